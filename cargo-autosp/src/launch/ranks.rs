//! The processes of a launch.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::output::{Last, To, forward, lines};
use super::system::{News, end_with_launcher, kill_group, look};
use super::{refused, system};
use crate::Failure;

/// How long a rank may take to end when it is asked to, before it is killed.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long what a rank has written is waited for when it has ended: a process that it left behind may hold the other end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Variables of other launchers, which would contradict ours.
const OTHERS: [&str; 10] = [
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_ID",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "GROUP_RANK",
];

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Code(u8),
    /// By this signal.
    Killed(i32),
    /// It was stopped by this signal, and killed for it: nobody would start it again.
    Stopped(i32),
}

impl End {
    /// The exit code that says the same.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Killed(signal) => 128 + signal as u8,
            Self::Stopped(_) => 128 + libc::SIGKILL as u8,
        }
    }

    /// Whether this may have happened because of `other`, which was seen no earlier: a rank that ends with an error may do so because
    /// another was killed, but none is killed because of an error.
    pub(super) fn is_consequence_of(self, other: Self) -> bool {
        matches!(self, Self::Code(_)) && !matches!(other, Self::Code(_))
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with exit code {code}"),
            Self::Killed(signal) => write!(f, "was killed by {}", system::name(*signal)),
            Self::Stopped(signal) => {
                write!(
                    f,
                    "was stopped by {}, and was killed",
                    system::name(*signal)
                )
            }
        }
    }
}

struct Rank {
    /// Waited for through [`look`], which also says when it is stopped.
    pid: i32,
    end: Option<End>,
    last: Last,
    output: Vec<JoinHandle<()>>,
}

/// All ranks of a launch. Those that still run are killed when it is dropped.
pub(super) struct Ranks {
    all: Vec<Rank>,
    /// When all were asked to end.
    asked: Option<Instant>,
}

impl Ranks {
    /// Starts `count` processes of `program`.
    ///
    /// # Errors
    /// AS0608 if one cannot be started; none is left then.
    pub(super) fn start(
        program: &[OsString],
        count: u16,
        variables: &[(&str, String)],
    ) -> Result<Self, Failure> {
        let mut ranks = Self {
            all: Vec::new(),
            asked: None,
        };
        let width = (count - 1).to_string().len();
        for rank in 0..count {
            let mut command = Command::new(&program[0]);
            command
                .args(&program[1..])
                .envs(variables.iter().map(|(name, value)| (name, value)))
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .process_group(0);
            for name in OTHERS {
                command.env_remove(name);
            }
            end_with_launcher(&mut command);
            let cannot = |error: &std::io::Error| {
                let reason = autosp_plan::io_reason(error);
                refused(format!(
                    "cannot start `{}` as rank {rank}: {reason}",
                    program[0].to_string_lossy()
                ))
            };
            let mut child = command.spawn().map_err(|error| cannot(&error))?;
            let (output, errors) = (child.stdout.take(), child.stderr.take());
            let last = Last::default();
            ranks.all.push(Rank {
                pid: child.id() as i32,
                end: None,
                last: Arc::clone(&last),
                output: Vec::new(),
            });
            let prefix = format!("[rank {rank:>width$}] ");
            let mut threads = Vec::new();
            if let (Some(output), Some(errors)) = (output, errors) {
                let (own, prefix_too) = (Arc::clone(&last), prefix.clone());
                threads.push(forward(output, To::Output, prefix, own));
                threads.push(forward(errors, To::Errors, prefix_too, last));
            }
            for thread in threads {
                let thread = thread.map_err(|error| cannot(&error))?;
                ranks.all[usize::from(rank)].output.push(thread);
            }
        }
        Ok(ranks)
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn are_running(&self) -> bool {
        self.all.iter().any(|rank| rank.end.is_none())
    }

    /// The ranks that have ended or were stopped since the last look, which are killed. What was asked to end is no news.
    pub(super) fn look(&mut self) -> Vec<(usize, End)> {
        let mut news = Vec::new();
        for (number, rank) in self.all.iter_mut().enumerate() {
            if rank.end.is_some() {
                continue;
            }
            let end = match look(rank.pid) {
                News::None => continue,
                News::Exited(code) => End::Code(code as u8),
                News::Killed(signal) => End::Killed(signal),
                News::Stopped(signal) => {
                    kill_group(rank.pid, libc::SIGKILL);
                    news.push((number, End::Stopped(signal)));
                    continue;
                }
            };
            rank.end = Some(end);
            // What it has started and left behind.
            kill_group(rank.pid, libc::SIGKILL);
            news.push((number, end));
        }
        if self.asked.is_some() {
            news.clear();
        }
        if self.asked.is_some_and(|asked| asked.elapsed() > PATIENCE) {
            self.kill_all(libc::SIGKILL);
        }
        news
    }

    /// Asks all ranks to end; those that have not after a while are killed.
    pub(super) fn end_all(&mut self) {
        if self.asked.is_none() {
            self.asked = Some(Instant::now());
            self.kill_all(libc::SIGTERM);
        }
    }

    fn kill_all(&self, signal: i32) {
        for rank in self.all.iter().filter(|rank| rank.end.is_none()) {
            kill_group(rank.pid, signal);
        }
    }

    /// Waits until everything that the ranks have written is written.
    pub(super) fn finish_output(&mut self) {
        while self.are_running() {
            self.look();
            std::thread::sleep(super::PERIOD);
        }
        let until = Instant::now() + LAST_WORDS;
        for thread in self.all.iter_mut().flat_map(|rank| rank.output.drain(..)) {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(super::PERIOD / 4);
            }
        }
    }

    /// How a rank ended, if it has.
    pub(super) fn end(&self, rank: usize) -> Option<End> {
        self.all[rank].end
    }

    /// The last lines that a rank has written.
    pub(super) fn last_lines(&self, rank: usize) -> Vec<String> {
        lines(&self.all[rank].last).iter().cloned().collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.kill_all(libc::SIGKILL);
        while self.are_running() {
            self.look();
            std::thread::sleep(super::PERIOD / 4);
        }
    }
}
