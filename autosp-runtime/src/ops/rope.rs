//! Rotary position embeddings: each pair `(a, b)` of a head becomes `(a cos - b sin, a sin + b cos)`; the backward turns the
//! other way. Source: Su et al., arXiv:2104.09864.

use candle_core::{D, Result, Shape, Tensor, WithDType, bail};

use super::{Kernel, Real, Rows, compute, per_row, record, record_gradient, tensor, tracked};

/// Which elements make a pair, where the sequence dimension is, and which way to turn.
#[derive(Clone, Copy)]
struct Rope {
    name: &'static str,
    /// Pairs are neighbours `(2i, 2i + 1)`; otherwise `(i, i + d/2)`.
    interleaved: bool,
    /// x is `[b, t, h, d]`; otherwise `[b, h, t, d]`.
    sequence_first: bool,
    /// Turn back: the backward.
    inverse: bool,
}

impl Rope {
    fn pair(self, i: usize, half: usize) -> (usize, usize) {
        if self.interleaved {
            (2 * i, 2 * i + 1)
        } else {
            (i, i + half)
        }
    }

    /// Sizes `(b, h, t, d)`, whatever the order in x.
    fn sizes(self, x: &Shape) -> Result<(usize, usize, usize, usize)> {
        let (b, second, third, d) = x.dims4()?;
        Ok(if self.sequence_first {
            (b, third, second, d)
        } else {
            (b, second, third, d)
        })
    }
}

impl Kernel<3> for Rope {
    const NAME: &'static str = "rope";

    fn run<T: WithDType, A: Real>(
        &self,
        [x, cos, sin]: [Rows<'_, T>; 3],
    ) -> Result<(Vec<T>, Shape)> {
        let (_, h, t, d) = self.sizes(x.shape())?;
        let half = d / 2;
        let batched = |table: &Rows<'_, T>| match *table.shape().dims() {
            [_, rows, _] => rows,
            _ => 0,
        };
        let (cos_batch, sin_batch) = (batched(&cos), batched(&sin));
        let sign = A::real(if self.inverse { -1.0 } else { 1.0 });
        let out = per_row(x.count(), d, 0, |i, out: &mut [T], _: &mut [A]| {
            let batch = i / (h * t);
            let position = if self.sequence_first {
                i / h % t
            } else {
                i % t
            };
            let row = x.row(i);
            let cos = cos.row(batch * cos_batch + position);
            let sin = sin.row(batch * sin_batch + position);
            for (i, (&c, &s)) in cos.iter().zip(sin).enumerate() {
                let (i, j) = self.pair(i, half);
                let (a, b) = (A::up(row[i]), A::up(row[j]));
                let (c, s) = (A::up(c), A::up(s) * sign);
                out[i] = (a * c - b * s).down();
                out[j] = (a * s + b * c).down();
            }
        });
        Ok((out, x.shape().clone()))
    }
}

/// The gradients of tables that are themselves trained: `dcos = sum(ga a + gb b)`, `dsin = sum(gb a - ga b)` over the heads (and
/// the batch when the table has none), zero for rows past the sequence.
fn tables(rope: Rope, x: &Tensor, grad: &Tensor, table: &Tensor) -> Result<[Tensor; 2]> {
    let half = x.dim(D::Minus1)? / 2;
    let split = |x: &Tensor| -> Result<[Tensor; 2]> {
        if rope.interleaved {
            let (b, h, t, _) = x.dims4()?;
            let x = x.contiguous()?.reshape((b, h, t, half, 2))?;
            Ok([
                x.narrow(4, 0, 1)?.squeeze(4)?,
                x.narrow(4, 1, 1)?.squeeze(4)?,
            ])
        } else {
            Ok([x.narrow(3, 0, half)?, x.narrow(3, half, half)?])
        }
    };
    let ([a, b], [ga, gb]) = (split(x)?, split(grad)?);
    let reduce = |product: Tensor| -> Result<Tensor> {
        let per_batch = product.sum(if rope.sequence_first { 2 } else { 1 })?;
        let (sum, dim) = if table.rank() == 3 {
            (per_batch, 1)
        } else {
            (per_batch.sum(0)?, 0)
        };
        let missing = table.dim(dim)? - sum.dim(dim)?;
        sum.pad_with_zeros(dim, 0, missing)?.contiguous()
    };
    Ok([
        reduce(((&ga * &a)? + (&gb * &b)?)?)?,
        reduce(((&gb * &a)? - (&ga * &b)?)?)?,
    ])
}

