//! A loop of one's own and the trainer take the same steps.

use autosp::loss::cross_entropy;
use autosp::{Decay, Optimizer, Parameters, Schedule, Settings, TrainSettings, Trainer};
use autosp_plan::settings::{Policy, Zero};
use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer as _;

use crate::job::draw;
use crate::trained::{Model, VOCABULARY, annotated};

const STEPS: u64 = 6;
const RATE: f64 = 0.1;

fn tokens(step: u64) -> Tensor {
    let tokens: Vec<u32> = (0..2 * 45)
        .map(|i| (draw(step + 100, i) % VOCABULARY as u64) as u32)
        .collect();
    Tensor::from_vec(tokens, (2, 45), &Device::Cpu).unwrap()
}

/// The losses of all steps by candle's own optimizer.
fn own_loop(settings: Settings, model: Model) -> Vec<f64> {
    autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(3, DType::F32, sp.device());
        let model = annotated(model, parameters.builder(), DType::F32)?;
        let vars = parameters.vars();
        let mut optimizer = candle_nn::SGD::new(vars.clone(), RATE)?;
        let mut losses = Vec::new();
        for step in 0..STEPS {
            let batch = sp.shard(&tokens(step))?;
            let (loss, mut gradients) = sp.scope(|| -> autosp::Result<_> {
                let loss = cross_entropy(&model(&batch.tokens, &batch.tokens)?, &batch.labels)?;
                Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
            })?;
            sp.reduce_gradients(&mut gradients, &vars)?;
            optimizer.step(&gradients)?;
            losses.push(loss);
        }
        Ok(losses)
    })
    .unwrap()
    .remove(0)
}

/// The losses of all steps by the trainer.
fn train(settings: Settings, model: Model) -> Vec<f64> {
    let how = TrainSettings {
        optimizer: Optimizer::sgd(),
        schedule: Schedule::constant(RATE),
        decay: Decay::All,
        clip: None,
        ..TrainSettings::default()
    };
    autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(3, DType::F32, sp.device());
        let model = annotated(model, parameters.builder(), DType::F32)?;
        let mut trainer = Trainer::new(sp, parameters, how)?;
        (0..STEPS)
            .map(|step| {
                let batch = sp.shard(&tokens(step))?;
                let loss = || cross_entropy(&model(&batch.tokens, &batch.tokens)?, &batch.labels);
                Ok(trainer.step(loss)?.loss)
            })
            .collect::<autosp::Result<Vec<_>>>()
    })
    .unwrap()
    .remove(0)
}

#[test]
fn an_own_loop_and_the_trainer_have_the_same_losses() {
    for model in Model::LANGUAGE {
        for (dp, sp, policy) in [(1, 4, Policy::All), (2, 2, Policy::Attention)] {
            let settings = Settings::default()
                .with_dp(dp)
                .with_sp(sp)
                .with_policy(policy);
            let own = own_loop(settings.clone(), model);
            assert!(own[STEPS as usize - 1] < own[0], "{own:?}");
            for zero in Zero::ALL {
                let trained = train(settings.clone().with_zero(zero), model);
                let bits = |losses: &[f64]| losses.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&own), bits(&trained), "{model:?} dp {dp} sp {sp}");
            }
        }
    }
}
