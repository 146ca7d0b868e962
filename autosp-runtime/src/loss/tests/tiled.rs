#![allow(
    clippy::struct_excessive_bools,
    clippy::float_cmp,
    reason = "cases of a table; the same bits"
)]
use super::*;
use crate::memory;

/// Hidden states [1, s, h], a vocabulary [V, h] and a bias [V], in f64.
struct Problem {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Vec<i64>,
    size: usize,
}

/// How logits are made, beside the plain product.
#[derive(Debug, Clone, Copy, Default)]
struct How {
    bias: bool,
    /// A class is a column of the weight.
    columns: bool,
    /// The weights are in a layer that is not seen into.
    layer: bool,
    scale: Option<f64>,
    cap: Option<f64>,
    cast: bool,
    frozen: bool,
}

impl How {
    fn drawn(bits: u32) -> Self {
        let bit = |i: u32| bits >> i & 1 == 1;
        Self {
            bias: bit(0),
            columns: bit(1) && !bit(0) && !bit(2),
            layer: bit(2),
            scale: bit(3).then_some(0.7),
            cap: bit(4).then_some(2.0),
            cast: bit(5),
            frozen: bit(6),
        }
    }
}

/// Loss on every rank, and gradients of hidden states (joined), weight and bias (summed over the ranks).
struct Found {
    losses: Vec<f64>,
    dx: Vec<f64>,
    dw: Option<Vec<f64>>,
    db: Option<Vec<f64>>,
}

