//! What a person sees while it trains, and the log that a program reads.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, IsTerminal, Write},
    path::{Path, PathBuf},
};

use autosp::{Error, Result, StepReport, codes};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::file_failure;

/// Progress bar and log file.
pub struct Report {
    bar: ProgressBar,
    log: Option<(BufWriter<File>, PathBuf)>,
    steps: u64,
}

impl Report {
    /// Opens the log before anything is computed; a run that goes on adds to it.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn new(steps: usize, log: Option<&Path>, goes_on: bool) -> Result<Self> {
        let mut how = OpenOptions::new();
        if goes_on {
            how.append(true);
        } else {
            how.write(true).truncate(true);
        }
        how.create(true);
        let create = |path: &Path| open(path, &how);
        let log = log
            .map(|path| Ok::<_, Error>((BufWriter::new(create(path)?), path.to_owned())))
            .transpose()?;
        let bar = ProgressBar::new(steps as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos:>4}/{len}  {msg}  {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Self {
            bar,
            log,
            steps: steps as u64,
        })
    }

    /// Shows and logs a finished step.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn step(&mut self, step: &StepReport) -> Result<()> {
        if let Some((log, path)) = &mut self.log {
            let object = json!({
                "step": step.step,
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "valid_tokens": step.valid_tokens,
                "tokens_per_s": step.tokens_per_s,
                "bytes_sent": step.bytes_sent,
                "exchange_bytes": step.exchange_bytes,
            });
            writeln!(log, "{object}")
                .and_then(|()| log.flush())
                .map_err(|error| {
                    file_failure(codes::FILE_UNWRITABLE, "write the log", path, &error)
                })?;
        }
        let memory = memory().map_or(String::new(), |bytes| {
            format!("  {:>5.0} MB", bytes as f64 / 1e6)
        });
        let text = format!(
            "loss {:.4}  {:>7.0} tokens/s{memory}",
            step.loss, step.tokens_per_s
        );
        if std::io::stderr().is_terminal() {
            self.bar.set_message(text);
            self.bar.set_position(step.step);
        } else if step.step == 1
            || step.step == self.steps
            || step.step.is_multiple_of(self.steps.div_ceil(10))
        {
            println!("step {:>4}/{}  {text}", step.step, self.steps);
        }
        Ok(())
    }

    /// Leaves the bar as it stands.
    pub fn finish(&self) {
        self.bar.abandon();
    }
}

/// Finds out now whether a file can be written in the end; what is there stays.
///
/// # Errors
/// When the folder cannot be made or the file not be opened.
pub fn check_writable(path: &Path) -> Result<()> {
    let is_new = !path.exists();
    open(path, OpenOptions::new().append(true).create(true))?;
    if is_new {
        // It was made for the check alone.
        let _ = fs::remove_file(path);
    }
    Ok(())
}

fn open(path: &Path, options: &OpenOptions) -> Result<File> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    folder
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| options.open(path))
        .map_err(|error| file_failure(codes::FILE_UNWRITABLE, "write", path, &error))
}

/// Bytes of memory that this process holds, where the system says (Linux).
fn memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()
        .map(|kilobytes| kilobytes * 1024)
}
