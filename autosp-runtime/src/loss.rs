//! Losses that are exact over all ranks.
//!
//! The loss of a step is one number: the sum of the token losses of all ranks, divided by the number of valid targets of all ranks.
//! Every rank holds that value. The gradient on a rank is this rank's part, so that the sum over the ranks is the gradient of the
//! value, however unequal the number of targets on each.
//!
//! [`cross_entropy`] takes logits that were made. [`Logits`] are not made: the product with the vocabulary, the loss and the gradients are
//! computed for some tokens at a time, so that no tensor [tokens, V] exists.

use std::cell::Cell;

use autosp_plan::codes;
use candle_core::{D, DType, Device, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::comm::{Tag, all_gather};
use crate::ops::{
    Kernel, Real, Rows, Visit, compute, max, owned, per_row, record, sum, tensor, visit, wide,
};
use crate::{Error, scope};

pub mod head;
mod tiled;

pub use head::Logits;
pub use tiled::linear_cross_entropy;

/// The label of a position that has no target.
pub const IGNORE: i64 = -100;

thread_local! {
    /// Valid targets, over all ranks, of the losses that this thread has taken since a trainer last asked; `None` if it took none.
    static TARGETS: Cell<Option<u64>> = const { Cell::new(None) };

    /// Whether a loss without a target is zero: one micro-batch of several may have none.
    static EMPTY: Cell<bool> = const { Cell::new(false) };
}

/// Mean cross-entropy, in nats, of `logits` `[.., V]` against `labels` `[..]` (whole numbers of any type; [`IGNORE`], -100, has no
/// loss).
///
/// Inside a sharded scope the mean is over the valid targets of all ranks, and every rank gets its value; a rank without a target
/// contributes nothing. On one rank and outside a scope it is the plain mean. The result is a scalar, `f32` (`f64` for `f64` logits):
/// losses are computed in that type and added in `f64`. The backward, `(softmax(logits) - onehot(labels)) / N`, writes the gradient
/// of the logits and nothing else of their size.
///
/// # Errors
/// AS0510 if there is no valid target on any rank; AS0511 if a label is no class; AS0509 if shapes do not fit.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let width = logits.dim(D::Minus1)?;
    let classes = classes(&logits.dims()[..logits.rank() - 1], width, labels)?;
    let dtype = wide(logits.dtype());
    let valid = classes.iter().filter(|class| class.is_some()).count();
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(loss) = on_gpu(&crate::scores::before_cast(logits)?, &classes, valid)?
    {
        return Ok(loss);
    }
    if !logits.device().is_cpu() {
        return composed(logits, &classes, valid, dtype);
    }
    let Sums { lse, total } = visit(&Forward { classes: &classes }, [logits])?;
    let (total, count) = over_ranks(total, valid)?;
    let value = Tensor::new(total / count, &Device::Cpu)?.to_dtype(dtype)?;
    record(
        "cross-entropy",
        [logits],
        owned(&value)?,
        move |[logits], grad| {
            let scale = grad.to_dtype(DType::F64)?.to_scalar::<f64>()? / count;
            Ok([Some(tensor(compute(
                &Backward {
                    classes: &classes,
                    lse: &lse,
                    scale,
                },
                [logits],
            )?))])
        },
    )
}

/// [`cross_entropy`] of rows `[b * s, V]`, with dimensions of length 1 between, against the labels `[b, s]` of a shard.
///
/// # Errors
/// As [`cross_entropy`].
pub fn token_loss(rows: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let classes = rows.dim(D::Minus1)?;
    cross_entropy(&rows.reshape(((), classes))?, &labels.flatten_all()?)
}

/// Runs `f`, in which a loss without any target is 0 with a gradient of 0.
pub(crate) fn allow_empty<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);

    impl Drop for Restore {
        fn drop(&mut self) {
            EMPTY.set(self.0);
        }
    }

    let _restore = Restore(EMPTY.replace(true));
    f()
}

/// Valid targets since the last call, over all ranks; `None` if there was no loss.
pub(crate) fn take_targets() -> Option<u64> {
    TARGETS.take()
}

