//! `candle_nn::attention` with a backward.

use candle_core::{Result, Tensor};

pub use candle_nn::attention::*;

/// Attention of `[b, s, h, d]` queries on `[b, s, g, d]` keys and values, to `[b, h, s, d]`.
///
/// # Errors
/// When a candle operation fails.
#[allow(clippy::needless_pass_by_value, reason = "the signature is candle's")]
pub fn flash_attn<T>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    _max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    let s = q.dim(1)?;
    let per_key = q.dim(2)? / k.dim(2)?;
    let heads: Vec<u32> = (0..q.dim(2)? as u32).map(|h| h / per_key as u32).collect();
    let heads = Tensor::new(heads, q.device())?;
    let of_query = |t: &Tensor| t.index_select(&heads, 2)?.transpose(1, 2)?.contiguous();
    let scores = q
        .transpose(1, 2)?
        .contiguous()?
        .matmul(&of_query(k)?.t()?)?
        .affine(f64::from(softmax_scale), 0.0)?;
    let scores = match softcap {
        Some(cap) => scores
            .affine(1.0 / f64::from(cap), 0.0)?
            .tanh()?
            .affine(f64::from(cap), 0.0)?,
        None => scores,
    };
    let scores = if attn_mask.is_causal() {
        let hidden = |i, j| if j > i { f32::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f32> = (0..s * s).map(|at| hidden(at / s, at % s)).collect();
        scores.broadcast_add(&Tensor::from_vec(mask, (s, s), q.device())?)?
    } else {
        scores
    };
    candle_nn::ops::softmax(&scores, candle_core::D::Minus1)?.matmul(&of_query(v)?)
}
