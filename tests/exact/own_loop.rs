//! A loop of one's own and the trainer take the same steps.

use autosp::{
    Optimizer, Parameters, Schedule, Settings, TextData, TrainSettings, Trainer,
    loss::cross_entropy,
};
use candle_core::DType;
use candle_nn::{Optimizer as _, SGD};

use crate::gpt2::{Config, Gpt2};

const STEPS: u64 = 4;
const RATE: f64 = 0.05;

#[test]
fn own_loops_and_the_trainer_have_the_same_losses() {
    let config = Config {
        vocab_size: 256,
        n_positions: 24,
        n_embd: 32,
        n_layer: 2,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
    };
    let text = TextData::from_text(&"a text of a few words, again and again; ".repeat(9));
    for (dp, sp) in [(1, 1), (1, 4), (2, 2)] {
        let losses = autosp::run_with(Settings::default().with_dp(dp).with_sp(sp), |sp| {
            let batch = |step| sp.shard(&text.batch(7, step, 2, 23)?);

            let parameters = Parameters::init(1, DType::F32, sp.device());
            let model = Gpt2::load(parameters.builder(), &config)?;
            let vars = parameters.vars();
            let mut optimizer = SGD::new(vars.clone(), RATE)?;
            let mut own = Vec::new();
            for step in 0..STEPS {
                let batch = batch(step)?;
                let (loss, mut gradients) = sp.scope(|| -> autosp::Result<_> {
                    let loss = cross_entropy(&model.forward(&batch.tokens)?, &batch.labels)?;
                    Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
                })?;
                sp.reduce_gradients(&mut gradients, &vars)?;
                optimizer.step(&gradients)?;
                own.push(loss);
            }

            let parameters = Parameters::init(1, DType::F32, sp.device());
            let model = Gpt2::load(parameters.builder(), &config)?;
            let settings = TrainSettings {
                optimizer: Optimizer::sgd(),
                schedule: Schedule::constant(RATE),
                clip: None,
                ..TrainSettings::default()
            };
            let mut trainer = Trainer::new(sp, parameters, settings)?;
            for (step, own) in own.iter().enumerate() {
                let batch = batch(step as u64)?;
                let report = trainer
                    .step(|| cross_entropy(&model.forward(&batch.tokens)?, &batch.labels))?;
                assert!(
                    (report.loss - own).abs() <= 1e-6 * own,
                    "dp {dp}, step {step}: {} and {own}",
                    report.loss
                );
            }
            Ok(own)
        })
        .unwrap();
        assert!(losses[0][STEPS as usize - 1] < losses[0][0], "{losses:?}");
    }
}
