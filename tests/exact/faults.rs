//! A rank that fails takes the others down with one message, and the functions outside a scope are the original ones.

use std::time::{Duration, Instant};

use autosp::{Parameters, Settings, codes};
use candle_core::{DType, Device, Tensor};

use crate::{
    job::{Job, plain, tiny},
    llama,
};

/// The same file without the attribute, on candle's own fused operations.
#[allow(dead_code, missing_docs, clippy::pedantic)]
mod unannotated {
    include!("../../examples/models/llama.rs");
}

#[test]
fn a_rank_that_panics_in_the_middle_ends_the_run() {
    let job = Job::random(tiny(2), 2, 40, 9, |_| true);
    let started = Instant::now();
    let error = autosp::run_with(Settings::default().with_sp(4), |sp| {
        let found = job.on_rank(sp)?;
        assert!(
            sp.rank() != 2,
            "the third rank gave up at loss {:.2}",
            found.loss
        );
        job.on_rank(sp)
    })
    .err()
    .unwrap();
    let text = error.to_string();
    assert_eq!(error.code(), codes::RANK_FAILED, "{text}");
    assert!(
        text.contains("rank 2") && text.contains("the third rank gave up"),
        "{text}"
    );
    assert!(started.elapsed() < Duration::from_mins(1));
}

#[test]
fn an_error_of_one_rank_keeps_its_message() {
    let job = Job::random(tiny(2), 2, 40, 9, |_| true);
    let error = autosp::run_with(Settings::default().with_sp(2), |sp| {
        if sp.rank() == 1 {
            // A length that nobody sharded.
            let parameters = job.parameters(sp.device())?;
            let model = llama::Llama::load(parameters.builder(), &job.config)?;
            sp.shard_targets(&job.tokens, &job.labels)?;
            let mut cache = llama::Cache::new(false, DType::F32, &job.config, sp.device())?;
            sp.scope(|| model.forward(&job.tokens, 0, &mut cache))?;
            return Ok(());
        }
        job.on_rank(sp).map(|_| ())
    })
    .err()
    .unwrap();
    let text = error.to_string();
    assert!(
        text.contains("rank 1") && text.contains("20") && text.contains("40"),
        "{text}"
    );
}

#[test]
fn an_offset_inside_a_scope_is_refused() {
    let job = Job::random(tiny(2), 1, 40, 9, |_| true);
    let error = autosp::run_with(Settings::default(), |sp| {
        let parameters = job.parameters(sp.device())?;
        let model = llama::Llama::load(parameters.builder(), &job.config)?;
        let batch = sp.shard_targets(&job.tokens, &job.labels)?;
        let mut cache = llama::Cache::new(false, DType::F32, &job.config, sp.device())?;
        sp.scope(|| model.forward(&batch.tokens, 3, &mut cache))?;
        Ok(())
    })
    .err()
    .unwrap();
    assert!(error.to_string().contains("index_pos"), "{error}");
}

#[test]
fn outside_a_scope_the_functions_are_the_original_ones() {
    let job = Job::random(tiny(2), 1, 12, 9, |_| true);
    let config = unannotated::Config {
        last_token_only: true,
        ..unannotated_config(&job.config)
    };
    let annotated = llama::Config {
        last_token_only: true,
        ..job.config.clone()
    };
    let parameters = Parameters::init(9, DType::F32, &Device::Cpu);
    let model = llama::Llama::load(parameters.builder(), &annotated).unwrap();
    let original = unannotated::Llama::load(parameters.builder(), &config).unwrap();
    let mut cache = llama::Cache::new(true, DType::F32, &annotated, &Device::Cpu).unwrap();
    let mut original_cache =
        unannotated::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    let mut at = 0;
    // A prompt, then token by token with the cache, as in generation.
    for len in [5, 1, 1, 1] {
        let tokens = job.tokens.narrow(1, at, len).unwrap();
        let found = model.forward(&tokens, at, &mut cache).unwrap();
        let expected = original.forward(&tokens, at, &mut original_cache).unwrap();
        assert_eq!(numbers(&found), numbers(&expected), "at {at}");
        at += len;
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn unannotated_config(config: &llama::Config) -> unannotated::Config {
    let config = plain(config);
    unannotated::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        max_position_embeddings: config.max_position_embeddings,
        rope_theta: config.rope_theta,
        rms_norm_eps: config.rms_norm_eps,
        tie_word_embeddings: config.tie_word_embeddings,
        last_token_only: config.last_token_only,
    }
}
