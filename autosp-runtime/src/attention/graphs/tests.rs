//! Graphs without a GPU: snapshots, and an interpreter that runs a graph on the CPU against the attention that it stands for.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::attention::{self, Kernel, Output, Spec};
use crate::mask::Band;

fn problem(
    heads: i64,
    kv_heads: i64,
    (queries, d): (i64, i64),
    lo: Option<i32>,
    hi: Option<i32>,
) -> Problem {
    let dims = |h: i64| contiguous([2, h, queries, d]);
    Problem {
        element: Element::Bf16,
        batch: 2,
        heads,
        kv_heads,
        queries,
        keys: queries,
        d,
        dv: d,
        scale: 0.25_f32.to_bits(),
        lo,
        hi,
        q: dims(heads),
        k: dims(kv_heads),
        v: dims(kv_heads),
        o: dims(heads),
        lse: contiguous([2, heads, queries, 1]),
    }
}

fn gradients(p: &Problem) -> GradientStrides {
    GradientStrides {
        o: p.o,
        q: p.q,
        k: p.k,
        v: p.v,
    }
}

/// The operations that cuDNN's engines match, by number and order.
#[test]
fn the_graphs_are_what_the_engines_match() {
    let causal = problem(4, 2, (16, 8), None, Some(0));
    assert_eq!(causal.forward().operations.len(), 14);
    assert_eq!(causal.backward(&gradients(&causal)).operations.len(), 24);
    let window = problem(4, 4, (16, 8), Some(-3), Some(0));
    assert_eq!(window.forward().operations.len(), 14 + 5);
    assert_eq!(
        problem(4, 4, (16, 8), None, None)
            .forward()
            .operations
            .len(),
        10
    );
    insta::assert_snapshot!("causal_forward", causal.forward());
    insta::assert_snapshot!("causal_backward", causal.backward(&gradients(&causal)));
    insta::assert_snapshot!("window_forward", window.forward());
}

/// What was measured for 32 query and 8 kv heads of width 128: half a GiB at 16 Ki tokens, 4 GiB at 128 Ki.
#[test]
fn scratch_is_what_was_measured() {
    let at = |length: i64| {
        let p = Problem {
            batch: 1,
            element: Element::F16,
            ..problem(32, 8, (length, 128), None, Some(0))
        };
        p.scratch() as f64 / f64::from(1 << 30)
    };
    assert!((at(16 << 10) - 0.5).abs() < 0.01);
    assert!((at(128 << 10) - 4.0).abs() < 0.1);
}

/// Runs a graph in f64; what is in device memory comes from `given` and is returned with what the graph writes.
fn interpret(graph: &Graph, given: &[(Role, Tensor)]) -> HashMap<Role, Tensor> {
    let mut values: Vec<Option<Tensor>> = vec![None; graph.nodes.len()];
    for (value, node) in values.iter_mut().zip(&graph.nodes) {
        *value = match node.home {
            Home::Device(role) => given.iter().find(|(r, _)| *r == role).map(|(_, x)| {
                let dims = node.dims.map(|n| n as usize);
                if x.dims() == dims {
                    x.clone()
                } else {
                    x.transpose(2, 3).unwrap()
                }
            }),
            Home::Float(x) => Some(scalar(f64::from(x))),
            Home::Int(x) => Some(scalar(f64::from(x))),
            Home::Virtual => None,
        };
    }
    for operation in &graph.operations {
        let read = |at: usize| values[at].clone().unwrap();
        let (y, value) = match *operation {
            Operation::MatMul { a, b, y } => {
                let (a, b) = (read(a), read(b));
                let share = a.dim(1).unwrap() / b.dim(1).unwrap();
                (
                    y,
                    a.contiguous()
                        .unwrap()
                        .matmul(&repeat(&b, share).contiguous().unwrap())
                        .unwrap(),
                )
            }
            Operation::Reshape { x, y } => (y, read(x).transpose(2, 3).unwrap()),
            Operation::Reduce { max: true, x, y } => (y, read(x).max_keepdim(3).unwrap()),
            Operation::Reduce { max: false, x, y } => {
                let (x, target) = (read(x), graph.nodes[y].dims.map(|n| n as usize));
                let (n, h, s, d) = x.dims4().unwrap();
                let sum = if target[3] == 1 && d > 1 {
                    x.sum_keepdim(3)
                } else {
                    x.reshape((n, target[1], h / target[1], s, d))
                        .unwrap()
                        .sum(2)
                };
                (y, sum.unwrap())
            }
            Operation::Pointwise { op, x, b, t, y } => {
                let x = read(x);
                let b = b.map(read);
                let with = |f: fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>| {
                    f(&x, b.as_ref().unwrap())
                };
                let value = match op {
                    Pointwise::Mul => with(Tensor::broadcast_mul),
                    Pointwise::Add => with(Tensor::broadcast_add),
                    Pointwise::Sub => with(Tensor::broadcast_sub),
                    Pointwise::Div => with(Tensor::broadcast_div),
                    Pointwise::GreaterEqual => with(Tensor::broadcast_ge),
                    Pointwise::Greater => with(Tensor::broadcast_gt),
                    Pointwise::Exp => x.exp(),
                    Pointwise::Log => x.log(),
                    Pointwise::Identity => Ok(x.clone()),
                    Pointwise::Index(axis) => {
                        let axis = axis as usize;
                        let mut dims = [1; 4];
                        dims[axis] = x.dim(axis).unwrap();
                        let index = Tensor::arange(0., dims[axis] as f64, &Device::Cpu).unwrap();
                        index.reshape(&dims).unwrap().broadcast_as(x.shape())
                    }
                    Pointwise::Select => {
                        let hidden = b.as_ref().unwrap().broadcast_as(x.shape()).unwrap();
                        read(t.unwrap()).where_cond(&x, &hidden)
                    }
                };
                (y, value.unwrap())
            }
        };
        assert_eq!(
            value.dims(),
            graph.nodes[y].dims.map(|n| n as usize),
            "{operation:?}"
        );
        values[y] = Some(value);
    }
    let named = graph
        .nodes
        .iter()
        .zip(values)
        .filter_map(|(node, value)| match node.home {
            Home::Device(role) => Some((role, value?)),
            _ => None,
        });
    named.collect()
}

