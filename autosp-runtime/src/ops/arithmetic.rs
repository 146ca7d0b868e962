//! Sums and products of tensors of one shape, which models write as operators, and what a gated activation makes of them.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};

use super::tape::{self, Hint, Recipe};
use super::{Kernel, Real, Rows, compute, record, record_hinted, taken, tensor, tracked};

/// What can stand beside an operator of candle's tensors.
pub trait Operand {
    /// The tensor.
    ///
    /// # Errors
    /// The error that stands in its place.
    fn operand(self) -> Result<Tensor>;
}

impl Operand for Tensor {
    fn operand(self) -> Result<Tensor> {
        Ok(self)
    }
}

impl Operand for &Tensor {
    fn operand(self) -> Result<Tensor> {
        Ok(self.clone())
    }
}

impl Operand for Result<Tensor> {
    fn operand(self) -> Result<Tensor> {
        self
    }
}

/// `a + b`; the gradient goes to both as it is.
///
/// # Errors
/// Those of candle's operator.
pub fn add(a: impl Operand, b: impl Operand) -> Result<Tensor> {
    let (a, b) = (a.operand()?, b.operand()?);
    if a.dims() != b.dims() || !(tape::holds(&a) || tape::holds(&b)) {
        return &a + &b;
    }
    let sum = tape::result((taken(&sum(&a, &b)?)?, a.shape().clone()), None);
    let both = tracked(&a) && tracked(&b);
    tape::push(&[&a, &b], &sum, (None, true), move |grad| {
        Ok(if both {
            vec![Some(grad.shared()), Some(grad.shared())]
        } else {
            vec![Some(grad.shared()), Some(grad)]
        })
    });
    Ok(sum)
}

/// `a * b`. The product of a `silu` is that of a gated activation, `silu(x) b`, whose backward begins with `x` and `b`; the product
/// itself is made again where a backward needs it.
///
/// # Errors
/// Those of candle's operator.
pub fn mul(a: impl Operand, b: impl Operand) -> Result<Tensor> {
    let (a, b) = (a.operand()?, b.operand()?);
    if a.dims() != b.dims() || !(tape::holds(&a) || tape::holds(&b)) {
        return &a * &b;
    }
    let silu = |x: &Tensor| match tape::hint(x) {
        Some(Hint::Silu(inner)) => Some(inner),
        _ => None,
    };
    if let Some(x) = silu(&a) {
        return gated(&x, &b);
    }
    if let Some(x) = silu(&b) {
        return gated(&x, &a);
    }
    let result = (taken(&product(&a, &b)?)?, a.shape().clone());
    let wanted = [tracked(&a), tracked(&b)];
    let backward = move |[a, b]: [&Tensor; 2], grad: &Tensor| {
        let da = wanted[0].then(|| product(grad, b)).transpose()?;
        let db = wanted[1].then(|| product(grad, a)).transpose()?;
        Ok([da, db])
    };
    record("mul", [&a, &b], result, backward)
}

/// `silu(x) b`.
fn gated(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    let result = (taken(&gate(x, b)?)?, x.shape().clone());
    tape::keep(x);
    tape::keep(b);
    let (gate_of, with) = (x.detach(), b.detach());
    let recipe = Recipe::new(move || gate(&gate_of, &with));
    let backward = |[x, b]: [&Tensor; 2], grad: &Tensor| {
        let [dx, db] = gate_backward(x, b, grad)?;
        Ok([Some(dx), Some(db)])
    };
    record_hinted(
        "silu mul",
        [x, b],
        result,
        Some(Hint::Again(recipe)),
        backward,
    )
}

/// `silu(x)`: `y = x s`, `s = 1 / (1 + exp(-x))`; backward `dx = dy s (1 + x (1 - s))`.
///
/// # Errors
/// When `xs` is not of a floating point type.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if xs.device().is_cuda()
        && let Some(y) = crate::cuda::ops::silu_forward(xs)?
    {
        let result = (taken(&y)?, xs.shape().clone());
        return record_silu(xs, result, |x, grad| {
            Ok(crate::cuda::ops::silu_backward(x, grad)?)
        });
    }
    if !tape::holds(xs) || !xs.device().is_cpu() {
        return candle_nn::ops::silu(xs);
    }
    let y = candle_nn::ops::silu(&xs.detach())?;
    record_silu(xs, (taken(&y)?, xs.shape().clone()), |x, grad| {
        Ok(Some(tensor(compute(&SiluBackward, [x, grad])?)))
    })
}

fn record_silu(
    xs: &Tensor,
    result: (candle_core::Storage, candle_core::Shape),
    backward: impl Fn(&Tensor, &Tensor) -> Result<Option<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let hint = tape::holds(xs).then(|| Hint::Silu(xs.clone()));
    let backward = move |[x]: [&Tensor; 1], grad: &Tensor| Ok([backward(x, grad)?]);
    record_hinted("silu", [xs], result, hint, backward)
}

struct SiluBackward;

