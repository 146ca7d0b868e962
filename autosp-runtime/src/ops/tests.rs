//! The replacements against candle: forward against the fast operation, gradients against autograd over the slow one, and both
//! against finite differences in `f64`.

use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::{LayerNorm, RmsNorm};
use proptest::prelude::*;

use super::*;

/// Numbers in about [-2, 2] that depend on the seed alone.
fn numbers(seed: u64, dims: &[usize]) -> Tensor {
    let count: usize = dims.iter().product();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let data: Vec<f64> = (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0
        })
        .collect();
    Tensor::from_vec(data, dims, &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    let (a, b) = (wide(a), wide(b));
    let norm = |x: &Tensor| {
        x.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
            .sqrt()
    };
    // The floor is for gradients that cancel to nothing, such as those of a norm over two elements.
    norm(&(&a - &b).unwrap()) / (norm(&b) + 0.1)
}

/// The same in `f32` and `f64`.
const EPS: f64 = 1.0 / 512.0;

type Function<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// The sum of the result with fixed random weights, so that every element of the gradient counts differently.
fn weighed(y: &Tensor) -> Result<Tensor> {
    (y * numbers(77, y.dims()).to_dtype(y.dtype())?)?.sum_all()
}

fn gradients(f: &Function<'_>, inputs: &[Tensor]) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|x| Var::from_tensor(x).unwrap())
        .collect();
    let operands: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = weighed(&f(&operands).unwrap()).unwrap().backward().unwrap();
    vars.iter()
        .map(|v| grads.get(v).expect("every operand has a gradient").clone())
        .collect()
}

/// Checks the gradients of `fast` against autograd over `slow` in `dtype`, and against central differences in `f64`.
fn check(
    fast: &Function<'_>,
    slow: &Function<'_>,
    inputs: &[Tensor],
    dtype: DType,
    tolerance: f64,
) {
    let cast: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
    let (found, expected) = (fast(&cast).unwrap(), slow(&cast).unwrap());
    assert!(
        distance(&found, &expected) <= tolerance,
        "forward differs by {}",
        distance(&found, &expected)
    );
    for (i, (found, expected)) in gradients(fast, &cast)
        .iter()
        .zip(gradients(slow, &cast))
        .enumerate()
    {
        assert_eq!(found.dtype(), dtype);
        let error = distance(found, &expected);
        assert!(
            error <= 10.0 * tolerance,
            "gradient {i} differs from autograd by {error}"
        );
    }
    for (i, found) in gradients(fast, inputs).iter().enumerate() {
        let error = distance(found, &differences(fast, inputs, i));
        assert!(
            error <= 1e-6,
            "gradient {i} differs from finite differences by {error}"
        );
    }
}

fn differences(f: &Function<'_>, inputs: &[Tensor], which: usize) -> Tensor {
    let base: Vec<f64> = inputs[which].flatten_all().unwrap().to_vec1().unwrap();
    let step = 1e-5;
    let at = |i: usize, delta: f64| {
        let mut data = base.clone();
        data[i] += delta;
        let mut inputs = inputs.to_vec();
        inputs[which] = Tensor::from_vec(data, inputs[which].dims(), &Device::Cpu).unwrap();
        weighed(&f(&inputs).unwrap())
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    };
    let data: Vec<f64> = (0..base.len())
        .map(|i| (at(i, step) - at(i, -step)) / (2.0 * step))
        .collect();
    Tensor::from_vec(data, inputs[which].dims(), &Device::Cpu).unwrap()
}

fn with_types(fast: &Function<'_>, slow: &Function<'_>, inputs: &[Tensor]) {
    check(fast, slow, inputs, DType::F64, 1e-12);
    check(fast, slow, inputs, DType::F32, 1e-6);
}

