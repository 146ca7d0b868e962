//! Softmax: `y_i = exp(x_i - max) / sum_j exp(x_j - max)`, `dx = y * (dy - sum_j dy_j y_j)`.

use candle_core::shape::Dim;
use candle_core::{D, Result, Shape, Tensor, WithDType};

use super::kernel::dot;
use super::{Kernel, Real, Rows, compute, max, per_row, record_result, sum, tensor};

struct Forward;

impl Kernel<1> for Forward {
    const NAME: &'static str = "softmax-last-dim";

    fn run<T: WithDType, A: Real>(&self, [x]: [Rows<'_, T>; 1]) -> Result<(Vec<T>, Shape)> {
        let out = per_row(
            x.count(),
            x.width(),
            x.width(),
            |i, out: &mut [T], row: &mut [A]| {
                x.read(i, row);
                let top = max(row);
                for value in row.iter_mut() {
                    *value = (*value - top).exp();
                }
                let total = sum(row);
                for (slot, &value) in out.iter_mut().zip(row.iter()) {
                    *slot = (value / total).down();
                }
            },
        );
        Ok((out, x.shape().clone()))
    }
}

struct Backward;

impl Kernel<2> for Backward {
    const NAME: &'static str = "softmax-last-dim backward";

    fn run<T: WithDType, A: Real>(&self, [y, grad]: [Rows<'_, T>; 2]) -> Result<(Vec<T>, Shape)> {
        let width = y.width();
        let out = per_row(
            y.count(),
            width,
            2 * width,
            |i, out: &mut [T], scratch: &mut [A]| {
                let (p, g) = scratch.split_at_mut(width);
                y.read(i, p);
                grad.read(i, g);
                let mean = dot(p, g);
                for ((slot, &p), &g) in out.iter_mut().zip(p.iter()).zip(g.iter()) {
                    *slot = (p * (g - mean)).down();
                }
            },
        );
        Ok((out, y.shape().clone()))
    }
}

/// Softmax over the last dimension, with a backward. Any layout; the result is contiguous.
///
/// # Errors
/// When `xs` is a scalar or not of a floating point type.
pub fn softmax_last_dim(xs: &Tensor) -> Result<Tensor> {
    xs.dim(D::Minus1)?;
    if !xs.device().is_cpu() {
        return candle_nn::ops::softmax(xs, D::Minus1);
    }
    record_result(
        "softmax-last-dim",
        [xs],
        compute(&Forward, [xs])?,
        |y, grad| Ok([Some(tensor(compute(&Backward, [y, grad])?))]),
    )
}

/// Softmax over dimension `dim`, with a backward.
///
/// # Errors
/// When `dim` is out of range or `xs` is not of a floating point type.
#[allow(clippy::needless_pass_by_value, reason = "candle's argument form")]
pub fn softmax<I: Dim>(xs: &Tensor, dim: I) -> Result<Tensor> {
    let dim = dim.to_index(xs.shape(), "softmax")?;
    let last = xs.rank() - 1;
    if dim == last {
        softmax_last_dim(xs)
    } else {
        softmax_last_dim(&xs.transpose(dim, last)?)?.transpose(dim, last)
    }
}
