//! Errors of NVIDIA's libraries: which operation, and what the library said.

use std::fmt;

use autosp_plan::codes;
use cudarc::cudnn::CudnnError;
use cudarc::driver::DriverError;
use cudarc::nccl::result::NcclError;

use crate::{Error, Result};

/// Turns a library's status into an error that says what was being done.
pub(crate) trait Explain<T> {
    /// `operation: library: message`; `operation` names the rank and the bytes where there are any.
    fn explain(self, operation: impl fmt::Display) -> Result<T>;
}

pub(super) fn failure(operation: impl fmt::Display, message: impl fmt::Display) -> Error {
    Error::new(codes::CUDA, format!("{operation}: {message}"))
}

impl<T> Explain<T> for std::result::Result<T, DriverError> {
    fn explain(self, operation: impl fmt::Display) -> Result<T> {
        self.map_err(|error| failure(operation, format_args!("CUDA: {error}")))
    }
}

impl<T> Explain<T> for std::result::Result<T, CudnnError> {
    fn explain(self, operation: impl fmt::Display) -> Result<T> {
        self.map_err(|error| failure(operation, format_args!("cuDNN: {error}")))
    }
}

impl<T> Explain<T> for std::result::Result<T, NcclError> {
    fn explain(self, operation: impl fmt::Display) -> Result<T> {
        self.map_err(|error| failure(operation, format_args!("NCCL: {:?}", error.0)))
    }
}
