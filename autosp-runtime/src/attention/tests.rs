//! Both kernels against candle's slow, differentiable operations and against finite differences.

mod half_precision;
mod rate;

use candle_core::{D, DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::{Gradients, Kernel, Output, Spec, backward, forward};
use crate::mask::{Action, Band, Mask, Term, mask_rule};

const CPU: Device = Device::Cpu;

/// Repeatable numbers in [-1, 1).
fn noise(seed: u64, dims: &[usize], dtype: DType) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f64> = (0..dims.iter().product())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect();
    Tensor::from_vec(values, dims, &CPU)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum MaskCase {
    None,
    /// A band, `true` where declared to the kernel, filled with a value.
    Fill(Option<i64>, Option<i64>, f64, bool),
    /// The same, added.
    Add(Option<i64>, Option<i64>, f64, bool),
    /// Every third query sees nothing but a fill of -1e9; the others see a scattered set.
    Scattered,
    /// An additive bias that differs everywhere.
    Slope,
}

impl MaskCase {
    fn value(self, i: usize, j: usize) -> f64 {
        match self {
            Self::None => 0.0,
            Self::Fill(lo, hi, ..) => f64::from(u8::from(!Band { lo, hi }.contains(i, j))),
            Self::Add(lo, hi, value, _) => {
                if (Band { lo, hi }).contains(i, j) {
                    0.0
                } else {
                    value
                }
            }
            Self::Scattered => f64::from(u8::from(i.is_multiple_of(3) || (i * 7 + j * 5) % 4 == 1)),
            Self::Slope => -0.03 * (i as f64 - j as f64).abs(),
        }
    }

    fn action(self) -> Action {
        match self {
            Self::Fill(_, _, value, _) => Action::Fill {
                value,
                nonzero: true,
            },
            Self::Scattered => Action::Fill {
                value: -1e9,
                nonzero: true,
            },
            _ => Action::Add,
        }
    }

    fn mask(self, n: usize) -> Option<Mask> {
        let declared = match self {
            Self::None => return None,
            Self::Fill(lo, hi, _, true) | Self::Add(lo, hi, _, true) => Some(Band { lo, hi }),
            _ => None,
        };
        Some(match self {
            Self::Fill(..) | Self::Scattered => {
                let mut host = mask_rule(n, n, move |i, j| self.value(i, j) as u8);
                if let Some(band) = declared {
                    host = host.band(band, 0, 1);
                }
                Mask::from_slice(&host, (n, n), &CPU).unwrap()
            }
            _ => {
                let mut host = mask_rule(n, n, move |i, j| self.value(i, j));
                if let (Some(band), Self::Add(_, _, value, _)) = (declared, self) {
                    host = host.band(band, 0.0, value);
                }
                Mask::from_slice(&host, (1, 1, n, n), &CPU).unwrap()
            }
        })
    }
}

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    kv_heads: usize,
    share: usize,
    len: usize,
    valid: usize,
    d: usize,
    dv: usize,
    cap: Option<f64>,
    mask: MaskCase,
    dtype: DType,
    kernel: Kernel,
}

impl Case {
    fn heads(&self) -> usize {
        self.kv_heads * self.share
    }

    fn spec(&self) -> Spec {
        let scale = 1.3 / (self.d as f64).sqrt();
        let mut spec = Spec::new(
            self.cap.map_or(scale, |cap| scale / cap),
            self.valid,
            self.heads(),
            self.kv_heads,
        );
        spec.cap = self.cap;
        if let Some(mask) = self.mask.mask(self.valid) {
            spec.terms.push(
                Term::new(
                    &mask,
                    self.mask.action(),
                    self.batch,
                    self.heads(),
                    self.valid,
                )
                .unwrap(),
            );
        }
        spec
    }

    fn inputs(&self) -> [Tensor; 4] {
        let Self {
            batch: b,
            kv_heads: g,
            len: s,
            d,
            dv,
            ..
        } = *self;
        let h = self.heads();
        [(1, h, d), (2, g, d), (3, g, dv), (4, h, dv)].map(|(seed, h, d)| {
            // Strided on purpose: heads after the sequence.
            noise(seed, &[b, s, h, d], self.dtype)
                .transpose(1, 2)
                .unwrap()
        })
    }