fn apply(rope: Rope, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, _, t, d) = rope.sizes(x.shape())?;
    for (what, table) in [("cos", cos), ("sin", sin)] {
        let fits = match *table.dims() {
            [rows, width] => rows >= t && 2 * width == d,
            [batch, rows, width] => batch == b && rows >= t && 2 * width == d,
            _ => false,
        };
        if !fits {
            bail!(
                "{}: expected {what} of at least {t} positions and width {}, found {:?} for x {:?}",
                rope.name,
                d / 2,
                table.dims(),
                x.dims()
            )
        }
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && !tracked(cos)
        && !tracked(sin)
        && let Some(y) = on_gpu(rope, x, cos, sin)?
    {
        return Ok(y);
    }
    if !x.device().is_cpu() {
        return composed(rope, x, cos, sin);
    }
    let wanted = [tracked(x), tracked(cos), tracked(sin)];
    let result = compute(&rope, [x, cos, sin])?;
    let back = Rope {
        inverse: true,
        ..rope
    };
    if !wanted[1] && !wanted[2] {
        let (cos, sin) = (cos.detach(), sin.detach());
        return record_gradient(rope.name, [x], result, move |grad| {
            Ok([Some(tensor(compute(&back, [grad, &cos, &sin])?))])
        });
    }
    record(
        rope.name,
        [x, cos, sin],
        result,
        move |[x, cos, sin], grad| {
            let dx = if wanted[0] {
                Some(tensor(compute(&back, [grad, cos, sin])?))
            } else {
                None
            };
            let dcos = if wanted[1] {
                Some(tables(rope, x, grad, cos)?[0].clone())
            } else {
                None
            };
            let dsin = if wanted[2] {
                Some(tables(rope, x, grad, sin)?[1].clone())
            } else {
                None
            };
            Ok([dx, dcos, dsin])
        },
    )
}

/// The same by a kernel on a GPU, for tables that are not trained; `None` for a type that it does not take.
#[cfg(feature = "cuda")]
fn on_gpu(rope: Rope, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Option<Tensor>> {
    use crate::cuda::ops;
    let turn = move |inverse| ops::Rope {
        interleaved: rope.interleaved,
        sequence_first: rope.sequence_first,
        inverse,
    };
    let Some(y) = ops::rope(turn(false), x, cos, sin)? else {
        return Ok(None);
    };
    let result = (super::taken(&y)?, x.shape().clone());
    let (cos, sin) = (cos.detach(), sin.detach());
    let y = record_gradient(rope.name, [x], result, move |grad| {
        Ok([ops::rope(turn(true), grad, &cos, &sin)?])
    });
    y.map(Some)
}

/// The same by candle's differentiable operations, for devices without a kernel here.
fn composed(rope: Rope, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, h, t, d) = rope.sizes(x.shape())?;
    let table = |table: &Tensor| -> Result<Tensor> {
        let table = if table.rank() == 3 {
            table.clone()
        } else {
            table.unsqueeze(0)?
        };
        table
            .narrow(1, 0, t)?
            .unsqueeze(if rope.sequence_first { 2 } else { 1 })
    };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let x = x.contiguous()?;
    let (dims, half) = (x.dims().to_vec(), d / 2);
    let [u, v] = if rope.interleaved {
        let x = x.reshape((b, h, t, half, 2))?;
        [
            x.narrow(4, 0, 1)?.squeeze(4)?,
            x.narrow(4, 1, 1)?.squeeze(4)?,
        ]
    } else {
        [x.narrow(3, 0, half)?, x.narrow(3, half, half)?]
    };
    let first = (u.broadcast_mul(&cos)? - v.broadcast_mul(&sin)?)?;
    let second = (u.broadcast_mul(&sin)? + v.broadcast_mul(&cos)?)?;
    if rope.interleaved {
        Tensor::stack(&[first, second], 4)?.reshape(dims)
    } else {
        Tensor::cat(&[first, second], 3)
    }
}

/// `candle_nn::rotary_emb::rope` with gradients: `xs` is `[b, h, t, d]`, `cos` and `sin` are `[>= t, d/2]` or `[b, >= t, d/2]`.
///
/// # Errors
/// When the shapes do not fit or the types differ.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    apply(
        Rope {
            name: "rope",
            interleaved: false,
            sequence_first: false,
            inverse: false,
        },
        xs,
        cos,
        sin,
    )
}

/// `candle_nn::rotary_emb::rope_i` with gradients: as [`rope`], with neighbouring elements as pairs.
///
/// # Errors
/// When the shapes do not fit or the types differ.
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    apply(
        Rope {
            name: "rope-i",
            interleaved: true,
            sequence_first: false,
            inverse: false,
        },
        xs,
        cos,
        sin,
    )
}

/// `candle_nn::rotary_emb::rope_thd` with gradients: as [`rope`], with `xs` of shape `[b, t, h, d]`.
///
/// # Errors
/// When the shapes do not fit or the types differ.
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    apply(
        Rope {
            name: "rope-thd",
            interleaved: false,
            sequence_first: true,
            inverse: false,
        },
        xs,
        cos,
        sin,
    )
}

/// Each rope as a kernel and as a composition.
#[cfg(test)]
pub(super) fn both() -> Vec<super::tests::Pair> {
    let variants = [(false, false), (true, false), (false, true)];
    let pair = |(interleaved, sequence_first)| {
        let rope = Rope {
            name: "rope",
            interleaved,
            sequence_first,
            inverse: false,
        };
        super::tests::Pair {
            fast: Box::new(move |x| apply(rope, &x[0], &x[1], &x[2])),
            slow: Box::new(move |x| composed(rope, &x[0], &x[1], &x[2])),
        }
    };
    variants.into_iter().map(pair).collect()
}
