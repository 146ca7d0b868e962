mod tiled;

use autosp_plan::Settings;
use candle_core::Var;
use proptest::prelude::*;

use super::*;
use crate::random::Stream;
use crate::run_with;

fn logits(rows: usize, vocabulary: usize, seed: u64) -> Tensor {
    let stream = Stream::new(seed, "logits");
    let data: Vec<f64> = (0..rows * vocabulary)
        .map(|i| 3.0 * stream.normal(i as u64))
        .collect();
    Tensor::from_vec(data, (1, rows, vocabulary), &Device::Cpu).unwrap()
}

fn labels(rows: usize, vocabulary: usize, seed: u64, kept: impl Fn(usize) -> bool) -> Vec<i64> {
    let stream = Stream::new(seed, "labels");
    (0..rows)
        .map(|i| {
            if kept(i) {
                stream.below(i as u64, vocabulary as u64) as i64
            } else {
                IGNORE
            }
        })
        .collect()
}

/// Mean loss and gradient by candle's autograd, in f64.
fn expected(logits: &Tensor, labels: &[i64]) -> (f64, Vec<f64>) {
    let var = Var::from_tensor(&logits.to_dtype(DType::F64).unwrap()).unwrap();
    let rows: Vec<u32> = (0..labels.len() as u32)
        .filter(|&i| labels[i as usize] != IGNORE)
        .collect();
    let classes: Vec<u32> = rows.iter().map(|&i| labels[i as usize] as u32).collect();
    let index = Tensor::new(rows, &Device::Cpu).unwrap();
    let kept = var.squeeze(0).unwrap().index_select(&index, 0).unwrap();
    let loss = candle_nn::loss::cross_entropy(&kept, &Tensor::new(classes, &Device::Cpu).unwrap())
        .unwrap();
    let grad = loss
        .backward()
        .unwrap()
        .get(&var)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    (loss.to_scalar().unwrap(), grad)
}

/// Loss on every rank and the gradients of all ranks' rows, joined.
fn sharded(
    logits: &Tensor,
    labels: &[i64],
    size: usize,
    dtype: DType,
) -> crate::Result<(Vec<f64>, Vec<f64>)> {
    let len = labels.len() / size;
    let results = run_with(Settings::default().with_sp(size), |sp| {
        let start = sp.rank() * len;
        let mine = Var::from_tensor(&logits.narrow(1, start, len)?.to_dtype(dtype)?)?;
        let targets = Tensor::new(&labels[start..start + len], &Device::Cpu)?.unsqueeze(0)?;
        sp.scope(|| {
            let loss = cross_entropy(&mine, &targets)?;
            let grads = loss.backward()?;
            let grad = grads.get(&mine).unwrap();
            assert_eq!(grad.dtype(), dtype);
            let grad = grad.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
            Ok((loss.to_dtype(DType::F64)?.to_scalar::<f64>()?, grad))
        })
    })?;
    Ok((
        results.iter().map(|r| r.0).collect(),
        results.into_iter().flat_map(|r| r.1).collect(),
    ))
}

/// Gradients are differences of probabilities, over at most some twenty targets: where a probability is nearly one, they are small, and
/// their rounding is not.
const ROUNDING: f64 = 0.05;

fn close(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    apart <= tolerance * (norm(&mut b.iter().copied()) + ROUNDING)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any split of any set of targets, also with none on a rank, has the loss and the gradient of one device.
    #[test]
    fn unequal_targets_are_exact(seed in 1u64..1 << 40, size in 1usize..5, len in 1usize..6, vocabulary in 2usize..40, keep in any::<u32>()) {
        let rows = size * len;
        let x = logits(rows, vocabulary, seed);
        let targets = labels(rows, vocabulary, seed, |i| i == 0 || keep >> i & 1 == 1);
        let (loss, grad) = expected(&x, &targets);
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-6)] {
            let (values, found) = sharded(&x, &targets, size, dtype).unwrap();
            // A loss is a difference of logits, and may be small where they are not.
            prop_assert!(values.iter().all(|value| (value - loss).abs() <= tolerance * (1.0 + loss)), "{values:?} {loss}");
            prop_assert!(values.windows(2).all(|pair| pair[0].to_bits() == pair[1].to_bits()));
            prop_assert!(close(&found, &grad, 10.0 * tolerance));
        }
    }
}

