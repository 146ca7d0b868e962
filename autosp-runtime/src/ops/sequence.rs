//! Operations that run along a sharded sequence, with candle's names: every rank gets the numbers of the whole sequence.
//!
//! Padding takes no part. Sums of half-precision values are taken in `f32` and rounded once. Outside a sharded scope, and on one
//! rank, they are candle's own.

#![allow(
    clippy::needless_pass_by_value,
    reason = "the argument forms of candle"
)]

use autosp_plan::codes;
use candle_core::shape::Dim;
use candle_core::{DType, Device, Result, Tensor};

use super::{owned, record, tracked};
use crate::comm::{Tag, all_gather, all_reduce_sum};
use crate::scope::{self, Scope, Shard};
use crate::{Error, Sp};

/// The sum over the sequence, which lies along `dim`, on every rank; `dim` goes away. The backward adds the gradients of all ranks
/// and gives each valid token the sum.
///
/// # Errors
/// AS0303 if `x` has another length along `dim` than this rank's shard; else as [`wait`](crate::comm::Engine::wait).
pub fn sum<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "sum")?;
    reduced(x, dim, false)?.squeeze(dim)
}

/// As [`sum`], with `dim` of length 1.
///
/// # Errors
/// As [`sum`].
pub fn sum_keepdim<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "sum_keepdim")?;
    reduced(x, dim, false)
}

/// The mean over the tokens of the sequence, padding not counted; else as [`sum`].
///
/// # Errors
/// As [`sum`].
pub fn mean<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "mean")?;
    reduced(x, dim, true)?.squeeze(dim)
}

/// As [`mean`], with `dim` of length 1.
///
/// # Errors
/// As [`sum`].
pub fn mean_keepdim<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "mean_keepdim")?;
    reduced(x, dim, true)
}

/// The scope and the shard that `x` is, if there are several ranks.
fn sharded(what: &str, x: &Tensor, dim: usize) -> Result<Option<(Scope, Shard)>> {
    let Some(scope) = scope::current() else {
        return Ok(None);
    };
    let shard = scope.shard()?;
    if x.dim(dim)? != shard.len {
        let text = format!(
            "`{what}` over the sequence: expected length {} along dim {dim} (this rank's shard), found {}",
            shard.len,
            x.dim(dim)?
        );
        return Err(Error::new(codes::LOCAL_LENGTH, text).into());
    }
    Ok((shard.size > 1).then_some((scope, shard)))
}

fn reduced(x: &Tensor, dim: usize, mean: bool) -> Result<Tensor> {
    let name = if mean { "mean" } else { "sum" };
    let Some((scope, shard)) = sharded(name, x, dim)? else {
        return if mean {
            x.mean_keepdim(dim)
        } else {
            x.sum_keepdim(dim)
        };
    };
    let over = Over {
        dim,
        shard,
        factor: mean.then(|| 1.0 / shard.valid as f64),
        dtype: x.dtype(),
        step: scope.step(),
    };
    let sp = scope.sp().clone();
    let total = over.forward(&sp, &x.detach())?;
    if !tracked(x) {
        return Ok(total);
    }
    record(name, [x], owned(&total)?, move |[x], grad| {
        Ok([Some(over.backward(&sp, x, grad)?)])
    })
}

/// One reduction.
#[derive(Clone, Copy)]
struct Over {
    dim: usize,
    shard: Shard,
    /// On the sum: 1 / S for a mean.
    factor: Option<f64>,
    dtype: DType,
    step: u64,
}

impl Over {
    /// The type that sums are taken in.
    fn wide(self) -> DType {
        super::wide(self.dtype)
    }

    fn all_ranks(self, sp: &Sp, direction: &'static str, x: &Tensor) -> Result<Tensor> {
        let tag = Tag::new("sequence sum", direction).at(self.step);
        let sum = all_reduce_sum(sp.sp_group(), tag, &x.contiguous()?)?;
        let sum = match self.factor {
            Some(factor) => sum.affine(factor, 0.0)?,
            None => sum,
        };
        sum.to_dtype(self.dtype)
    }

    fn forward(self, sp: &Sp, x: &Tensor) -> Result<Tensor> {
        let here = self.shard.valid_here();
        let own = if here == 0 {
            let mut dims = x.dims().to_vec();
            dims[self.dim] = 1;
            Tensor::zeros(dims, self.wide(), x.device())?
        } else {
            x.narrow(self.dim, 0, here)?
                .to_dtype(self.wide())?
                .sum_keepdim(self.dim)?
        };
        self.all_ranks(sp, "tokens", &own)
    }

    /// The transpose: the gradients of all ranks, added, for every valid token of this rank.
    fn backward(self, sp: &Sp, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let grad = self.all_ranks(sp, "grad_tokens", &grad.to_dtype(self.wide())?)?;
        let (here, len) = (self.shard.valid_here(), self.shard.len);
        if here == 0 {
            return x.zeros_like();
        }
        let mut dims = x.dims().to_vec();
        dims[self.dim] = here;
        grad.broadcast_as(dims)?
            .pad_with_zeros(self.dim, 0, len - here)?
            .contiguous()
    }
}

/// The running sum along the sequence, which lies along `dim`, for numbers that need no gradient (masks, counts of tokens). It is
/// computed on the host in `f64`, so that whole numbers are exact.
///
/// # Errors
/// AS0333 for a tensor that carries a gradient; AS0303 as [`sum`].
pub fn cumsum<D: Dim>(x: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "cumsum")?;
    let Some((scope, shard)) = sharded("cumsum", x, dim)? else {
        return x.cumsum(dim);
    };
    if tracked(x) {
        let text = "cumsum along a sharded sequence: found a tensor that carries a gradient, which would be lost";
        return Err(Error::new(codes::SEQUENCE_GRADIENT, text)
            .with_help("`.detach()` it if it is a constant")
            .into());
    }
    let (dims, inner) = (x.dims(), x.dims()[dim + 1..].iter().product::<usize>());
    let mut values = x
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?;
    for token in (0..values.len()).filter(|at| (at / inner) % shard.len > 0) {
        values[token] += values[token - inner];
    }
    let running = Tensor::from_vec(values, dims, &Device::Cpu)?;
    let here = shard.valid_here();
    let last = if here == 0 {
        running.narrow(dim, 0, 1)?.zeros_like()?
    } else {
        running.narrow(dim, here - 1, 1)?
    };
    let tag = Tag::new("sequence sum", "running").at(scope.step());
    let all = all_gather(scope.sp().sp_group(), tag, &last.contiguous()?, dim)?;
    let before = if shard.rank == 0 {
        last.zeros_like()?
    } else {
        all.narrow(dim, 0, shard.rank)?.sum_keepdim(dim)?
    };
    running
        .broadcast_add(&before)?
        .to_dtype(x.dtype())?
        .to_device(x.device())
}

#[cfg(test)]
mod tests;