    /// O of the valid rows and the gradients of sum(O * w), by candle.
    fn slow(&self, [q, k, v, w]: &[Tensor; 4]) -> (Tensor, [Tensor; 3]) {
        let vars = [q, k, v].map(|x| Var::from_tensor(&x.contiguous().unwrap()).unwrap());
        let n = self.valid;
        let cut = |x: &Tensor| x.narrow(2, 0, n).unwrap();
        let repeat = |x: &Tensor| {
            let (b, g, s, d) = x.dims4().unwrap();
            x.unsqueeze(2)
                .unwrap()
                .expand((b, g, self.share, s, d))
                .unwrap()
                .reshape((b, g * self.share, s, d))
                .unwrap()
        };
        let spec = self.spec();
        let [q, k, v] = [
            cut(&vars[0]),
            repeat(&cut(&vars[1])),
            repeat(&cut(&vars[2])),
        ];
        let mut scores = (q.matmul(&k.t().unwrap()).unwrap() * spec.scale).unwrap();
        if let Some(cap) = self.cap {
            scores = (scores.tanh().unwrap() * cap).unwrap();
        }
        let values: Vec<f64> = (0..n * n)
            .map(|at| self.mask.value(at / n, at % n))
            .collect();
        let mask = Tensor::from_vec(values, (n, n), &CPU)
            .unwrap()
            .broadcast_as(scores.shape())
            .unwrap();
        scores = match self.mask.action() {
            Action::Fill { value, .. } => {
                let fill = Tensor::full(value, scores.shape(), &CPU)
                    .unwrap()
                    .to_dtype(self.dtype)
                    .unwrap();
                mask.to_dtype(DType::U8)
                    .unwrap()
                    .where_cond(&fill, &scores)
                    .unwrap()
            }
            Action::Add => (scores + mask.to_dtype(self.dtype).unwrap()).unwrap(),
        };
        let o = candle_nn::ops::softmax(&scores, D::Minus1)
            .unwrap()
            .matmul(&v.contiguous().unwrap())
            .unwrap();
        let grads = (&o * cut(w))
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        (
            o.detach(),
            [0, 1, 2].map(|at| grads.get(&vars[at]).unwrap().detach()),
        )
    }

    fn fast(&self, [q, k, v, w]: &[Tensor; 4]) -> (Output, Gradients) {
        let spec = self.spec();
        let output = forward(self.kernel, &spec, q, k, v).unwrap();
        let gradients = backward(self.kernel, &spec, (q, k, v), &output, w).unwrap();
        (output, gradients)
    }

    fn tolerance(&self) -> f64 {
        if self.dtype == DType::F64 {
            1e-12
        } else {
            1e-5
        }
    }

    fn check(&self) {
        let inputs = self.inputs();
        let (o, grads) = self.slow(&inputs);
        let (output, gradients) = self.fast(&inputs);
        close(
            "o",
            &output.o.narrow(2, 0, self.valid).unwrap(),
            &o,
            self.tolerance(),
        );
        for (name, got, want) in [
            ("dq", &gradients.q, 0),
            ("dk", &gradients.k, 1),
            ("dv", &gradients.v, 2),
        ] {
            close(name, got, &grads[want], self.tolerance());
        }
        let pads = self.len - self.valid;
        for (name, x) in [
            ("o", &output.o),
            ("dq", &gradients.q),
            ("dk", &gradients.k),
            ("dv", &gradients.v),
        ] {
            assert!(
                values(&x.narrow(2, self.valid, pads).unwrap())
                    .iter()
                    .all(|x| *x == 0.0),
                "{name} of padding"
            );
        }
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// |a - b| <= tolerance (|b| + 1), and NaN where `want` is NaN.
fn close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    for (at, (a, b)) in values(got).into_iter().zip(values(want)).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * (1.0 + b.abs()) || (a.is_nan() && b.is_nan()),
            "{name}[{at}]: {a} against {b}"
        );
    }
}