fn numbers(shape: &[usize], seed: u64) -> Tensor {
    let stream = Stream::new(seed, "tensor");
    let data: Vec<f64> = (0..shape.iter().product::<usize>())
        .map(|i| stream.normal(i as u64))
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn flat(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    x.to_vec1().unwrap()
}

/// What `layer` in [`How`] stands for.
#[derive(Clone)]
struct Hidden(candle_nn::Linear);

impl candle_core::Module for Hidden {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

impl Problem {
    fn new(seed: u64, size: usize, len: usize, vocabulary: usize, keep: u32) -> Self {
        let (rows, h) = (size * len, 3 + (seed % 5) as usize);
        Self {
            x: numbers(&[1, rows, h], seed),
            weight: numbers(&[vocabulary, h], seed + 1),
            bias: numbers(&[vocabulary], seed + 2),
            labels: labels(rows, vocabulary, seed, |i| {
                i == 0 || keep >> (i % 32) & 1 == 1
            }),
            size,
        }
    }

    /// By candle's own operations on one device, in f64.
    fn expected(&self, how: How) -> Found {
        let [x, w, b] = [&self.x, &self.weight, &self.bias].map(|t| Var::from_tensor(t).unwrap());
        let rows: Vec<u32> = (0..self.labels.len() as u32)
            .filter(|&i| self.labels[i as usize] != IGNORE)
            .collect();
        let classes: Vec<u32> = rows
            .iter()
            .map(|&i| self.labels[i as usize] as u32)
            .collect();
        let index = Tensor::new(rows, &Device::Cpu).unwrap();
        let kept = x.squeeze(0).unwrap().index_select(&index, 0).unwrap();
        let mut z = kept.matmul(&w.t().unwrap()).unwrap();
        if how.bias {
            z = z.broadcast_add(&b).unwrap();
        }
        if let Some(scale) = how.scale {
            z = (z / scale).unwrap();
        }
        if let Some(cap) = how.cap {
            z = ((z / cap).unwrap().tanh().unwrap() * cap).unwrap();
        }
        let classes = Tensor::new(classes, &Device::Cpu).unwrap();
        let loss = candle_nn::loss::cross_entropy(&z, &classes).unwrap();
        let grads = loss.backward().unwrap();
        Found {
            losses: vec![loss.to_scalar().unwrap()],
            dx: flat(grads.get(&x).unwrap()),
            dw: (!how.frozen).then(|| flat(grads.get(&w).unwrap())),
            db: (how.bias && !how.frozen).then(|| flat(grads.get(&b).unwrap())),
        }
    }

    fn logits(how: How, x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Logits> {
        let bias = how.bias.then_some(b);
        let mut z = if how.layer {
            let layer = Hidden(candle_nn::Linear::new(w.clone(), bias.cloned()));
            head::layer(&layer, x)?
        } else if how.columns {
            head::matmul(x, &w.t()?)?
        } else {
            Logits::new(x, w, bias)?
        };
        if let Some(scale) = how.scale {
            z = (z / scale)?;
        }
        if how.cast && x.dtype() != DType::F64 {
            z = z.to_dtype(DType::F32)?;
        }
        if let Some(cap) = how.cap {
            z = ((z / cap)?.tanh()? * cap)?;
        }
        Ok(z)
    }

    fn found(&self, how: How, dtype: DType, bytes: usize) -> crate::Result<Found> {
        let settings = Settings::default()
            .with_sp(self.size)
            .with_loss_bytes(bytes);
        let len = self.labels.len() / self.size;
        let results = run_with(settings, |sp| {
            let start = sp.rank() * len;
            let x = Var::from_tensor(&self.x.narrow(1, start, len)?.to_dtype(dtype)?)?;
            let leaf = |t: &Tensor| -> Result<Tensor> {
                let t = t.to_dtype(dtype)?;
                Ok(if how.frozen {
                    t
                } else {
                    Var::from_tensor(&t)?.into_inner()
                })
            };
            let (w, b) = (leaf(&self.weight)?, leaf(&self.bias)?);
            let targets = Tensor::new(&self.labels[start..start + len], &Device::Cpu)?;
            sp.scope(|| {
                let loss = Self::logits(how, &x, &w, &b)?.cross_entropy(&targets.unsqueeze(0)?)?;
                let grads = loss.backward()?;
                let get = |t: &Tensor| grads.get(t).map(flat);
                assert_eq!(grads.get(&x).unwrap().dtype(), dtype);
                let loss = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                Ok((loss, get(&x).unwrap(), get(&w), get(&b)))
            })
        })?;
        let sum = |each: Vec<Option<Vec<f64>>>| {
            each.into_iter()
                .flatten()
                .reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect())
        };
        Ok(Found {
            losses: results.iter().map(|r| r.0).collect(),
            dx: results.iter().flat_map(|r| r.1.clone()).collect(),
            dw: sum(results.iter().map(|r| r.2.clone()).collect()),
            db: sum(results.iter().map(|r| r.3.clone()).collect()),
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any head, any tile and any split of any set of targets, also with none on a rank, has the loss and the gradients of one device.
    #[test]
    fn tiles_are_exact(
        seed in 1u64..1 << 40, size in 1usize..4, len in 1usize..9, vocabulary in 2usize..40, keep in any::<u32>(),
        bits in any::<u32>(), bytes in 1usize..4000,
    ) {
        let problem = Problem::new(seed, size, len, vocabulary, keep);
        let how = How::drawn(bits);
        let expected = problem.expected(how);
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-6)] {
            let found = problem.found(how, dtype, bytes).unwrap();
            let loss = expected.losses[0];
            prop_assert!(found.losses.iter().all(|l| (l - loss).abs() <= tolerance * (1.0 + loss)), "{how:?} {:?} {loss}", found.losses);
            prop_assert!(close(&found.dx, &expected.dx, 10.0 * tolerance), "{how:?}: dx");
            for (found, expected, what) in [(&found.dw, &expected.dw, "dw"), (&found.db, &expected.db, "db")] {
                match (found, expected) {
                    (Some(found), Some(expected)) => prop_assert!(close(found, expected, 10.0 * tolerance), "{how:?}: {what}"),
                    (found, expected) => prop_assert!(found.is_none() && expected.is_none(), "{how:?}: {what}"),
                }
            }
        }
    }
}

#[test]
fn half_precision_sums_the_weight_in_f32_and_f16_does_not_vanish() {
    let problem = Problem::new(4, 1, 300, 50, u32::MAX);
    for (dtype, tolerance) in [(DType::BF16, 8e-3), (DType::F16, 2e-3)] {
        for how in [
            How::default(),
            How {
                cap: Some(3.0),
                cast: true,
                bias: true,
                ..How::default()
            },
        ] {
            let (expected, found) = (
                problem.expected(how),
                problem.found(how, dtype, 2000).unwrap(),
            );
            assert!((found.losses[0] - expected.losses[0]).abs() < tolerance * expected.losses[0]);
            assert!(
                close(&found.dx, &expected.dx, 2.0 * tolerance),
                "{dtype:?} {how:?}"
            );
            assert!(
                close(&found.dw.unwrap(), &expected.dw.unwrap(), 2.0 * tolerance),
                "{dtype:?} {how:?}"
            );
        }
    }
}

/// Many targets of one class: the sum of their gradients, before it is divided by their number, is larger than f16 holds.
#[test]
fn f16_does_not_overflow_where_a_class_has_many_targets() {
    let (tokens, device) = (72_000, Device::Cpu);
    let gradients = |dtype: DType| -> candle_core::Result<[Vec<f64>; 2]> {
        let x = Tensor::ones((tokens, 2), dtype, &device)?;
        let weight = Var::zeros((4, 2), dtype, &device)?;
        let bias = Var::zeros(4, dtype, &device)?;
        let labels = Tensor::zeros(tokens, DType::U32, &device)?;
        let loss = linear_cross_entropy(&x, &weight, Some(bias.as_tensor()), &labels)?;
        let grads = loss.backward()?;
        Ok([weight, bias].map(|v| flat(grads.get(&v).unwrap())))
    };
    // softmax - onehot with four equal logits: 1/4 - 1 for the class, 1/4 for the others, the mean over tokens alike.
    let [dw, db] = gradients(DType::F16).unwrap();
    assert!(close(&db, &[-0.75, 0.25, 0.25, 0.25], 1e-3), "{db:?}");
    assert!(
        close(
            &dw,
            &[-0.75, -0.75, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
            1e-3
        ),
        "{dw:?}"
    );
}

#[test]
fn runs_are_equal_to_the_bit() {
    let problem = Problem::new(9, 2, 40, 31, 0x5555_7777);
    let run = || {
        let found = problem.found(How::default(), DType::F32, 1000).unwrap();
        (found.losses, found.dx, found.dw)
    };
    assert_eq!(run(), run());
}

#[test]
fn a_factor_on_the_loss_is_one_on_the_gradients() {
    let problem = Problem::new(3, 1, 6, 11, u32::MAX);
    let targets = Tensor::new(&problem.labels[..], &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let grads = |factor: f64| {
        let x = Var::from_tensor(&problem.x).unwrap();
        let loss = linear_cross_entropy(&x, &problem.weight, None, &targets).unwrap();
        let grads = (loss * factor).unwrap().backward().unwrap();
        flat(grads.get(&x).unwrap())
    };
    let three: Vec<f64> = grads(1.0).iter().map(|g| 3.0 * g).collect();
    assert!(close(&grads(3.0), &three, 1e-14));
}

#[test]
fn without_a_backward_there_is_the_value_alone() {
    let problem = Problem::new(7, 1, 6, 11, u32::MAX);
    let x = Var::from_tensor(&problem.x).unwrap();
    let w = Var::from_tensor(&problem.weight).unwrap();
    let targets = Tensor::new(&problem.labels[..], &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let value = |loss: &Tensor| loss.to_scalar::<f64>().unwrap();
    let with = linear_cross_entropy(&x, &w, None, &targets).unwrap();
    let without = memory::forward_only(|| linear_cross_entropy(&x, &w, None, &targets)).unwrap();
    assert!((value(&with) - value(&without)).abs() < 1e-14);
    assert!(with.track_op() && !without.track_op());
}

#[test]
fn a_micro_batch_without_targets_is_zero() {
    let problem = Problem::new(7, 1, 4, 11, u32::MAX);
    let x = Var::from_tensor(&problem.x).unwrap();
    let none = Tensor::new(&[[IGNORE; 4]], &Device::Cpu).unwrap();
    let loss = || linear_cross_entropy(&x, &problem.weight, None, &none);
    assert_eq!(Error::from(loss().unwrap_err()).code(), codes::NO_TARGET);
    let empty = allow_empty(loss).unwrap();
    assert_eq!(empty.to_scalar::<f64>().unwrap(), 0.0);
    let grads = empty.backward().unwrap();
    assert!(flat(grads.get(&x).unwrap()).iter().all(|&g| g == 0.0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let code = |result: Result<Tensor>| Error::from(result.unwrap_err()).code();
    let (x, w) = (numbers(&[2, 3, 4], 1), numbers(&[5, 4], 2));
    let targets =
        |dims: (usize, usize), class: i64| Tensor::full(class, dims, &Device::Cpu).unwrap();
    let loss = |w: &Tensor, b: Option<&Tensor>, t: &Tensor| linear_cross_entropy(&x, w, b, t);
    assert!(loss(&w, None, &targets((2, 3), 4)).is_ok());
    assert_eq!(
        code(loss(&w, None, &targets((2, 3), 5))),
        codes::LABEL_RANGE
    );
    assert_eq!(
        code(loss(&w, None, &targets((3, 2), 1))),
        codes::BATCH_SHAPE
    );
    assert_eq!(
        code(loss(&w.t().unwrap(), None, &targets((2, 3), 1))),
        codes::BATCH_SHAPE
    );
    assert_eq!(
        code(loss(&w, Some(&numbers(&[4], 1)), &targets((2, 3), 1))),
        codes::BATCH_SHAPE
    );
    let logits = Logits::new(&x, &w, None).unwrap();
    assert!(logits.unsqueeze(3).is_err() && logits.unsqueeze(2).is_ok());
    assert!(logits.squeeze(9).is_err());
    // Rows of logits are those of the hidden states, in the order of the batch, sequence first or not.
    let folded = |dim: usize, keep: bool| head::fold(&logits, dim, keep).unwrap();
    let rows = Tensor::new(&[0i64, 1, 2, 3, 4, 0], &Device::Cpu).unwrap();
    let value =
        |logits: &Logits, t: &Tensor| logits.cross_entropy(t).unwrap().to_scalar::<f64>().unwrap();
    let whole = value(&logits, &rows.reshape((2, 3)).unwrap());
    assert_eq!(value(&folded(1, false), &rows), whole);
    assert_eq!(value(&folded(1, true), &rows.unsqueeze(1).unwrap()), whole);
    let first = head::fold(
        &Logits::new(&x.transpose(0, 1).unwrap(), &w, None).unwrap(),
        0,
        false,
    );
    assert!((value(&first.unwrap(), &rows) - whole).abs() < 1e-14);
    let odd = logits.unsqueeze(1).unwrap().squeeze(1).unwrap();
    assert!(odd.cross_entropy(&targets((2, 3), 1)).is_ok());
}
