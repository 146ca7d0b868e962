mod divided;
mod limits;
mod sharded;

use autosp_plan::Settings;
use autosp_plan::settings::Policy;
use candle_core::{DType, Device, Module, Tensor};
use proptest::prelude::*;

use super::*;
use crate::random::Stream;
use crate::{loss, memory::checkpoint, run_with};

const ROWS: usize = 12;

/// The reports of the steps, and the variables after them.
type Trained = (Vec<StepReport>, Vec<Vec<f32>>);

/// A model of two layers, on the rows of this rank.
fn train(settings: Settings, how: TrainSettings, steps: usize) -> Result<Vec<Trained>> {
    run_with(settings, |sp| {
        let seed = if sp.is_main() { 1 } else { 2 };
        let parameters = Parameters::init(seed, DType::F32, &Device::Cpu);
        let vb = parameters.builder();
        let first = candle_nn::linear(6, 8, vb.pp("first"))?;
        let second = candle_nn::linear(8, 5, vb.pp("second"))?;
        let mut trainer = Trainer::new(sp, parameters, how)?;
        let stream = Stream::new(3, "data");
        let mut reports = Vec::new();
        for step in 0..steps {
            let len = ROWS / sp.world_size();
            let x: Vec<f32> = (0..ROWS * 6)
                .map(|i| stream.normal((step * ROWS * 6 + i) as u64) as f32)
                .collect();
            let labels: Vec<i64> = (0..ROWS as i64)
                .map(|i| if i % 5 == 1 { -100 } else { i % 5 })
                .collect();
            let x =
                Tensor::from_vec(x, (ROWS, 6), &Device::Cpu)?.narrow(0, sp.rank() * len, len)?;
            let labels =
                Tensor::from_vec(labels, ROWS, &Device::Cpu)?.narrow(0, sp.rank() * len, len)?;
            let (first, second) = (first.clone(), second.clone());
            reports.push(trainer.step(|| {
                let x = checkpoint(&x, move |x| first.forward(x)?.silu())?;
                loss::cross_entropy(&second.forward(&x)?, &labels)
            })?);
        }
        let values = trainer
            .parameters()
            .vars()
            .into_iter()
            .map(|var| var.flatten_all()?.to_vec1::<f32>());
        Ok((reports, values.collect::<candle_core::Result<_>>()?))
    })
}

fn near(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * b.abs()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Every mesh, policy and bucket size takes the steps of one rank.
    #[test]
    fn every_mesh_takes_the_same_steps(dp in 1usize..4, sp in 1usize..4, input in any::<bool>(), bucket in prop::sample::select(vec![1usize, 200, 1 << 20])) {
        prop_assume!(ROWS.is_multiple_of(dp * sp));
        let how = TrainSettings { optimizer: Optimizer::sgd(), schedule: Schedule::constant(0.5), bucket_bytes: bucket, ..TrainSettings::default() };
        let policy = if input { Policy::Input } else { Policy::All };
        let one = train(Settings::default(), how, 3).unwrap().remove(0);
        let many = train(Settings::default().with_dp(dp).with_sp(sp).with_policy(policy), how, 3).unwrap();
        for (reports, values) in &many {
            for (found, expected) in reports.iter().zip(&one.0) {
                prop_assert!(near(found.loss, expected.loss, 1e-6), "{} {}", found.loss, expected.loss);
                prop_assert!(near(found.grad_norm, expected.grad_norm, 1e-5));
                prop_assert_eq!(found.valid_tokens, expected.valid_tokens);
                prop_assert_eq!(found.bytes_sent, many[0].0[found.step as usize - 1].bytes_sent);
            }
            prop_assert_eq!(values, &many[0].1, "ranks hold the same bits");
            for (found, expected) in values.iter().flatten().zip(one.1.iter().flatten()) {
                prop_assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{found} {expected}");
            }
        }
        prop_assert_eq!(one.0[0].bytes_sent, 0);
        if dp * sp > 1 {
            prop_assert!(many[0].0[0].bytes_sent > 0);
            prop_assert_eq!(many[0].0[1].bytes_sent, many[0].0[2].bytes_sent);
        }
    }
}

#[test]
fn runs_repeat_bit_by_bit_and_learn() {
    let how = TrainSettings {
        schedule: Schedule::cosine(0.05, 2, 40),
        ..TrainSettings::default()
    };
    let run = || {
        let found = train(Settings::default().with_dp(2), how, 40)
            .unwrap()
            .remove(0);
        (
            found.0.iter().map(|report| report.loss).collect::<Vec<_>>(),
            found.1,
        )
    };
    let (losses, values) = run();
    assert_eq!((losses.clone(), values), run());
    assert!(losses[39] < losses[0], "{losses:?}");
}

