//! What a person sees while it trains, and the log that a program reads.

use std::{
    fs::{self, File},
    io::{BufWriter, IsTerminal, Write},
    path::Path,
    time::Instant,
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{Failure, failure, text::reason};

/// One step, as it is logged.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// From 1.
    pub step: usize,
    /// Mean loss over all valid targets of the step, in nats.
    pub loss: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Targets that counted.
    pub valid_tokens: usize,
    /// Bytes that all ranks handed to their peers.
    pub bytes_sent: u64,
    /// The part of them that belongs to attention sites.
    pub exchange_bytes: u64,
}

/// Progress bar and log file.
pub struct Report {
    bar: ProgressBar,
    log: Option<(BufWriter<File>, String)>,
    steps: usize,
    last: Instant,
}

impl Report {
    /// Opens the log before anything is computed.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn new(steps: usize, log: Option<&Path>) -> Result<Self, Failure> {
        let log = match log {
            None => None,
            Some(path) => Some((BufWriter::new(create(path)?), path.display().to_string())),
        };
        let bar = ProgressBar::new(steps as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos:>4}/{len}  {msg}  {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Self { bar, log, steps, last: Instant::now() })
    }

    /// Starts the clock of the first step.
    pub fn start(&mut self) {
        self.last = Instant::now();
    }

    /// Shows and logs a finished step.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn step(&mut self, line: Line) -> Result<(), Failure> {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        let tokens_per_s = line.valid_tokens as f64 / seconds;
        if let Some((log, path)) = &mut self.log {
            let object = json!({
                "step": line.step,
                "loss": line.loss,
                "grad_norm": line.grad_norm,
                "valid_tokens": line.valid_tokens,
                "tokens_per_s": tokens_per_s,
                "bytes_sent": line.bytes_sent,
                "exchange_bytes": line.exchange_bytes,
            });
            writeln!(log, "{object}")
                .and_then(|()| log.flush())
                .map_err(|error| failure(format!("cannot write the log `{path}`: {}", reason(&error))))?;
        }
        let memory = memory().map_or(String::new(), |bytes| format!("  {:>5.0} MB", bytes as f64 / 1e6));
        let text = format!("loss {:.4}  {tokens_per_s:>7.0} tokens/s{memory}", line.loss);
        if std::io::stderr().is_terminal() {
            self.bar.set_message(text);
            self.bar.inc(1);
        } else if line.step == 1 || line.step == self.steps || line.step % self.steps.div_ceil(10) == 0 {
            println!("step {:>4}/{}  {text}", line.step, self.steps);
        }
        Ok(())
    }

    /// Leaves the bar as it stands.
    pub fn finish(&self) {
        self.bar.abandon();
    }
}

/// Creates a file and the folder it is in.
///
/// # Errors
/// When either cannot be made.
pub fn create(path: &Path) -> Result<File, Failure> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| File::create(path))
        .map_err(|error| failure(format!("cannot write `{}`: {}", path.display(), reason(&error))))
}

/// Bytes of memory that this process holds, where the system says (Linux).
fn memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
