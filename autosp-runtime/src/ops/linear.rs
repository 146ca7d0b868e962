//! A linear layer whose weights may be frozen: `y = x W^T + b`, `dx = dy W`, `dW = dy^T x`, `db` the sum of `dy` over the rows.
//!
//! candle walks back into both operands of a matrix product, so that a frozen weight costs a gradient of its own size and the product
//! that makes it, and it turns operands round for it. Here the gradients of x and W are one product each; a frozen weight has none.

use candle_core::{Result, Shape, Storage, Tensor};
use candle_nn::{Linear, Module};

use super::{cast, owned, record, record_gradient, taken, tape, tracked, wide};

/// The layer applied to `x` `[.., in]`; as candle's, but that frozen weights get no gradient and cost none.
///
/// # Errors
/// Those of candle's layer.
pub fn linear(layer: &Linear, x: &Tensor) -> Result<Tensor> {
    if x.rank() >= 2 && (x.device().is_cuda() || tape::holds(x) || tape::holds(layer.weight())) {
        return product(layer, x);
    }
    let weight = layer.weight();
    if tracked(weight) || !tracked(x) {
        return layer.forward(x);
    }
    let bias = layer.bias();
    let inside = bias.filter(|bias| !tracked(bias));
    let product = Linear::new(weight.clone(), inside.cloned()).forward(&x.detach())?;
    let back = Linear::new(weight.t()?, None);
    let y = record_gradient("linear", [x], owned(&product)?, move |grad| {
        Ok([Some(back.forward(grad)?)])
    })?;
    match bias.filter(|bias| tracked(bias)) {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// The layer as one operation.
fn product(layer: &Linear, x: &Tensor) -> Result<Tensor> {
    let (weight, bias) = (layer.weight(), layer.bias());
    let (out, width) = weight.dims2()?;
    let mut y = rows(x, width)?.matmul(&weight.detach().t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.detach())?;
    }
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = out;
    }
    let result: (Storage, Shape) = (taken(&y)?, shape.into());
    let wanted = [tracked(x), tracked(weight)];
    let gradients =
        move |grad: &Tensor, x: &Tensor, weight: &Tensor| -> Result<[Option<Tensor>; 2]> {
            let dx = wanted[0].then(|| grad.matmul(weight)?.reshape(x.shape()));
            let dw = wanted[1].then(|| grad.t()?.matmul(&rows(x, width)?));
            Ok([dx.transpose()?, dw.transpose()?])
        };
    match bias.filter(|bias| tracked(bias)) {
        None => {
            let backward = move |[x, weight]: [&Tensor; 2], grad: &Tensor| {
                gradients(&rows(grad, out)?, x, weight)
            };
            record("linear", [x, weight], result, backward)
        }
        Some(bias) => {
            let backward = move |[x, weight, bias]: [&Tensor; 3], grad: &Tensor| {
                let grad = rows(grad, out)?;
                let [dx, dw] = gradients(&grad, x, weight)?;
                Ok([dx, dw, Some(column_sums(&grad)?.to_dtype(bias.dtype())?)])
            };
            let operands = [x, weight, bias];
            record("linear", operands, result, backward)
        }
    }
}

/// Contiguous `[rows, width]`, detached.
fn rows(x: &Tensor, width: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let x = crate::cuda::ops::contiguous(x)?;
        return x.reshape((x.elem_count() / width.max(1), width));
    }
    let x = x.detach().contiguous()?;
    x.reshape((x.elem_count() / width.max(1), width))
}

/// The sum over the rows, taken in a type that is wide enough for many.
fn column_sums(x: &Tensor) -> Result<Tensor> {
    cast(x, wide(x.dtype()))?.sum(0)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// The gradients that candle's store is left with are those of the leaves: variables, and constants that it walked into.
    #[test]
    fn frozen_weights_get_no_gradient_and_others_the_same() {
        let make = |shape: &[usize], frozen: bool| {
            let n: usize = shape.iter().product();
            let x = Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap();
            let x = ((x * 0.37).unwrap().sin().unwrap()).reshape(shape).unwrap();
            if frozen {
                x
            } else {
                Var::from_tensor(&x).unwrap().into_inner()
            }
        };
        for shape in [&[2, 3, 4][..], &[3, 4], &[2, 2, 3, 4]] {
            for (weight_frozen, bias) in [
                (true, None),
                (true, Some(true)),
                (true, Some(false)),
                (false, Some(true)),
            ] {
                let x = make(shape, false);
                let layer = Linear::new(
                    make(&[5, 4], weight_frozen),
                    bias.map(|frozen| make(&[5], frozen)),
                );
                let grads = |y: Tensor| {
                    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                    let values = |x: &Tensor| {
                        grads
                            .get(x)
                            .map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap())
                    };
                    let found = (
                        values(&x).unwrap(),
                        values(layer.weight()),
                        layer.bias().and_then(values),
                    );
                    let held: usize = grads
                        .get_ids()
                        .filter_map(|id| grads.get_id(*id))
                        .map(Tensor::elem_count)
                        .sum();
                    (found, held)
                };
                let (plain, walked) = grads(layer.forward(&x).unwrap());
                let (found, held) = grads(linear(&layer, &x).unwrap());
                for (a, b) in plain.0.iter().zip(&found.0) {
                    assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} {b}");
                }
                if weight_frozen {
                    assert_eq!(found.1, None);
                    assert!(held + 20 <= walked, "{held} of {walked}");
                    let trained =
                        shape.iter().product::<usize>() + if bias == Some(false) { 5 } else { 0 };
                    assert_eq!(held, trained);
                } else {
                    assert_eq!((&found.1, held), (&plain.1, walked));
                }
                if bias == Some(false) {
                    assert_eq!(found.2, plain.2);
                }
            }
        }
    }
}
