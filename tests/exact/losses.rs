//! Losses whose logits are never whole: the contract, on meshes, in tiles of a few tokens.

use autosp::loss::cross_entropy;
use autosp::{Optimizer, Parameters, Settings, TrainSettings, Trainer};
use autosp_plan::settings::Policy;
use candle_core::{DType, Device, Tensor};

use crate::job::{Job, Loss, assert_contract, tiny};
use crate::llama;

/// Logits of so many tokens of the tiny Llama at a time.
const TILE: usize = 5 * 40 * 4;

const TILED: Loss = |model, tokens, cache, labels| model.forward_loss(tokens, 0, cache, labels);

const WHOLE: Loss =
    |model, tokens, cache, labels| cross_entropy(&model.forward(tokens, 0, cache)?, labels);

fn settings(sp: usize, dp: usize) -> Settings {
    Settings::default()
        .with_sp(sp)
        .with_dp(dp)
        .with_loss_bytes(TILE)
}

#[test]
fn a_llama_on_every_mesh() {
    for (tied, last, s) in [(false, false, 48), (true, false, 45), (false, true, 45)] {
        // Ever more targets towards the end, and none on the first of four ranks.
        let job = Job::random(
            llama::Config {
                tie_word_embeddings: tied,
                last_token_only: last,
                ..tiny(2)
            },
            2,
            s,
            7,
            |position| (position * position) % s < position && position >= s.div_ceil(4),
        );
        // The loss over all tokens does not ask which of them generation needs.
        let all = Job {
            config: llama::Config {
                last_token_only: false,
                ..job.config.clone()
            },
            ..Job::random(tiny(2), 2, s, 7, |_| true)
        };
        let expected = Job {
            labels: job.labels.clone(),
            ..all
        }
        .expected();
        for (sp, dp) in [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)] {
            for policy in [Policy::All, Policy::Attention] {
                let settings = settings(sp, dp).with_policy(policy);
                let found = autosp::run_with(settings, |sp| job.with_loss(sp, TILED)).unwrap();
                for rank in &found {
                    let what = format!("tied {tied} last {last} sp {sp} dp {dp} {policy:?}");
                    assert_contract(&what, rank, &expected);
                }
            }
        }
    }
}

/// Tiles are how a loss is computed, not which: the same bits in every run, and the numbers of whole logits.
#[test]
fn tiles_repeat_to_the_bit() {
    let job = Job::random(tiny(2), 2, 48, 3, |position| position % 5 != 2);
    let run = |loss: Loss| autosp::run_with(settings(2, 1), |sp| job.with_loss(sp, loss)).unwrap();
    let (a, b, whole) = (run(TILED), run(TILED), run(WHOLE));
    for ((a, b), whole) in a.iter().zip(&b).zip(whole) {
        assert_eq!(a.loss.to_bits(), b.loss.to_bits());
        for (name, gradient) in &a.gradients {
            let bits = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(gradient), bits(&b.gradients[name]), "{name}");
        }
        assert_contract("whole logits", a, &(whole.loss, whole.gradients));
    }
}

/// The parameters after steps of several micro-batches, one of them without a target, and the validation loss.
fn trained(loss: Loss, sp: usize) -> (Vec<f64>, Vec<f32>) {
    let config = tiny(2);
    let jobs = [0, 1, 2].map(|i| {
        Job::random(tiny(2), 2, 24, 20 + i, move |position| {
            i != 1 && position % (2 + i as usize) == 0
        })
    });
    let ranks = autosp::run_with(settings(sp, 1), |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let model = llama::Llama::load(parameters.builder(), &config)?;
        let named = parameters.clone();
        let how = TrainSettings {
            optimizer: Optimizer::sgd(),
            ..TrainSettings::default()
        };
        let mut trainer = Trainer::new(sp, parameters, how)?;
        let of = |job: &Job| -> autosp::Result<Tensor> {
            let batch = sp.shard_targets(&job.tokens, &job.labels)?;
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            Ok(loss(&model, &batch.tokens, &mut cache, &batch.labels)?)
        };
        let mut losses = Vec::new();
        for _ in 0..2 {
            let report = trainer.step_over(&jobs, &of)?;
            losses.extend([report.loss, report.grad_norm, report.valid_tokens as f64]);
        }
        losses.push(trainer.evaluate(|| of(&jobs[2]))?.loss);
        let mut values = Vec::new();
        for (_, var) in named.named() {
            values.extend(var.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok((losses, values))
    });
    ranks.unwrap().swap_remove(0)
}

#[test]
fn a_trainer_takes_the_same_steps() {
    let (expected, values) = trained(WHOLE, 1);
    for sp in [1, 2, 4] {
        let (losses, found) = trained(TILED, sp);
        for (a, b) in losses.iter().zip(&expected) {
            assert!(
                (a - b).abs() <= 1e-5 * b.abs(),
                "sp {sp}: {losses:?} and {expected:?}"
            );
        }
        let apart = |f: &dyn Fn(usize) -> f32| (0..values.len()).map(|i| f(i).powi(2)).sum::<f32>();
        let (difference, size) = (apart(&|i| found[i] - values[i]), apart(&|i| values[i]));
        assert!(difference.sqrt() <= 1e-5 * size.sqrt(), "sp {sp}");
    }
}
