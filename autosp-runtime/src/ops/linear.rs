//! A linear layer whose weights may be frozen.
//!
//! candle walks back into both operands of a matrix product, so that a frozen weight costs a gradient of its own size and the product
//! that makes it. Here the gradient goes to the input alone: `y = x W^T + b`, `dx = dy W`.

use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module};

use super::{owned, record1, tracked};

/// The layer applied to `x` `[.., in]`; as candle's, but that frozen weights get no gradient and cost none.
///
/// # Errors
/// Those of candle's layer.
pub fn linear(layer: &Linear, x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && x.rank() >= 2 {
        return super::modules::linear(layer, x);
    }
    let weight = layer.weight();
    if tracked(weight) || !tracked(x) {
        return layer.forward(x);
    }
    let bias = layer.bias();
    let inside = bias.filter(|bias| !tracked(bias));
    let product = Linear::new(weight.clone(), inside.cloned()).forward(&x.detach())?;
    let back = Linear::new(weight.t()?, None);
    let y = record1("linear", x, owned(&product)?, move |_, _, grad| {
        Ok([Some(back.forward(grad)?)])
    })?;
    match bias.filter(|bias| tracked(bias)) {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
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
