//! Device addresses of tensors, and tensors without values.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor};
use cudarc::driver::{CudaStream, DevicePtr};

use super::failure::failure;
use crate::Result;

/// The device address of the first element of a tensor, valid for as long as the tensor lives.
///
/// # Errors
/// AS0411 for a tensor that is not on a GPU, or of a type that no kernel takes.
pub(crate) fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(failure(
            "device address",
            format_args!(
                "expected a tensor on a GPU, found {:?}",
                x.device().location()
            ),
        ));
    };
    let stream = storage.device.cuda_stream();
    let base = match &storage.slice {
        Slice::U8(slice) => start(slice, &stream),
        Slice::U32(slice) => start(slice, &stream),
        Slice::I64(slice) => start(slice, &stream),
        Slice::BF16(slice) => start(slice, &stream),
        Slice::F16(slice) => start(slice, &stream),
        Slice::F32(slice) => start(slice, &stream),
        Slice::F64(slice) => start(slice, &stream),
        _ => {
            return Err(failure(
                "device address",
                format_args!(
                    "expected a number type that kernels take, found {:?}",
                    x.dtype()
                ),
            ));
        }
    };
    Ok(base + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
}

/// With event tracking off the guard does nothing: the address is only read.
fn start<T>(slice: &cudarc::driver::CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// A contiguous tensor whose values are whatever was in memory.
///
/// # Errors
/// Candle's error when memory runs out.
pub(crate) fn unwritten(
    device: &CudaDevice,
    shape: impl Into<Shape>,
    dtype: DType,
) -> Result<Tensor> {
    let shape = shape.into();
    // SAFETY: every caller hands the tensor to a kernel that writes all of it before anything reads it.
    let storage = unsafe { device.alloc_uninit(&shape, dtype) }?;
    Ok(Tensor::from_storage(
        Storage::Cuda(storage),
        shape,
        BackpropOp::none(),
        false,
    ))
}

/// The CUDA device of a tensor.
///
/// # Errors
/// Candle's error for a tensor elsewhere.
pub(crate) fn device_of(x: &Tensor) -> Result<CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device.clone()),
        other => Err(failure(
            "a kernel",
            format_args!("expected a tensor on a GPU, found {:?}", other.location()),
        )),
    }
}
