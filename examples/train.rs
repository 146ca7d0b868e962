//! Trains a small Llama on text, each sequence spread over several ranks: `cargo run --release --example train`.
//!
//! The model is `models/llama.rs`, plain candle code; the attribute below is all that makes it sequence-parallel. The program
//! reads text and perhaps a model ([`input`]), trains ([`train`]) and writes checkpoints that it can go on from, shows and logs each
//! step ([`report`]), checks the first step against one rank, saves the model, loads it back, and lets the original functions write
//! some text ([`sample`]).

#![allow(clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

use std::{io, path::Path, process::ExitCode, sync::Mutex};

use autosp::{
    Error, Launched, Optimizer, Parameters, Result, Schedule, Settings, Sp, StepReport, TextData,
    TrainSettings, Trainer, codes, settings::Source,
};
use candle_core::{DType, Device, Tensor};

#[path = "train/input.rs"]
mod input;
#[path = "train/options.rs"]
mod options;
#[path = "train/report.rs"]
mod report;
#[path = "train/sample.rs"]
mod sample;

use options::{Loss, Options};
use report::Report;

/// The model, as its file has it.
#[autosp::sequence_parallel(loss)]
#[allow(missing_docs, clippy::pedantic)]
pub mod llama {
    include!("models/llama.rs");
}

/// Tokens that the sample begins with, and tokens that the model adds.
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
    let text = input::text(options)?;
    let report = Report::new(options.steps, options.log.as_deref(), options.resume)?;
    let report = Mutex::new(report);
    report::check_writable(&options.save)?;
    let config = input::config(options, &text)?;

    // Whether there are such batches is known before there are ranks.
    text.labelled_batch(options.seed, 0, options.batch, options.seq_len)?;
    let launched = autosp::launched()?;
    let settings = settings(options, launched.as_ref())?;
    // Each process of a launched run does what follows; one of them says it.
    let is_main = launched.is_none_or(|launched| launched.rank == 0);
    let (dp, sp) = (settings.dp(), settings.sp());
    if is_main {
        println!(
            "{} tokens of text in {} documents; {} ranks: dp {dp} x sp {sp}; a step: {} sequences of {} tokens",
            text.len(),
            text.documents(),
            dp * sp,
            options.batch * options.accumulate,
            options.seq_len
        );
        let said: Vec<String> = settings
            .entries()
            .filter(|(_, _, source)| **source != Source::Default)
            .map(|(key, value, source)| format!("{} = {value} ({source})", key.name))
            .collect();
        println!("settings: {}; the rest by default", said.join(", "));
    }
    let first = autosp::run_with(settings.clone(), |sp| {
        train(
            sp,
            options,
            &config,
            &text,
            options.steps as u64,
            true,
            |step| match report.lock() {
                Ok(mut report) => report.step(step),
                Err(_) => Ok(()),
            },
        )
    })?;
    if !is_main {
        return Ok(());
    }
    if let Ok(report) = report.lock() {
        report.finish();
    }
    let alone = autosp::run_on_threads(settings.on_mesh(1, 1), |sp| {
        train(sp, options, &config, &text, 1, false, |_| Ok(()))
    })?;
    match (first[0], alone[0]) {
        (Some(ranks), Some(alone)) if ranks.step == alone.step => {
            compare(&ranks, &alone, dp * sp, options.dtype.tolerance())?;
        }
        (Some(ranks), _) => println!("went on with step {}", ranks.step),
        (None, _) => println!("all {} steps had been taken", options.steps),
    }

    // What was saved is what the original functions run on: no scope, no ranks.
    let loaded = autosp::load_trainable(&[&options.save], DType::F32, &Device::Cpu)?;
    let prompt = text.tokens(text.len() / 2..text.len() / 2 + PROMPT);
    let written = sample::generate(loaded.builder(), &config, &prompt, SAMPLE)?;
    println!(
        "saved and loaded back: {} ({} parameters)",
        options.save.display(),
        loaded.element_count()
    );
    let tokenizer = text.tokenizer();
    println!(
        "{}\u{2502}{}",
        tokenizer.decode(&prompt)?,
        tokenizer.decode(&written)?
    );
    Ok(())
}