/// The class of every position, `None` where it is ignored, of logits `[leading.., vocabulary]`.
fn classes(
    leading: &[usize],
    vocabulary: usize,
    labels: &Tensor,
) -> crate::Result<Vec<Option<u32>>> {
    if leading != labels.dims() || !labels.dtype().is_int() {
        let text = format!(
            "expected whole labels of shape {leading:?} for logits {leading:?} x {vocabulary}, found {:?} of shape {:?}",
            labels.dtype(),
            labels.dims()
        );
        return Err(Error::new(codes::BATCH_SHAPE, text));
    }
    // -100 has no other form in an unsigned type.
    let ignore = [IGNORE, i64::from(IGNORE as u32)];
    let labels = labels
        .to_device(&Device::Cpu)?
        .flatten_all()?
        .to_dtype(DType::I64)?
        .to_vec1::<i64>()?;
    let class = |(position, label): (usize, i64)| match u32::try_from(label) {
        _ if ignore.contains(&label) => Ok(None),
        Ok(class) if (class as usize) < vocabulary => Ok(Some(class)),
        _ => {
            let text = format!(
                "expected a label in 0..{vocabulary} or {IGNORE}, found {label} at position {position}"
            );
            Err(Error::new(codes::LABEL_RANGE, text))
        }
    };
    labels.into_iter().enumerate().map(class).collect()
}

/// The sum of the losses and the number of targets, over all ranks of the scope in progress; (0, 1) where there may be none.
fn over_ranks(total: f64, valid: usize) -> crate::Result<(f64, f64)> {
    let [sum, count] = add_over_ranks("sum", [total, valid as f64])?;
    Ok(counted(count)?.map_or((0.0, 1.0), |count| (sum, count)))
}

/// Numbers of all ranks of the scope in progress, added in the order of the ranks.
fn add_over_ranks<const N: usize>(what: &'static str, own: [f64; N]) -> crate::Result<[f64; N]> {
    let Some(scope) = scope::current().filter(|scope| scope.sp().world_size() > 1) else {
        return Ok(own);
    };
    let tag = Tag::new("loss", what).at(scope.step());
    let own = Tensor::new(&[own], &Device::Cpu)?;
    let all = all_gather(scope.sp().world_group(), tag, &own, 0)?.to_vec2::<f64>()?;
    let mut sums = [0.0; N];
    for rank in &all {
        for (sum, x) in sums.iter_mut().zip(rank) {
            *sum += x;
        }
    }
    Ok(sums)
}

/// Notes the targets of a loss; `None` where there are none and there need not be any.
fn counted(count: f64) -> crate::Result<Option<f64>> {
    if count == 0.0 && !EMPTY.get() {
        let text =
            format!("expected at least one target on some rank, found every label to be {IGNORE}");
        return Err(Error::new(codes::NO_TARGET, text));
    }
    TARGETS.set(Some(TARGETS.get().unwrap_or(0) + count as u64));
    Ok((count > 0.0).then_some(count))
}

struct Forward<'a> {
    classes: &'a [Option<u32>],
}

struct Sums {
    /// log(sum(exp(row))) of every row; 0 where there is no target.
    lse: Vec<f64>,
    /// Sum of the rows' losses.
    total: f64,
}

impl Visit<1> for Forward<'_> {
    const NAME: &'static str = "cross-entropy";
    type Output = Sums;

    fn visit<T: WithDType, A: Real>(&self, [logits]: [Rows<'_, T>; 1]) -> Result<Sums> {
        let width = logits.width();
        let scratch = || vec![A::ZERO; width];
        let row = |row: &mut Vec<A>, (i, class): (usize, &Option<u32>)| match *class {
            None => (0.0, 0.0),
            Some(class) => {
                logits.read(i, row);
                let target = row[class as usize].wide();
                let top = max(row);
                for x in row.iter_mut() {
                    *x = (*x - top).exp();
                }
                let lse = top.wide() + sum(row).wide().ln();
                (lse, lse - target)
            }
        };
        let (lse, losses): (Vec<f64>, Vec<f64>) = self
            .classes
            .par_iter()
            .enumerate()
            .map_init(scratch, row)
            .unzip();
        Ok(Sums {
            lse,
            total: losses.iter().sum(),
        })
    }
}

struct Backward<'a> {
    classes: &'a [Option<u32>],
    lse: &'a [f64],
    /// What a unit of token loss is worth: the gradient of the mean, divided by the number of targets.
    scale: f64,
}

