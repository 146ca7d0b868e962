//! `candle_nn::rotary_emb` with a backward everywhere.

use candle_core::{Result, Tensor};

pub use candle_nn::rotary_emb::*;

/// Rotates the halves of the last dimension; `xs` is `[b, h, s, d]`, the tables are `[s, d / 2]`.
///
/// # Errors
/// When a candle operation fails.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    candle_nn::rotary_emb::rope_slow(xs, cos, sin)
}

/// Rotates neighbouring pairs of the last dimension; `xs` is `[b, h, s, d]`, the tables are `[s, d / 2]`.
///
/// # Errors
/// When a candle operation fails.
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    candle_nn::rotary_emb::rope_i_slow(xs, cos, sin)
}

/// Rotates the halves of the last dimension; `xs` is `[b, s, h, d]`, the tables are `[s, d / 2]`.
///
/// # Errors
/// When a candle operation fails.
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rope(&xs.transpose(1, 2)?, cos, sin)?
        .transpose(1, 2)?
        .contiguous()
}