fn masks() -> impl Strategy<Value = MaskCase> {
    let edge = || prop_oneof![Just(None), (-40i64..40).prop_map(Some)];
    let fill = || {
        prop_oneof![
            Just(-1e9),
            Just(f64::from(f32::MIN)),
            Just(-3.0),
            Just(f64::NEG_INFINITY)
        ]
    };
    // With -inf every row keeps its diagonal, since other rows are NaN: that has a test of its own.
    let banded =
        (edge(), edge(), fill(), any::<bool>()).prop_map(|(lo, hi, fill, declared)| match fill {
            f64::NEG_INFINITY => (lo.map(|x: i64| -x.abs()), hi.map(i64::abs), fill, declared),
            _ => (lo, hi, fill, declared),
        });
    prop_oneof![
        Just(MaskCase::None),
        banded
            .clone()
            .prop_map(|(lo, hi, fill, declared)| MaskCase::Fill(lo, hi, fill, declared)),
        banded.prop_map(|(lo, hi, fill, declared)| MaskCase::Add(lo, hi, fill, declared)),
        Just(MaskCase::Scattered),
        Just(MaskCase::Slope),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let shape = (
        1usize..3,
        1usize..3,
        1usize..4,
        1usize..220,
        1usize..20,
        1usize..20,
    );
    let kernel = prop_oneof![3 => Just(Kernel::Tiled), 1 => Just(Kernel::Reference)];
    let dtype = prop_oneof![Just(DType::F32), Just(DType::F64)];
    (
        shape,
        0usize..8,
        prop_oneof![Just(None), Just(Some(2.0)), Just(Some(30.0))],
        masks(),
        dtype,
        kernel,
    )
        .prop_map(
            |((batch, kv_heads, share, len, d, dv), pads, cap, mask, dtype, kernel)| {
                let valid = len.saturating_sub(pads).max(1);
                Case {
                    batch,
                    kv_heads,
                    share,
                    len,
                    valid,
                    d,
                    dv,
                    cap,
                    mask,
                    dtype,
                    kernel,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn agrees_with_candles_slow_operations(case in cases()) {
        case.check();
    }
}

fn long(mask: MaskCase) -> Case {
    Case {
        batch: 1,
        kv_heads: 1,
        share: 2,
        len: 900,
        valid: 893,
        d: 16,
        dv: 16,
        cap: None,
        mask,
        dtype: DType::F64,
        kernel: Kernel::Tiled,
    }
}

#[test]
fn several_blocks_of_keys_and_skipped_tiles_are_exact() {
    for declared in [true, false] {
        for fill in [f64::NEG_INFINITY, -1e9] {
            long(MaskCase::Fill(None, Some(0), fill, declared)).check();
            long(MaskCase::Add(Some(-99), Some(0), fill, declared)).check();
        }
    }
    // Rows below 300 see nothing: uniform over all keys, also those of tiles that the band leaves out.
    long(MaskCase::Fill(None, Some(-300), -1e9, true)).check();
    long(MaskCase::Add(None, Some(-300), -50.0, true)).check();
}

#[test]
fn rows_of_minus_infinity_are_nan_as_in_candle() {
    for kernel in [Kernel::Tiled, Kernel::Reference] {
        for declared in [true, false] {
            for mask in [
                MaskCase::Fill(None, Some(-2), f64::NEG_INFINITY, declared),
                MaskCase::Add(None, Some(-2), f64::NEG_INFINITY, declared),
            ] {
                let case = Case {
                    kernel,
                    len: 101,
                    valid: 99,
                    dtype: DType::F32,
                    ..long(mask)
                };
                case.check();
            }
        }
    }
}

#[test]
fn lse_is_the_logarithm_of_the_denominator() {
    for kernel in [Kernel::Tiled, Kernel::Reference] {
        let case = Case {
            kernel,
            ..long(MaskCase::None)
        };
        let [q, k, v, _] = case.inputs();
        let lse = forward(kernel, &case.spec(), &q, &k, &v).unwrap().lse;
        let k = k
            .narrow(2, 0, case.valid)
            .unwrap()
            .repeat((1, 2, 1, 1))
            .unwrap();
        let scores = (q
            .contiguous()
            .unwrap()
            .matmul(&k.t().unwrap().contiguous().unwrap())
            .unwrap()
            * case.spec().scale)
            .unwrap();
        let want = scores.exp().unwrap().sum(D::Minus1).unwrap().log().unwrap();
        close(
            "lse",
            &lse.narrow(2, 0, case.valid).unwrap(),
            &want.narrow(2, 0, case.valid).unwrap(),
            1e-12,
        );
    }
}

#[test]
fn gradients_are_finite_differences() {
    let case = Case {
        len: 19,
        valid: 17,
        d: 5,
        dv: 3,
        cap: Some(1.5),
        ..long(MaskCase::Fill(None, Some(0), -1e9, true))
    };
    let inputs = case.inputs();
    let (_, gradients) = case.fast(&inputs);
    let loss = |inputs: &[Tensor; 4]| {
        let [q, k, v, w] = inputs;
        let o = forward(case.kernel, &case.spec(), q, k, v).unwrap().o;
        (o * w.contiguous().unwrap())
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    };
    for (which, gradient) in [(0, &gradients.q), (1, &gradients.k), (2, &gradients.v)] {
        let gradient = values(gradient);
        for at in (0..gradient.len()).step_by(7) {
            let [up, down] = [1e-5, -1e-5].map(|by| {
                let mut moved = inputs.clone();
                let mut x = values(&moved[which].contiguous().unwrap());
                x[at] += by;
                moved[which] = Tensor::from_vec(x, moved[which].shape(), &CPU).unwrap();
                loss(&moved)
            });
            let slope = (up - down) / 2e-5;
            assert!(
                (slope - gradient[at]).abs() < 1e-8,
                "input {which}[{at}]: {} against {slope}",
                gradient[at]
            );
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let case = Case {
        dtype: DType::F32,
        ..long(MaskCase::Fill(None, Some(0), f64::NEG_INFINITY, true))
    };
    let inputs = case.inputs();
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let (output, g) = pool.install(|| case.fast(&inputs));
        [output.o, output.lse, g.q, g.k, g.v].map(|x| {
            x.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .into_iter()
                .map(f32::to_bits)
                .collect::<Vec<_>>()
        })
    };
    let one = bits(1);
    assert!(one == bits(2) && one == bits(2) && one == bits(3));
}

#[test]
fn kv_heads_follow_the_map() {
    let case = Case {
        kv_heads: 2,
        share: 2,
        ..long(MaskCase::None)
    };
    let inputs = case.inputs();
    let [q, k, v, w] = &inputs;
    let mut spec = case.spec();
    spec.kv_of = vec![0, 1, 0, 1];
    let permuted = |x: &Tensor| {
        x.index_select(&Tensor::new(&[0u32, 2, 1, 3], &CPU).unwrap(), 1)
            .unwrap()
    };
    let blocked = [
        permuted(&q.contiguous().unwrap()),
        k.clone(),
        v.clone(),
        permuted(&w.contiguous().unwrap()),
    ];
    let (want, want_grads) = case.fast(&blocked);
    for kernel in [Kernel::Tiled, Kernel::Reference] {
        let output = forward(kernel, &spec, q, k, v).unwrap();
        let gradients = backward(kernel, &spec, (q, k, v), &output, w).unwrap();
        close("o", &output.o, &permuted(&want.o), 1e-12);
        close("dq", &gradients.q, &permuted(&want_grads.q), 1e-12);
        close("dk", &gradients.k, &want_grads.k, 1e-12);
    }
}

#[test]
fn shapes_and_types_that_do_not_fit_are_refused() {
    let x = |dims: &[usize], dtype| noise(1, dims, dtype);
    let q = x(&[1, 4, 8, 16], DType::F32);
    let spec = Spec::new(1.0, 8, 4, 2);
    let refused = |k: &Tensor, v: &Tensor| {
        forward(Kernel::Tiled, &spec, &q, k, v)
            .unwrap_err()
            .code()
            .id
    };
    let k = x(&[1, 2, 8, 16], DType::F32);
    assert_eq!(refused(&x(&[1, 2, 8, 12], DType::F32), &k), "AS0323");
    assert_eq!(refused(&k, &x(&[1, 2, 7, 16], DType::F32)), "AS0323");
    assert_eq!(refused(&k, &k.to_dtype(DType::F64).unwrap()), "AS0329");
    assert_eq!(
        refused(
            &x(&[1, 1, 8, 16], DType::F32),
            &x(&[1, 1, 8, 16], DType::F32)
        ),
        "AS0323"
    );
}