#[test]
fn half_precision_logits_have_an_f32_loss() {
    for dtype in [DType::BF16, DType::F16] {
        let x = logits(6, 50, 1).to_dtype(dtype).unwrap();
        let targets = labels(6, 50, 1, |i| i != 2);
        let (loss, grad) = expected(&x, &targets);
        let (values, found) = sharded(&x, &targets, 1, dtype).unwrap();
        assert!((values[0] - loss).abs() < 1e-6 * loss, "{values:?} {loss}");
        assert!(close(&found, &grad, 4e-3));
    }
}

#[test]
fn a_scaled_loss_has_a_scaled_gradient_and_ignored_rows_may_hold_anything() {
    let mut data = logits(4, 8, 2)
        .flatten_all()
        .unwrap()
        .to_vec1::<f64>()
        .unwrap();
    data[..8].fill(f64::NAN);
    let x = Var::from_tensor(&Tensor::from_vec(data, (4, 8), &Device::Cpu).unwrap()).unwrap();
    let targets = Tensor::new(&[(-100i32) as u32, 1, 2, 3], &Device::Cpu).unwrap();
    let grad = |scale: f64| {
        let loss = (cross_entropy(&x, &targets).unwrap() * scale).unwrap();
        loss.backward()
            .unwrap()
            .get(&x)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()
    };
    let (one, three) = (grad(1.0), grad(3.0));
    assert!(one[..8].iter().all(|&g| g == 0.0));
    assert!(
        one.iter()
            .zip(&three)
            .all(|(a, b)| (3.0 * a - b).abs() < 1e-15)
    );
}

#[test]
fn any_layout_of_logits_is_read() {
    let x = logits(6, 8, 3)
        .to_dtype(DType::F32)
        .unwrap()
        .squeeze(0)
        .unwrap();
    let targets = Tensor::new(&labels(6, 8, 3, |_| true)[..], &Device::Cpu).unwrap();
    let value = |x: &Tensor| {
        cross_entropy(x, &targets)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    let strided = x.t().unwrap().contiguous().unwrap().t().unwrap();
    assert!(!strided.is_contiguous());
    assert!((value(&x) - value(&strided)).abs() == 0.0);
}

#[test]
fn what_cannot_be_averaged_is_refused() {
    let x = logits(4, 8, 2).squeeze(0).unwrap();
    let code = |labels: Tensor| Error::from(cross_entropy(&x, &labels).unwrap_err()).code();
    assert_eq!(
        code(Tensor::new(&[IGNORE; 4], &Device::Cpu).unwrap()),
        codes::NO_TARGET
    );
    assert_eq!(
        code(Tensor::new(&[0i64, 1, 8, 2], &Device::Cpu).unwrap()),
        codes::LABEL_RANGE
    );
    assert_eq!(
        code(Tensor::new(&[0i64, 1, -1, 2], &Device::Cpu).unwrap()),
        codes::LABEL_RANGE
    );
    assert_eq!(
        code(Tensor::new(&[0i64, 1, 2], &Device::Cpu).unwrap()),
        codes::BATCH_SHAPE
    );
    assert_eq!(
        code(Tensor::new(&[0f32, 1., 2., 3.], &Device::Cpu).unwrap()),
        codes::BATCH_SHAPE
    );
    let error = sharded(&logits(4, 8, 1), &[IGNORE; 4], 2, DType::F32).unwrap_err();
    assert_eq!(error.code(), codes::NO_TARGET);
}

#[test]
fn the_composition_for_other_devices_is_the_same() {
    let x = Var::from_tensor(&logits(5, 9, 4)).unwrap();
    let targets = labels(5, 9, 4, |i| i != 1);
    let classes: Vec<Option<u32>> = targets
        .iter()
        .map(|&label| u32::try_from(label).ok())
        .collect();
    let loss = composed(&x, &classes, 4, DType::F64).unwrap();
    let (value, grad) = expected(&x, &targets);
    let found = loss
        .backward()
        .unwrap()
        .get(&x)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1::<f64>()
        .unwrap();
    assert!((loss.to_scalar::<f64>().unwrap() - value).abs() < 1e-12);
    assert!(close(&found, &grad, 1e-12));
}
