//! What GPUs there are, and how fast their links to the host are.

use std::time::Instant;

use candle_core::Device;
use cudarc::driver::{CudaContext, sys};

use super::{Explain, versions};
use crate::Result;

/// Times that a copy is made.
const TIMES: u32 = 5;

/// Names of GPUs and what was found of them, and the versions of NVIDIA's libraries.
///
/// # Errors
/// AS0410 for a library that is too old, AS0411 if the driver refuses.
pub(crate) fn machine() -> Result<Vec<(String, String)>> {
    let mut lines = vec![("libraries".to_owned(), versions()?.to_string())];
    let count = CudaContext::device_count().explain("counting GPUs")? as usize;
    let mut devices = Vec::with_capacity(count);
    for ordinal in 0..count {
        let context = CudaContext::new(ordinal).explain("opening a GPU")?;
        let name = context.name().explain("the name of a GPU")?;
        let memory = context.total_mem().explain("the memory of a GPU")?;
        let memory = autosp_plan::units::show_size(memory as u64);
        lines.push((format!("GPU {ordinal}"), format!("{name}, {memory}")));
        devices.push(context.cu_device());
    }
    for (a, &first) in devices.iter().enumerate() {
        for (b, &second) in devices.iter().enumerate().skip(a + 1) {
            let mut direct = 0;
            // SAFETY: the call writes one integer; both devices are open.
            unsafe { sys::cuDeviceCanAccessPeer(&raw mut direct, first, second) }
                .result()
                .explain("the link between two GPUs")?;
            let how = if direct == 1 {
                "direct"
            } else {
                "through the host"
            };
            lines.push((format!("GPU {a} to GPU {b}"), how.to_owned()));
        }
    }
    Ok(lines)
}

/// Bytes a second from pinned host memory to the device or back, whichever is slower.
///
/// # Errors
/// AS0411 if memory runs out or the driver refuses.
pub(crate) fn host_link(device: &Device, bytes: usize) -> Result<f64> {
    let what = "copies between host and device";
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context().clone();
    // SAFETY: the bytes are only copied, never looked at.
    let (mut host, mut there) = unsafe {
        let host = context
            .alloc_pinned_with_flags::<u8>(bytes, 0)
            .explain(what)?;
        (host, stream.alloc::<u8>(bytes).explain(what)?)
    };
    let mut slowest = f64::INFINITY;
    for up in [true, false] {
        let mut best = f64::INFINITY;
        for _ in 0..=TIMES {
            stream.synchronize().explain(what)?;
            let begin = Instant::now();
            if up {
                stream.memcpy_htod(&host, &mut there).explain(what)?;
            } else {
                stream.memcpy_dtoh(&there, &mut host).explain(what)?;
            }
            stream.synchronize().explain(what)?;
            best = best.min(begin.elapsed().as_secs_f64());
        }
        slowest = slowest.min(bytes as f64 / best.max(1e-9));
    }
    Ok(slowest)
}
