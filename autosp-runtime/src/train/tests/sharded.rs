//! ZeRO, micro-batches, groups, frozen variables, validation.

use autosp_plan::Settings;
use autosp_plan::settings::{Place, Policy, Zero};
use candle_core::{DType, Device, Module};
use proptest::prelude::*;

use super::*;
use crate::memory::checkpoint;
use crate::random::Stream;
use crate::run_with;

const ROWS: usize = 12;
const WIDTH: usize = 6;

/// The rows of one batch that belong to this rank, and their labels; every fifth row has none.
fn batch(sp: &Sp, seed: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
    let stream = Stream::new(seed as u64, "rows");
    let x: Vec<f32> = (0..ROWS * WIDTH)
        .map(|i| stream.normal(i as u64) as f32)
        .collect();
    let labels: Vec<i64> = (0..ROWS as i64)
        .map(|i| if i % 5 == 1 { -100 } else { i % 5 })
        .collect();
    let len = ROWS / sp.world_size();
    let x = Tensor::from_vec(x, (ROWS, WIDTH), &Device::Cpu)?.to_dtype(dtype)?;
    let labels = Tensor::from_vec(labels, ROWS, &Device::Cpu)?;
    Ok((
        x.narrow(0, sp.rank() * len, len)?,
        labels.narrow(0, sp.rank() * len, len)?,
    ))
}

/// Two layers, the first of which is a checkpoint.
struct Model {
    first: candle_nn::Linear,
    second: candle_nn::Linear,
}

impl Model {
    fn new(parameters: &Parameters) -> Result<Self> {
        let vb = parameters.builder();
        Ok(Self {
            first: candle_nn::linear(WIDTH, 8, vb.pp("first"))?,
            second: candle_nn::linear(8, 5, vb.pp("second"))?,
        })
    }

    fn loss(&self, x: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
        let first = self.first.clone();
        let x = checkpoint(x, move |x| first.forward(x)?.silu())?;
        loss::cross_entropy(&self.second.forward(&x)?, labels)
    }
}

/// What ranks have after some steps: the reports, the variables, and the bytes of the optimizer.
type Trained = (Vec<StepReport>, Vec<Vec<f32>>, u64);

fn train(
    settings: Settings,
    how: TrainSettings,
    dtype: DType,
    groups: &[Group],
    batches: &[usize],
) -> Vec<Trained> {
    run_with(settings, |sp| {
        let parameters = Parameters::init(if sp.is_main() { 1 } else { 2 }, dtype, &Device::Cpu);
        let model = Model::new(&parameters)?;
        let mut trainer = Trainer::new(sp, parameters, how)?.with_groups(groups)?;
        let mut reports = Vec::new();
        for step in 0..3 {
            let seeds = batches.iter().map(|&seed| seed + 100 * step);
            reports.push(trainer.step_over(seeds, |seed| {
                let (x, labels) = batch(sp, seed, dtype)?;
                Ok::<_, Error>(model.loss(&x, &labels)?)
            })?);
        }
        let values = trainer.parameters().vars().into_iter().map(|var| {
            let values = var.flatten_all()?.to_dtype(DType::F32)?;
            values.to_vec1::<f32>()
        });
        let values = values.collect::<candle_core::Result<_>>()?;
        Ok((reports, values, trainer.optimizer_bytes()))
    })
    .unwrap()
}