fn tables(seed: u64, dims: &[usize]) -> [Tensor; 2] {
    let angle = numbers(seed, dims);
    [angle.cos().unwrap(), angle.sin().unwrap()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn softmax_has_candles_values_and_gradients(seed in 1u64..1 << 40, a in 1usize..4, b in 1usize..4, c in 1usize..40, dim in 0usize..3) {
        let x = numbers(seed, &[a, b, c]);
        with_types(&|x| softmax_last_dim(&x[0]), &|x| candle_nn::ops::softmax(&x[0], D::Minus1), std::slice::from_ref(&x));
        with_types(&|x| softmax(&x[0], dim), &|x| candle_nn::ops::softmax(&x[0], dim), &[x]);
    }

    #[test]
    fn norms_have_candles_values_and_gradients(seed in 1u64..1 << 40, a in 1usize..4, b in 1usize..4, n in 3usize..40) {
        let inputs = [numbers(seed, &[a, b, n]), numbers(seed + 1, &[n]), numbers(seed + 2, &[n])];
        with_types(&|x| rms_norm_op(&x[0], &x[1], 1e-5), &|x| candle_nn::ops::rms_norm_slow(&x[0], &x[1], 1e-5), &inputs[..2]);
        with_types(
            &|x| layer_norm_op(&x[0], &x[1], &x[2], 1e-5),
            &|x| candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], 1e-5),
            &inputs,
        );
    }

    #[test]
    fn modules_have_candles_values_and_gradients(seed in 1u64..1 << 40, a in 1usize..4, n in 3usize..40) {
        let inputs = [numbers(seed, &[a, 3, n]), numbers(seed + 1, &[n]), numbers(seed + 2, &[n])];
        with_types(
            &|x| rms_norm(&RmsNorm::new(x[1].clone(), EPS), &x[0]),
            &|x| RmsNorm::new(x[1].clone(), EPS).forward_diff(&x[0]),
            &inputs[..2],
        );
        for make in [LayerNorm::new_no_bias, LayerNorm::rms_norm] {
            with_types(
                &|x| layer_norm(&make(x[1].clone(), EPS), &x[0]),
                &|x| make(x[1].clone(), EPS).forward(&x[0]),
                &inputs[..2],
            );
        }
        let fast: &Function<'_> = &|x| layer_norm(&LayerNorm::new(x[1].clone(), x[2].clone(), EPS), &x[0]);
        with_types(fast, &|x| candle_nn::ops::layer_norm_slow(&x[0], &x[1], &x[2], EPS as f32), &inputs);
    }

    #[test]
    fn ropes_have_candles_values_and_gradients(
        seed in 1u64..1 << 40, b in 1usize..3, h in 1usize..4, t in 1usize..6, half in 1usize..5, spare in 0usize..3,
    ) {
        let x = numbers(seed, &[b, h, t, 2 * half]);
        let [cos, sin] = tables(seed + 1, &[t + spare, half]);
        let inputs = [x, cos, sin];
        with_types(&|x| rope(&x[0], &x[1], &x[2]), &|x| candle_nn::rotary_emb::rope_slow(&x[0], &x[1], &x[2]), &inputs);
        with_types(&|x| rope_i(&x[0], &x[1], &x[2]), &|x| candle_nn::rotary_emb::rope_i_slow(&x[0], &x[1], &x[2]), &inputs);
        with_types(
            &|x| rope_thd(&x[0].transpose(1, 2)?, &x[1], &x[2])?.transpose(1, 2),
            &|x| candle_nn::rotary_emb::rope_slow(&x[0], &x[1], &x[2]),
            &inputs,
        );
    }

    #[test]
    fn layouts_do_not_matter(seed in 1u64..1 << 40, a in 1usize..5, b in 2usize..5, c in 2usize..9) {
        let x = numbers(seed, &[a, b + 1, 2 * c]);
        let alpha = numbers(seed + 1, &[2 * c]);
        let same = |f: &dyn Fn(&Tensor) -> Tensor, x: Tensor| distance(&f(&x), &f(&x.contiguous().unwrap()));
        for view in [x.narrow(1, 1, b).unwrap(), x.transpose(0, 1).unwrap(), x.narrow(0, 0, 1).unwrap().broadcast_as((3, b + 1, 2 * c)).unwrap()] {
            prop_assert!(same(&|x| softmax_last_dim(x).unwrap(), view.clone()) == 0.0);
            prop_assert!(same(&|x| rms_norm_op(x, &alpha, 1e-5).unwrap(), view) == 0.0);
        }
        prop_assert!(same(&|x| softmax_last_dim(x).unwrap(), x.transpose(1, 2).unwrap()) == 0.0);
    }
}

