//! CUDA GPUs: everything that speaks to NVIDIA's libraries, behind the feature `cuda`.
//!
//! One rank has one GPU, one compute stream (candle's) and one communication stream. Streams are ordered by events of our own: cudarc's
//! tracking is off, so that a kernel argument costs no event. What the communication stream reads or writes is owned by the
//! [engine](nccl) until the compute stream has been told to wait for it, because memory goes back to the pool in the order of the
//! compute stream.
//!
//! Foreign functions are called here and nowhere else. Their errors name the operation and what the library said.

pub(crate) mod attention;
mod cudnn;
mod device;
pub(crate) mod doctor;
mod elementwise;
mod failure;
pub(crate) mod gemm;
mod kernels;
mod library;
mod memory;
pub(crate) mod nccl;
mod nvrtc;
pub(crate) mod offload;
pub(crate) mod ops;
#[doc(hidden)]
pub mod probe;
mod watch;

pub(crate) use device::{Gpu, open, total_memory};
pub use device::{Memory, memory};
pub(crate) use failure::Explain;
pub use library::{Versions, versions};
pub(crate) use memory::{address, device_of, unwritten};
pub(crate) use watch::Watch;