/// One rank's part of the run: the same program on every rank. `keep` says whether it goes on from a checkpoint, writes some, and saves
/// the model. Returns the first step that it took.
fn train(
    sp: &Sp,
    options: &Options,
    config: &llama::Config,
    text: &TextData,
    steps: u64,
    keep: bool,
    mut show: impl FnMut(&StepReport) -> Result<()>,
) -> Result<Option<StepReport>> {
    let dtype = options.dtype.candle();
    let parameters = match &options.model {
        Some(folder) => autosp::load_trainable(&[folder], dtype, sp.device())?,
        None => Parameters::init(options.seed, dtype, sp.device()),
    };
    let model = llama::Llama::load(parameters.builder(), config)?;
    let mut trainer = Trainer::new(sp, parameters, train_settings(options))?;
    let folder = options.checkpoints();
    // How many batches of the text have been read.
    let mut position = 0;
    if keep && options.resume {
        let Some(resumed) = trainer.resume(&folder)? else {
            let folder = folder.display();
            return Err(failure(format!(
                "expected a checkpoint in `{folder}` to resume from, found none"
            )));
        };
        position = resumed.note.parse().map_err(|_| {
            let note = resumed.note;
            failure(format!(
                "expected a checkpoint that notes a position in the text, found `{note}`"
            ))
        })?;
    }
    let mut first = None;
    let mut saved = None;
    while trainer.steps() < steps {
        let batches = position..position + options.accumulate as u64;
        position = batches.end;
        let done = trainer.step_over(batches, |batch| -> Result<Tensor> {
            let (tokens, labels) =
                text.labelled_batch(options.seed, batch, options.batch, options.seq_len)?;
            let batch = sp.shard_labelled(&tokens, &labels)?;
            let mut cache = llama::Cache::new(false, dtype, config, sp.device())?;
            Ok(match options.loss {
                Loss::Tiled => model.forward_loss(&batch.tokens, 0, &mut cache, &batch.labels)?,
                Loss::Whole => {
                    let logits = model.forward(&batch.tokens, 0, &mut cache)?;
                    autosp::loss::cross_entropy(&logits, &batch.labels)?
                }
            })
        })?;
        if sp.is_main() {
            show(&done)?;
        }
        first.get_or_insert(done);
        let due = |every: usize| done.step.is_multiple_of(every as u64);
        if keep && options.save_every.is_some_and(due) {
            trainer.save_checkpoint(&folder, &position.to_string())?;
            saved = Some(done.step);
        }
    }
    if keep {
        if first.is_some() && saved != Some(trainer.steps()) {
            trainer.save_checkpoint(&folder, &position.to_string())?;
        }
        trainer.save(&options.save)?;
    }
    Ok(first)
}

/// Prints how far the first step on all ranks is from the same step on one.
fn compare(ranks: &StepReport, alone: &StepReport, count: usize, allowed: f64) -> Result<()> {
    let apart = |a: f64, b: f64| (a - b).abs() / b.abs();
    let (loss, norm) = (
        apart(ranks.loss, alone.loss),
        apart(ranks.grad_norm, alone.grad_norm),
    );
    println!(
        "first step on {count} ranks against one: loss {:.6} and {:.6} ({loss:.1e} apart), gradient norm {:.6} and {:.6} ({norm:.1e} apart)",
        ranks.loss, alone.loss, ranks.grad_norm, alone.grad_norm
    );
    if loss.max(norm) <= allowed {
        Ok(())
    } else {
        Err(failure(format!(
            "expected the first step to equal that of one rank within {allowed:e}"
        )))
    }
}

/// Four ranks, or as many as were launched, unless a flag, a variable or `autosp.toml` says otherwise.
fn settings(options: &Options, launched: Option<&Launched>) -> Result<Settings> {
    let mut settings = match launched {
        None => Settings::default().with_sp(4),
        Some(_) => Settings::default(),
    }
    .loaded()?;
    let number = |value: Option<usize>| value.map(|value| value.to_string());
    let flags = [
        ("dp", number(options.dp)),
        ("sp", number(options.sp)),
        ("groups", number(options.groups)),
        ("zero", number(options.zero)),
        ("policy", options.policy.clone()),
        ("device", options.device.clone()),
    ];
    for (name, value) in flags {
        if let Some(value) = value {
            settings.set(name, &value, Source::Flag(format!("--{name}")))?;
        }
    }
    if let Some(launched) = launched {
        settings = launched.fit(&settings)?;
    }
    let (dp, batch) = (settings.dp(), options.batch);
    if !batch.is_multiple_of(dp) {
        return Err(failure(format!(
            "expected a --batch that divides by dp = {dp}, found {batch}"
        )));
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