#[test]
fn forward_equals_the_fast_operations() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 1e-2 };
        let x = numbers(3, &[2, 4, 6, 8]).to_dtype(dtype).unwrap();
        let alpha = numbers(4, &[8]).to_dtype(dtype).unwrap();
        let beta = numbers(5, &[8]).to_dtype(dtype).unwrap();
        let [cos, sin] = tables(6, &[6, 4]).map(|t| t.to_dtype(dtype).unwrap());
        let pairs = [
            (softmax_last_dim(&x), candle_nn::ops::softmax_last_dim(&x)),
            (
                rms_norm_op(&x, &alpha, 1e-5),
                candle_nn::ops::rms_norm(&x, &alpha, 1e-5),
            ),
            (
                layer_norm_op(&x, &alpha, &beta, 1e-5),
                candle_nn::ops::layer_norm(&x, &alpha, &beta, 1e-5),
            ),
            (
                rope(&x, &cos, &sin),
                candle_nn::rotary_emb::rope(&x, &cos, &sin),
            ),
            (
                rope_i(&x, &cos, &sin),
                candle_nn::rotary_emb::rope_i(&x, &cos, &sin),
            ),
        ];
        for (i, (found, expected)) in pairs.into_iter().enumerate() {
            let error = distance(&found.unwrap(), &expected.unwrap());
            assert!(
                error <= tolerance,
                "operation {i} in {dtype:?} differs by {error}"
            );
        }
        let [cos, sin] = tables(6, &[2, 6, 4]).map(|t| t.to_dtype(dtype).unwrap());
        let error = distance(
            &rope(&x, &cos, &sin).unwrap(),
            &candle_nn::rotary_emb::rope(&x, &cos, &sin).unwrap(),
        );
        assert!(error <= tolerance, "batched tables differ by {error}");
        let x = x.transpose(1, 2).unwrap().contiguous().unwrap();
        let error = distance(
            &rope_thd(&x, &cos, &sin).unwrap(),
            &candle_nn::rotary_emb::rope_thd(&x, &cos, &sin).unwrap(),
        );
        assert!(error <= tolerance, "rope_thd differs by {error}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let inputs = [
        numbers(1, &[4, 1000, 48]),
        numbers(2, &[48]),
        numbers(3, &[48]),
    ]
    .map(|x| x.to_dtype(DType::F32).unwrap());
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let grads = gradients(
                &|x| softmax_last_dim(&layer_norm_op(&x[0], &x[1], &x[2], 1e-5)?),
                &inputs,
            );
            grads
                .iter()
                .map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap())
                .collect::<Vec<_>>()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(7));
}

#[test]
fn frozen_operands_get_no_gradient_and_frozen_graphs_record_nothing() {
    let x = Var::from_tensor(&numbers(1, &[2, 8])).unwrap();
    let alpha = numbers(2, &[8]);
    let y = rms_norm_op(&x, &alpha, 1e-5).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some());
    assert!(grads.get(&alpha).is_none());
    assert!(
        !rms_norm_op(&alpha.unsqueeze(0).unwrap(), &alpha, 1e-5)
            .unwrap()
            .track_op()
    );
}

#[test]
fn wrong_shapes_and_types_are_refused() {
    let x = numbers(1, &[1, 2, 3, 8]);
    let short = numbers(2, &[2, 4]);
    let message = rope(&x, &short, &short).unwrap_err().to_string();
    assert!(message.contains("at least 3 positions"), "{message}");
    assert!(rms_norm_op(&x, &numbers(1, &[4]), 1e-5).is_err());
    let message = rms_norm_op(&x, &numbers(1, &[8]).to_dtype(DType::F32).unwrap(), 1e-5)
        .unwrap_err()
        .to_string();
    assert!(message.contains("F32"), "{message}");
    assert!(softmax_last_dim(&Tensor::new(1u32, &Device::Cpu).unwrap()).is_err());
}

/// The kernel of an operation and its composition.
pub(super) struct Pair {
    pub(super) fast: Box<Function<'static>>,
    pub(super) slow: Box<Function<'static>>,
}

#[test]
fn the_compositions_for_other_devices_are_the_same() {
    let inputs = [
        numbers(1, &[2, 4, 6, 8]),
        numbers(2, &[8]),
        numbers(3, &[8]),
    ];
    for Pair { fast, slow } in norm::both() {
        with_types(&*fast, &*slow, &inputs[..2]);
        with_types(&*fast, &*slow, &inputs);
    }
    let [cos, sin] = tables(4, &[2, 7, 4]);
    let inputs = [numbers(1, &[2, 6, 6, 8]), cos, sin];
    for Pair { fast, slow } in rope::both() {
        with_types(&*fast, &*slow, &inputs);
    }
}
