//! Which libraries are there, asked once before anything runs on a GPU.

use std::fmt;

use autosp_plan::codes;
use cudarc::{cublas, cudnn, driver, nccl};

use super::failure::Explain;
use crate::{Error, Result};

/// The versions of NVIDIA's libraries, as they number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Versions {
    /// CUDA version that the driver supports: 13000 is 13.0.
    pub driver: i32,
    /// cuBLAS: 130100 is 13.1.0.
    pub cublas: i32,
    /// cuDNN: 91400 is 9.14.0.
    pub cudnn: usize,
    /// NCCL: 22803 is 2.28.3.
    pub nccl: i32,
}

/// The oldest driver that runs the kernels this was built with (CUDA 13.0, driver 580).
const DRIVER: i32 = 13_000;
/// The oldest cuBLAS of that CUDA version.
const CUBLAS: i32 = 130_000;
/// The oldest cuDNN whose attention graphs were tried.
const CUDNN: usize = 90_600;
/// The oldest NCCL whose interface is used.
const NCCL: i32 = 21_800;

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let three =
            |v: i32, high: i32, low: i32| format!("{}.{}.{}", v / high, v % high / low, v % low);
        write!(
            f,
            "driver for CUDA {}.{}, cuBLAS {}, cuDNN {}, NCCL {}",
            self.driver / 1000,
            self.driver % 1000 / 10,
            three(self.cublas, 10_000, 100),
            three(self.cudnn as i32, 10_000, 100),
            three(self.nccl, 10_000, 100),
        )
    }
}

impl Versions {
    /// # Errors
    /// AS0410 with one line that says what to install if a library is older than what this was built for.
    fn check(self) -> Result<Self> {
        let old = |what: &str, needs: &str, help: &str| {
            Error::new(
                codes::CUDA_LIBRARY,
                format!("expected {what} {needs} or newer, found {self}"),
            )
            .with_help(help)
        };
        if self.driver < DRIVER {
            return Err(old(
                "a driver for CUDA",
                "13.0",
                "install NVIDIA driver 580 or newer",
            ));
        }
        if self.cublas < CUBLAS {
            return Err(old("cuBLAS", "13.0", "pip install 'nvidia-cublas>=13'"));
        }
        if self.cudnn < CUDNN {
            return Err(old("cuDNN", "9.6", "pip install nvidia-cudnn-cu13"));
        }
        if self.nccl < NCCL {
            return Err(old("NCCL", "2.18", "pip install nvidia-nccl-cu13"));
        }
        Ok(self)
    }
}

/// The versions of the libraries that this program has loaded.
///
/// # Errors
/// AS0410 if one is too old, AS0411 if one cannot be asked.
pub fn versions() -> Result<Versions> {
    use cublas::sys::libraryPropertyType as Part;
    let mut driver = 0;
    // SAFETY: the function writes one integer, and needs no context.
    unsafe { driver::sys::cuDriverGetVersion(&raw mut driver) }
        .result()
        .explain("version of the driver")?;
    let property = |kind| {
        let mut value = 0;
        // SAFETY: the function writes one integer, and needs no handle.
        unsafe { cublas::sys::cublasGetProperty(kind, &raw mut value) };
        value
    };
    let cublas = property(Part::MAJOR_VERSION) * 10_000
        + property(Part::MINOR_VERSION) * 100
        + property(Part::PATCH_LEVEL);
    let nccl = nccl::result::get_nccl_version().explain("version of NCCL")?;
    Versions {
        driver,
        cublas,
        cudnn: cudnn::result::get_version(),
        nccl,
    }
    .check()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_library_is_named_with_what_to_install() {
        let good = Versions {
            driver: 13_000,
            cublas: 130_100,
            cudnn: 91_400,
            nccl: 22_803,
        };
        assert_eq!(
            good.to_string(),
            "driver for CUDA 13.0, cuBLAS 13.1.0, cuDNN 9.14.0, NCCL 2.28.3"
        );
        assert_eq!(good.check().unwrap(), good);
        let error = Versions {
            cudnn: 90_100,
            ..good
        }
        .check()
        .unwrap_err();
        assert_eq!(error.code(), codes::CUDA_LIBRARY);
        assert!(
            error
                .to_string()
                .contains("found driver for CUDA 13.0, cuBLAS 13.1.0, cuDNN 9.1.0"),
            "{error}"
        );
        assert_eq!(error.help(), Some("pip install nvidia-cudnn-cu13"));
        for old in [
            Versions {
                driver: 12_080,
                ..good
            },
            Versions {
                cublas: 120_900,
                ..good
            },
            Versions {
                nccl: 21_703,
                ..good
            },
        ] {
            assert_eq!(old.check().unwrap_err().code(), codes::CUDA_LIBRARY);
        }
    }
}
