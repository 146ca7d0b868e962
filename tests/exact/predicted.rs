//! What the planner predicts of a step is what the ledger of each rank counts.

use autosp::loss::cross_entropy;
use autosp::planner::Model;
use autosp::train::{Checked, Workload};
use autosp::{Parameters, Settings, TrainSettings, Trainer};
use autosp_plan::settings::{Policy, Zero};
use candle_core::{DType, Device, Tensor};

use crate::job::draw;
use crate::llama;

const ROWS: usize = 2;
const LENGTH: usize = 45;

fn config() -> llama::Config {
    llama::Config {
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 112,
        num_hidden_layers: 3,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: None,
        max_position_embeddings: LENGTH,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        last_token_only: false,
    }
}

/// The sizes of [`config`] with `layers` blocks.
fn sizes(layers: usize) -> Model {
    let config = config();
    Model {
        hidden: config.hidden_size,
        ffn: config.intermediate_size,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim(),
        layers,
        vocabulary: config.vocab_size,
        tied: false,
        vectors: 2 * config.hidden_size,
        window: None,
    }
}

/// One step on every rank, and what was checked.
fn checked(settings: Settings, model: &Model) -> Vec<Vec<Checked>> {
    let config = config();
    let tokens: Vec<u32> = (0..(ROWS * LENGTH) as u64)
        .map(|i| (draw(7, i) % config.vocab_size as u64) as u32)
        .collect();
    let tokens = Tensor::from_vec(tokens, (ROWS, LENGTH), &Device::Cpu).unwrap();
    autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(3, DType::F32, sp.device());
        let llama = llama::Llama::load(parameters.builder(), &config)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        trainer.expect(Workload {
            model: model.clone(),
            seq: LENGTH,
            batch: ROWS / sp.settings().dp(),
            loss_tiles: 1,
        });
        assert!(trainer.checked().is_empty());
        for _ in 0..2 {
            let batch = sp.shard(&tokens)?;
            trainer.step(|| {
                let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
                let logits = llama.forward(&batch.tokens, 0, &mut cache)?;
                cross_entropy(&logits, &batch.labels)
            })?;
        }
        Ok(trainer.checked().to_vec())
    })
    .unwrap()
}

#[test]
fn a_step_needs_what_the_planner_says() {
    for (dp, sp, zero, policy) in [
        (1, 1, Zero::Stage0, Policy::Input),
        (1, 4, Zero::Stage0, Policy::Attention),
        (2, 2, Zero::Stage1, Policy::Qkv),
        (2, 2, Zero::Stage2, Policy::Input),
        (1, 2, Zero::Stage2, Policy::All),
    ] {
        let settings = Settings::default()
            .with_dp(dp)
            .with_sp(sp)
            .with_zero(zero)
            .with_policy(policy);
        for rank in checked(settings, &sizes(3)) {
            let find = |what: &str| rank.iter().find(|one| one.what == what);
            let exact = |what: &str| {
                let one = find(what).unwrap_or_else(|| panic!("no {what}"));
                assert_eq!(
                    one.measured.to_bits(),
                    one.predicted.to_bits(),
                    "{policy:?} {one:?}"
                );
            };
            exact("parameters");
            if zero != Zero::Stage2 {
                exact("gradients");
            }
            exact("kept");
            assert!(rank.iter().all(Checked::holds), "{rank:?}");
            // Shares of buckets are rounded up to whole elements, in two lists of four bytes.
            let optimizer = find("optimizer").unwrap();
            assert!(
                (optimizer.measured - optimizer.predicted).abs() <= 8.0 * 16.0,
                "{optimizer:?}"
            );
            // Time is a GPU's.
            assert!(find("step").is_none());
        }
    }
}

#[test]
fn another_model_than_was_said_is_found_out() {
    let settings = Settings::default().with_sp(2).with_policy(Policy::Input);
    for rank in checked(settings, &sizes(4)) {
        let wrong = rank.iter().filter(|one| !one.holds());
        let wrong: Vec<&str> = wrong.map(|one| one.what).collect();
        assert_eq!(wrong, ["parameters", "optimizer", "gradients", "kept"]);
    }
}
