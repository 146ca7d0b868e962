//! Copies between the memory of a device and that of its host.

use std::any::Any;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use crate::Result;

/// Memory of the host that copies go to and come from.
pub(crate) trait Memory: Send {
    /// All of it.
    fn bytes(&mut self) -> &mut [u8];
}

impl Memory for Vec<u8> {
    fn bytes(&mut self) -> &mut [u8] {
        self
    }
}

/// A point up to which copies have come. The device knows what it is; copies of the processor are there at once.
pub(crate) type Mark = Option<Arc<dyn Any + Send + Sync>>;

/// The values of a whole storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) dtype: DType,
    pub(crate) elements: usize,
}

impl Extent {
    /// Of a tensor's storage, whatever part of it the tensor sees; `None` for types that are not copied.
    pub(crate) fn of(x: &Tensor) -> Option<Self> {
        let (storage, _) = x.storage_and_layout();
        let (dtype, elements) = match &*storage {
            Storage::Cpu(CpuStorage::F32(data)) => (DType::F32, data.len()),
            Storage::Cpu(CpuStorage::F64(data)) => (DType::F64, data.len()),
            Storage::Cpu(CpuStorage::BF16(data)) => (DType::BF16, data.len()),
            Storage::Cpu(CpuStorage::F16(data)) => (DType::F16, data.len()),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => crate::cuda::offload::extent(storage)?,
            _ => return None,
        };
        Some(Self { dtype, elements })
    }

    pub(crate) fn bytes(self) -> usize {
        self.elements * self.dtype.size_in_bytes()
    }
}

/// What copies. A copy begins when what the device was told to compute by then is done, and runs beside what it is told afterwards:
/// nothing waits for it before [`join`](Self::join). Until the mark of a copy was joined, the memory that it reads or writes is to be left
/// alone on both sides.
pub(crate) trait Link: Send + Sync {
    /// Memory of the host.
    ///
    /// # Errors
    /// When there is none.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Memory>>;

    /// Begins to copy whole storages of tensors to `to`, one after the other. What was loaded from there before has been read by then.
    ///
    /// # Errors
    /// Those of the device.
    fn save(&self, from: &[Tensor], to: &mut [u8]) -> Result<Mark>;

    /// Begins to copy back, to new memory. What was saved there by `saved` has been written by then.
    ///
    /// # Errors
    /// Those of the device, which may have no memory left.
    fn load(&self, from: &[u8], extents: &[Extent], saved: &Mark) -> Result<(Vec<Storage>, Mark)>;

    /// Lets what is computed from now on wait for `mark`.
    ///
    /// # Errors
    /// Those of the device.
    fn join(&self, mark: &Mark) -> Result<()>;

    /// Waits on the host until the copies have come to `mark`, so that the processor may use the memory.
    ///
    /// # Errors
    /// Those of the device.
    fn wait(&self, mark: &Mark) -> Result<()>;
}

/// The link of a device.
///
/// # Errors
/// When the device has no streams left; AS0311 for a device that there is no link to.
pub(crate) fn link_to(device: &Device) -> Result<Box<dyn Link>> {
    match device {
        Device::Cpu => Ok(Box::new(Plain)),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Box::new(crate::cuda::offload::Streams::new(device)?)),
        other => Err(candle_core::Error::Msg(format!(
            "what blocks keep goes to the host from the cpu and from CUDA, not from {:?}",
            other.location()
        ))
        .into()),
    }
}

/// The processor, whose memory is copied within itself.
pub(crate) struct Plain;

/// Numbers that are nothing but their bytes.
trait Number: Copy {}

impl Number for f32 {}
impl Number for f64 {}
impl Number for bf16 {}
impl Number for f16 {}

fn write<T: Number>(from: &[T], to: &mut [u8]) {
    // SAFETY: numbers have no bytes that are not values, and any alignment does for bytes.
    let bytes =
        unsafe { std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), size_of_val(from)) };
    to.copy_from_slice(bytes);
}

fn read<T: Number>(from: &[u8], elements: usize) -> Vec<T> {
    assert_eq!(from.len(), elements * size_of::<T>());
    let mut numbers: Vec<T> = Vec::with_capacity(elements);
    // SAFETY: the vector has room for all elements, any bytes are numbers, and all of them are written before the length says so.
    unsafe {
        let to = numbers.as_mut_ptr().cast::<u8>();
        std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        numbers.set_len(elements);
    }
    numbers
}

impl Link for Plain {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Memory>> {
        Ok(Box::new(vec![0; bytes]))
    }

    fn save(&self, from: &[Tensor], mut to: &mut [u8]) -> Result<Mark> {
        for x in from {
            let Some(extent) = Extent::of(x) else {
                continue;
            };
            let (part, rest) = to.split_at_mut(extent.bytes());
            let (storage, _) = x.storage_and_layout();
            match &*storage {
                Storage::Cpu(CpuStorage::F32(data)) => write(data, part),
                Storage::Cpu(CpuStorage::F64(data)) => write(data, part),
                Storage::Cpu(CpuStorage::BF16(data)) => write(data, part),
                Storage::Cpu(CpuStorage::F16(data)) => write(data, part),
                _ => {}
            }
            to = rest;
        }
        Ok(None)
    }

    fn load(&self, mut from: &[u8], extents: &[Extent], _: &Mark) -> Result<(Vec<Storage>, Mark)> {
        let mut storages = Vec::with_capacity(extents.len());
        for extent in extents {
            let (part, rest) = from.split_at(extent.bytes());
            let storage = match extent.dtype {
                DType::F64 => CpuStorage::F64(read(part, extent.elements)),
                DType::BF16 => CpuStorage::BF16(read(part, extent.elements)),
                DType::F16 => CpuStorage::F16(read(part, extent.elements)),
                // An extent is of one of four types.
                _ => CpuStorage::F32(read(part, extent.elements)),
            };
            storages.push(Storage::Cpu(storage));
            from = rest;
        }
        Ok((storages, None))
    }

    fn join(&self, _: &Mark) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: &Mark) -> Result<()> {
        Ok(())
    }
}
