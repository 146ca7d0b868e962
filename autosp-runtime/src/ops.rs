//! Differentiable replacements for the candle operations that have no backward, with candle's names and argument forms.
//!
//! candle's `softmax_last_dim`, `rms_norm`, `layer_norm` and the three rope variants run a fused forward and record nothing, so
//! that a gradient silently stops there. The functions here give the same forward result and record a backward. On the CPU both
//! directions are fused kernels: they run on all threads, read operands of any layout, accumulate in `f32` (`f64` for `f64`
//! tensors, and for every sum over rows), and give the same bits whatever the number of threads. On CUDA GPUs they are kernels of
//! `templates/kernels`; elsewhere they are composed of candle operations that have a backward.
//!
//! An operand that nothing tracks (a frozen weight, rope tables) gets no gradient and costs none. [`linear`] is here for that alone:
//! candle's layer has a backward, which computes a gradient for a frozen weight too.

mod arithmetic;
mod dropout;
mod kernel;
mod layer;
mod linear;
mod modules;
mod movement;
mod norm;
mod positions;
mod record;
mod rope;
pub mod sequence;
mod softmax;
pub(crate) mod tape;

pub use arithmetic::{Operand, add, mul, silu};
pub use dropout::{RowsAndTokens, dropout, dropout_layer};
pub use layer::{Layer, layer, no_cache, norm_layer};
pub use linear::linear;
pub use modules::embedding;
pub use movement::Recorded;
pub use norm::{layer_norm, layer_norm_op, rms_norm, rms_norm_op};
pub use positions::{fold, pick, pick_narrow, slice};
pub use rope::{rope, rope_i, rope_thd};
pub use softmax::{softmax, softmax_last_dim};

pub(crate) use arithmetic::{accumulate, cast, sum_as, wide};
pub(crate) use kernel::{Kernel, Real, Rows, Visit, compute, max, per_row, sum, visit};
pub(crate) use record::{
    Kept, owned, put, record, record_gradient, record_hinted, record_result, taken, tensor, tracked,
};
pub(crate) use tape::Gradient;

#[cfg(test)]
mod tests;
