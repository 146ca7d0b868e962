//! What the ranks of a run share: mailboxes, the last collectives, and who has failed or returned.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use autosp_plan::{Settings, codes};

use super::away::Away;
use super::mail::{Mailbox, Open};
use crate::comm::Tag;
use crate::comm::process::Frame;
use crate::comm::ring::Ring;
use crate::{Error, Result};

/// Collectives of each rank that a message shows.
pub(super) const SHOWN: usize = 4;

/// A message shows all ranks of a world of this size.
const SMALL_WORLD: usize = 8;

/// The first failure of a rank.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) rank: usize,
    pub(crate) error: Error,
}

impl Fault {
    fn copy(&self) -> Self {
        Self {
            rank: self.rank,
            error: self.error.copy(),
        }
    }
}

/// How long ranks wait for each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    /// From the start of a collective.
    pub(crate) usual: Duration,
    /// The same until the second scope begins.
    pub(crate) first: Duration,
}

impl From<&Settings> for Deadlines {
    fn from(settings: &Settings) -> Self {
        Self {
            usual: settings.deadline(),
            first: settings.start_deadline(),
        }
    }
}

/// What the ranks of one run share: all of it where they are threads; where they are processes, each has one, with the others [`Away`].
#[derive(Debug)]
pub(crate) struct World {
    pub(super) deadlines: Deadlines,
    pub(super) mailboxes: Vec<Mailbox>,
    pub(super) rings: Vec<Mutex<Ring>>,
    pub(super) returned: Vec<AtomicBool>,
    /// Scopes that each rank has entered.
    scopes: Vec<AtomicU64>,
    pub(super) away: Option<Away>,
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
    pub(crate) fn new(size: usize, deadlines: Deadlines) -> Self {
        Self {
            deadlines,
            scopes: (0..size).map(|_| AtomicU64::new(0)).collect(),
            away: None,
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

    /// How long `rank` waits for the others, from the start of a collective.
    pub(crate) fn deadline(&self, rank: usize) -> Duration {
        match self.scopes[rank].load(Ordering::Relaxed) {
            0 | 1 => self.deadlines.first,
            _ => self.deadlines.usual,
        }
    }

    /// Notes that `rank` enters a scope: with the second, its first step is over.
    pub(crate) fn scope_begins(&self, rank: usize) {
        self.scopes[rank].fetch_add(1, Ordering::Relaxed);
    }

    /// Records that `rank` failed, unless it has already, and wakes everybody, in all processes.
    pub(crate) fn raise(&self, rank: usize, error: Error) {
        let fault = Fault { rank, error };
        let told = fault.copy();
        if self.record(fault.rank, fault.error)
            && let Some(away) = &self.away
        {
            away.tell_all(|| Frame::Fault(told.copy()));
        }
    }

    /// As [`raise`](Self::raise), in this process alone; whether it was news.
    pub(super) fn record(&self, rank: usize, error: Error) -> bool {
        let is_news = {
            let mut faults = lock(&self.faults);
            let is_news = faults.iter().all(|fault| fault.rank != rank);
            if is_news {
                tracing::error!(rank, %error, "a rank failed");
                faults.push(Fault { rank, error });
            }
            is_news
        };
        self.failed.store(true, Ordering::SeqCst);
        self.ring_all_bells();
        for Hook(stop) in std::mem::take(&mut *lock(&self.hooks)) {
            stop();
        }
        is_news
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

    /// Records that `rank`, of this process, has returned, and wakes everybody who may wait for it.
    pub(crate) fn leave(&self, rank: usize) {
        let open = lock(&self.mailboxes[rank].content).open.first().copied();
        if let (
            Some(Open {
                kind,
                sequence,
                tag,
                ..
            }),
            false,
        ) = (open, self.has_failed())
        {
            let text = format!(
                "expected a wait for each collective, found none for {tag}, collective #{sequence} of the {kind} group"
            );
            self.raise(rank, Error::new(codes::UNFINISHED, text));
        }
        if let Some(away) = &self.away {
            away.tell_all(|| Frame::Returned);
        }
        self.has_left(rank);
    }

    /// Records that `rank` has returned, once.
    pub(super) fn has_left(&self, rank: usize) {
        if self.returned[rank].swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some((sleeper, error)) = self.all_asleep() {
            self.raise(sleeper, error);
        }
        *lock(&self.running) -= 1;
        self.ring_all_bells();
    }

    /// The ranks of this process.
    fn own(&self) -> std::ops::Range<usize> {
        match &self.away {
            Some(away) => away.me..away.me + 1,
            None => 0..self.returned.len(),
        }
    }

    /// Blocks until all ranks have returned; after a failure those of this process are enough. Gives up `grace` after a failure: then the
    /// ranks of this process that still run are the result.
    pub(crate) fn wait_for_all(&self, grace: Duration) -> Vec<usize> {
        let mut running = lock(&self.running);
        let mut until: Option<Instant> = None;
        while *running > 0 {
            if self.has_failed() {
                let left = until
                    .get_or_insert_with(|| Instant::now() + grace)
                    .saturating_duration_since(Instant::now());
                let stuck: Vec<usize> = self
                    .own()
                    .filter(|&rank| !self.returned[rank].load(Ordering::SeqCst))
                    .collect();
                if stuck.is_empty() || left.is_zero() {
                    return stuck;
                }
                let woken = self.changed.wait_timeout(running, left);
                running = woken.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                let woken = self.changed.wait(running);
                running = woken.unwrap_or_else(PoisonError::into_inner);
            }
        }
        Vec::new()
    }

    /// The failures so far, in the order of time; at most one a rank.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        lock(&self.faults).iter().map(Fault::copy).collect()
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
        lock(&self.mailboxes[rank].content).open.push(Open {
            kind,
            sequence,
            tag,
            since: Instant::now(),
        });
    }

    /// Notes that `rank` waits for a collective that it has started, and says since when it has.
    pub(super) fn waits(&self, rank: usize, kind: &'static str, sequence: u64) -> Instant {
        let open = &mut lock(&self.mailboxes[rank].content).open;
        let place = open
            .iter()
            .position(|open| (open.kind, open.sequence) == (kind, sequence));
        place.map_or_else(Instant::now, |place| open.remove(place).since)
    }

    /// Notes that a collective is complete on `rank`.
    pub(super) fn completed(&self, rank: usize, kind: &'static str, sequence: u64) {
        lock(&self.rings[rank]).done(kind, sequence);
    }

    /// The last collectives of each rank, one a line; in a large world only those of `ranks`.
    pub(crate) fn history(&self, ranks: &[usize]) -> String {
        let now = Instant::now();
        let mut text = String::new();
        for (rank, ring) in self.rings.iter().enumerate() {
            if self.rings.len() <= SMALL_WORLD || ranks.contains(&rank) {
                let last = match &self.away {
                    Some(away) if away.me != rank => away.history(rank),
                    _ => lock(ring).last(SHOWN, now),
                };
                let _ = write!(text, "\n   rank {rank}{last}");
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
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
