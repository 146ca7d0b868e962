//! What Hugging Face transformers computed, on one rank and on four: S = 90 does not divide by 4.

use autosp::{Decay, Optimizer, Schedule, Settings, TrainSettings, Trainer, loss::cross_entropy};
use autosp_reference::{Golden, Norms, Tensors, global_norm, labels, llama_config};
use candle_core::DType;

use crate::{
    job::{Job, Start},
    llama,
};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/golden/llama-tiny/model.safetensors"
);

fn near(what: &str, found: f64, expected: f64) {
    assert!(
        (found - expected).abs() <= 1e-5 * expected.abs(),
        "{what}: expected {expected}, found {found}"
    );
}

#[test]
fn losses_and_gradient_norms() {
    let golden = Golden::load("llama-tiny").unwrap();
    for case in golden.cases() {
        let job = Job {
            config: llama_config!(llama, &golden.config),
            start: Start::File(MODEL.to_owned()),
            tokens: golden.batches[0].clone(),
            labels: labels(&golden.batches[0], case.ignore).unwrap(),
        };
        for sp in [1, 4] {
            for found in job.on_ranks(Settings::default().with_sp(sp)) {
                let what = |name: &str| format!("{name} on {sp} ranks, {} ignored", case.ignore);
                near(&what("loss"), found.loss, case.loss);
                near(
                    &what("gradient norm"),
                    global_norm(&found.gradients).unwrap(),
                    case.grad_norm,
                );
                assert_eq!(found.gradients.len(), case.grad_norms.len());
                for (name, gradient) in found.gradients {
                    let norm = global_norm(&Tensors::from([(name.clone(), gradient)])).unwrap();
                    near(&what(&name), norm, case.grad_norms[&name]);
                }
            }
        }
    }
}

/// Five steps of the trainer on every mesh.
fn five_steps(golden: &Golden, expected: &[Norms], settings: TrainSettings) {
    assert_eq!(expected.len(), 5);
    let config = llama_config!(llama, &golden.config);
    for (sp, dp) in [(1, 1), (4, 1), (2, 2)] {
        autosp::run_with(Settings::default().with_sp(sp).with_dp(dp), |sp| {
            let parameters = autosp::load_trainable(&[MODEL], DType::F32, sp.device())?;
            let model = llama::Llama::load(parameters.builder(), &config)?;
            let mut trainer = Trainer::new(sp, parameters, settings)?;
            for (tokens, expected) in golden.batches.iter().zip(expected) {
                let batch = sp.shard_targets(tokens, &labels(tokens, 0)?)?;
                let step = trainer.step(|| {
                    let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
                    cross_entropy(&model.forward(&batch.tokens, 0, &mut cache)?, &batch.labels)
                })?;
                let what = |name: &str| format!("{name} of step {} on {:?}", step.step, sp);
                near(&what("loss"), step.loss, expected.loss);
                near(&what("gradient norm"), step.grad_norm, expected.grad_norm);
                assert_eq!(step.valid_tokens, 178);
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn five_steps_of_sgd() {
    let golden = Golden::load("llama-tiny").unwrap();
    let settings = TrainSettings {
        optimizer: Optimizer::sgd(),
        schedule: Schedule::constant(0.1),
        clip: Some(1.0),
        ..TrainSettings::default()
    };
    five_steps(&golden, &golden.sgd(), settings);
}

#[test]
fn five_steps_of_adamw() {
    let golden = Golden::load("llama-tiny").unwrap();
    let settings = TrainSettings {
        optimizer: Optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        },
        schedule: Schedule::constant(1e-3),
        decay: Decay::All,
        clip: Some(1.0),
        ..TrainSettings::default()
    };
    five_steps(&golden, &golden.adamw(), settings);
}
