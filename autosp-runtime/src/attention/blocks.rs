//! Attention from matrix products over blocks of queries, by candle's operations: exact, in memory that grows with the length.
//!
//! Any float type and a cap; scores of one block are at most [`SCORES`] elements. Sums run in the type of the tensors, `f32` for half
//! precision.

use candle_core::{D, DType, Tensor};

use crate::Result;
use crate::attention::{Gradients, Output, Spec};
use crate::mask::Band;
use crate::ops::wide;

/// Scores of a block: 64 Mi elements, 256 MiB in `f32`.
const SCORES: usize = 1 << 26;

/// [b, h, s, d] in the type to compute in, valid tokens alone.
fn raised(x: &Tensor, valid: usize) -> Result<Tensor> {
    let x = x.detach().narrow(2, 0, valid)?;
    Ok(x.to_dtype(wide(x.dtype()))?.contiguous()?)
}

/// The kv head of each query head, side by side.
fn shared(x: &Tensor, kv_of: &[usize]) -> Result<Tensor> {
    let index: Vec<u32> = kv_of.iter().map(|&g| g as u32).collect();
    Ok(x.index_select(&Tensor::new(index, x.device())?, 1)?)
}

/// Queries in one block.
fn rows(batch: usize, heads: usize, keys: usize) -> usize {
    (SCORES / (batch * heads * keys).max(1)).max(1)
}

/// Pairs that a block of queries may not see, as 1, or nothing if it sees all: [1, 1, queries, keys].
fn hidden(
    band: &Band,
    (first, count): (usize, usize),
    keys: usize,
    like: &Tensor,
) -> Result<Option<Tensor>> {
    if band.lo.is_none() && band.hi.is_none() {
        return Ok(None);
    }
    let device = like.device();
    let query =
        Tensor::arange(first as i64, (first + count) as i64, device)?.reshape((1, 1, count, 1))?;
    let key = Tensor::arange(0, keys as i64, device)?.reshape((1, 1, 1, keys))?;
    let distance = key.broadcast_sub(&query)?;
    let mut hidden = distance.zeros_like()?.to_dtype(DType::U8)?;
    if let Some(hi) = band.hi {
        hidden = (hidden + distance.gt(hi)?)?;
    }
    if let Some(lo) = band.lo {
        hidden = (hidden + distance.lt(lo)?)?;
    }
    Ok(Some(hidden.gt(0_u8)?))
}

/// Scores of a block after scale, cap and band, and d score / d (scale q·k) of the cap, if there is one.
fn scores(
    spec: &Spec,
    q: &Tensor,
    k: &Tensor,
    hidden: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    let mut scores = (q.matmul(&k.t()?)? * spec.scale)?;
    let mut slope = None;
    if let Some(cap) = spec.cap {
        let bent = scores.tanh()?;
        slope = Some((1.0 - bent.sqr()?)?.affine(cap, 0.0)?);
        scores = (bent * cap)?;
    }
    if let Some(hidden) = hidden {
        let below = Tensor::new(f32::NEG_INFINITY, q.device())?.to_dtype(q.dtype())?;
        scores = hidden
            .broadcast_as(scores.shape())?
            .where_cond(&below.broadcast_as(scores.shape())?, &scores)?;
    }
    Ok((scores, slope))
}

/// Rows of zeros after the valid ones.
fn padded(x: &Tensor, rows: usize) -> Result<Tensor> {
    let missing = rows - x.dim(2)?;
    Ok(if missing == 0 {
        x.clone()
    } else {
        x.pad_with_zeros(2, 0, missing)?
    })
}

