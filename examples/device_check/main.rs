//! Holds what a GPU computes against the processor, and several ranks against one: attention, the replaced operations, whole steps.
//!
//! `cargo run --release --features cuda --example device_check -- --json docs/device-runs/FILE.json --sources $(scripts/cuda-sources.sh)`.
//! With two GPUs it also runs two ranks over NCCL. Errors are |a - b| / |b|, 2-norms, against `f64` on the CPU from the same values.

#![allow(clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

mod attention;
mod operations;
mod steps;

use std::process::ExitCode;

use autosp::{Result, Settings, settings};
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use serde_json::{Value, json};

/// The model, as its file has it.
#[autosp::sequence_parallel(loss)]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod llama {
    include!("../models/llama.rs");
}

/// Checks a GPU against the processor.
#[derive(Debug, Parser)]
struct Options {
    /// The figures go here as JSON
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// What the CUDA sources hash to, for the JSON
    #[arg(long, default_value = "")]
    sources: String,
    /// GPUs to use
    #[arg(long, default_value_t = 1)]
    gpus: usize,
    /// Whether whole steps are checked too
    #[arg(long)]
    steps: bool,
}

/// One comparison: a name, the errors by part, and the most that is allowed.
struct Row {
    name: String,
    errors: Vec<(String, f64)>,
    allowed: f64,
}

impl Row {
    fn good(&self) -> bool {
        self.errors.iter().all(|(_, error)| *error <= self.allowed)
    }

    fn show(&self) {
        let errors: Vec<String> = self
            .errors
            .iter()
            .map(|(part, error)| format!("{part} {error:.1e}"))
            .collect();
        let verdict = if self.good() { "ok  " } else { "FAIL" };
        println!(
            "{verdict} {:<44} {} (allowed {:.0e})",
            self.name,
            errors.join(", "),
            self.allowed
        );
    }

    fn json(&self) -> Value {
        let errors: serde_json::Map<String, Value> = self
            .errors
            .iter()
            .map(|(part, error)| (part.clone(), json!(error)))
            .collect();
        json!({ "check": self.name, "errors": errors, "allowed": self.allowed, "ok": self.good() })
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    #[cfg(feature = "cuda")]
    let versions = autosp::cuda::versions()?.to_string();
    #[cfg(not(feature = "cuda"))]
    let versions = "built without the feature `cuda`".to_owned();
    println!("{versions}");
    let mut rows: Vec<Row> = Vec::new();
    let mut add = |row: Result<Row>, name: &str| {
        let row = row.unwrap_or_else(|error| {
            println!("{name}: {error}");
            Row {
                name: name.to_owned(),
                errors: vec![("refused".to_owned(), f64::INFINITY)],
                allowed: 0.0,
            }
        });
        row.show();
        rows.push(row);
    };
    let on_gpu = Settings::default().with_device(settings::Device::Cuda);
    let devices = autosp::run_with(on_gpu, |sp| Ok(sp.device().clone()))?;
    let gpu = &devices[0];
    for case in attention::cases() {
        add(attention::check(&case, gpu), &case.name());
    }
    for dtype in [DType::F32, DType::BF16] {
        for (name, row) in operations::check(gpu, dtype) {
            add(row, &name);
        }
    }
    if options.steps {
        for (name, row) in steps::check(options.gpus)? {
            add(row, &name);
        }
    }
    let good = rows.iter().all(Row::good);
    if let Some(path) = &options.json {
        let checks: Vec<Value> = rows.iter().map(Row::json).collect();
        let report = json!({ "libraries": versions, "sources": options.sources, "gpus": options.gpus, "ok": good, "checks": checks });
        let text = format!("{report:#}\n");
        std::fs::write(path, text).map_err(|error| {
            autosp::Error::new(autosp::codes::FILE_UNWRITABLE, error.to_string())
        })?;
    }
    println!(
        "{} of {} checks are good",
        rows.iter().filter(|row| row.good()).count(),
        rows.len()
    );
    Ok(good)
}

/// Values in -1..1 that depend on the seed alone.
fn noise(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
        .collect();
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

/// |a - b| / |b|, infinite for what is not finite.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    let up = |x: &Tensor| -> Result<Tensor> {
        Ok(x.to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .flatten_all()?)
    };
    let (a, b) = (up(a)?, up(b)?);
    let norm = |x: Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let error = norm((a - &b)?)? / norm(b)?.max(1e-30);
    Ok(if error.is_finite() {
        error
    } else {
        f64::INFINITY
    })
}
