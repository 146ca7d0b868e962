//! What the planner predicts of a step is what the ledger of each rank counts.

use autosp::loss::cross_entropy;
use autosp::planner::Model;
use autosp::train::{Checked, Workload};
use autosp::{Parameters, Purpose, Settings, TrainSettings, Trainer};
use autosp_plan::settings::{Memory, Place, Policy, Zero};
use candle_core::{DType, Device, Tensor};

use crate::job::draw;
use crate::llama;

const ROWS: usize = 2;
const LENGTH: usize = 45;
/// A length at which activations are more than what parameters need.
const LONG: usize = 1536;

fn config() -> llama::Config {
    llama::Config {
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 112,
        num_hidden_layers: 3,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: None,
        max_position_embeddings: LONG,
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
    let found = attempt(settings, model, LENGTH).unwrap().into_iter();
    found.map(|rank| rank.checked).collect()
}

/// What a rank has after two steps.
struct Trained {
    checked: Vec<Checked>,
    chosen: Settings,
    losses: Vec<f64>,
    /// The most bytes for each purpose.
    most: Vec<u64>,
}

fn trained(settings: Settings, model: &Model) -> Vec<Trained> {
    attempt(settings, model, LONG).unwrap()
}

fn attempt(settings: Settings, model: &Model, length: usize) -> autosp::Result<Vec<Trained>> {
    let config = config();
    let tokens: Vec<u32> = (0..(ROWS * length) as u64)
        .map(|i| (draw(7, i) % config.vocab_size as u64) as u32)
        .collect();
    let tokens = Tensor::from_vec(tokens, (ROWS, length), &Device::Cpu).unwrap();
    autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(3, DType::F32, sp.device());
        let llama = llama::Llama::load(parameters.builder(), &config)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        trainer.expect(Workload {
            model: model.clone(),
            seq: length,
            batch: ROWS / sp.settings().dp(),
            loss_tiles: 1,
        })?;
        assert!(trainer.checked().is_empty());
        let mut losses = Vec::new();
        for _ in 0..2 {
            let batch = sp.shard(&tokens)?;
            let report = trainer.step(|| {
                let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
                let logits = llama.forward(&batch.tokens, 0, &mut cache)?;
                cross_entropy(&logits, &batch.labels)
            })?;
            losses.push(report.loss);
        }
        Ok(Trained {
            checked: trainer.checked().to_vec(),
            chosen: trainer.settings().clone(),
            losses,
            most: Purpose::ALL
                .map(|purpose| sp.ledger().most(purpose))
                .to_vec(),
        })
    })
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

/// With a limit the planner chooses what fits; the numbers are those of the defaults, and what is held is what was predicted.
#[test]
fn less_memory_keeps_less_and_trains_the_same() {
    let settings = Settings::default()
        .with_dp(2)
        .with_sp(2)
        .with_zero(Zero::Stage1);
    let free = trained(settings.clone(), &sizes(3));
    // Head groups add gradients up in another order.
    let near = |losses: &[f64]| {
        let pairs = losses.iter().zip(&free[0].losses);
        pairs.into_iter().all(|(a, b)| (a / b - 1.0).abs() < 1e-6)
    };
    // Nothing is chosen where nothing limits.
    assert!(free.iter().all(|rank| rank.chosen.chosen().is_empty()));
    let fixed = settings
        .clone()
        .with_memory(Memory::Fixed)
        .with_memory_limit(1 << 30);
    assert!(trained(fixed, &sizes(3))[0].chosen.chosen().is_empty());

    // The most for each purpose, which were not all at once.
    let device = |rank: &Trained| rank.most.iter().sum::<u64>() - rank.most[Purpose::Host as usize];
    let mut seen: Vec<String> = Vec::new();
    let (mut before, mut limit) = (u64::MAX, 16_000_000);
    let error = loop {
        let found = match attempt(settings.clone().with_memory_limit(limit), &sizes(3), LONG) {
            Ok(found) => found,
            Err(error) => break error,
        };
        for rank in &found {
            assert!(near(&rank.losses), "{}", rank.chosen.chosen());
            assert_eq!(rank.chosen.chosen(), found[0].chosen.chosen());
            assert!(
                rank.checked.iter().all(Checked::holds),
                "{:?}",
                rank.checked
            );
            assert!(!rank.chosen.is_said("policy") && rank.chosen.is_said("sp"));
        }
        let held = device(&found[0]);
        if seen.last() != Some(&found[0].chosen.chosen()) {
            seen.push(found[0].chosen.chosen());
        }
        before = before.min(held);
        limit = (limit as f64 * 0.8) as u64;
    };
    // What is counted is less than what is predicted: it goes on where nothing is predicted to fit, until that is more than the limit.
    assert_eq!(error.code(), autosp::codes::OUT_OF_MEMORY, "{error}");
    assert!(before < device(&free[0]) / 10 * 9, "{seen:#?}");
    let first = seen
        .first()
        .is_some_and(|chosen| chosen.contains("policy=all\n"));
    assert!(first && seen.len() >= 3, "{seen:#?}");
    let offloads = seen.iter().any(|chosen| chosen.contains("+offload"));
    assert!(offloads, "{seen:#?}");

    // What was said stays, whatever fits.
    let said = settings
        .with_memory_limit(64 << 20)
        .with_policy(Policy::Qkv)
        .with_optimizer(Place::Host)
        .with_groups(1);
    let found = &trained(said.clone(), &sizes(3))[0];
    assert_eq!(found.chosen.policies(), said.policies());
    assert_eq!(
        (found.chosen.groups(), found.chosen.optimizer()),
        (1, Place::Host)
    );
    assert!(near(&found.losses));
    assert!(
        found.checked.iter().all(Checked::holds),
        "{:?}",
        found.checked
    );
}
