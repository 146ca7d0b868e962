//! What the threads of a run share: mailboxes, the last collectives, and who has failed or returned.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use autosp_plan::codes;

use super::mail::Mailbox;
use crate::comm::Tag;
use crate::comm::ring::Ring;
use crate::{Error, Result};

/// Collectives of each rank that a message shows.
const SHOWN: usize = 4;

/// A message shows all ranks of a world of this size.
const SMALL_WORLD: usize = 8;

/// The first failure of a rank.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) rank: usize,
    pub(crate) error: Error,
}

/// What the threads of one run share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) deadline: Duration,
    pub(super) mailboxes: Vec<Mailbox>,
    rings: Vec<Mutex<Ring>>,
    pub(super) returned: Vec<AtomicBool>,
    failed: AtomicBool,
    faults: Mutex<Vec<Fault>>,
    /// Ranks that have not returned yet; its bell rings when one does, and when one fails.
    running: Mutex<usize>,
    changed: Condvar,
    /// Called once when the run fails: what else has to be stopped.
    hooks: Mutex<Vec<Hook>>,
}

/// Stops something that waits outside of mailboxes.
struct Hook(Box<dyn Fn() + Send>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

impl World {
    /// A world of `size` ranks, of which none has done anything.
    pub(crate) fn new(size: usize, deadline: Duration) -> Self {
        Self {
            deadline,
            mailboxes: (0..size).map(|_| Mailbox::default()).collect(),
            rings: (0..size).map(|_| Mutex::default()).collect(),
            returned: (0..size).map(|_| AtomicBool::new(false)).collect(),
            failed: AtomicBool::new(false),
            faults: Mutex::default(),
            running: Mutex::new(size),
            changed: Condvar::new(),
            hooks: Mutex::default(),
        }
    }

    /// Records that `rank` failed, unless it has already, and wakes everybody.
    pub(crate) fn raise(&self, rank: usize, error: Error) {
        {
            let mut faults = lock(&self.faults);
            if faults.iter().all(|fault| fault.rank != rank) {
                tracing::error!(rank, %error, "a rank failed");
                faults.push(Fault { rank, error });
            }
        }
        self.failed.store(true, Ordering::SeqCst);
        self.ring_all_bells();
        for Hook(stop) in std::mem::take(&mut *lock(&self.hooks)) {
            stop();
        }
    }

    /// `stop` is called, on the thread of whoever fails, when the run fails; at once if it has.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_failure(&self, stop: impl Fn() + Send + 'static) {
        lock(&self.hooks).push(Hook(Box::new(stop)));
        if self.has_failed() {
            for Hook(stop) in std::mem::take(&mut *lock(&self.hooks)) {
                stop();
            }
        }
    }

    /// Records that `rank` has returned, and wakes everybody who may wait for it.
    pub(crate) fn leave(&self, rank: usize) {
        let open = lock(&self.mailboxes[rank].content).open.first().copied();
        if let (Some((kind, sequence, tag)), false) = (open, self.has_failed()) {
            let text = format!(
                "expected a wait for each collective, found none for {tag}, collective #{sequence} of the {kind} group"
            );
            self.raise(rank, Error::new(codes::UNFINISHED, text));
        }
        self.returned[rank].store(true, Ordering::SeqCst);
        if let Some((sleeper, error)) = self.all_asleep() {
            self.raise(sleeper, error);
        }
        *lock(&self.running) -= 1;
        self.ring_all_bells();
    }

    /// Blocks until all ranks have returned. Gives up `grace` after one has failed: then the ranks that still run are the result.
    pub(crate) fn wait_for_all(&self, grace: Duration) -> Vec<usize> {
        let mut running = lock(&self.running);
        let mut until: Option<Instant> = None;
        while *running > 0 {
            if until.is_none() && self.has_failed() {
                until = Some(Instant::now() + grace);
            }
            running = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self
                    .changed
                    .wait(running)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => {
                    let ranks = 0..self.returned.len();
                    return ranks
                        .filter(|&rank| !self.returned[rank].load(Ordering::SeqCst))
                        .collect();
                }
                Some(left) => {
                    self.changed
                        .wait_timeout(running, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        Vec::new()
    }

    /// The failures so far, in the order of time; at most one a rank.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        lock(&self.faults)
            .iter()
            .map(|Fault { rank, error }| Fault {
                rank: *rank,
                error: error.copy(),
            })
            .collect()
    }

    /// As [`faults`](Self::faults), when the run is over.
    pub(crate) fn take_faults(&self) -> Vec<Fault> {
        std::mem::take(&mut *lock(&self.faults))
    }

    /// Whether a rank has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// AS0404 if another rank than `rank` has failed, or `rank`'s own failure again.
    pub(super) fn check(&self, rank: usize) -> Result<()> {
        if !self.has_failed() {
            return Ok(());
        }
        let faults = lock(&self.faults);
        Err(match faults.first() {
            Some(first) if first.rank == rank => first.error.copy(),
            Some(first) => Error::new(
                codes::STOPPED,
                format!("stopped: rank {} failed: {}", first.rank, first.error),
            ),
            None => Error::new(codes::STOPPED, "stopped: the run has failed"),
        })
    }

    /// Notes that `rank` has started a collective.
    pub(super) fn started(&self, rank: usize, kind: &'static str, sequence: u64, tag: Tag) {
        lock(&self.rings[rank]).start(kind, tag, sequence);
        lock(&self.mailboxes[rank].content)
            .open
            .push((kind, sequence, tag));
    }

    /// Notes that `rank` waits for a collective that it has started.
    pub(super) fn waits(&self, rank: usize, kind: &'static str, sequence: u64) {
        lock(&self.mailboxes[rank].content)
            .open
            .retain(|&(k, s, _)| (k, s) != (kind, sequence));
    }

    /// Notes that a collective is complete on `rank`.
    pub(super) fn completed(&self, rank: usize, kind: &'static str, sequence: u64) {
        lock(&self.rings[rank]).done(kind, sequence);
    }

    /// The last collectives of each rank, one a line; in a large world only those of `ranks`.
    pub(super) fn history(&self, ranks: &[usize]) -> String {
        let now = Instant::now();
        let mut text = String::new();
        for (rank, ring) in self.rings.iter().enumerate() {
            if self.rings.len() <= SMALL_WORLD || ranks.contains(&rank) {
                let _ = write!(text, "\n   rank {rank}{}", lock(ring).last(SHOWN, now));
            }
        }
        text
    }

    /// Whoever is about to sleep holds its mailbox, so that no bell is missed.
    fn ring_all_bells(&self) {
        for mailbox in &self.mailboxes {
            drop(lock(&mailbox.content));
            mailbox.bell.notify_all();
        }
        drop(lock(&self.running));
        self.changed.notify_all();
    }
}

/// A panic elsewhere is reported as such; the data behind our locks is whole after each statement.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
