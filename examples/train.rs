//! Trains a small Llama on text, each sequence spread over several ranks: `cargo run --release --example train`.
//!
//! The model is `models/llama.rs`, plain candle code; the attribute below is all that makes it sequence-parallel. The program
//! reads text, trains ([`train`]), shows and logs each step ([`report`]), checks the first step against one rank, saves
//! the model, loads it back, and lets the original functions write some text ([`sample`]).

#![allow(clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Mutex,
};

use autosp::{
    Error, Optimizer, Parameters, Result, Schedule, Settings, Sp, StepReport, TextData,
    TrainSettings, Trainer, codes, settings::Source,
};
use candle_core::{DType, Device, Tensor};

#[path = "train/options.rs"]
mod options;
#[path = "train/report.rs"]
mod report;
#[path = "train/sample.rs"]
mod sample;

use options::Options;
use report::Report;

/// The model, as its file has it.
#[autosp::sequence_parallel]
#[allow(missing_docs, clippy::pedantic)]
pub mod llama {
    include!("models/llama.rs");
}

/// What is read where no text is named: this workspace.
const WORKSPACE: &[&str] = &[
    "README.md",
    "docs",
    "src",
    "autosp-macros",
    "autosp-compiler",
    "autosp-plan",
    "autosp-runtime",
    "cargo-autosp",
    "examples",
];

/// Bytes that the sample begins with, and bytes that the model adds.
const PROMPT: usize = 48;
const SAMPLE: usize = 240;

fn main() -> ExitCode {
    let done = Options::read(std::env::args_os()).and_then(|read| match read {
        Ok(options) => run(&options),
        Err(help) => {
            print!("{help}");
            Ok(())
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.to_string().replace("\n  help: ", "; "));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let text = read(options)?;
    let report = Mutex::new(Report::new(options.steps, options.log.as_deref())?);
    report::check_writable(&options.save)?;
    let config = config(options);

    // Whether there are such batches is known before there are ranks.
    text.batch(options.seed, 0, options.batch, options.seq_len)?;
    let (dp, sp) = (options.dp, options.sp);
    println!(
        "{} bytes of text; {} ranks: dp {dp} x sp {sp}; a step: {} sequences of {} tokens",
        text.len(),
        dp * sp,
        options.batch,
        options.seq_len
    );
    let first = autosp::run_with(settings(options, options.dp, options.sp)?, |sp| {
        train(
            sp,
            options,
            &config,
            &text,
            options.steps,
            Some(&options.save),
            |step| match report.lock() {
                Ok(mut report) => report.step(step),
                Err(_) => Ok(()),
            },
        )
    })?;
    if let Ok(report) = report.lock() {
        report.finish();
    }
    let alone = autosp::run_with(settings(options, 1, 1)?, |sp| {
        train(sp, options, &config, &text, 1, None, |_| Ok(()))
    })?;
    compare(&first[0], &alone[0], dp * sp)?;

    // What was saved is what the original functions run on: no scope, no ranks.
    let loaded = autosp::load_trainable(&[&options.save], DType::F32, &Device::Cpu)?;
    let prompt = &text.bytes()[text.len() / 2..][..PROMPT.min(text.len() / 2)];
    let written = sample::generate(loaded.builder(), &config, prompt, SAMPLE)?;
    println!(
        "saved and loaded back: {} ({} parameters)",
        options.save.display(),
        loaded.element_count()
    );
    println!(
        "{}\u{2502}{}",
        String::from_utf8_lossy(prompt),
        String::from_utf8_lossy(&written)
    );
    Ok(())
}

/// The text that the options name.
fn read(options: &Options) -> Result<TextData> {
    if options.data.is_empty() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"));
        let paths: Vec<PathBuf> = WORKSPACE.iter().map(|name| workspace.join(name)).collect();
        TextData::open(&paths)
    } else {
        TextData::open(&options.data)
    }
}

/// One rank's part of the run: the same program on every rank. Returns the first step.
fn train(
    sp: &Sp,
    options: &Options,
    config: &llama::Config,
    text: &TextData,
    steps: usize,
    save: Option<&Path>,
    mut show: impl FnMut(&StepReport) -> Result<()>,
) -> Result<StepReport> {
    let parameters = Parameters::init(options.seed, DType::F32, sp.device());
    let model = llama::Llama::load(parameters.builder(), config)?;
    let mut trainer = Trainer::new(sp, parameters, train_settings(options))?;
    let mut first = None;
    for step in 0..steps {
        let tokens = text.batch(options.seed, step as u64, options.batch, options.seq_len)?;
        let batch = sp.shard(&tokens)?;
        let done = trainer.step(|| -> candle_core::Result<Tensor> {
            let mut cache = llama::Cache::new(false, DType::F32, config, sp.device())?;
            let logits = model.forward(&batch.tokens, 0, &mut cache)?;
            autosp::loss::cross_entropy(&logits, &batch.labels)
        })?;
        if sp.is_main() {
            show(&done)?;
        }
        first.get_or_insert(done);
    }
    if let Some(path) = save {
        trainer.save(path)?;
    }
    first.ok_or_else(|| failure("expected --steps of at least 1, found 0"))
}

/// Prints how far the first step on all ranks is from the same step on one.
fn compare(ranks: &StepReport, alone: &StepReport, count: usize) -> Result<()> {
    let apart = |a: f64, b: f64| (a - b).abs() / b.abs();
    let (loss, norm) = (
        apart(ranks.loss, alone.loss),
        apart(ranks.grad_norm, alone.grad_norm),
    );
    println!(
        "first step on {count} ranks against one: loss {:.6} and {:.6} ({loss:.1e} apart), gradient norm {:.6} and {:.6} ({norm:.1e} apart)",
        ranks.loss, alone.loss, ranks.grad_norm, alone.grad_norm
    );
    if loss.max(norm) <= 1e-5 {
        Ok(())
    } else {
        Err(failure(
            "expected the first step to equal that of one rank within 1e-5",
        ))
    }
}

/// A Llama of about a million parameters over bytes.
fn config(options: &Options) -> llama::Config {
    llama::Config {
        vocab_size: 256,
        hidden_size: 128,
        intermediate_size: 352,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: None,
        max_position_embeddings: options.seq_len.max(PROMPT + SAMPLE),
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        last_token_only: false,
    }
}

fn settings(options: &Options, dp: usize, sp: usize) -> Result<Settings> {
    let mut settings = Settings::from_env()?;
    for (name, value) in [("dp", dp), ("sp", sp), ("groups", options.groups)] {
        settings.set(name, &value.to_string(), Source::Flag(format!("--{name}")))?;
    }
    Ok(settings)
}

fn train_settings(options: &Options) -> TrainSettings {
    let steps = options.steps as u64;
    TrainSettings {
        optimizer: Optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        },
        schedule: Schedule::cosine(options.lr, steps.div_ceil(10), steps),
        ..TrainSettings::default()
    }
}

/// What the command line asks for cannot be done.
fn failure(message: impl Into<String>) -> Error {
    Error::new(codes::ARGUMENT, message)
}

/// A file that cannot be read or written.
fn file_failure(code: codes::Code, what: &str, path: &Path, error: &io::Error) -> Error {
    let reason = autosp::io_reason(error);
    Error::new(
        code,
        format!("cannot {what} `{}`: {reason}", path.display()),
    )
}
