//! Copies between a GPU and its host, on streams beside the compute stream.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaStorageSlice as Slice;
use candle_core::{CudaDevice, CudaStorage, DType, Shape, Storage, Tensor};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DevicePtr, result};

use super::failure::{Explain, failure};
use crate::Result;
use crate::memory::link::{Extent, Link, Mark, Memory};

/// Two streams, one each way.
pub(crate) struct Streams {
    device: CudaDevice,
    compute: Arc<CudaStream>,
    down: Arc<CudaStream>,
    up: Arc<CudaStream>,
}

impl Streams {
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let compute = device.cuda_stream();
        let stream = || {
            let stream = compute.context().new_stream();
            stream.explain("a stream for copies to the host")
        };
        Ok(Self {
            device: device.clone(),
            down: stream()?,
            up: stream()?,
            compute,
        })
    }
}

/// Page-locked memory that the processor caches: cudarc's own is write-combined, which is slow to read.
struct Pinned {
    context: Arc<CudaContext>,
    streams: [Arc<CudaStream>; 2],
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is this value's alone; the pointer is used through `&mut` and when it is freed.
unsafe impl Send for Pinned {}

impl Memory for Pinned {
    fn bytes(&mut self) -> &mut [u8] {
        if self.bytes == 0 {
            return &mut [];
        }
        // SAFETY: the driver gave so many bytes at this address, all of them written since, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.bytes == 0 || self.context.bind_to_thread().is_err() {
            return;
        }
        for stream in &self.streams {
            // A stream that has failed copies no more.
            let _ = stream.synchronize();
        }
        // SAFETY: the address came from `malloc_host`, and no copy is under way on either stream.
        let _ = unsafe { result::free_host(self.start.cast::<c_void>()) };
    }
}

/// Type and elements of a storage; `None` for types that blocks do not keep.
pub(crate) fn extent(storage: &CudaStorage) -> Option<(DType, usize)> {
    match &storage.slice {
        Slice::BF16(slice) => Some((DType::BF16, slice.len())),
        Slice::F16(slice) => Some((DType::F16, slice.len())),
        Slice::F32(slice) => Some((DType::F32, slice.len())),
        Slice::F64(slice) => Some((DType::F64, slice.len())),
        _ => None,
    }
}

/// The device address of a storage's first element.
fn start(storage: &CudaStorage, stream: &CudaStream) -> Result<u64> {
    match &storage.slice {
        Slice::BF16(slice) => Ok(slice.device_ptr(stream).0),
        Slice::F16(slice) => Ok(slice.device_ptr(stream).0),
        Slice::F32(slice) => Ok(slice.device_ptr(stream).0),
        Slice::F64(slice) => Ok(slice.device_ptr(stream).0),
        _ => Err(failure(
            "what a block keeps on the host",
            "expected floating point numbers",
        )),
    }
}

fn event(mark: &Mark) -> Option<&CudaEvent> {
    mark.as_ref()?.downcast_ref::<CudaEvent>()
}

impl Link for Streams {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Memory>> {
        let context = Arc::clone(self.compute.context());
        context.bind_to_thread().explain("memory of the host")?;
        let start = if bytes == 0 {
            std::ptr::null_mut()
        } else {
            // SAFETY: the context is bound; flags 0 are plain page-locked memory.
            let found = unsafe { result::malloc_host(bytes, 0) };
            let start = found
                .explain(format_args!(
                    "{bytes} bytes of page-locked memory for what blocks keep"
                ))?
                .cast::<u8>();
            // SAFETY: so many bytes are there, and references may only be made to what was written.
            unsafe { std::ptr::write_bytes(start, 0, bytes) };
            start
        };
        Ok(Box::new(Pinned {
            context,
            streams: [Arc::clone(&self.down), Arc::clone(&self.up)],
            start,
            bytes,
        }))
    }

    fn save(&self, from: &[Tensor], mut to: &mut [u8]) -> Result<Mark> {
        let what = "copying to the host what a block keeps";
        self.down.join(&self.compute).explain(what)?;
        // The memory may be one that is still read for an earlier load.
        self.down.join(&self.up).explain(what)?;
        for x in from {
            let (storage, _) = x.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                return Err(failure(what, "expected a tensor on a GPU"));
            };
            let bytes = extent(storage).map_or(0, |(dtype, n)| n * dtype.size_in_bytes());
            let (part, rest) = to.split_at_mut(bytes);
            to = rest;
            if bytes > 0 {
                let source = start(storage, &self.compute)?;
                // SAFETY: the source has so many bytes and the shelf keeps it until the mark was joined; the destination is page-locked
                // memory that outlives the copy: it is freed after its streams were waited for.
                unsafe { result::memcpy_dtoh_async(part, source, self.down.cu_stream()) }
                    .explain(what)?;
            }
        }
        let done = self.down.record_event(None).explain(what)?;
        Ok(Some(Arc::new(done)))
    }

    fn load(
        &self,
        mut from: &[u8],
        extents: &[Extent],
        saved: &Mark,
    ) -> Result<(Vec<Storage>, Mark)> {
        let what = "copying back from the host what a block keeps";
        let mut storages = Vec::with_capacity(extents.len());
        for extent in extents {
            let shape = Shape::from(extent.elements);
            // SAFETY: all of it is copied to before the mark, which readers join.
            storages.push(unsafe { self.device.alloc_uninit(&shape, extent.dtype) }?);
        }
        // Memory of the pool is free in the order of the compute stream.
        self.up.join(&self.compute).explain(what)?;
        if let Some(saved) = event(saved) {
            self.up.wait(saved).explain(what)?;
        }
        for (storage, extent) in storages.iter().zip(extents) {
            let (part, rest) = from.split_at(extent.bytes());
            from = rest;
            if !part.is_empty() {
                let target = start(storage, &self.compute)?;
                // SAFETY: the target has so many bytes, which nothing else uses before the mark; the source is page-locked memory that
                // outlives the copy.
                unsafe { result::memcpy_htod_async(target, part, self.up.cu_stream()) }
                    .explain(what)?;
            }
        }
        let done = self.up.record_event(None).explain(what)?;
        let storages = storages.into_iter().map(Storage::Cuda).collect();
        Ok((storages, Some(Arc::new(done))))
    }

    fn join(&self, mark: &Mark) -> Result<()> {
        match event(mark) {
            Some(done) => self
                .compute
                .wait(done)
                .explain("waiting for what a block keeps on the host"),
            None => Ok(()),
        }
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        match event(mark) {
            Some(done) => done
                .synchronize()
                .explain("waiting on the host for a copy from the device"),
            None => Ok(()),
        }
    }
}
