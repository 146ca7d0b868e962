//! Cross-entropy behind a linear layer, for some tokens at a time: logits, loss and gradients, one tile after the other.
//!
//! The gradient is computed in the forward: a tile's logits are there once, and become their own gradient in the same memory. What is
//! kept for the backward is the gradient of the hidden states, as large as these, and that of the weight. The gradient is that of the
//! mean, so the number of targets of all ranks is asked for first; the backward multiplies by the gradient that comes in, which is
//! mostly one.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, D, DType, Device, InplaceOp1, Layout, Result, Tensor, Var, WithDType, bail,
};
use rayon::prelude::*;

use super::head::{Head, Logits, Step};
use super::{Forward, add_over_ranks, counted, sum_of_losses};
use crate::ops::{Real, accumulate, max, owned, record_gradient, sum, tracked, visit, wide};
use crate::{memory, scope};

/// Bytes of logits where no settings are in force.
const BYTES: usize = 512 << 20;

/// Tiles are multiples of so many rows where they can be: what matrix products like.
const ROWS: usize = 128;

/// Mean cross-entropy, in nats, of `x Wᵀ + b` against `labels`: [`cross_entropy`](super::cross_entropy) of a linear layer's result, of
/// which at most the setting `loss_bytes` exist at a time. x is `[.., h]`, W `[V, h]`, b `[V]`, labels `[..]`.
///
/// For a scale, a soft cap or a cast in between see [`Logits`].
///
/// # Errors
/// As [`cross_entropy`](super::cross_entropy); AS0509 if shapes do not fit.
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    labels: &Tensor,
) -> Result<Tensor> {
    Logits::new(x, weight, bias)?.cross_entropy(labels)
}

/// The mean over all ranks, with its gradients.
pub(super) fn mean(logits: &Logits, classes: Vec<Option<u32>>, width: usize) -> Result<Tensor> {
    let _span = tracing::debug_span!("loss", rows = classes.len(), classes = width).entered();
    let (device, rows) = (logits.x.device(), classes.len());
    let valid = classes.iter().filter(|class| class.is_some()).count();
    let [count] = add_over_ranks("count", [valid as f64])?;
    let count = counted(count)?;
    let wanted = !memory::is_forward_only();
    let mut tiles = Tiles::new(logits, classes, wanted, count.unwrap_or(1.0))?;
    let each = rows_of_a_tile(rows, width * tiles.bytes_of_a_logit());
    for start in (0..rows).step_by(each) {
        tiles.tile(start, each.min(rows - start))?;
    }
    let (own, gradients) = tiles.end()?;
    let [total] = add_over_ranks("total", [own.total])?;
    let value = count.map_or(0.0, |count| total / count);
    let value = Tensor::new(value, &Device::Cpu)?
        .to_dtype(own.dtype)?
        .to_device(device)?;
    if !wanted {
        return Ok(value);
    }
    // One node of the graph for each operand; the first has the value.
    let mut loss: Option<Tensor> = None;
    let unit = own.unit;
    for (operand, gradient) in gradients {
        let part = if loss.is_none() {
            value.clone()
        } else {
            value.zeros_like()?
        };
        let dtype = operand.dtype();
        let part = record_gradient(
            "linear cross-entropy",
            [&operand],
            owned(&part)?,
            move |grad| {
                let factor = grad.to_dtype(DType::F64)?.to_scalar::<f64>()? / unit;
                let gradient = gradient.as_ref().map(|g| scaled(g, factor, dtype));
                Ok([gradient.transpose()?])
            },
        )?;
        loss = Some(match loss {
            None => part,
            Some(loss) => (loss + part)?,
        });
    }
    Ok(loss.unwrap_or(value))
}

/// Rows whose logits stay within the bound, in tiles of about one size.
fn rows_of_a_tile(rows: usize, bytes_of_a_row: usize) -> usize {
    let bytes = scope::current().map_or(BYTES, |scope| scope.sp().settings().loss_bytes());
    let most = (bytes / bytes_of_a_row.max(1)).max(1);
    let most = if most > ROWS {
        most - most % ROWS
    } else {
        most
    };
    let even = rows.div_ceil(rows.div_ceil(most).max(1));
    even.next_multiple_of(ROWS).clamp(1, most)
}

/// `gradient` times a factor in the type `dtype`, rounded once.
fn scaled(gradient: &Tensor, factor: f64, dtype: DType) -> Result<Tensor> {
    #[allow(
        clippy::float_cmp,
        reason = "it is one, and not about one, where the loss itself is walked back"
    )]
    if factor == 1.0 {
        return gradient.to_dtype(dtype);
    }
    let wide = gradient.to_dtype(wide(gradient.dtype()))?;
    (wide * factor)?.to_dtype(dtype)
}

