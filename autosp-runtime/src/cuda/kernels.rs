//! Our kernels: compiled by NVRTC for the GPU at hand when they are first used, kept for the process, and [on disk](crate::kernel_cache).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use autosp_templates::kernels::{Copy, Element, Rows};
use candle_core::{CudaDevice, DType, Tensor};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, LaunchArgs, LaunchConfig,
    PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use super::failure::{Explain, failure};
use super::nvrtc;
use crate::Result;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// Blocks that fill a GPU of any size with kernels that loop.
pub(super) const MANY: u32 = 132 * 8;

/// A module of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Module {
    Rows(Rows),
    Copy(Copy),
}

impl Module {
    fn source(self) -> String {
        match self {
            Self::Rows(rows) => rows.to_string(),
            Self::Copy(copy) => copy.to_string(),
        }
    }
}

/// The element type of a tensor that kernels take.
pub(super) fn element(dtype: DType) -> Option<Element> {
    match dtype {
        DType::BF16 => Some(Element::Bf16),
        DType::F16 => Some(Element::F16),
        DType::F32 => Some(Element::F32),
        _ => None,
    }
}

/// The module for rows of `width` elements, all of which begin at a multiple of `width` from an aligned address.
pub(super) fn rows(element: Element, width: usize) -> Rows {
    let pack = if width.is_multiple_of(element.widest()) {
        element.widest()
    } else {
        1
    };
    let steps = width.div_ceil(pack * THREADS as usize);
    Rows {
        element,
        pack,
        steps: steps.next_power_of_two(),
    }
}

/// Rows that one thread cannot hold are left to candle.
pub(super) const MOST_STEPS: usize = 8;

/// A kernel on the stream of a device.
pub(super) struct Function {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

/// Modules that were loaded, by GPU.
type Loaded = HashMap<(usize, Module), Arc<CudaModule>>;

/// Kernel `name` of a module on `device`.
///
/// # Errors
/// AS0411 with the compiler's words if the source does not compile.
pub(super) fn function(device: &CudaDevice, module: Module, name: &str) -> Result<Function> {
    static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);
    let stream = device.cuda_stream();
    let context = stream.context();
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_with(HashMap::new);
    let key = (context.ordinal(), module);
    let found = if let Some(found) = loaded.get(&key) {
        Arc::clone(found)
    } else {
        let made = load(context, &module.source())?;
        loaded.insert(key, Arc::clone(&made));
        made
    };
    let function = found
        .load_function(name)
        .explain(format_args!("kernel `{name}`"))?;
    Ok(Function { function, stream })
}

/// Loads the module of a source, compiled for the GPU; one from the cache that the driver does not take is compiled anew.
fn load(context: &Arc<CudaContext>, source: &str) -> Result<Arc<CudaModule>> {
    let load = |cubin| context.load_module(Ptx::from_binary(cubin));
    let compiled = nvrtc::module(context, source, false)?;
    match load(compiled.cubin) {
        Err(error) if compiled.kept => {
            tracing::warn!(%error, "kept kernels do not load and are compiled again");
            load(nvrtc::module(context, source, true)?.cubin)
        }
        loaded => loaded,
    }
    .explain("loading kernels")
}

/// A launch: a kernel and its arguments.
pub(super) struct Launch<'a> {
    args: LaunchArgs<'a>,
}

impl<'a> Launch<'a> {
    pub(super) fn new(function: &'a Function) -> Self {
        Self {
            args: function.stream.launch_builder(&function.function),
        }
    }

    /// The next argument: an address, a number or a plain structure, of the type that the kernel declares.
    pub(super) fn with<T: DeviceRepr>(mut self, x: &'a T) -> Self {
        self.args.arg(x);
        self
    }

    /// Puts the kernel on its stream.
    ///
    /// # Errors
    /// AS0411 if the driver refuses.
    pub(super) fn run(mut self, blocks: usize, what: &str) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let blocks =
            u32::try_from(blocks).map_err(|_| failure(what, "expected at most 2^32 blocks"))?;
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the callers pass what the kernel of that name declares, with tensors of the sizes that they pass; the tensors are
        // used in the order of the stream that they are freed on.
        unsafe { self.args.launch(config) }.explain(what).map(drop)
    }
}

/// Blocks of a kernel that loops over `items` with `each` items a thread.
pub(super) fn looping(items: usize, each: usize) -> usize {
    items.div_ceil(each * THREADS as usize).min(MANY as usize)
}

/// Whether kernels can read a tensor's memory from its begin, `pack` elements at a time.
pub(super) fn aligned(x: &Tensor, pack: usize) -> bool {
    x.layout().start_offset().is_multiple_of(pack)
}