fn close(a: &[Vec<f32>], b: &[Vec<f32>], tolerance: f32) -> bool {
    a.iter()
        .flatten()
        .zip(b.iter().flatten())
        .all(|(a, b)| (a - b).abs() <= tolerance * (0.01 + b.abs()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// With the optimizer shared out, and the gradients, and on the host, training is the same, and all ranks together hold what one would.
    #[test]
    fn zero_changes_no_number(
        zero in prop::sample::select(Zero::ALL.to_vec()), place in prop::sample::select(vec![Place::Device, Place::Host]),
        dp in 1usize..4, sp in 1usize..3, adam in any::<bool>(), half in any::<bool>(),
        bucket in prop::sample::select(vec![1usize, 100, 1 << 20]), policy in prop::sample::select(Policy::ALL.to_vec()),
    ) {
        prop_assume!(ROWS.is_multiple_of(dp * sp));
        let dtype = if half { DType::BF16 } else { DType::F32 };
        let optimizer = if adam { Optimizer::adamw() } else { Optimizer::Sgd { momentum: 0.9, weight_decay: 0.1 } };
        // Without clipping no number is summed in another order than before.
        let how = TrainSettings { optimizer, schedule: Schedule::constant(0.1), bucket_bytes: bucket, clip: None, ..TrainSettings::default() };
        let settings = Settings::default().with_dp(dp).with_sp(sp).with_policy(policy);
        let groups = [Group { rate: 0.5, weight_decay: Some(0.3), ..Group::new("second.*") }];
        let whole = train(settings.clone(), how, dtype, &groups, &[1]);
        let shared = train(settings.with_zero(zero).with_optimizer(place), how, dtype, &groups, &[1]);
        for (shared, whole) in shared.iter().zip(&whole) {
            prop_assert_eq!(&shared.1, &whole.1);
            for (shared, whole) in shared.0.iter().zip(&whole.0) {
                prop_assert_eq!(shared.loss.to_bits(), whole.loss.to_bits());
                prop_assert!((shared.grad_norm - whole.grad_norm).abs() <= 1e-12 * whole.grad_norm);
            }
        }
        let total: u64 = shared.iter().map(|rank| rank.2).sum();
        if zero == Zero::Stage0 {
            prop_assert!(shared.iter().all(|rank| rank.2 == whole[0].2));
            return Ok(());
        }
        prop_assert_eq!(total, whole[0].2);
        let most = shared.iter().map(|rank| rank.2).max().unwrap_or(0);
        // A bucket of one element more or less, in three lists of up to eight bytes, for each of up to four buckets.
        prop_assert!(most <= total / (dp * sp) as u64 + 4 * 24, "{} of {}", most, total);
    }
}

#[test]
fn clipping_is_by_the_norm_of_all_shares() {
    let how = TrainSettings {
        optimizer: Optimizer::sgd(),
        schedule: Schedule::constant(1.0),
        clip: Some(0.01),
        ..TrainSettings::default()
    };
    let settings = Settings::default().with_dp(3);
    let whole = train(settings.clone(), how, DType::F32, &[], &[1]);
    for zero in [Zero::Stage1, Zero::Stage2] {
        let shared = train(settings.clone().with_zero(zero), how, DType::F32, &[], &[1]);
        assert!(close(&shared[0].1, &whole[0].1, 1e-6));
        assert!((shared[2].0[2].grad_norm / whole[0].0[2].grad_norm - 1.0).abs() < 1e-6);
    }
}

/// On the host lie the state and two loads; on the device nothing of the optimizer from step to step.
#[test]
fn the_ledger_knows_where_the_optimizer_is() {
    for (place, half) in [
        (Place::Device, false),
        (Place::Host, false),
        (Place::Host, true),
    ] {
        let dtype = if half { DType::BF16 } else { DType::F32 };
        let settings = Settings::default()
            .with_dp(2)
            .with_zero(Zero::Stage1)
            .with_optimizer(place);
        run_with(settings, |sp| {
            let parameters = Parameters::init(1, dtype, &Device::Cpu);
            let model = Model::new(&parameters)?;
            let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
            for _ in 0..2 {
                let (x, labels) = batch(sp, 1, dtype)?;
                trainer.step(|| model.loss(&x, &labels))?;
                let (state, ledger) = (trainer.optimizer_bytes(), sp.ledger());
                let found =
                    [Purpose::Optimizer, Purpose::Host].map(|purpose| ledger.bytes(purpose));
                if place == Place::Device {
                    assert_eq!(found, [state, 0]);
                    continue;
                }
                // All variables are one bucket: one load of a gradient, an old and a new value for each element of this rank.
                let elements = state / if half { 12 } else { 8 };
                let load = elements * if half { 8 } else { 12 };
                assert_eq!(found, [0, state + load]);
                // Gradients, old values but for those with master weights, and new values pass through the device.
                let most = elements * if half { 4 + 2 + 2 } else { 4 + 4 + 4 };
                assert!(ledger.most(Purpose::Optimizer) <= most);
                assert!(ledger.most(Purpose::Optimizer) > 0);
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn micro_batches_are_one_batch() {
    // Micro-batches of one to four rows with labels, and one without any, against all rows at once.
    let rows = |sp: &Sp, range: std::ops::Range<usize>| -> Result<(Tensor, Tensor)> {
        let (x, labels) = batch(sp, 3, DType::F32)?;
        Ok((
            x.narrow(0, range.start, range.len())?,
            labels.narrow(0, range.start, range.len())?,
        ))
    };
    for zero in Zero::ALL {
        let run = |cuts: &[usize], policy| {
            let settings = Settings::default()
                .with_dp(2)
                .with_zero(zero)
                .with_policy(policy);
            let how = TrainSettings {
                optimizer: Optimizer::sgd(),
                schedule: Schedule::constant(0.5),
                ..TrainSettings::default()
            };
            let found = run_with(settings, |sp| {
                let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
                let model = Model::new(&parameters)?;
                let mut trainer = Trainer::new(sp, parameters, how)?;
                let ranges = cuts.windows(2).map(|cut| cut[0]..cut[1]);
                let report = trainer.step_over(ranges, |range| {
                    let (x, labels) = rows(sp, range)?;
                    Ok::<_, Error>(model.loss(&x, &labels)?)
                })?;
                let values = trainer.parameters().vars().into_iter();
                let values = values.map(|var| var.flatten_all()?.to_vec1::<f32>());
                Ok((report, values.collect::<candle_core::Result<Vec<_>>>()?))
            });
            found.unwrap().remove(1)
        };
        let (whole, expected) = run(&[0, 6], Policy::All);
        for policy in [Policy::All, Policy::Input] {
            // Row 1 of both ranks has no target on rank 0; rows 1..2 alone have one on rank 1 only.
            for cuts in [&[0, 1, 3, 6][..], &[0, 2, 6], &[0, 1, 2, 3, 4, 5, 6]] {
                let (report, values) = run(cuts, policy);
                assert_eq!(report.valid_tokens, whole.valid_tokens);
                assert!((report.loss / whole.loss - 1.0).abs() < 1e-6, "{cuts:?}");
                assert!((report.grad_norm / whole.grad_norm - 1.0).abs() < 1e-5);
                assert!(close(&values, &expected, 1e-5), "{cuts:?}");
            }
        }
    }
}

#[test]
fn a_micro_batch_may_have_no_target_but_not_all() {
    let found = run_with(Settings::default(), |sp| {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let model = Model::new(&parameters)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        let (x, labels) = batch(sp, 1, DType::F32)?;
        let none = (labels.zeros_like()? - 100.0)?;
        let one = trainer.evaluate(|| model.loss(&x, &labels))?;
        let step = trainer.step_over([&none, &labels, &none], |labels| model.loss(&x, labels))?;
        assert_eq!(step.valid_tokens, one.valid_tokens);
        assert!((step.loss - one.loss).abs() < 1e-6);
        let errors = [
            trainer.step_over([&none, &none], |labels| model.loss(&x, labels)),
            trainer.step_over([&none], |labels| model.loss(&x, labels)),
        ];
        for error in errors {
            assert_eq!(error.unwrap_err().code(), codes::NO_TARGET);
        }
        let other = |labels: Option<&Tensor>| match labels {
            Some(labels) => model.loss(&x, labels),
            None => model.first.forward(&x)?.sqr()?.mean_all(),
        };
        for mixed in [[Some(&labels), None], [None, Some(&labels)]] {
            let error = trainer.step_over(mixed, other).unwrap_err();
            assert_eq!(error.code(), codes::TRAIN_SETTING);
        }
        let error = trainer.step_over([], other).unwrap_err();
        assert_eq!(error.code(), codes::TRAIN_SETTING);
        Ok(())
    });
    found.unwrap();
}

#[test]
fn losses_without_targets_are_averaged() {
    two_ranks(TrainSettings::default(), |_, trainer, x| {
        let y = trainer.parameters().vars()[1].clone();
        let report = trainer.step_over([1.0, 3.0], |factor| {
            ((x + y.as_tensor())?.sum_all()? * factor)?.sum_all()
        })?;
        // Each rank's loss is its own; 4 and 12 on both, with gradients of 1 and 3 on each of the two.
        assert!((report.loss - 8.0).abs() < 1e-9);
        assert!((report.grad_norm - 8.0).abs() < 1e-6);
        assert_eq!(report.valid_tokens, 0);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_validation_loss_is_that_of_all_targets_and_holds_nothing() {
    for policy in [Policy::All, Policy::Input] {
        run_with(Settings::default().with_dp(2).with_policy(policy), |sp| {
            let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
            let model = Model::new(&parameters)?;
            let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
            let (x, labels) = batch(sp, 1, DType::F32)?;
            let whole = trainer.evaluate(|| model.loss(&x, &labels))?;
            let several = trainer.evaluate_over([0..1, 1..6], |rows| {
                let (x, labels) = (
                    x.narrow(0, rows.start, rows.len())?,
                    labels.narrow(0, rows.start, rows.len())?,
                );
                let loss = model.loss(&x, &labels)?;
                assert_eq!(sp.ledger().held(), 0, "no backward will come");
                Ok::<_, candle_core::Error>(loss)
            })?;
            assert_eq!(several.valid_tokens, whole.valid_tokens);
            assert!((several.loss / whole.loss - 1.0).abs() < 1e-6);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn frozen_variables_are_neither_reduced_nor_stepped() {
    let run = |freeze: bool, zero| {
        let settings = Settings::default().with_dp(2).with_zero(zero);
        run_with(settings, |sp| {
            let parameters = Parameters::init(1, DType::F32, &Device::Cpu)
                .freeze(move |name| freeze && name.starts_with("first"));
            let model = Model::new(&parameters)?;
            let before = parameters.all();
            let before = before
                .iter()
                .map(|(name, var)| Ok((name.clone(), var.copy()?.flatten_all()?.to_vec1::<f32>()?)))
                .collect::<Result<Vec<_>>>()?;
            let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
            let (x, labels) = batch(sp, 1, DType::F32)?;
            let report = trainer.step(|| model.loss(&x, &labels))?;
            for ((name, before), (_, now)) in before.iter().zip(trainer.parameters().all()) {
                let same = before == &now.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(same, freeze && name.starts_with("first"), "{name}");
            }
            Ok((report.bytes_sent, trainer.optimizer_bytes()))
        })
        .unwrap()
        .remove(0)
    };
    let elements = |frozen: bool| {
        if frozen {
            8 * 5 + 5
        } else {
            8 * 5 + 5 + 6 * 8 + 8
        }
    };
    for zero in [Zero::Stage0, Zero::Stage1] {
        let ((some, some_state), (all, all_state)) = (run(true, zero), run(false, zero));
        // Of two ranks each sends half of what is summed and half of the sum; and one byte for the presence of each variable.
        let frozen = (elements(false) - elements(true)) as u64;
        let saved = all - some;
        assert!(
            (2 * 4 * frozen..=2 * 4 * frozen + 16).contains(&saved),
            "{saved}"
        );
        if zero == Zero::Stage0 {
            assert_eq!(some_state, 8 * elements(true) as u64);
            assert_eq!(all_state, 8 * elements(false) as u64);
        }
    }
}
