//! Layers and activations whose gradients candle computes with more work than they need on a GPU. On the CPU they are candle's own.

use candle_core::{Module, Result, Tensor};

/// `candle_nn::ops::silu`: `y = x s`, `s = 1 / (1 + exp(-x))`; backward `dx = dy s (1 + x (1 - s))`.
///
/// # Errors
/// When `xs` is not of a floating point type.
pub fn silu(xs: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if xs.device().is_cuda()
        && let Some(y) = crate::cuda::ops::silu_forward(xs)?
    {
        let result = (super::taken(&y)?, xs.shape().clone());
        return super::record1("silu", xs, result, |[x], _, grad| {
            Ok([crate::cuda::ops::silu_backward(x, grad)?])
        });
    }
    candle_nn::ops::silu(xs)
}

/// What `module.forward(xs)` computes: `y = x Wᵀ + b`. The gradients of x and W are one product each, without candle's intermediate
/// transposes; a frozen weight has none.
///
/// # Errors
/// When the last dimension of `xs` is not the weight's second, or the types differ.
#[cfg(feature = "cuda")]
pub(super) fn linear(module: &candle_nn::Linear, xs: &Tensor) -> Result<Tensor> {
    let y = product(xs, module.weight())?;
    match module.bias() {
        None => Ok(y),
        Some(bias) => y.broadcast_add(bias),
    }
}

/// x Wᵀ with x [.., in] and W [out, in].
#[cfg(feature = "cuda")]
fn product(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    use super::{record2, taken, tracked};
    let (out, width) = weight.dims2()?;
    let rows = |x: &Tensor, width: usize| -> Result<Tensor> {
        let x = crate::cuda::ops::contiguous(x)?;
        x.reshape((x.elem_count() / width.max(1), width))
    };
    let y = rows(xs, width)?.matmul(&weight.detach().t()?)?;
    let mut shape = xs.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    let wanted = [tracked(xs), tracked(weight)];
    record2(
        "linear",
        xs,
        weight,
        (taken(&y)?, shape.into()),
        move |[x, weight], _, grad| {
            let grad = rows(grad, out)?;
            let dx = wanted[0].then(|| grad.matmul(weight)?.reshape(x.shape()));
            let dw = wanted[1].then(|| grad.t()?.matmul(&rows(x, width)?));
            Ok([dx.transpose()?, dw.transpose()?])
        },
    )
}

/// What `module.forward(ids)` computes: rows of the table. On a GPU the gradient of the table is summed in `f32`, by all threads at
/// once and in no fixed order.
///
/// # Errors
/// When an index is not a row, or `ids` is not of an integer type.
pub fn embedding(module: &candle_nn::Embedding, ids: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    {
        let table = module.embeddings();
        if table.device().is_cuda() && ids.dtype() == candle_core::DType::U32 && table.rank() == 2 {
            use super::{record1, taken};
            let (rows, width) = table.dims2()?;
            let index = crate::cuda::ops::contiguous(ids)?.flatten_all()?;
            let y = table.detach().index_select(&index, 0)?;
            let mut shape = ids.dims().to_vec();
            shape.push(width);
            return record1(
                "embedding",
                table,
                (taken(&y)?, shape.into()),
                move |[table], _, grad| {
                    let sum = crate::cuda::ops::embedding_backward(&index, grad, rows)?;
                    let Some(sum) = sum else {
                        return Ok([Some(table.zeros_like()?.index_add(
                            &index,
                            &grad.flatten_to(grad.rank() - 2)?,
                            0,
                        )?)]);
                    };
                    Ok([Some(sum)])
                },
            );
        }
    }
    module.forward(ids)
}
