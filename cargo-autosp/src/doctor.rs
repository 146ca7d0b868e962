//! `cargo autosp doctor`: what this machine is and how fast, for people and for the planner.

use std::fmt::Write as _;
use std::path::PathBuf;

use autosp_plan::planner::Rates;
use autosp_plan::settings::Device;
use autosp_plan::{codes, io_reason};
use autosp_runtime::doctor::{Findings, measure};

use crate::{Failure, Outcome};

/// What `doctor` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// GPUs to measure together; 0 measures the processor
    #[arg(long, default_value_t = if cfg!(feature = "cuda") { 1 } else { 0 })]
    gpus: usize,
    /// Where the rates go, for `estimate` to read; measured GPUs go to autosp-rates.toml by themselves
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = Rates::FILE)]
    save: Option<PathBuf>,
}

/// Measures, prints and saves.
///
/// # Errors
/// AS0410 without GPUs that can be used, AS0505 if the file cannot be written.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let (device, ranks) = match arguments.gpus {
        // Two ranks on threads, so that there is an exchange.
        0 => (Device::Cpu, 2),
        n => (Device::Cuda, n),
    };
    let found = measure(device, ranks).map_err(|error| {
        let help = error
            .help()
            .map_or(String::new(), |help| format!("\n  help: {help}"));
        Failure::new(known(error.code().id), format!("{}{help}", error.message()))
    })?;
    let mut text = show(&found, ranks);
    let save = arguments.save.clone();
    // Those of a processor would make a wrong plan for GPUs.
    let save = save.or_else(|| (device == Device::Cuda).then(|| Rates::FILE.into()));
    if let Some(path) = save {
        std::fs::write(&path, found.rates.to_toml()).map_err(|error| {
            let message = format!("cannot write `{}`: {}", path.display(), io_reason(&error));
            Failure::new(&codes::FILE_UNWRITABLE, message)
        })?;
        let _ = writeln!(
            text,
            "saved in {}, which `cargo autosp estimate` reads",
            path.display()
        );
    }
    Ok(Outcome::done(text))
}

fn known(id: &str) -> &'static codes::Code {
    codes::find(id).unwrap_or(&codes::CANDLE)
}

fn show(found: &Findings, ranks: usize) -> String {
    let mut text = String::new();
    for (name, value) in &found.machine {
        let _ = writeln!(text, "{name:<18} {value}");
    }
    let Rates {
        gemm,
        attention,
        copy,
        link,
        host_link,
        host_memory,
    } = &found.rates;
    let _ = writeln!(text, "\nof each of {ranks} ranks at once");
    let tera = |rate: f64| format!("{:.3} TFLOP/s", rate / 1e12);
    let giga = |rate: f64| format!("{:.1} GB/s", rate / 1e9);
    let mut line = |name: &str, value: String, rate: &str| {
        let assumed = found.assumed.iter().find(|(known, _)| *known == rate);
        let note = assumed.map_or(String::new(), |(_, why)| format!(" (by default: {why})"));
        let _ = writeln!(text, "{name:<18} {value}{note}");
    };
    line("matrix product", tera(*gemm), "gemm");
    for [length, forward, backward] in attention {
        let value = format!("{} forward, {} backward", tera(*forward), tera(*backward));
        line(&format!("attention {length}"), value, "attention");
    }
    line("copy", giga(*copy), "copy");
    line("exchange", giga(*link), "link");
    line("host link", giga(*host_link), "host_link");
    line("host memory", giga(*host_memory), "host_memory");
    text
}