/// An operand of the loss, with its gradient.
type Found = (Tensor, Option<Tensor>);

/// What all tiles of a rank gave.
struct Own {
    /// Sum of the losses.
    total: f64,
    /// The type of the loss.
    dtype: DType,
    /// The gradients are those of the mean times this power of two.
    unit: f64,
}

/// The tiles so far.
struct Tiles<'a> {
    logits: &'a Logits,
    steps: &'a [Step],
    /// Hidden states [n, h], detached.
    x: Tensor,
    classes: Vec<Option<u32>>,
    /// The classes as kernels read them.
    #[cfg(feature = "cuda")]
    on_gpu: Option<Tensor>,
    wanted: bool,
    unit: f64,
    /// What a unit of token loss is worth.
    scale: f64,
    total: f64,
    /// Losses [rows] of tiles that stay on their device until all are done.
    losses: Vec<Tensor>,
    dx: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    /// Variables of a layer that is not seen into.
    variables: Vec<Found>,
}

impl<'a> Tiles<'a> {
    fn new(
        logits: &'a Logits,
        classes: Vec<Option<u32>>,
        wanted: bool,
        count: f64,
    ) -> Result<Self> {
        let width = logits.x.dim(D::Minus1)?;
        let x = logits.x.detach().reshape((classes.len(), width))?;
        // What only widens is read wide anyway.
        let mut steps = logits.steps.as_slice();
        while let [before @ .., Step::Cast(DType::F32)] = steps {
            let from = type_before(before, x.dtype());
            if from.size_in_bytes() > 4 {
                break;
            }
            steps = before;
        }
        // Products with 1 / N would vanish in a type with few exponents.
        let unit = if x.dtype() == DType::F16 {
            2f64.powi(count.log2().ceil() as i32)
        } else {
            1.0
        };
        let dx = wanted && tracked(&logits.x);
        let dx = dx.then(|| Tensor::zeros(x.shape(), x.dtype(), x.device()));
        Ok(Self {
            logits,
            steps,
            dx: dx.transpose()?,
            #[cfg(feature = "cuda")]
            on_gpu: (x.device().is_cuda())
                .then(|| super::classes_on_gpu(&classes, x.device()))
                .transpose()?,
            x,
            classes,
            wanted,
            unit,
            scale: unit / count,
            total: 0.0,
            losses: Vec::new(),
            weight: None,
            bias: None,
            variables: Vec::new(),
        })
    }

    /// The type of the logits in which the loss is taken.
    fn dtype(&self) -> DType {
        type_before(self.steps, self.x.dtype())
    }

    /// Bytes for one logit: its own and those of what a backward through the steps needs.
    fn bytes_of_a_logit(&self) -> usize {
        let tanh = self
            .steps
            .iter()
            .filter(|step| **step == Step::Tanh)
            .count();
        let bytes = |step: &Step| match step {
            Step::Cast(dtype) => dtype.size_in_bytes(),
            _ => 0,
        };
        let widest = self.steps.iter().map(bytes).max().unwrap_or(0);
        widest.max(self.x.dtype().size_in_bytes()) * (1 + tanh)
    }

    /// Rows `start..start + len`.
    fn tile(&mut self, start: usize, len: usize) -> Result<()> {
        if self.classes[start..start + len].iter().all(Option::is_none) {
            return Ok(());
        }
        let x = self.x.narrow(0, start, len)?;
        match &self.logits.head {
            Head::Weight {
                weight,
                columns,
                bias,
            } => {
                // [V, h]
                let w = weight.detach();
                let w = if *columns { w.t()? } else { w };
                let mut z = x.matmul(&w.t()?)?;
                if let Some(bias) = bias {
                    z = z.broadcast_add(&bias.detach())?;
                }
                let Some(dz) = self.loss(z, start, false)? else {
                    return Ok(());
                };
                if let Some(dx) = &self.dx {
                    dx.slice_set(&dz.matmul(&w)?.contiguous()?, 0, start)?;
                }
                if tracked(weight) {
                    add_product(&mut self.weight, &dz, &x)?;
                }
                if bias.as_ref().is_some_and(tracked) {
                    add(&mut self.bias, dz.to_dtype(wide(dz.dtype()))?.sum(0)?)?;
                }
                Ok(())
            }
            Head::Layer(forward) => {
                let leaf = Var::from_tensor(&x)?;
                let y = forward(leaf.as_tensor())?;
                let Some(dy) = self.loss(y.detach(), start, true)? else {
                    return Ok(());
                };
                if !tracked(&y) {
                    return Ok(());
                }
                // A scalar whose gradient of y is dy.
                let seed = (y * dy)?.sum_all()?;
                let variables: Vec<Tensor> = seed
                    .sorted_nodes()
                    .into_iter()
                    .filter(|node| node.is_variable() && node.id() != leaf.id())
                    .cloned()
                    .collect();
                let mut grads = seed.backward()?;
                for variable in variables {
                    let Some(grad) = grads.remove(&variable) else {
                        continue;
                    };
                    let grad = grad.detach().to_dtype(wide(grad.dtype()))?;
                    let known = self
                        .variables
                        .iter_mut()
                        .find(|(known, _)| known.id() == variable.id());
                    match known {
                        Some((_, sum)) => add(sum, grad)?,
                        None => self.variables.push((variable, Some(grad))),
                    }
                }
                if let (Some(dx), Some(grad)) = (&self.dx, grads.remove(&leaf)) {
                    dx.slice_set(&grad.detach().contiguous()?, 0, start)?;
                }
                Ok(())
            }
        }
    }

