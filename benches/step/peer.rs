//! Training steps of the annotated Llama as the peers are measured: the same geometry flags, optimizer, warm-up, and one line
//! `RESULT {json}` for each length.
//!
//! Model FLOPs of a step are 6 Nm S + 6 L S² q, without recomputation: Nm parameters in matrix products (all but the embedding), q =
//! heads x head width. Peak memory is the high-water mark of the pool that all tensors come from.

use std::time::Instant;

use autosp::settings::Source;
use autosp::{
    Batch, Error, Optimizer, Parameters, Result, Schedule, Settings, Sp, StepReport, TrainSettings,
    Trainer, codes,
};
use candle_core::{DType, Device, Tensor};
use clap::Parser;

use super::llama;

/// Measures training steps.
#[derive(Debug, Parser)]
#[allow(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct Options {
    /// Global lengths, in this order
    #[arg(long, value_delimiter = ',')]
    seqs: Vec<usize>,
    #[arg(long, default_value_t = 1)]
    batch: usize,
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    #[arg(long, default_value_t = 14336)]
    ffn: usize,
    #[arg(long, default_value_t = 32)]
    heads: usize,
    #[arg(long, default_value_t = 8)]
    kv_heads: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 32000)]
    vocab: usize,
    #[arg(long, default_value = "bf16")]
    dtype: String,
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    #[arg(long, default_value_t = 5)]
    steps: usize,
    #[arg(long, default_value_t = 1e-5)]
    lr: f64,
    #[arg(long, default_value = "cuda")]
    device: String,
    #[arg(long, default_value_t = 1)]
    sp: usize,
    #[arg(long, default_value_t = 2)]
    groups: usize,
    #[arg(long, default_value = "all")]
    policy: String,
    #[arg(long, default_value_t = 1)]
    zero: usize,
    /// `tiled`: logits of some tokens at a time; `whole`: of all
    #[arg(long, default_value = "tiled", value_parser = ["tiled", "whole"])]
    loss: String,
    /// What cargo passes to a benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// One rank's figures for one length.
#[derive(Default)]
struct Measured {
    seconds: Vec<f64>,
    losses: Vec<f64>,
    norm: f64,
    first: f64,
    peak: f64,
}

pub(crate) fn run() -> Result<()> {
    let options = Options::parse();
    let mut settings = Settings::from_env()?;
    let flags = [
        ("device", options.device.clone()),
        ("sp", options.sp.to_string()),
        ("groups", options.groups.to_string()),
        ("policy", options.policy.clone()),
        ("zero", options.zero.to_string()),
    ];
    for (name, value) in flags {
        settings.set(name, &value, Source::Flag(format!("--{name}")))?;
    }
    autosp::run_with(settings, |sp| measure(sp, &options)).map(drop)
}

fn measure(sp: &Sp, options: &Options) -> Result<()> {
    let dtype = match options.dtype.as_str() {
        "bf16" => DType::BF16,
        "fp32" => DType::F32,
        other => {
            return Err(Error::new(
                codes::ARGUMENT,
                format!("expected --dtype bf16 or fp32, found {other}"),
            ));
        }
    };
    let config = llama::Config {
        vocab_size: options.vocab,
        hidden_size: options.hidden,
        intermediate_size: options.ffn,
        num_hidden_layers: options.layers,
        num_attention_heads: options.heads,
        num_key_value_heads: options.kv_heads,
        head_dim: None,
        max_position_embeddings: options.seqs.iter().copied().max().unwrap_or(0),
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        last_token_only: false,
    };
    let parameters = Parameters::init(0, dtype, sp.device());
    let model = llama::Llama::load(parameters.builder(), &config)?;
    let count = parameters.element_count();
    let training = TrainSettings {
        optimizer: Optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        },
        schedule: Schedule::constant(options.lr),
        ..TrainSettings::default()
    };
    let mut trainer = Trainer::new(sp, parameters, training)?;
    // The tables are part of the model, not of a step.
    let cache = llama::Cache::new(false, dtype, &config, sp.device())?;
    for &length in &options.seqs {
        let measured = lengthwise(sp, options, length, |batch| {
            trainer.step(|| -> candle_core::Result<Tensor> {
                let cache = &mut cache.clone();
                if options.loss == "tiled" {
                    return model.forward_loss(&batch.tokens, 0, cache, &batch.labels);
                }
                let logits = model.forward(&batch.tokens, 0, cache)?;
                autosp::loss::cross_entropy(&logits, &batch.labels)
            })
        })?;
        if sp.is_main() {
            show(options, length, sp.world_size(), count, &measured);
        }
    }
    Ok(())
}

/// Warm-up and measured steps of one length. Every step begins and ends with all ranks' GPUs idle.
fn lengthwise(
    sp: &Sp,
    options: &Options,
    length: usize,
    mut step: impl FnMut(&Batch) -> Result<StepReport>,
) -> Result<Measured> {
    let mut measured = Measured::default();
    for number in 0..options.warmup + options.steps {
        if number == options.warmup {
            peak(sp.device(), true)?;
        }
        let batch = sp.shard(&tokens(options, length, number)?)?;
        sp.device().synchronize()?;
        sp.barrier()?;
        let started = Instant::now();
        let report = step(&batch)?;
        sp.device().synchronize()?;
        sp.barrier()?;
        let seconds = started.elapsed().as_secs_f64();
        if number == 0 {
            measured.first = seconds;
        }
        if number >= options.warmup {
            measured.seconds.push(seconds);
        }
        measured.losses.push(report.loss);
        measured.norm = report.grad_norm;
    }
    measured.peak = peak(sp.device(), false)?;
    Ok(measured)
}

/// Token ids that depend on the step alone, the same on every rank.
fn tokens(options: &Options, length: usize, step: usize) -> Result<Tensor> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(step as u64 + 1) | 1;
    let ids: Vec<u32> = (0..options.batch * length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % options.vocab as u64) as u32
        })
        .collect();
    Ok(Tensor::from_vec(
        ids,
        (options.batch, length),
        &Device::Cpu,
    )?)
}

/// The high-water mark of device memory in GiB; 0 on the CPU.
#[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
fn peak(device: &Device, begin_again: bool) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return Ok(autosp::cuda::memory(device, begin_again)?.peak as f64 / f64::from(1 << 30));
    }
    let _ = (device, begin_again);
    Ok(0.0)
}

fn show(options: &Options, length: usize, world: usize, parameters: usize, measured: &Measured) {
    let mut seconds = measured.seconds.clone();
    let all: Vec<f64> = seconds.iter().map(|s| (s * 1e5).round() / 1e2).collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let (s, layers) = (length as f64, options.layers as f64);
    let products = (parameters - options.vocab * options.hidden) as f64;
    let flops =
        options.batch as f64 * (6.0 * products * s + 6.0 * layers * s * s * options.hidden as f64);
    let result = serde_json::json!({
        "mode": "autosp-rust",
        "policy": options.policy,
        "zero": options.zero,
        "groups": options.groups,
        "dtype": options.dtype,
        "loss": options.loss,
        "seq": length,
        "sp": options.sp,
        "world": world,
        "params": parameters,
        "first_step_s": (measured.first * 10.0).round() / 10.0,
        "step_ms_median": (median * 1e5).round() / 1e2,
        "step_ms_all": all,
        "tokens_per_s": (options.batch as f64 * s / median).round(),
        "model_tflops_per_gpu": (flops / median / world as f64 / 1e11).round() / 10.0,
        "peak_alloc_gib": (measured.peak * 1e3).round() / 1e3,
        "losses": measured.losses,
        "grad_norm": measured.norm,
    });
    println!("RESULT {result}");
}
