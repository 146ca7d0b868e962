//! The CUDA kernels of [`autosp_templates::kernels`], compiled for the processor.
//!
//! The text is that which NVRTC compiles. A header stands for CUDA: the threads of a block change at barriers and shuffles alone, in an
//! order drawn from a seed, so that a kernel whose threads wait at different barriers or whose result depends on their order is found;
//! what is out of alignment ends the program. [`Buffer`] has guards on both sides.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

use autosp_templates::kernels::Element;
use half::{bf16, f16};

/// Threads of a block, as the runtime launches kernels.
pub const THREADS: usize = 256;

/// Bytes on each side of a buffer that no kernel may touch.
const GUARD: usize = 256;

/// What guards hold: not a number in any of the types.
const UNTOUCHED: u8 = 0xff;

/// Device memory, on the host.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// In units of 16 bytes, so that it begins as an allocation of a GPU does.
    memory: Vec<u128>,
    bytes: usize,
}

impl Buffer {
    /// So many bytes that hold no number.
    pub fn unwritten(bytes: usize) -> Self {
        let units = (bytes + 2 * GUARD).div_ceil(16);
        Self {
            memory: vec![u128::from_ne_bytes([UNTOUCHED; 16]); units],
            bytes,
        }
    }

    /// These bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut buffer = Self::unwritten(bytes.len());
        buffer.all()[GUARD..GUARD + bytes.len()].copy_from_slice(bytes);
        buffer
    }

    /// These numbers, rounded to elements.
    pub fn of_elements(element: Element, numbers: &[f64]) -> Self {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|&x| match element {
                Element::Bf16 => bf16::from_f64(x).to_le_bytes().to_vec(),
                Element::F16 => f16::from_f64(x).to_le_bytes().to_vec(),
                Element::F32 => (x as f32).to_le_bytes().to_vec(),
            })
            .collect();
        Self::of(&bytes)
    }

    /// The elements.
    pub fn elements(&mut self, element: Element) -> Vec<f64> {
        let bytes = self.bytes().chunks_exact(element.bytes());
        bytes
            .map(|x| match (element, x) {
                (Element::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).into(),
                (Element::F16, &[a, b]) => f16::from_le_bytes([a, b]).into(),
                (Element::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
                _ => f64::NAN,
            })
            .collect()
    }

    /// The content.
    pub fn bytes(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        &mut self.all()[GUARD..GUARD + bytes]
    }

    fn all(&mut self) -> &mut [u8] {
        let (address, len) = (
            self.memory.as_mut_ptr().cast::<u8>(),
            self.memory.len() * 16,
        );
        // SAFETY: the memory of the vector, borrowed as long as the slice, as bytes, which have no invalid values.
        unsafe { std::slice::from_raw_parts_mut(address, len) }
    }

    /// Whether nothing outside of the content was written.
    fn is_guarded(&mut self) -> bool {
        let bytes = self.bytes;
        let all = self.all();
        let rest = all[..GUARD].iter().chain(&all[GUARD + bytes..]);
        rest.copied().all(|byte| byte == UNTOUCHED)
    }
}

/// An argument of a kernel.
#[derive(Debug)]
pub enum Argument<'a> {
    /// The address of a buffer.
    Memory(&'a mut Buffer),
    /// No address.
    Nothing,
    /// The same buffer as the argument of this number.
    Same(usize),
    /// A 64-bit number.
    Long(i64),
    /// A 32-bit number.
    Int(i32),
    /// A number in single precision.
    Float(f32),
    /// A structure of 64-bit numbers.
    Longs(Vec<i64>),
}

/// Launches kernel `name` of the module that [`autosp_templates::kernels::all`] calls `module`.
///
/// # Panics
/// If there is no such kernel, or it has written beside its buffers.
pub fn launch(module: &str, name: &str, blocks: usize, seed: u64, arguments: &mut [Argument]) {
    let run = MODULES.iter().find(|(known, _)| *known == module);
    let (_, run) = run.unwrap_or_else(|| panic!("no module {module}"));
    let mut addresses: Vec<*mut c_void> = arguments
        .iter_mut()
        .map(|argument| match argument {
            Argument::Memory(buffer) => buffer.bytes().as_mut_ptr().cast(),
            _ => std::ptr::null_mut(),
        })
        .collect();
    for (i, argument) in arguments.iter().enumerate() {
        if let Argument::Same(other) = argument {
            addresses[i] = addresses[*other];
        }
    }
    // Each argument by its address, as a driver takes it.
    let mut pointers: Vec<*mut c_void> = Vec::with_capacity(arguments.len());
    for (argument, address) in arguments.iter_mut().zip(&mut addresses) {
        pointers.push(match argument {
            Argument::Memory(_) | Argument::Same(_) | Argument::Nothing => {
                std::ptr::from_mut(address).cast()
            }
            Argument::Long(x) => std::ptr::from_mut(x).cast(),
            Argument::Int(x) => std::ptr::from_mut(x).cast(),
            Argument::Float(x) => std::ptr::from_mut(x).cast(),
            Argument::Longs(all) => all.as_mut_ptr().cast(),
        });
    }
    let text = CString::new(name).unwrap_or_default();
    // SAFETY: the function reads as many arguments as the kernel declares, which is what each test passes; buffers outlive the call.
    let known = unsafe {
        run(
            text.as_ptr(),
            blocks as c_uint,
            THREADS as c_uint,
            seed,
            pointers.as_mut_ptr(),
        )
    };
    assert_eq!(known, 1, "no kernel {name} in {module}");
    for (i, argument) in arguments.iter_mut().enumerate() {
        if let Argument::Memory(buffer) = argument {
            assert!(
                buffer.is_guarded(),
                "{name} has written beside argument {i}"
            );
        }
    }
}

type Run = unsafe extern "C" fn(*const c_char, c_uint, c_uint, u64, *mut *mut c_void) -> c_int;

macro_rules! modules {
    ($($symbol:ident $name:literal)*) => {
        #[cfg(not(no_compiler))]
        mod symbols {
            use super::*;
            unsafe extern "C" {
                $(pub(super) fn $symbol(name: *const c_char, blocks: c_uint, threads: c_uint, seed: u64, arguments: *mut *mut c_void) -> c_int;)*
            }
        }

        /// The modules by their names.
        #[cfg(not(no_compiler))]
        const MODULES: &[(&str, Run)] = &[$(($name, symbols::$symbol)),*];
        #[cfg(no_compiler)]
        const MODULES: &[(&str, Run)] = &[];
    };
}

include!(concat!(env!("OUT_DIR"), "/modules.rs"));
