//! Every row of the operation table against the real operation, on whole and on sharded random tensors.
//!
//! A row claims along which dimensions an operation may be sharded. For each claim: the operation on the shards gives the
//! shards of the operation, bit for bit. For each dimension that a row says is computed along: it does not, so that the
//! refusal is deserved. A row without an operation here fails, as does an operation without a row.

use autosp_compiler::ops::{PlaceRule, Row, ShapeRule, candle};
use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_nn::{Activation, Dropout, Embedding, LayerNorm, Linear, RmsNorm, ops, rotary_emb};
use proptest::prelude::*;

#[path = "op_table/beside.rs"]
mod beside;
#[path = "op_table/random.rs"]
mod random_numbers;

/// Sizes that two and three ranks divide.
const N: usize = 6;

/// Numbers in (0.1, 0.9), all different, from a seed.
fn random(seed: u64, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let data: Vec<f32> = (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            0.1 + 0.8 * ((state >> 40) as f32 / (1u64 << 24) as f32)
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).expect("data of that shape")
}

type Run = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// An operation on random operands.
struct Case {
    inputs: Vec<Tensor>,
    run: Run,
    /// Shardings that the row allows: a dimension for each input (`None`: whole), and the dimension of the result.
    allowed: Vec<(Vec<Option<usize>>, usize)>,
    /// Dimensions of the first input that the row says are computed along.
    along: Vec<usize>,
}

