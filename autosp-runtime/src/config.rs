//! `config.json`: what a Hugging Face model folder says about its model. The reader is [`autosp_plan::config`], which the command line
//! shares.

pub use autosp_plan::config::{ConfigError, Float, ModelConfig, Rope};
use candle_core::DType;

use crate::Error;

/// candle's name of a type of weights.
pub fn dtype(float: Float) -> DType {
    match float {
        Float::F64 => DType::F64,
        Float::F32 => DType::F32,
        Float::BF16 => DType::BF16,
        Float::F16 => DType::F16,
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        Self::new(error.code, error.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_code_and_message_and_types_their_size() {
        let error: Error = ModelConfig::open("no/such/config.json").unwrap_err().into();
        assert_eq!(error.code(), autosp_plan::codes::FILE_UNREADABLE);
        assert!(error.message().contains("no/such/config.json"), "{error}");
        for float in Float::ALL {
            assert_eq!(dtype(float).size_in_bytes(), float.bytes());
            assert_eq!(dtype(float).as_str(), float.name());
        }
    }
}
