//! `candle_nn::ops` with a backward everywhere.

use candle_core::{D, Result, Tensor};

pub use candle_nn::ops::*;

/// Softmax over the last dimension; the shape stays.
///
/// # Errors
/// When a candle operation fails.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    candle_nn::ops::softmax(xs, D::Minus1)
}

/// `x / rms(x) * alpha` over the last dimension.
///
/// # Errors
/// When a candle operation fails.
pub fn rms_norm(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    candle_nn::ops::rms_norm_slow(xs, alpha, eps)
}

/// `(x - mean) / std * alpha + beta` over the last dimension.
///
/// # Errors
/// When a candle operation fails.
pub fn layer_norm(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    candle_nn::ops::layer_norm_slow(xs, alpha, beta, eps)
}
