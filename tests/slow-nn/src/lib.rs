//! `candle_nn` with a backward for every operation.
//!
//! Several of candle-nn's fused operations have no backward and say nothing about it: a model that uses them trains on a
//! fraction of its gradients. This crate has candle-nn's own names, and behind those operations candle's own slow formulas,
//! which are differentiable. A model file that is compiled with this crate under the name `candle_nn` is therefore the
//! unannotated model on candle's slow operations, and that is what AutoSP's results are compared with.

pub use candle_nn::*;

pub mod attention;
pub mod kv_cache;
pub mod layer_norm;
pub mod ops;
pub mod rotary_emb;

pub use layer_norm::{LayerNorm, RmsNorm, layer_norm, layer_norm_no_bias, rms_norm};