fn case(inputs: Vec<Tensor>, run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Case {
    Case {
        inputs,
        run: Box::new(run),
        allowed: Vec::new(),
        along: Vec::new(),
    }
}

fn unary(seed: u64, run: impl Fn(&Tensor) -> Result<Tensor> + 'static) -> Case {
    case(vec![random(seed, &[N, N, N])], move |x| run(&x[0]))
}

fn binary(seed: u64, run: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + 'static) -> Case {
    case(
        vec![random(seed, &[N, N, N]), random(seed + 1, &[N, N, N])],
        move |x| run(&x[0], &x[1]),
    )
}

fn layer_weight(seed: u64, shape: &[usize]) -> Tensor {
    random(seed + 17, shape)
}

/// The operations of `candle_core::Tensor` by name.
#[allow(clippy::too_many_lines)]
fn tensor_op(name: &str, seed: u64) -> Option<Case> {
    Some(match name {
        "exp" => unary(seed, Tensor::exp),
        "log" => unary(seed, Tensor::log),
        "sin" => unary(seed, Tensor::sin),
        "cos" => unary(seed, Tensor::cos),
        "abs" => unary(seed, Tensor::abs),
        "neg" => unary(seed, Tensor::neg),
        "sqr" => unary(seed, Tensor::sqr),
        "sqrt" => unary(seed, Tensor::sqrt),
        "recip" => unary(seed, Tensor::recip),
        "relu" => unary(seed, Tensor::relu),
        "silu" => unary(seed, Tensor::silu),
        "gelu" => unary(seed, Tensor::gelu),
        "gelu_erf" => unary(seed, Tensor::gelu_erf),
        "erf" => unary(seed, Tensor::erf),
        "powf" => unary(seed, |x| x.powf(1.5)),
        "elu" => unary(seed, |x| x.elu(0.7)),
        "clamp" => unary(seed, |x| x.clamp(0.3f32, 0.6f32)),
        "sign" => unary(seed, Tensor::sign),
        "floor" => unary(seed, |x| (x * 9.0)?.floor()),
        "ceil" => unary(seed, |x| (x * 9.0)?.ceil()),
        "round" => unary(seed, |x| (x * 9.0)?.round()),
        "index_select" => {
            let rows = Tensor::new(&[0u32, 2, 2, 5, 1, 3], &Device::Cpu).ok()?;
            case(vec![random(seed, &[N, N, N])], move |x| {
                x[0].contiguous()?.index_select(&rows, 1)
            })
        }
        "index_add" => {
            let rows = Tensor::new(&[0u32, 2, 2, 5, 1, 3], &Device::Cpu).ok()?;
            case(
                vec![random(seed, &[N, N, N]), random(seed + 1, &[N, N, N])],
                move |x| x[0].contiguous()?.index_add(&rows, &x[1].contiguous()?, 1),
            )
        }
        "gather" => {
            let index = |x: &Tensor| (x * 5.0)?.round()?.to_dtype(DType::U32);
            case(
                vec![random(seed, &[N, N, N]), random(seed + 1, &[N, N, N])],
                move |x| x[0].contiguous()?.gather(&index(&x[1])?.contiguous()?, 1),
            )
        }
        "arg_sort_last_dim" => unary(seed, |x| {
            x.contiguous()?
                .arg_sort_last_dim(false)?
                .to_dtype(DType::F32)
        }),
        "affine" => unary(seed, |x| x.affine(2.0, -0.5)),
        "tanh" => unary(seed, Tensor::tanh),
        "to_dtype" => unary(seed, |x| x.to_dtype(DType::F64)),
        "detach" => unary(seed, |x| Ok(x.detach())),
        "zeros_like" => unary(seed, Tensor::zeros_like),
        "ones_like" => unary(seed, Tensor::ones_like),
        "contiguous" => unary(seed, Tensor::contiguous),
        "copy" => unary(seed, Tensor::copy),
        "to_device" => unary(seed, |x| x.to_device(x.device())),
        "force_contiguous" => unary(seed, Tensor::force_contiguous),
        "add" => binary(seed, Tensor::add),
        "sub" => binary(seed, Tensor::sub),
        "mul" => binary(seed, Tensor::mul),
        "div" => binary(seed, Tensor::div),
        "maximum" => binary(seed, |x, y| x.maximum(y)),
        "minimum" => binary(seed, |x, y| x.minimum(y)),
        "eq" => binary(seed, |x, y| x.eq(y)),
        "ne" => binary(seed, |x, y| x.ne(y)),
        "lt" => binary(seed, |x, y| x.lt(y)),
        "le" => binary(seed, |x, y| x.le(y)),
        "gt" => binary(seed, |x, y| x.gt(y)),
        "ge" => binary(seed, |x, y| x.ge(y)),
        "broadcast_add" => binary(seed, Tensor::broadcast_add),
        "broadcast_sub" => binary(seed, Tensor::broadcast_sub),
        "broadcast_mul" => binary(seed, Tensor::broadcast_mul),
        "broadcast_div" => binary(seed, Tensor::broadcast_div),
        "broadcast_maximum" => binary(seed, Tensor::broadcast_maximum),
        "broadcast_minimum" => binary(seed, Tensor::broadcast_minimum),
        "broadcast_eq" => binary(seed, Tensor::broadcast_eq),
        "broadcast_ne" => binary(seed, Tensor::broadcast_ne),
        "broadcast_lt" => binary(seed, Tensor::broadcast_lt),
        "broadcast_le" => binary(seed, Tensor::broadcast_le),
        "broadcast_gt" => binary(seed, Tensor::broadcast_gt),
        "broadcast_ge" => binary(seed, Tensor::broadcast_ge),
        "where_cond" => case(
            vec![
                random(seed, &[N, N, N]),
                random(seed + 1, &[N, N, N]),
                random(seed + 2, &[N, N, N]),
            ],
            |x| x[0].gt(0.5)?.where_cond(&x[1], &x[2]),
        ),
        // The last size is given, so that the reshape is the same program on a shard.
        "reshape" => unary(seed, |x| {
            x.reshape((x.dim(0)?, x.dim(1)?, 2, x.dim(2)? / 2))
        }),
        "flatten" => unary(seed, |x| x.flatten(1, 2)),
        "flatten_from" => unary(seed, |x| x.flatten_from(1)),
        "flatten_to" => unary(seed, |x| x.flatten_to(1)),
        "flatten_all" => unary(seed, Tensor::flatten_all),
        "transpose" => unary(seed, |x| x.transpose(0, 2)),
        "t" => unary(seed, Tensor::t),
        "permute" => unary(seed, |x| x.permute((2, 0, 1))),
        "unsqueeze" => unary(seed, |x| x.unsqueeze(1)),
        "squeeze" => case(vec![random(seed, &[N, 1, N])], |x| x[0].squeeze(1)),
        "expand" => case(vec![random(seed, &[N, 1, N])], |x| {
            x[0].expand((x[0].dim(0)?, 5, x[0].dim(2)?))
        }),
        "broadcast_as" => case(vec![random(seed, &[N, 1, N])], |x| {
            x[0].broadcast_as((x[0].dim(0)?, 5, x[0].dim(2)?))
        }),
        "broadcast_left" => unary(seed, |x| x.broadcast_left((2, 3))),
        "narrow" => unary(seed, |x| x.narrow(1, 1, 3)),
        "chunk" => unary(seed, |x| Ok(x.chunk(2, 1)?[1].clone())),
        "cat" => binary(seed, |x, y| Tensor::cat(&[x, y], 1)),
        "stack" => binary(seed, |x, y| Tensor::stack(&[x, y], 1)),
        "i" => unary(seed, |x| x.i((.., 2, ..))),
        "get_on_dim" => unary(seed, |x| x.get_on_dim(1, 2)),
        "get" => unary(seed, |x| x.transpose(0, 1)?.get(2)),
        "matmul" => binary(seed, Tensor::matmul),
        "broadcast_matmul" => binary(seed, Tensor::broadcast_matmul),
        "sum_keepdim" => unary(seed, |x| x.sum_keepdim(1)),
        "mean_keepdim" => unary(seed, |x| x.mean_keepdim(1)),
        "max_keepdim" => unary(seed, |x| x.max_keepdim(1)),
        "min_keepdim" => unary(seed, |x| x.min_keepdim(1)),
        "sum" => unary(seed, |x| x.sum(1)),
        "mean" => unary(seed, |x| x.mean(1)),
        "max" => unary(seed, |x| x.max(1)),
        "min" => unary(seed, |x| x.min(1)),
        "argmax" => unary(seed, |x| x.argmax(1)),
        "argmin" => unary(seed, |x| x.argmin(1)),
        "sum_all" => unary(seed, Tensor::sum_all),
        "mean_all" => unary(seed, Tensor::mean_all),
        "max_all" => unary(seed, Tensor::max_all),
        "min_all" => unary(seed, Tensor::min_all),
        "cumsum" => unary(seed, |x| x.cumsum(1)),
        // candle 0.11.1 flips a view that is not contiguous wrongly.
        "flip" => unary(seed, |x| x.contiguous()?.flip(&[1])),
        "roll" => unary(seed, |x| x.roll(1, 1)),
        _ => return None,
    })
}

/// Layers and functions of `candle_nn` by path.
fn nn_op(path: &str, seed: u64) -> Option<Case> {
    // x [b, h, s, d] with tables [s, d/2], which are cut with the sequence.
    let rope = |run: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| {
        case(
            vec![
                random(seed, &[N, N, N, N]),
                random(seed + 1, &[N, N / 2]),
                random(seed + 2, &[N, N / 2]),
            ],
            move |x| {
                run(
                    &x[0].contiguous()?,
                    &x[1].contiguous()?,
                    &x[2].contiguous()?,
                )
            },
        )
    };
    Some(match path {
        "candle_nn::ops::silu" => unary(seed, ops::silu),
        "candle_nn::ops::sigmoid" => unary(seed, ops::sigmoid),
        "candle_nn::ops::leaky_relu" => unary(seed, |x| ops::leaky_relu(x, 0.1)),
        "candle_nn::Activation::forward" => unary(seed, |x| Activation::Swiglu.forward(x)),
        "candle_nn::Linear::forward" => {
            let layer = Linear::new(layer_weight(seed, &[4, N]), Some(layer_weight(seed, &[4])));
            unary(seed, move |x| layer.forward(x))
        }
        "candle_nn::Embedding::forward" => {
            let layer = Embedding::new(layer_weight(seed, &[10, 4]), 4);
            unary(seed, move |x| {
                layer.forward(&(x * 9.9)?.to_dtype(DType::U32)?)
            })
        }
        "candle_nn::RmsNorm::forward" => {
            let layer = RmsNorm::new(layer_weight(seed, &[N]), 1e-6);
            unary(seed, move |x| layer.forward(&x.contiguous()?))
        }
        "candle_nn::RmsNorm::forward_diff" => {
            let layer = RmsNorm::new(layer_weight(seed, &[N]), 1e-6);
            unary(seed, move |x| layer.forward_diff(x))
        }
        "candle_nn::LayerNorm::forward" => {
            let layer =
                LayerNorm::new(layer_weight(seed, &[N]), layer_weight(seed + 1, &[N]), 1e-6);
            unary(seed, move |x| layer.forward(&x.contiguous()?))
        }
        "candle_nn::ops::softmax_last_dim" => {
            unary(seed, |x| ops::softmax_last_dim(&x.contiguous()?))
        }
        "candle_nn::ops::softmax" => unary(seed, |x| ops::softmax(x, 1)),
        "candle_nn::ops::log_softmax" => unary(seed, |x| ops::log_softmax(x, 1)),
        "candle_nn::rotary_emb::rope" => rope(rotary_emb::rope),
        "candle_nn::rotary_emb::rope_i" => rope(rotary_emb::rope_i),
        "candle_nn::rotary_emb::rope_slow" => rope(rotary_emb::rope_slow),
        "candle_nn::rotary_emb::rope_i_slow" => rope(rotary_emb::rope_i_slow),
        "candle_nn::rotary_emb::rope_thd" => rope(rotary_emb::rope_thd),
        "candle_nn::ops::dropout" => unary(seed, |x| ops::dropout(x, 0.5)),
        "candle_nn::Dropout::forward" => unary(seed, |x| Dropout::new(0.5).forward(x, true)),
        _ => return None,
    })
}

/// Fills in which shardings the row's rules allow and along which dimensions they compute.
fn claims(row: &Row, case: &mut Case) {
    let rank = case.inputs[0].rank();
    let each = |dims: &[(usize, usize)], inputs: usize| -> Vec<(Vec<Option<usize>>, usize)> {
        dims.iter()
            .map(|(d, out)| (vec![Some(*d); inputs], *out))
            .collect()
    };
    let count = case.inputs.len();
    let same: Vec<(usize, usize)> = (0..rank).map(|d| (d, d)).collect();
    (case.allowed, case.along) = match row.shape {
        ShapeRule::Same | ShapeRule::Broadcast | ShapeRule::Select => (each(&same, count), vec![]),
        ShapeRule::Embedding => (each(&same, 1), vec![]),
        ShapeRule::Matmul => (
            vec![
                (vec![Some(0), Some(0)], 0),
                (vec![Some(1), None], 1),
                (vec![None, Some(2)], 2),
            ],
            vec![],
        ),
        ShapeRule::Linear | ShapeRule::AlongLast => (each(&same[..rank - 1], 1), vec![rank - 1]),
        ShapeRule::Reshape => (each(&[(0, 0), (1, 1)], 1), vec![]),
        // The outer of two merged dimensions stays outermost; the inner one would be interleaved.
        ShapeRule::Flatten => match row.name() {
            "flatten_to" => (each(&[(0, 0), (2, 1)], 1), vec![1]),
            "flatten_all" => (each(&[(0, 0)], 1), vec![1, 2]),
            _ => (each(&[(0, 0), (1, 1)], 1), vec![2]),
        },
        ShapeRule::Transpose => (each(&[(0, 2), (1, 1), (2, 0)], 1), vec![]),
        ShapeRule::T => (each(&[(0, 0), (1, 2), (2, 1)], 1), vec![]),
        ShapeRule::Permute => (each(&[(0, 1), (1, 2), (2, 0)], 1), vec![]),
        ShapeRule::Unsqueeze => (each(&[(0, 0), (1, 2), (2, 3)], 1), vec![]),
        ShapeRule::Squeeze => (each(&[(0, 0), (2, 1)], 1), vec![]),
        ShapeRule::Expand => (each(&[(0, 0), (2, 2)], 1), vec![]),
        ShapeRule::BroadcastLeft => (each(&[(0, 2), (1, 3), (2, 4)], 1), vec![]),
        ShapeRule::Narrow | ShapeRule::Chunk | ShapeRule::ReduceKeep | ShapeRule::Along => {
            (each(&[(0, 0), (2, 2)], 1), vec![1])
        }
        ShapeRule::IndexSelect => (each(&[(0, 0), (2, 2)], 1), vec![1]),
        ShapeRule::IndexAdd | ShapeRule::Gather | ShapeRule::Cat => {
            (each(&[(0, 0), (2, 2)], 2), vec![1])
        }
        ShapeRule::Stack => (each(&[(0, 0), (1, 2), (2, 3)], 2), vec![]),
        ShapeRule::Index | ShapeRule::Reduce | ShapeRule::GetOnDim => {
            (each(&[(0, 0), (2, 1)], 1), vec![1])
        }
        ShapeRule::ReduceAll => (vec![], vec![0, 1, 2]),
        ShapeRule::Rope => (
            vec![
                (vec![Some(0), None, None], 0),
                (vec![Some(1), None, None], 1),
                (vec![Some(2), Some(0), Some(0)], 2),
            ],
            vec![3],
        ),
        ShapeRule::RopeThd => (
            vec![
                (vec![Some(0), None, None], 0),
                (vec![Some(1), Some(0), Some(0)], 1),
                (vec![Some(2), None, None], 2),
            ],
            vec![3],
        ),
        other => panic!("{}: no claims for {other:?}", row.path),
    };
}

/// Whether the operation on the shards gives the shards of the operation.
fn commutes(case: &Case, dims: &[Option<usize>], out: usize, parts: usize) -> Result<bool> {
    let whole = (case.run)(&case.inputs)?;
    let cut = |t: &Tensor, d: usize, r: usize| {
        let n = t.dim(d)? / parts;
        t.narrow(d, r * n, n)
    };
    let mut equal = true;
    for r in 0..parts {
        let inputs: Result<Vec<Tensor>> = case
            .inputs
            .iter()
            .zip(dims)
            .map(|(t, d)| d.map_or_else(|| Ok(t.clone()), |d| cut(t, d, r)))
            .collect();
        // A shard on which the operation fails or has another shape is not the shard of the whole.
        let Ok(part) = (case.run)(&inputs?) else {
            return Ok(false);
        };
        if whole.rank() == 0 || out >= whole.rank() {
            equal &= part.dims() == whole.dims() && bits(&part)? == bits(&whole)?;
            continue;
        }
        let expected = cut(&whole, out, r)?;
        equal &= expected.dims() == part.dims() && bits(&part)? == bits(&expected)?;
    }
    Ok(equal)
}

fn bits(t: &Tensor) -> Result<Vec<u64>> {
    Ok(t.to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?
        .into_iter()
        .map(f64::to_bits)
        .collect())
}

fn operation(row: &Row, seed: u64) -> Option<Case> {
    let mut case = match row.path.strip_prefix("candle_core::Tensor::") {
        Some(name) => tensor_op(name, seed),
        None => nn_op(&row.path, seed),
    }?;
    claims(row, &mut case);
    Some(case)
}

/// Rows that draw.
fn draws(row: &Row) -> bool {
    matches!(row.place, PlaceRule::Random | PlaceRule::Dropout)
}

/// Rows without a tensor operand or whose value is no tensor, checked by name below; candle-transformers' layers are checked
/// in `tests/zoo`.
fn without_operand(row: &Row) -> bool {
    let elsewhere = row.path.starts_with("candle_transformers::");
    elsewhere
        || matches!(row.place, PlaceRule::Make | PlaceRule::Host)
        || matches!(row.shape, ShapeRule::Opaque | ShapeRule::Each)
}

#[test]
fn every_row_has_its_operation() {
    let missing: Vec<&str> = candle()
        .rows()
        .iter()
        .filter(|r| !without_operand(r) && operation(r, 1).is_none())
        .map(|r| r.path.as_str())
        .collect();
    assert!(missing.is_empty(), "rows without a proof: {missing:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn operations_commute_with_sharding_where_a_row_says_so(seed in any::<u32>(), parts in 2usize..=3) {
        for row in candle().rows().iter().filter(|r| !without_operand(r) && !draws(r)) {
            let case = operation(row, u64::from(seed)).expect("a proof of the row");
            for (dims, out) in &case.allowed {
                let fine = commutes(&case, dims, *out, parts).expect("the operation");
                prop_assert!(fine, "{}: sharded along {dims:?} it is not the shard (dimension {out}) of the whole", row.path);
            }
        }
    }

    #[test]
    fn operations_do_not_commute_where_a_row_says_they_compute(seed in any::<u32>(), parts in 2usize..=3) {
        for row in candle().rows().iter().filter(|r| !without_operand(r) && !draws(r)) {
            let case = operation(row, u64::from(seed)).expect("a proof of the row");
            for d in &case.along {
                let dims: Vec<Option<usize>> = case.inputs.iter().enumerate().map(|(i, _)| (i == 0 || row.shape == ShapeRule::Cat).then_some(*d)).collect();
                let fine = commutes(&case, &dims, *d, parts).unwrap_or(false);
                prop_assert!(!fine, "{}: the row refuses dimension {d}, along which it could be sharded", row.path);
            }
        }
    }
}

#[test]
fn gradients_are_where_a_row_says_so() {
    for row in candle()
        .rows()
        .iter()
        .filter(|r| !without_operand(r) && !draws(r))
    {
        let case = operation(row, 3).expect("a proof of the row");
        if row.path.contains("Embedding") {
            continue; // the operand is an index; the gradient goes to the table
        }
        let var = Var::from_tensor(&case.inputs[0]).expect("a variable");
        let mut inputs = case.inputs.clone();
        inputs[0] = var.as_tensor().clone();
        let result = (case.run)(&inputs).expect("the operation");
        let gradient = result
            .to_dtype(DType::F32)
            .and_then(|y| y.sum_all())
            .and_then(|y| y.backward());
        let has = gradient.is_ok_and(|g| g.get(&var).is_some());
        // `where_cond` has its condition first, which has no gradient.
        if row.shape != ShapeRule::Select {
            assert_eq!(
                has,
                row.grad,
                "{}: a gradient {}",
                row.path,
                if has { "is there" } else { "is missing" }
            );
        }
        assert!(
            row.grad || row.twin.is_none() || !has,
            "{}: replaced though it has a gradient",
            row.path
        );
    }
}
