//! One training step of the example's model on 1, 2 and 4 ranks: `cargo bench --bench step`. With `--seqs`, the geometry and the
//! output of the peers instead ([`peer`]): `cargo bench --features cuda --bench step -- --device cuda --sp 2 --seqs 16384,32768`.
//!
//! The ranks are threads that share the cores, so that more of them do the same work in smaller parts: the difference to one rank
//! is what exchanges, padding and waiting cost.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod peer;

use std::{hint::black_box, time::Duration};

use autosp::{Parameters, Settings, TrainSettings, Trainer};
use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};

/// The example's model.
#[autosp::sequence_parallel(loss)]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod llama {
    include!("../../examples/models/llama.rs");
}

const ROWS: usize = 2;
const LENGTH: usize = 512;

fn config() -> llama::Config {
    llama::Config {
        vocab_size: 256,
        hidden_size: 128,
        intermediate_size: 352,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: None,
        max_position_embeddings: LENGTH,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        last_token_only: false,
    }
}

/// Runs `steps` steps on `sp` ranks and returns how long they took on the first, the start of the ranks not counted.
fn train(sp: usize, steps: u64) -> autosp::Result<Duration> {
    let config = config();
    let tokens: Vec<u32> = (0..(ROWS * LENGTH) as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) >> 24)
        .collect();
    let tokens = Tensor::from_vec(tokens, (ROWS, LENGTH), &Device::Cpu)?;
    let times = autosp::run_with(Settings::default().with_sp(sp).with_groups(2), |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let model = llama::Llama::load(parameters.builder(), &config)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        let mut time = Duration::ZERO;
        for _ in 0..steps {
            let batch = sp.shard(&tokens)?;
            let report = trainer.step(|| {
                let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
                model.forward_loss(&batch.tokens, 0, &mut cache, &batch.labels)
            })?;
            time += Duration::from_secs_f64(black_box(report).seconds);
        }
        Ok(time)
    })?;
    Ok(times[0])
}

fn step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step");
    group
        .sample_size(10)
        .throughput(Throughput::Elements((ROWS * LENGTH) as u64));
    for sp in [1, 2, 4] {
        group.bench_function(BenchmarkId::new("ranks", sp), |bencher| {
            bencher.iter_custom(|steps| train(sp, steps).expect("the model trains"));
        });
    }
    group.finish();
}

criterion_group!(benches, step);

fn main() {
    if std::env::args().any(|argument| argument == "--seqs") {
        if let Err(error) = peer::run() {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
