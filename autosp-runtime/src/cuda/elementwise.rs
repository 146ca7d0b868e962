//! Operations element by element on tensors of one shape, in float, rounded once. Each returns `None` where it has no kernel.

use autosp_templates::kernels::Element;
use candle_core::{DType, Tensor};

use super::kernels::{Launch, Module, aligned, element, function, looping};
use super::memory::{address, device_of, unwritten};
use super::ops::{contiguous, flat};
use crate::Result;

/// x s(x).
pub(crate) fn silu_forward(x: &Tensor) -> Result<Option<Tensor>> {
    Ok(elementwise("silu_forward", [x])?.map(|[y]| y))
}

/// dy s (1 + x (1 - s)).
pub(crate) fn silu_backward(x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
    Ok(elementwise("silu_backward", [x, grad])?.map(|[dx]| dx))
}

/// a + b.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    Ok(elementwise("add", [a, b])?.map(|[sum]| sum))
}

/// a b.
pub(crate) fn mul(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    Ok(elementwise("mul", [a, b])?.map(|[product]| product))
}

/// x s(x) b.
pub(crate) fn gated_forward(x: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    Ok(elementwise("gated_forward", [x, b])?.map(|[y]| y))
}

/// dy b s (1 + x (1 - s)) and dy x s.
pub(crate) fn gated_backward(x: &Tensor, b: &Tensor, grad: &Tensor) -> Result<Option<[Tensor; 2]>> {
    elementwise("gated_backward", [x, b, grad])
}

/// Adds `from` to a contiguous `into`. False, and nothing is done, where there is no kernel.
pub(crate) fn add_to(into: &Tensor, from: &Tensor) -> Result<bool> {
    let whole = aligned(into, 16 / into.dtype().size_in_bytes());
    let Some(element) = element(into.dtype()).filter(|_| into.dtype() == from.dtype() && whole)
    else {
        return Ok(false);
    };
    let from = contiguous(from)?;
    launch(element, "add", &[into, &from], &[into])?;
    Ok(true)
}

/// x in another type: from half precision to `f32` or back.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    let (name, narrow) = match (x.dtype(), dtype) {
        (narrow @ (DType::BF16 | DType::F16), DType::F32) => ("widen", narrow),
        (DType::F32, narrow @ (DType::BF16 | DType::F16)) => ("narrow", narrow),
        _ => return Ok(None),
    };
    let Some(element) = element(narrow) else {
        return Ok(None);
    };
    let x = contiguous(x)?;
    let y = unwritten(&device_of(&x)?, x.shape(), dtype)?;
    launch(element, name, &[&x], &[&y])?;
    Ok(Some(y))
}

/// a + b of half precision in `f32`.
pub(crate) fn add_wide(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let half = a.dtype() == b.dtype() && matches!(a.dtype(), DType::BF16 | DType::F16);
    let Some(element) = element(a.dtype()).filter(|_| half) else {
        return Ok(None);
    };
    let (a, b) = (contiguous(a)?, contiguous(b)?);
    let y = unwritten(&device_of(&a)?, a.shape(), DType::F32)?;
    launch(element, "add_wide", &[&a, &b], &[&y])?;
    Ok(Some(y))
}

fn elementwise<const N: usize, const M: usize>(
    name: &str,
    operands: [&Tensor; N],
) -> Result<Option<[Tensor; M]>> {
    let first = operands[0];
    let same = operands.iter().all(|x| x.dtype() == first.dtype());
    let Some(element) = element(first.dtype()).filter(|_| same) else {
        return Ok(None);
    };
    let operands = operands
        .into_iter()
        .map(contiguous)
        .collect::<Result<Vec<_>>>()?;
    let mut results = Vec::with_capacity(M);
    for _ in 0..M {
        results.push(unwritten(&device_of(first)?, first.shape(), first.dtype())?);
    }
    let operands: Vec<&Tensor> = operands.iter().collect();
    let written: Vec<&Tensor> = results.iter().collect();
    launch(element, name, &operands, &written)?;
    Ok(results.try_into().ok())
}

/// Runs a kernel of the element's module over all elements of contiguous tensors of one shape.
fn launch(element: Element, name: &str, operands: &[&Tensor], results: &[&Tensor]) -> Result<()> {
    let first = operands[0];
    let module = flat(element, first.elem_count());
    let addresses = operands
        .iter()
        .chain(results)
        .map(|x| address(x))
        .collect::<Result<Vec<_>>>()?;
    let count = first.elem_count() as i64;
    let kernel = function(&device_of(first)?, Module::Rows(module), name)?;
    let launch = addresses.iter().fold(Launch::new(&kernel), Launch::with);
    launch
        .with(&count)
        .run(looping(first.elem_count(), module.pack), name)
}
