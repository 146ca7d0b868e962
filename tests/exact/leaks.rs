//! No position sees its own target: on random tokens there is nothing to learn.

use autosp::{Parameters, Schedule, Settings, TrainSettings, Trainer, loss::cross_entropy};
use candle_core::{DType, Tensor};

use crate::{
    job::{Job, tiny},
    llama,
};

const STEPS: u64 = 60;

/// Trains on new random tokens at every step and returns the mean loss of the last ten.
fn last_losses(labels: impl Fn(&Job) -> Tensor + Sync) -> f64 {
    let config = llama::Config {
        vocab_size: 256,
        ..tiny(4)
    };
    let settings = TrainSettings {
        schedule: Schedule::constant(5e-3),
        ..TrainSettings::default()
    };
    let losses = autosp::run_with(Settings::default().with_sp(4), |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let model = llama::Llama::load(parameters.builder(), &config)?;
        let mut trainer = Trainer::new(sp, parameters, settings)?;
        let mut last = 0.0;
        for step in 0..STEPS {
            let job = Job::random(config.clone(), 4, 62, 1000 + step, |_| true);
            let batch = sp.shard_targets(&job.tokens, &labels(&job))?;
            let report = trainer.step(|| {
                let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
                cross_entropy(&model.forward(&batch.tokens, 0, &mut cache)?, &batch.labels)
            })?;
            if step >= STEPS - 10 {
                last += report.loss / 10.0;
            }
        }
        Ok(last)
    });
    losses.unwrap()[0]
}

#[test]
fn random_tokens_stay_at_their_entropy() {
    let entropy = 256f64.ln();
    let loss = last_losses(|job| job.labels.clone());
    assert!(
        loss > entropy - 0.01,
        "{loss} is below the entropy {entropy}"
    );
    assert!(
        loss < entropy + 0.5,
        "{loss}: the model did not even learn that there is nothing to learn"
    );
    // The same training notices a target that can be seen: here every position's target is its own token.
    let loss = last_losses(|job| job.tokens.to_dtype(DType::I64).unwrap());
    assert!(
        loss < entropy - 0.5,
        "{loss}: a visible target was not learned"
    );
}
