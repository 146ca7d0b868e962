//! Random programs on a tape against the same programs in candle's graph.

use std::collections::HashMap;

use candle_core::{D, DType, Device, TensorId, Var};
use candle_nn::Linear;
use proptest::prelude::*;

use super::*;
use crate::ops::{self, Recorded};

const ROWS: usize = 3;
const WIDTH: usize = 4;

fn numbers(seed: u64, dims: &[usize]) -> Tensor {
    let count: usize = dims.iter().product();
    let data: Vec<f64> = (0..count)
        .map(|i| ((seed as f64 * 12.9898 + i as f64 * 78.233).sin() * 43_758.545_3).fract())
        .collect();
    Tensor::from_vec(data, dims, &Device::Cpu).unwrap()
}

/// Variables of the model.
struct Model {
    square: Linear,
    biased: Linear,
    scale: Var,
}

impl Model {
    fn new() -> Self {
        let var = |seed, dims: &[usize]| Var::from_tensor(&numbers(seed, dims)).unwrap();
        let weight = |seed| var(seed, &[WIDTH, WIDTH]).into_inner();
        Self {
            square: Linear::new(weight(1), None),
            biased: Linear::new(weight(2), Some(var(3, &[WIDTH]).into_inner())),
            scale: var(4, &[WIDTH]),
        }
    }

    fn variables(&self) -> Vec<Tensor> {
        let bias = self.biased.bias().unwrap();
        let all = [self.square.weight(), self.biased.weight(), bias];
        all.into_iter()
            .cloned()
            .chain([self.scale.as_tensor().clone()])
            .collect()
    }
}

/// One operation on earlier results, which are all [ROWS, WIDTH].
fn step(model: &Model, op: u8, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match op {
        0 => ops::add(a, b),
        1 => ops::mul(a, b),
        2 => ops::mul(ops::silu(a), b),
        3 => ops::mul(b, ops::silu(a)?),
        4 => ops::linear(&model.square, a),
        5 => ops::linear(
            &model.biased,
            &ops::rms_norm_op(a, model.scale.as_tensor(), 0.1)?,
        ),
        6 => ops::rms_norm_op(a, model.scale.as_tensor(), 0.1),
        7 => a.reshape__sp((WIDTH, ROWS))?.t__sp()?.contiguous__sp(),
        8 => a
            .transpose__sp(0, 1)?
            .flatten_all__sp()?
            .reshape__sp((ROWS, WIDTH)),
        9 => a
            .unsqueeze__sp(0)?
            .permute__sp((2, 0, 1))?
            .squeeze__sp(1)?
            .t__sp(),
        // Operations of candle's own, between the others and on views of theirs.
        10 => a.tanh()?.broadcast_add(model.scale.as_tensor()),
        11 => (a.t__sp()?.sqr()? * 0.5)?.t(),
        12 => a.broadcast_mul(&b.sum_keepdim(D::Minus1)?),
        13 => ops::softmax_last_dim(a),
        14 => Ok(a.detach()),
        _ => ops::add(
            a.to_dtype__sp(DType::F32)?.to_dtype__sp(DType::F64)?,
            b.clone(),
        ),
    }
}

fn program(model: &Model, steps: &[(u8, usize, usize)], x: &Tensor) -> Result<Tensor> {
    let mut results = vec![x.clone()];
    for &(op, a, b) in steps {
        let pick = |i: usize| results[i % results.len()].clone();
        let result = step(model, op, &pick(a), &pick(b))?;
        results.push(result);
    }
    Ok(results.pop().unwrap())
}

/// The result, the input's gradient and those of the variables.
type Found = (Tensor, Option<Tensor>, Vec<Option<Tensor>>);

fn by_graph(
    model: &Model,
    steps: &[(u8, usize, usize)],
    x: &Tensor,
    grad: &Tensor,
) -> Result<Found> {
    let x = Var::from_tensor(x)?;
    let y = program(model, steps, x.as_tensor())?;
    let mut grads = (&y * grad)?.sum_all()?.backward()?;
    let of_x = grads.remove(&x);
    let variables = model.variables();
    Ok((y, of_x, variables.iter().map(|v| grads.remove(v)).collect()))
}

fn by_tape(
    model: &Model,
    steps: &[(u8, usize, usize)],
    x: &Tensor,
    grad: &Tensor,
) -> Result<Found> {
    let (y, block) = record(&input(x, true)?, |x| program(model, steps, x))?;
    let mut sums: HashMap<TensorId, Tensor> = HashMap::new();
    let of_x = block.backward(grad, &mut |variable, grad| {
        let sum = match sums.remove(&variable.id()) {
            None => grad,
            Some(sum) => (sum + grad)?,
        };
        sums.insert(variable.id(), sum);
        Ok(())
    })?;
    let variables = model.variables();
    Ok((
        y,
        of_x,
        variables.iter().map(|v| sums.remove(&v.id())).collect(),
    ))
}