#[test]
fn clipping_bounds_the_step() {
    let values = |clip, rate| {
        let how = TrainSettings {
            optimizer: Optimizer::sgd(),
            schedule: Schedule::constant(rate),
            clip,
            ..TrainSettings::default()
        };
        let (reports, values) = train(Settings::default(), how, 1).unwrap().remove(0);
        (reports[0].grad_norm, values.concat())
    };
    let (norm, start) = values(None, 0.0);
    let length = |(found, after): (f64, Vec<f32>)| {
        assert!(near(found, norm, 1e-9), "the norm is that before clipping");
        after
            .iter()
            .zip(&start)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    assert!(near(length(values(None, 1.0)), norm, 1e-4));
    assert!(near(
        length(values(Some(norm / 4.0), 1.0)),
        norm / 4.0,
        1e-4
    ));
    assert!(near(length(values(Some(norm * 4.0), 1.0)), norm, 1e-4));
}

/// A trainer of one variable of two elements, on two ranks.
fn two_ranks<T: Send>(
    how: TrainSettings,
    f: impl Fn(&Sp, &mut Trainer, &Tensor) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    run_with(Settings::default().with_dp(2), |sp| {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let x = parameters
            .builder()
            .get_with_hints(2, "x", candle_nn::Init::Const(1.0))?;
        parameters
            .builder()
            .get_with_hints(2, "y", candle_nn::Init::Const(1.0))?;
        let mut trainer = Trainer::new(sp, parameters, how)?;
        f(sp, &mut trainer, &x)
    })
}

#[test]
fn a_gradient_missing_on_one_rank_is_zero_and_on_all_is_an_error() {
    let how = TrainSettings {
        optimizer: Optimizer::sgd(),
        clip: None,
        ..TrainSettings::default()
    };
    let error = two_ranks(how, |_, trainer, x| trainer.step(|| x.sqr()?.sum_all())).unwrap_err();
    assert!(
        error.code() == codes::NO_GRADIENT && error.message().contains("`y`"),
        "{error}"
    );
    assert!(!error.message().contains("`x`"), "{error}");
    let norms = two_ranks(how, |sp, trainer, x| {
        let y = trainer.parameters().vars()[1].clone();
        let report = trainer.step(|| {
            if sp.is_main() {
                x.sum_all()
            } else {
                (y.sum_all()? * 2.0)?.sum_all()
            }
        })?;
        Ok(report.grad_norm)
    });
    assert!(
        norms
            .unwrap()
            .iter()
            .all(|&norm| near(norm, 10f64.sqrt(), 1e-6))
    );
}

#[test]
fn what_is_not_finite_is_an_error_or_skipped_on_all_ranks() {
    let wrong = |sp: &Sp, trainer: &mut Trainer, x: &Tensor, value: f64| {
        let y = trainer.parameters().vars()[1].clone();
        let factor = if sp.is_main() { 1.0 } else { value };
        trainer.step(|| ((x + y.as_tensor())?.sqr()?.sum_all()? * factor)?.sum_all())
    };
    let how = TrainSettings::default();
    let error = two_ranks(how, |sp, trainer, x| wrong(sp, trainer, x, f64::NAN)).unwrap_err();
    assert_eq!(error.code(), codes::NOT_FINITE);
    let how = TrainSettings {
        skip_non_finite: true,
        ..how
    };
    two_ranks(how, |sp, trainer, x| {
        let report = wrong(sp, trainer, x, f64::INFINITY)?;
        assert!(report.skipped);
        assert_eq!(x.to_vec1::<f32>()?, [1.0, 1.0]);
        let report = wrong(sp, trainer, x, 2.0)?;
        assert!(!report.skipped && report.step == 2);
        assert!(x.to_vec1::<f32>()?[0] < 1.0);
        Ok(())
    })
    .unwrap();
}

#[test]
fn trainers_refuse_what_they_cannot_train() {
    let results = run_with(Settings::default(), |sp| {
        let none = Parameters::init(1, DType::F32, &Device::Cpu);
        assert_eq!(
            Trainer::new(sp, none, TrainSettings::default())
                .err()
                .unwrap()
                .code(),
            codes::TRAIN_SETTING
        );
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let x = parameters.builder().get(2, "x")?;
        let mut trainer = Trainer::new(sp, parameters.clone(), TrainSettings::default())?;
        assert_eq!(
            trainer.step(|| x.sqr()).unwrap_err().code(),
            codes::BATCH_SHAPE
        );
        parameters.builder().get(2, "late")?;
        let error = trainer.step(|| x.sqr()?.sum_all()).unwrap_err();
        assert!(
            error.code() == codes::TRAIN_SETTING && error.message().contains("`late`"),
            "{error}"
        );
        Ok(())
    });
    results.unwrap();
}

#[test]
fn own_loops_get_the_exact_gradients() {
    for policy in [Policy::All, Policy::Input] {
        let settings = Settings::default().with_dp(2).with_policy(policy);
        let results = run_with(settings, |sp| {
            let w = Var::from_tensor(&Tensor::arange(1f32, 4., &Device::Cpu)?)?;
            let x = Tensor::new((sp.rank() + 1) as f32, &Device::Cpu)?;
            let inner = w.clone();
            let mut grads = sp.scope(|| {
                checkpoint(&x, move |x| inner.sqr()?.broadcast_mul(x))?
                    .sum_all()?
                    .backward()
            })?;
            sp.reduce_gradients(&mut grads, std::slice::from_ref(&w))?;
            let error = sp
                .reduce_gradients(
                    &mut grads,
                    &[w.clone(), Var::zeros(2, DType::F32, &Device::Cpu)?],
                )
                .unwrap_err();
            assert!(
                error.code() == codes::NO_GRADIENT && error.message().contains("variable 1"),
                "{error}"
            );
            Ok(grads.get(&w).unwrap().to_vec1::<f32>()?)
        });
        // d/dw of (1 + 2) w^2.
        assert!(
            results
                .unwrap()
                .iter()
                .all(|grad| grad == &[6.0, 12.0, 18.0])
        );
    }
}

#[test]
fn evaluation_changes_nothing() {
    two_ranks(TrainSettings::default(), |_, trainer, x| {
        let found = trainer.evaluate(|| x.sum_all())?;
        assert!((found.loss - 2.0).abs() < 1e-12);
        assert_eq!(x.to_vec1::<f32>()?, [1.0, 1.0]);
        assert_eq!(trainer.steps(), 0);
        Ok(())
    })
    .unwrap();
}
