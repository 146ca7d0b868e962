//! What the threads of a run share: mailboxes, faults, and what each rank waits for.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use autosp_plan::codes;
use candle_core::Tensor;

use crate::comm::Tag;
use crate::comm::ring::Ring;
use crate::{Error, Result};

/// Collectives of each rank that a message shows.
const SHOWN: usize = 4;

/// Kind of the group, world rank of the sender, sequence number: where an envelope belongs.
pub(super) type Key = (&'static str, usize, u64);

/// What one rank hands to another in one collective.
#[derive(Debug)]
pub(super) struct Envelope {
    pub(super) tag: Tag,
    pub(super) part: Option<Tensor>,
}

/// What a rank waits for.
#[derive(Debug, Clone)]
pub(super) struct Missing {
    pub(super) tag: Tag,
    pub(super) keys: Vec<Key>,
}

/// How a wait ended.
#[derive(Debug)]
pub(super) enum Taken {
    /// At least one envelope.
    Envelopes(Vec<(Key, Envelope)>),
    /// The deadline passed.
    Late,
    /// These ranks have returned without an envelope.
    Returned(Vec<usize>),
    /// All ranks wait, and none can go on.
    Stuck(Error),
}

#[derive(Debug, Default)]
struct Mailbox {
    letters: Mutex<HashMap<Key, Envelope>>,
    bell: Condvar,
}

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
    mailboxes: Vec<Mailbox>,
    rings: Vec<Mutex<Ring>>,
    returned: Vec<AtomicBool>,
    failed: AtomicBool,
    faults: Mutex<Vec<Fault>>,
    /// What each rank waits for; locked before a mailbox, never after.
    waiting: Mutex<Vec<Option<Missing>>>,
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
            waiting: Mutex::new(vec![None; size]),
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
    }

    /// Records that `rank` starts no further collective, and wakes everybody who may wait for one.
    pub(crate) fn leave(&self, rank: usize) {
        self.returned[rank].store(true, Ordering::SeqCst);
        self.ring_all_bells();
    }

    /// The failures so far, in the order of time; at most one a rank.
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
            Some(first) => Error::new(codes::STOPPED, format!("stopped: rank {} failed: {}", first.rank, first.error)),
            None => Error::new(codes::STOPPED, "stopped: the run has failed"),
        })
    }

    /// Lets `rank` note something in its ring.
    pub(super) fn ring(&self, rank: usize, note: impl FnOnce(&mut Ring)) {
        note(&mut lock(&self.rings[rank]));
    }

    /// The last collectives of all ranks, one a line.
    pub(super) fn history(&self) -> String {
        let now = Instant::now();
        let mut text = String::new();
        for (rank, ring) in self.rings.iter().enumerate() {
            let _ = write!(text, "\n   rank {rank}{}", lock(ring).last(SHOWN, now));
        }
        text
    }

    /// Puts an envelope into the mailbox of `to`.
    pub(super) fn post(&self, to: usize, key: Key, envelope: Envelope) {
        let mailbox = &self.mailboxes[to];
        lock(&mailbox.letters).insert(key, envelope);
        mailbox.bell.notify_all();
    }

    /// Blocks until at least one of the missing envelopes is there, and takes those that are.
    pub(super) fn take(&self, rank: usize, missing: &Missing, until: Instant) -> Result<Taken> {
        if let Some(envelopes) = pick(&mut lock(&self.mailboxes[rank].letters), &missing.keys) {
            self.check(rank)?;
            return Ok(Taken::Envelopes(envelopes));
        }
        if let Some(error) = self.announce(rank, missing) {
            return Ok(Taken::Stuck(error));
        }
        let taken = self.sleep(rank, missing, until);
        lock(&self.waiting)[rank] = None;
        taken
    }

    fn sleep(&self, rank: usize, missing: &Missing, until: Instant) -> Result<Taken> {
        let mailbox = &self.mailboxes[rank];
        let mut letters = lock(&mailbox.letters);
        loop {
            self.check(rank)?;
            if let Some(envelopes) = pick(&mut letters, &missing.keys) {
                return Ok(Taken::Envelopes(envelopes));
            }
            // A rank posts before it returns, and the mailbox is locked: what is not here now will never come.
            let gone = missing.keys.iter().map(|&(_, from, _)| from);
            let gone: Vec<usize> = gone.filter(|&from| self.returned[from].load(Ordering::SeqCst)).collect();
            if !gone.is_empty() {
                return Ok(Taken::Returned(gone));
            }
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return Ok(Taken::Late);
            };
            let woken = mailbox.bell.wait_timeout(letters, left);
            letters = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Records what `rank` waits for. If every rank waits and nothing is on its way, says who waits where.
    fn announce(&self, rank: usize, missing: &Missing) -> Option<Error> {
        let mut waiting = lock(&self.waiting);
        waiting[rank] = Some(missing.clone());
        let stuck = waiting.iter().enumerate().all(|(rank, missing)| {
            missing.as_ref().is_some_and(|missing| {
                let letters = lock(&self.mailboxes[rank].letters);
                missing.keys.iter().all(|key| !letters.contains_key(key))
            })
        });
        if !stuck || self.has_failed() {
            return None;
        }
        let mut text = "expected the same collectives on all ranks, found every rank waiting:".to_owned();
        for (rank, missing) in waiting.iter().enumerate() {
            if let Some(Missing { tag, keys }) = missing {
                let ranks: Vec<usize> = keys.iter().map(|&(_, rank, _)| rank).collect();
                let kind = keys.first().map_or("", |key| key.0);
                let _ = write!(text, "\n   rank {rank} in {tag} of the {kind} group, for {}", list(&ranks));
            }
        }
        waiting[rank] = None;
        Some(Error::new(codes::MISMATCH, text))
    }

    /// Whoever is about to sleep holds its mailbox, so that no bell is missed.
    fn ring_all_bells(&self) {
        for mailbox in &self.mailboxes {
            drop(lock(&mailbox.letters));
            mailbox.bell.notify_all();
        }
    }
}

fn pick(letters: &mut HashMap<Key, Envelope>, keys: &[Key]) -> Option<Vec<(Key, Envelope)>> {
    let found: Vec<_> = keys.iter().filter_map(|key| Some((*key, letters.remove(key)?))).collect();
    (!found.is_empty()).then_some(found)
}

/// A panic elsewhere is reported as such; the data behind our locks is whole after each statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `rank 3`, `ranks 1 and 3`, `ranks 0 to 3`.
pub(super) fn list(ranks: &[usize]) -> String {
    match ranks {
        [] => "no rank".to_owned(),
        [one] => format!("rank {one}"),
        [first, .., last] if ranks.len() > 2 && last - first == ranks.len() - 1 => format!("ranks {first} to {last}"),
        [init @ .., last] => {
            let init: Vec<String> = init.iter().map(ToString::to_string).collect();
            format!("ranks {} and {last}", init.join(", "))
        }
    }
}