fn assert_near(name: &str, found: Option<&Tensor>, expected: Option<&Tensor>) {
    let flat = |x: Option<&Tensor>| match x {
        None => Vec::new(),
        Some(x) => x.flatten_all().unwrap().to_vec1::<f64>().unwrap(),
    };
    let (mut found, mut expected) = (flat(found), flat(expected));
    // No gradient is zero.
    found.resize(found.len().max(expected.len()), 0.0);
    expected.resize(found.len(), 0.0);
    for (a, b) in found.iter().zip(&expected) {
        assert!(
            (a - b).abs() <= 2e-6 * (1.0 + b.abs()),
            "{name}: {a} for {b}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_tape_gives_the_gradients_of_the_graph(
        steps in prop::collection::vec((0u8..16, 0usize..64, 0usize..64), 1..12)
    ) {
        let model = Model::new();
        let (x, grad) = (numbers(7, &[ROWS, WIDTH]), numbers(8, &[ROWS, WIDTH]));
        let expected = by_graph(&model, &steps, &x, &grad).unwrap();
        let found = by_tape(&model, &steps, &x, &grad).unwrap();
        assert_near("result", Some(&found.0), Some(&expected.0));
        assert_near("input", found.1.as_ref(), expected.1.as_ref());
        for (i, (found, expected)) in found.2.iter().zip(&expected.2).enumerate() {
            assert_near(&format!("variable {i}"), found.as_ref(), expected.as_ref());
        }
        // For its values alone, the same program.
        let alone = values(|| program(&model, &steps, &x)).unwrap();
        assert_near("values", Some(&alone), Some(&expected.0));
    }
}

/// What a backward does not need is gone when the block has run, and what it needs when it has been used.
#[test]
fn nothing_is_kept_that_no_backward_needs() {
    let model = Model::new();
    let x = numbers(7, &[ROWS, WIDTH]);
    let (_, block) = record(&input(&x, true).unwrap(), |x| {
        let y = ops::add(x, &x.t__sp()?.contiguous__sp()?.reshape__sp((ROWS, WIDTH))?)?;
        assert!(is_recording());
        ops::linear(&model.square, &y)
    })
    .unwrap();
    assert!(!is_recording());
    // The input, t, contiguous, reshape, the sum, the layer.
    assert_eq!(block.entries.len(), 6);
    assert!(block.movable);
}

#[test]
fn an_error_in_a_block_ends_its_tape() {
    let x = numbers(7, &[ROWS, WIDTH]);
    assert!(record(&input(&x, true).unwrap(), |x| x.reshape__sp(5)).is_err());
    assert!(!is_recording() && !is_for_values());
}

/// Attention takes queries and keys in the type that they were cast from; both runs of a block have to know it.
#[test]
fn casts_are_known_in_both_runs_of_a_block() {
    let half = numbers(7, &[2, ROWS, WIDTH]).to_dtype(DType::BF16).unwrap();
    let seen = |x: &Tensor| -> Result<Tensor> {
        let wide = x.to_dtype__sp(DType::F32)?;
        let turned = wide.reshape__sp((1, 2, ROWS, WIDTH))?.t__sp()?;
        for (y, dims) in [
            (&wide, vec![2, ROWS, WIDTH]),
            (&turned, vec![1, 2, WIDTH, ROWS]),
            (&turned.contiguous__sp()?, vec![1, 2, WIDTH, ROWS]),
        ] {
            let Some(Hint::Cast(narrow)) = hint(y) else {
                panic!("the cast of {:?} is not known", y.dims())
            };
            assert_eq!(
                (narrow.dtype(), narrow.dims()),
                (DType::BF16, dims.as_slice())
            );
            assert_eq!(y.to_dtype__sp(DType::BF16)?.id(), narrow.id());
        }
        Ok(turned)
    };
    record(&input(&half, true).unwrap(), seen).unwrap();
    values(|| seen(&half)).unwrap();
}

/// The gated product is made in one way, whether it is recorded or not.
#[test]
fn gates_have_the_same_bits_in_both_runs_of_a_block() {
    let x = numbers(7, &[ROWS, WIDTH]).to_dtype(DType::BF16).unwrap();
    let gated = |x: &Tensor| ops::mul(ops::silu(x)?, ops::add(x, x)?);
    let (recorded, _) = record(&input(&x, true).unwrap(), gated).unwrap();
    let alone = values(|| gated(&x)).unwrap();
    let bits = |x: &Tensor| x.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(bits(&recorded), bits(&alone));
}

/// An input that needs no gradient gets none, through whatever operation.
#[test]
fn an_input_without_a_gradient_gets_none() {
    let (model, x) = (Model::new(), numbers(7, &[ROWS, WIDTH]));
    let (y, block) = record(&x, |x| {
        let y = ops::add(x, ops::linear(&model.square, x)?)?;
        ops::mul(ops::mul(&y, x)?, ops::silu(x)?)
    })
    .unwrap();
    let mut variables = 0;
    let of_x = block
        .backward(&y.detach(), &mut |_, _| {
            variables += 1;
            Ok(())
        })
        .unwrap();
    assert!(of_x.is_none());
    assert_eq!(variables, 1);
}