impl Kernel<2> for SiluBackward {
    const NAME: &'static str = "silu backward";

    fn run<T: candle_core::WithDType, A: Real>(
        &self,
        [x, grad]: [Rows<'_, T>; 2],
    ) -> Result<(Vec<T>, candle_core::Shape)> {
        let one = A::real(1.0);
        let out = super::per_row(x.count(), x.width(), 0, |i, out: &mut [T], _: &mut [A]| {
            for ((slot, &x), &g) in out.iter_mut().zip(x.row(i)).zip(grad.row(i)) {
                let (x, g) = (A::up(x), A::up(g));
                let s = one / (one + (A::ZERO - x).exp());
                *slot = (g * s * (one + x * (one - s))).down();
            }
        });
        Ok((out, x.shape().clone()))
    }
}

/// `a + b` of detached tensors of one shape.
fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda()
        && let Some(sum) = crate::cuda::ops::add(a, b)?
    {
        return Ok(sum);
    }
    &a.detach() + &b.detach()
}

/// `a * b` of detached tensors of one shape.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda()
        && let Some(product) = crate::cuda::ops::mul(a, b)?
    {
        return Ok(product);
    }
    &a.detach() * &b.detach()
}

fn gate(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = crate::cuda::ops::gated_forward(x, b)?
    {
        return Ok(y);
    }
    candle_nn::ops::silu(&x.detach())? * b.detach()
}

/// The gradients of x and b.
fn gate_backward(x: &Tensor, b: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(grads) = crate::cuda::ops::gated_backward(x, b, grad)?
    {
        return Ok(grads);
    }
    let inner = (grad * b)?;
    let dx = if x.device().is_cpu() {
        tensor(compute(&SiluBackward, [x, &inner])?)
    } else {
        let s = candle_nn::ops::sigmoid(x)?;
        let slope = (&s * ((x * (1.0 - &s)?)? + 1.0)?)?;
        (inner * slope)?
    };
    Ok([dx, (candle_nn::ops::silu(x)? * grad)?])
}

/// The type that many numbers of type `dtype` are added in: half precision in `f32`, others in their own.
pub(crate) fn wide(dtype: DType) -> DType {
    match dtype {
        DType::BF16 | DType::F16 => DType::F32,
        same => same,
    }
}

/// `x` in another type, detached.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = crate::cuda::ops::cast(x, dtype)?
    {
        return Ok(y);
    }
    x.detach().to_dtype(dtype)
}

/// The sum of two parts of a sum in `dtype`.
pub(crate) fn sum_as(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if a.device().is_cuda()
        && dtype == DType::F32
        && let Some(sum) = crate::cuda::ops::add_wide(a, b)?
    {
        return Ok(sum);
    }
    accumulate(cast(a, dtype)?, a.dtype() != dtype, &cast(b, dtype)?)
}

/// `into + from`, in the memory of `into` where it is fresh and contiguous.
pub(crate) fn accumulate(into: Tensor, fresh: bool, from: &Tensor) -> Result<Tensor> {
    // candle writes into no tensor that may have one element twice, of which a stride of zero is the sign, also for a dim of one.
    let writable = fresh && into.is_contiguous() && !into.stride().contains(&0);
    if writable && into.dims() == from.dims() && into.dtype() == from.dtype() {
        #[cfg(feature = "cuda")]
        if into.device().is_cuda() {
            return if crate::cuda::ops::add_to(&into, from)? {
                Ok(into)
            } else {
                sum(&into, from)
            };
        }
        if into.device().is_cpu() {
            into.inplace_op2(&from.contiguous()?, &AddTo)?;
            return Ok(into);
        }
    }
    sum(&into, from)
}

/// Adds one contiguous tensor to another.
struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add to"
    }

    fn cpu_fwd(
        &self,
        into: &mut CpuStorage,
        into_layout: &Layout,
        from: &CpuStorage,
        from_layout: &Layout,
    ) -> Result<()> {
        fn added<T: Copy + std::ops::AddAssign>(
            (into, at): (&mut [T], &Layout),
            (from, of): (&[T], &Layout),
        ) -> Result<()> {
            let (Some((a, b)), Some((c, d))) = (at.contiguous_offsets(), of.contiguous_offsets())
            else {
                bail!("add to: expected contiguous tensors")
            };
            for (x, &y) in into[a..b].iter_mut().zip(&from[c..d]) {
                *x += y;
            }
            Ok(())
        }
        let (at, of) = (into_layout, from_layout);
        match (into, from) {
            (CpuStorage::F32(x), CpuStorage::F32(y)) => added((x, at), (y, of)),
            (CpuStorage::F64(x), CpuStorage::F64(y)) => added((x, at), (y, of)),
            (CpuStorage::BF16(x), CpuStorage::BF16(y)) => added((x, at), (y, of)),
            (CpuStorage::F16(x), CpuStorage::F16(y)) => added((x, at), (y, of)),
            _ => bail!("add to: expected two tensors of one floating point type"),
        }
    }
}