    /// Adds the loss of the rows from `start`, and returns the gradient of `y`, the logits before the steps. `shared` says that others
    /// may read the memory of `y`.
    fn loss(&mut self, y: Tensor, start: usize, shared: bool) -> Result<Option<Tensor>> {
        let mut z = y;
        // The types before casts and the values of soft caps.
        let mut saved = Vec::with_capacity(self.steps.len());
        let mut shared = shared;
        for step in self.steps {
            let (next, kept) = match *step {
                Step::Affine(mul, add) => (z.affine(mul, add)?, None),
                Step::Tanh => {
                    let tanh = z.tanh()?;
                    (tanh.clone(), self.wanted.then_some(tanh))
                }
                Step::Cast(dtype) => (z.to_dtype(dtype)?, None),
            };
            saved.push((kept, z.dtype()));
            shared = match *step {
                Step::Affine(..) => false,
                Step::Tanh => self.wanted,
                Step::Cast(dtype) => shared && dtype == z.dtype(),
            };
            z = next;
        }
        if shared && self.wanted {
            z = z.copy()?;
        }
        let Some(mut dz) = self.rows(z, start)? else {
            return Ok(None);
        };
        for (step, (kept, dtype)) in self.steps.iter().zip(saved).rev() {
            dz = match (step, kept) {
                (Step::Affine(mul, _), _) => dz.affine(*mul, 0.0)?,
                (Step::Tanh, Some(tanh)) => (dz * tanh.sqr()?.affine(-1.0, 1.0)?)?,
                (Step::Tanh, None) => dz,
                (Step::Cast(_), _) => dz.to_dtype(dtype)?,
            };
        }
        Ok(Some(dz))
    }

    /// Adds the losses of logits [len, V] and turns them into their gradient, in their own memory where that can be.
    #[allow(clippy::needless_pass_by_value, reason = "its memory is written over")]
    fn rows(&mut self, z: Tensor, start: usize) -> Result<Option<Tensor>> {
        let classes = &self.classes[start..start + z.dim(0)?];
        if z.device().is_cpu() {
            if !self.wanted {
                self.total += visit(&Forward { classes }, [&z])?.total;
                return Ok(None);
            }
            let z = z.contiguous()?;
            let op = Overwrite {
                classes,
                scale: self.scale,
                total: Mutex::new(0.0),
            };
            z.inplace_op1(&op)?;
            self.total += op
                .total
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner);
            return Ok(Some(z));
        }
        #[cfg(feature = "cuda")]
        if let Some(on_gpu) = &self.on_gpu {
            let classes = on_gpu.narrow(0, start, classes.len())?;
            let scale = self.wanted.then_some(self.scale);
            if let Some(losses) = crate::cuda::ops::loss_tile(&z, &classes, scale)? {
                self.losses.push(losses);
                return Ok(self.wanted.then_some(z));
            }
        }
        let leaf = Var::from_tensor(&z)?;
        let own = sum_of_losses(&leaf, classes, wide(z.dtype()))?;
        self.losses.push(own.detach().reshape(1)?);
        if !self.wanted {
            return Ok(None);
        }
        let mut grads = own.backward()?;
        grads
            .remove(&leaf)
            .map(|grad| grad.detach().affine(self.scale, 0.0))
            .transpose()
    }

    /// The sum of the losses, and each operand with its gradient.
    fn end(self) -> Result<(Own, Vec<Found>)> {
        let mut total = self.total;
        if !self.losses.is_empty() {
            let all = Tensor::cat(&self.losses, 0)?.to_dtype(DType::F64)?;
            total += all.sum_all()?.to_scalar::<f64>()?;
        }
        let own = Own {
            total,
            dtype: wide(self.dtype()),
            unit: self.unit,
        };
        let x = &self.logits.x;
        let dx = self.dx.map(|dx| dx.reshape(x.shape())).transpose()?;
        let mut all = vec![(x.clone(), dx)];
        if let Head::Weight {
            weight,
            columns,
            bias,
        } = &self.logits.head
        {
            let gradient = match self.weight {
                Some(gradient) if *columns => Some(gradient.t()?.contiguous()?),
                other => other,
            };
            all.push((weight.clone(), gradient));
            if let Some(bias) = bias {
                all.push((bias.clone(), self.bias));
            }
        }
        all.extend(self.variables);
        Ok((own, all))
    }
}