pub(crate) fn forward(
    spec: &Spec,
    band: &Band,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Output> {
    let (batch, heads, queries, _) = q.dims4()?;
    let (dtype, valid) = (q.dtype(), spec.valid.min(queries));
    let q = raised(q, valid)?;
    let (k, v) = (
        shared(&raised(k, valid)?, &spec.kv_of)?,
        shared(&raised(v, valid)?, &spec.kv_of)?,
    );
    let (mut outputs, mut logs) = (Vec::new(), Vec::new());
    let step = rows(batch, heads, valid);
    for first in (0..valid).step_by(step) {
        let count = step.min(valid - first);
        let hidden = hidden(band, (first, count), valid, &q)?;
        let (scores, _) = scores(
            spec,
            &q.narrow(2, first, count)?.contiguous()?,
            &k,
            hidden.as_ref(),
        )?;
        let top = scores.max_keepdim(D::Minus1)?;
        let weights = scores.broadcast_sub(&top)?.exp()?;
        drop(scores);
        let total = weights.sum_keepdim(D::Minus1)?;
        outputs.push(weights.matmul(&v)?.broadcast_div(&total)?);
        logs.push((total.log()? + top)?);
    }
    let o = padded(&Tensor::cat(&outputs, 2)?.to_dtype(dtype)?, queries)?.contiguous()?;
    let lse = padded(&Tensor::cat(&logs, 2)?, queries)?
        .squeeze(3)?
        .contiguous()?;
    Ok(Output {
        o,
        rest: Tensor::zeros(0, lse.dtype(), lse.device())?,
        lse,
    })
}

pub(crate) fn backward(
    spec: &Spec,
    band: &Band,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Output,
    grad: &Tensor,
) -> Result<Gradients> {
    let (batch, heads, queries, _) = q.dims4()?;
    let (kv_heads, keys) = (k.dim(1)?, k.dim(2)?);
    let (dtype, valid) = (q.dtype(), spec.valid.min(queries));
    let (q, o, grad) = (
        raised(q, valid)?,
        raised(&output.o, valid)?,
        raised(grad, valid)?,
    );
    let (k, v) = (
        shared(&raised(k, valid)?, &spec.kv_of)?,
        shared(&raised(v, valid)?, &spec.kv_of)?,
    );
    let lse = output
        .lse
        .narrow(2, 0, valid)?
        .unsqueeze(3)?
        .to_dtype(q.dtype())?;
    let delta = (&o * &grad)?.sum_keepdim(D::Minus1)?;
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
    let step = rows(batch, heads, valid);
    for first in (0..valid).step_by(step) {
        let count = step.min(valid - first);
        let cut = |x: &Tensor| x.narrow(2, first, count)?.contiguous();
        let (q, grad) = (cut(&q)?, cut(&grad)?);
        let hidden = hidden(band, (first, count), valid, &q)?;
        let (scores, slope) = scores(spec, &q, &k, hidden.as_ref())?;
        let weights = scores.broadcast_sub(&cut(&lse)?)?.exp()?;
        drop(scores);
        dv = (dv + weights.transpose(2, 3)?.matmul(&grad)?)?;
        let mut ds = (grad.matmul(&v.t()?)?.broadcast_sub(&cut(&delta)?)? * weights)?;
        if let Some(slope) = slope {
            ds = (ds * slope)?;
        }
        let ds = (ds * spec.scale)?;
        dq.push(ds.matmul(&k)?);
        dk = (dk + ds.transpose(2, 3)?.matmul(&q)?)?;
    }
    let dq = Tensor::cat(&dq, 2)?;
    let summed = |x: &Tensor| -> Result<Tensor> {
        let mut heads: Vec<Option<Tensor>> = vec![None; kv_heads];
        for (h, &g) in spec.kv_of.iter().enumerate() {
            let part = x.narrow(1, h, 1)?;
            heads[g] = Some(match heads[g].take() {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let parts = heads
            .into_iter()
            .map(|head| Ok(head.map_or_else(|| x.narrow(1, 0, 1)?.zeros_like(), Ok)?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 1)?)
    };
    let finish = |x: Tensor, rows: usize| -> Result<Tensor> {
        Ok(padded(&x.to_dtype(dtype)?, rows)?.contiguous()?)
    };
    Ok(Gradients {
        q: finish(dq, queries)?,
        k: finish(summed(&dk)?, keys)?,
        v: finish(summed(&dv)?, keys)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{self, Kernel};
    use candle_core::Device;

    #[test]
    fn blocks_compute_what_the_plain_loop_does() {
        let noise = |h: usize, seed: f64| {
            let values: Vec<f64> = (0..2 * h * 13 * 6)
                .map(|i| ((i as f64 + seed) * 12.9898).sin())
                .collect();
            Tensor::from_vec(values, (2, h, 13, 6), &Device::Cpu).unwrap()
        };
        let (q, k, v, grad) = (noise(4, 1.0), noise(2, 2.0), noise(2, 3.0), noise(4, 4.0));
        let bands = [
            (None, None),
            (None, Some(0)),
            (Some(-4), Some(0)),
            (Some(-2), Some(3)),
        ];
        for (lo, hi) in bands {
            for (valid, cap) in [(13, None), (11, Some(1.5))] {
                let band = Band { lo, hi };
                let mut spec = Spec::new(0.4, valid, 4, 2).with_band(band).unwrap();
                spec.cap = cap;
                let wanted = attention::forward(Kernel::Reference, &spec, &q, &k, &v).unwrap();
                let found = forward(&spec, &band, &q, &k, &v).unwrap();
                let apart = |a: &Tensor, b: &Tensor| {
                    let most = (a - b)
                        .unwrap()
                        .abs()
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .max(0)
                        .unwrap();
                    most.to_scalar::<f64>().unwrap()
                };
                assert!(
                    apart(&wanted.o, &found.o) < 1e-12 && apart(&wanted.lse, &found.lse) < 1e-12
                );
                let wanted_grads =
                    attention::backward(Kernel::Reference, &spec, (&q, &k, &v), &wanted, &grad)
                        .unwrap();
                let grads = backward(&spec, &band, (&q, &k, &v), &found, &grad).unwrap();
                assert!(
                    apart(&wanted_grads.q, &grads.q) < 1e-12,
                    "{lo:?} {hi:?} {valid}"
                );
                assert!(
                    apart(&wanted_grads.k, &grads.k) < 1e-12,
                    "{lo:?} {hi:?} {valid}"
                );
                assert!(
                    apart(&wanted_grads.v, &grads.v) < 1e-12,
                    "{lo:?} {hi:?} {valid}"
                );
            }
        }
    }
}