fn scalar(x: f64) -> Tensor {
    Tensor::full(x, (1, 1, 1, 1), &Device::Cpu).unwrap()
}

fn repeat(x: &Tensor, share: usize) -> Tensor {
    let (n, h, s, d) = x.dims4().unwrap();
    let wide = x.unsqueeze(2).unwrap().expand((n, h, share, s, d)).unwrap();
    wide.reshape((n, h * share, s, d)).unwrap()
}

fn noise(dims: (usize, usize, usize, usize), seed: u64) -> Tensor {
    let (a, b, c, d) = dims;
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f64> = (0..a * b * c * d)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / f64::from(1 << 23) - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap();
    difference
        .to_dtype(DType::F64)
        .unwrap()
        .to_scalar::<f64>()
        .unwrap()
}

/// The graph computes what the CPU's attention does, forward and backward, for each kind of band and of head sharing.
#[test]
fn a_graph_computes_attention_and_its_gradients() {
    for (heads, kv_heads) in [(4, 4), (4, 2), (3, 1)] {
        for (lo, hi) in [
            (None, None),
            (None, Some(0)),
            (Some(-3), Some(0)),
            (Some(-2), Some(2)),
            (Some(-1), None),
        ] {
            let p = problem(heads, kv_heads, (11, 6), lo, hi);
            let (h, g, s, d) = (heads as usize, kv_heads as usize, 11, 6);
            let (q, k, v) = (
                noise((2, h, s, d), 1),
                noise((2, g, s, d), 2),
                noise((2, g, s, d), 3),
            );
            let grad = noise((2, h, s, d), 4);
            let mut spec = Spec::new(0.25, s, h, g);
            if lo.is_some() || hi.is_some() {
                let band = Band {
                    lo: lo.map(i64::from),
                    hi: hi.map(i64::from),
                };
                spec = spec.with_band(band).unwrap();
            }
            let expected: Output =
                attention::forward(Kernel::Reference, &spec, &q, &k, &v).unwrap();
            let given = [
                (Role::Q, q.clone()),
                (Role::K, k.clone()),
                (Role::V, v.clone()),
            ];
            let found = interpret(&p.forward(), &given);
            assert!(apart(&found[&Role::O], &expected.o) < 1e-12);
            assert!(apart(&found[&Role::Lse].squeeze(3).unwrap(), &expected.lse) < 1e-12);

            let wanted =
                attention::backward(Kernel::Reference, &spec, (&q, &k, &v), &expected, &grad)
                    .unwrap();
            let lse = expected.lse.unsqueeze(3).unwrap();
            let given = [
                given.as_slice(),
                &[
                    (Role::O, expected.o.clone()),
                    (Role::Lse, lse),
                    (Role::GradO, grad),
                ],
            ]
            .concat();
            let found = interpret(&p.backward(&gradients(&p)), &given);
            for (role, wanted) in [
                (Role::GradQ, &wanted.q),
                (Role::GradK, &wanted.k),
                (Role::GradV, &wanted.v),
            ] {
                assert!(
                    apart(&found[&role], wanted) < 1e-12,
                    "{role:?} {lo:?} {hi:?}"
                );
            }
        }
    }
}
