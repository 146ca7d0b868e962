//! NVRTC: from the source of kernels to code for the GPU at hand.

use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::nvrtc::{result, sys};

use super::failure::{Explain, failure};
use crate::Result;
use crate::kernel_cache::{Cache, Key};

const WHAT: &str = "compiling kernels";
const STANDARD: &str = "--std=c++17";

/// A compiled module, and whether it comes from the cache.
pub(super) struct Compiled {
    pub(super) cubin: Vec<u8>,
    pub(super) kept: bool,
}

/// The module of a source for the GPU of a context: from the cache, unless `anew`, else compiled and kept.
///
/// # Errors
/// AS0411 with the compiler's words if the source does not compile.
pub(super) fn module(context: &Arc<CudaContext>, source: &str, anew: bool) -> Result<Compiled> {
    let (major, minor) = context
        .compute_capability()
        .explain("the GPU's architecture")?;
    let architecture = format!("sm_{major}{minor}");
    let compiler = format!("NVRTC {} {STANDARD}", version()?);
    let key = Key {
        source,
        architecture: &architecture,
        compiler: &compiler,
    };
    let cache = Cache::of_user();
    if let Some(cubin) = cache.get(key).filter(|_| !anew) {
        return Ok(Compiled { cubin, kept: true });
    }
    let cubin = compile(source, &architecture)?;
    if let Err(error) = cache.put(key, &cubin) {
        let variable = crate::kernel_cache::VARIABLE;
        tracing::warn!(%error, "compiled kernels cannot be kept; {variable} names another folder");
    }
    Ok(Compiled { cubin, kept: false })
}

fn version() -> Result<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are valid for one number each.
    let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    check(status)?;
    Ok(format!("{major}.{minor}"))
}

fn check(status: sys::nvrtcResult) -> Result<()> {
    status
        .result()
        .map_err(|error| failure(WHAT, format_args!("NVRTC: {:?}", error.0)))
}

/// A program of NVRTC, destroyed with this.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and nobody else has it. There is nothing to do about an error.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn compile(source: &str, architecture: &str) -> Result<Vec<u8>> {
    let text = CString::new(source)
        .map_err(|_| failure(WHAT, "expected a source without zero bytes, found one"))?;
    let program = result::create_program(&text, None)
        .map(Program)
        .map_err(|error| failure(WHAT, format_args!("NVRTC: {:?}", error.0)))?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        STANDARD.to_owned(),
    ];
    // SAFETY: the program is a valid one, as in all calls below.
    if let Err(error) = unsafe { result::compile_program(program.0, &options) } {
        return Err(failure(
            WHAT,
            format_args!("NVRTC: {:?}: {}", error.0, log(&program)),
        ));
    }
    let mut size = 0;
    // SAFETY: `size` is valid for one number.
    check(unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut size) })?;
    let mut cubin = vec![0_u8; size];
    // SAFETY: the vector has as many bytes as were asked for.
    check(unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast::<c_char>()) })?;
    Ok(cubin)
}

/// What the compiler said.
fn log(program: &Program) -> String {
    // SAFETY: the program is a valid one.
    let Ok(log) = (unsafe { result::get_program_log(program.0) }) else {
        return String::new();
    };
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::from_utf8_lossy(&bytes).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    )
}