/// The type of what steps give for logits of a type.
fn type_before(steps: &[Step], first: DType) -> DType {
    let cast = steps.iter().rev().find_map(|step| match step {
        Step::Cast(dtype) => Some(*dtype),
        _ => None,
    });
    cast.unwrap_or(first)
}

/// `sum += dzᵀ x`, in `f32` or `f64`.
fn add_product(sum: &mut Option<Tensor>, dz: &Tensor, x: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if dz.device().is_cuda() && dz.dtype() != DType::F64 {
        return crate::cuda::gemm::add_product(sum, dz, x);
    }
    let wide = wide(dz.dtype());
    let product = dz.to_dtype(wide)?.t()?.matmul(&x.to_dtype(wide)?)?;
    add(sum, product)
}

/// Adds to a sum whose memory is its own.
fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        None => more,
        Some(sum) => accumulate(sum, true, &more)?,
    });
    Ok(())
}

/// Rows of logits become the gradient of `scale` times the sum of their losses; the sum is left in `total`.
struct Overwrite<'a> {
    classes: &'a [Option<u32>],
    scale: f64,
    total: Mutex<f64>,
}

impl Overwrite<'_> {
    fn run<T: WithDType, A: Real>(&self, data: &mut [T]) {
        let width = data.len().checked_div(self.classes.len()).unwrap_or(0);
        if width == 0 {
            return;
        }
        let scale = A::real(self.scale);
        let row = |scratch: &mut Vec<A>, (data, class): (&mut [T], &Option<u32>)| {
            let Some(class) = *class else {
                data.fill(T::zero());
                return 0.0;
            };
            let class = class as usize;
            for (slot, &x) in scratch.iter_mut().zip(data.iter()) {
                *slot = A::up(x);
            }
            let (target, top) = (scratch[class].wide(), max(scratch));
            for x in scratch.iter_mut() {
                *x = (*x - top).exp();
            }
            let total = sum(scratch);
            for x in scratch.iter_mut() {
                *x = *x / total;
            }
            scratch[class] = scratch[class] - A::real(1.0);
            for (slot, &x) in data.iter_mut().zip(scratch.iter()) {
                *slot = (x * scale).down();
            }
            top.wide() + total.wide().ln() - target
        };
        let losses: Vec<f64> = data
            .par_chunks_exact_mut(width)
            .zip(self.classes)
            .map_init(|| vec![A::ZERO; width], row)
            .collect();
        let mut total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
        *total += losses.iter().sum::<f64>();
    }
}

impl InplaceOp1 for Overwrite<'_> {
    fn name(&self) -> &'static str {
        "cross-entropy in place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("cross-entropy in place: expected contiguous logits")
        };
        match storage {
            CpuStorage::F32(data) => self.run::<_, f32>(&mut data[from..to]),
            CpuStorage::F64(data) => self.run::<_, f64>(&mut data[from..to]),
            CpuStorage::BF16(data) => self.run::<_, f32>(&mut data[from..to]),
            CpuStorage::F16(data) => self.run::<_, f32>(&mut data[from..to]),
            _ => bail!("cross-entropy in place: expected floating point logits"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_stay_within_the_bound_and_are_of_one_size() {
        let row = BYTES / 1000;
        assert_eq!(rows_of_a_tile(0, row), 1);
        assert_eq!(rows_of_a_tile(1, row), 128);
        assert_eq!(rows_of_a_tile(900, row), 512);
        // 1025 rows in two tiles, not one of 896 and one of 129.
        assert_eq!(rows_of_a_tile(1025, row), 640);
        assert_eq!(rows_of_a_tile(1 << 20, row), 896);
        assert_eq!(rows_of_a_tile(5, BYTES), 1);
        assert_eq!(rows_of_a_tile(5, 2 * BYTES), 1);
        assert_eq!(rows_of_a_tile(100, BYTES / 7), 7);
    }
}