impl Kernel<1> for Backward<'_> {
    const NAME: &'static str = "cross-entropy backward";

    fn run<T: WithDType, A: Real>(&self, [logits]: [Rows<'_, T>; 1]) -> Result<(Vec<T>, Shape)> {
        let scale = A::real(self.scale);
        let out = per_row(
            logits.count(),
            logits.width(),
            logits.width(),
            |i, out: &mut [T], row: &mut [A]| {
                let Some(class) = self.classes[i] else { return };
                logits.read(i, row);
                let lse = A::real(self.lse[i]);
                for x in row.iter_mut() {
                    *x = (*x - lse).exp();
                }
                row[class as usize] = row[class as usize] - A::real(1.0);
                for (slot, &x) in out.iter_mut().zip(row.iter()) {
                    *slot = (x * scale).down();
                }
            },
        );
        Ok((out, logits.shape().clone()))
    }
}

/// The same by kernels on a GPU, where the token losses are computed in `f32` and added in `f64`; `None` for a type that they do
/// not take.
#[cfg(feature = "cuda")]
fn on_gpu(logits: &Tensor, classes: &[Option<u32>], valid: usize) -> Result<Option<Tensor>> {
    use crate::cuda::ops;
    let rows = classes.len();
    let classes = classes_on_gpu(classes, logits.device())?;
    let flat = move |x: &Tensor| x.detach().reshape((rows, x.dim(D::Minus1)?));
    let Some([lse, losses]) = ops::loss_forward(&flat(logits)?, &classes)? else {
        return Ok(None);
    };
    let total = losses.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    let (total, count) = over_ranks(total, valid)?;
    let value = Tensor::new((total / count) as f32, logits.device())?;
    let loss = record(
        "cross-entropy",
        [logits],
        owned(&value)?,
        move |[logits], grad| {
            let scale = grad.to_dtype(DType::F64)?.to_scalar::<f64>()? / count;
            let dx = ops::loss_backward(&flat(logits)?, &classes, &lse, scale)?;
            Ok([Some(dx.reshape(logits.shape())?)])
        },
    )?;
    Ok(Some(loss))
}

/// Classes as kernels read them.
#[cfg(feature = "cuda")]
fn classes_on_gpu(classes: &[Option<u32>], device: &Device) -> Result<Tensor> {
    let none = crate::cuda::ops::NO_CLASS;
    let classes: Vec<u32> = classes.iter().map(|class| class.unwrap_or(none)).collect();
    Tensor::new(classes, device)
}

/// The same by candle's differentiable operations, for devices without a kernel here.
fn composed(
    logits: &Tensor,
    classes: &[Option<u32>],
    valid: usize,
    dtype: DType,
) -> Result<Tensor> {
    let own = sum_of_losses(&logits.reshape((classes.len(), ()))?, classes, dtype)?;
    let here = own.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    let (total, count) = over_ranks(here, valid)?;
    // The value is that of all ranks; the gradient is that of `own` alone.
    own.affine(1.0 / count, (total - here) / count)
}

/// The sum of the losses of rows `[n, V]`, in `dtype`, by operations that have a backward.
fn sum_of_losses(logits: &Tensor, classes: &[Option<u32>], dtype: DType) -> Result<Tensor> {
    let (device, rows) = (logits.device(), classes.len());
    let targets: Vec<u32> = classes.iter().map(|class| class.unwrap_or(0)).collect();
    let weights: Vec<f32> = classes
        .iter()
        .map(|class| if class.is_some() { 1.0 } else { 0.0 })
        .collect();
    let logits = logits.to_dtype(dtype)?;
    let picked = logits
        .gather(&Tensor::from_vec(targets, (rows, 1), device)?, 1)?
        .squeeze(1)?;
    let weights = Tensor::from_vec(weights, rows, device)?.to_dtype(dtype)?;
    // A row without a target may hold anything, also infinities, which a weight of zero would not silence.
    let losses = (logits.log_sum_exp(1)? - picked)?;
    weights
        .ne(0.0)?
        .where_cond(&losses, &losses.zeros_like()?)?
        .sum_all()
}

#[cfg(test)]
mod tests;
