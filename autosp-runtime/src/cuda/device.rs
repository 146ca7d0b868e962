//! One rank's GPU: candle's device on a stream of its own, and a stream beside it for communication.

use std::sync::Arc;

use candle_core::{CudaDevice, Device};
use cudarc::driver::{CudaContext, CudaStream, sys};

use super::failure::{Explain, failure};
use crate::Result;

/// One rank's GPU.
#[derive(Debug, Clone)]
pub(crate) struct Gpu {
    pub(crate) device: CudaDevice,
    /// The stream that candle's kernels and ours run on.
    pub(crate) compute: Arc<CudaStream>,
    /// The stream of collectives; its kernels go first where both have work.
    pub(crate) side: Arc<CudaStream>,
}

/// Opens GPU `ordinal`: versions checked, cudarc's event tracking off, memory kept by the pool.
///
/// # Errors
/// AS0410 for a library that is too old, AS0411 if there is no such GPU or it refuses.
pub(crate) fn open(ordinal: usize) -> Result<(Device, Gpu)> {
    super::library::versions()?;
    let count = CudaContext::device_count().explain("counting GPUs")?;
    if ordinal >= count as usize {
        return Err(failure(
            "opening a GPU",
            format_args!("expected a GPU below {count} (one a rank), found {ordinal}"),
        )
        .with_help(
            "set sp x dp to the number of GPUs, or AUTOSP_DEVICE=cuda-shared to try ranks on one",
        ));
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?.clone();
    // SAFETY: all tensors are used on the compute stream alone, but for what `comm::nccl` sends and receives, which it orders with
    // events of its own and owns until the compute stream waits for them.
    unsafe { cuda.disable_event_tracking() };
    let compute = cuda.cuda_stream();
    let context = compute.context().clone();
    keep_memory(&context)?;
    let side = context
        .new_stream_with_priority(highest_priority())
        .explain("a stream for communication")?;
    Ok((
        device,
        Gpu {
            device: cuda,
            compute,
            side,
        },
    ))
}

fn highest_priority() -> i32 {
    let (mut least, mut greatest) = (0, 0);
    // SAFETY: the function writes two integers of the current context, which the caller has bound.
    unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) };
    greatest
}

fn pool(context: &CudaContext) -> Result<sys::CUmemoryPool> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: the function writes one pointer; the device is one that was opened.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) }
        .result()
        .explain("the memory pool")?;
    Ok(pool)
}

/// Freed memory stays with the pool: by default every synchronisation gives it back to the driver.
fn keep_memory(context: &CudaContext) -> Result<()> {
    let mut most = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a 64-bit number.
    unsafe { sys::cuMemPoolSetAttribute(pool(context)?, attribute, (&raw mut most).cast()) }
        .result()
        .explain("keeping the pool's memory")
}

/// Device memory in bytes, of the pool that tensors come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// In use now.
    pub used: u64,
    /// Most in use since [`memory`] was last asked to begin again.
    pub peak: u64,
}

/// Device memory of a CUDA device; `begin_again` sets the high-water mark back to what is in use.
///
/// # Errors
/// AS0411 if the driver refuses; candle's error for another device.
pub fn memory(device: &Device, begin_again: bool) -> Result<Memory> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let pool = pool(stream.context())?;
    let read = |attribute| -> Result<u64> {
        let mut value = 0_u64;
        // SAFETY: the attributes read here are 64-bit numbers.
        unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) }
            .result()
            .explain("asking the memory pool")?;
        Ok(value)
    };
    let memory = Memory {
        used: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
    };
    if begin_again {
        let mut zero = 0_u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a 64-bit number, and 0 is the value that resets it.
        unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut zero).cast()) }
            .result()
            .explain("resetting the memory pool's mark")?;
    }
    Ok(memory)
}

/// All memory of a CUDA device, in bytes.
///
/// # Errors
/// AS0411 if the driver refuses; candle's error for another device.
pub(crate) fn total_memory(device: &Device) -> Result<u64> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let total = stream.context().total_mem();
    Ok(total.explain("asking for the device's memory")? as u64)
}
