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
    content: Mutex<Content>,
    bell: Condvar,
}

/// Letters that have come, and what the rank is doing about them.
#[derive(Debug, Default)]
struct Content {
    letters: HashMap<Key, Envelope>,
    asleep: Option<Missing>,
    /// Collectives that the rank has started and not waited for.
    open: Vec<(&'static str, u64, Tag)>,
}

impl Content {
    /// Takes the letters among `keys` that are there; `None` if there are none.
    fn pick(&mut self, keys: &[Key]) -> Option<Vec<(Key, Envelope)>> {
        let found: Vec<_> = keys
            .iter()
            .filter_map(|key| Some((*key, self.letters.remove(key)?)))
            .collect();
        (!found.is_empty()).then_some(found)
    }
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
    /// Ranks that have not returned yet; its bell rings when one does, and when one fails.
    running: Mutex<usize>,
    changed: Condvar,
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

    /// Records that `rank` has returned, and wakes everybody who may wait for it.
    pub(crate) fn leave(&self, rank: usize) {
        self.returned[rank].store(true, Ordering::SeqCst);
        if !self.has_failed() {
            let open = lock(&self.mailboxes[rank].content).open.first().copied();
            if let Some((kind, sequence, tag)) = open {
                let text = format!(
                    "expected a wait for each collective, found none for {tag}, collective #{sequence} of the {kind} group"
                );
                self.raise(rank, Error::new(codes::UNFINISHED, text));
            } else if let Some(error) = self.all_asleep() {
                self.raise(rank, error);
            }
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
        lock(&mailbox.content).letters.insert(key, envelope);
        mailbox.bell.notify_all();
    }

    /// Blocks until at least one of the missing envelopes is there, and takes those that are.
    ///
    /// What has arrived is taken even if the run has failed meanwhile, so that an error which all ranks find is found by all.
    pub(super) fn take(&self, rank: usize, missing: &Missing, until: Instant) -> Result<Taken> {
        {
            let mut content = lock(&self.mailboxes[rank].content);
            if let Some(envelopes) = content.pick(&missing.keys) {
                return Ok(Taken::Envelopes(envelopes));
            }
            content.asleep = Some(missing.clone());
        }
        if let Some(error) = self.all_asleep() {
            return Ok(Taken::Stuck(error));
        }
        self.sleep(rank, missing, until)
    }

    fn sleep(&self, rank: usize, missing: &Missing, until: Instant) -> Result<Taken> {
        let mailbox = &self.mailboxes[rank];
        let mut content = lock(&mailbox.content);
        let taken = loop {
            if let Some(envelopes) = content.pick(&missing.keys) {
                break Ok(Taken::Envelopes(envelopes));
            }
            if let Err(error) = self.check(rank) {
                break Err(error);
            }
            // A rank posts before it returns, and the mailbox is locked: what is not here now will never come.
            let gone = self.returned_among(missing);
            if !gone.is_empty() {
                break Ok(Taken::Returned(gone));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Ok(Taken::Late);
            }
            let woken = mailbox.bell.wait_timeout(content, left);
            content = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        content.asleep = None;
        taken
    }

    fn returned_among(&self, missing: &Missing) -> Vec<usize> {
        let senders = missing.keys.iter().map(|&(_, from, _)| from);
        senders
            .filter(|&from| self.returned[from].load(Ordering::SeqCst))
            .collect()
    }

    /// If every rank that has not returned sleeps, and no letter is there for any: who waits where.
    ///
    /// All mailboxes are locked together (by index, and nobody else holds two), so that this is one moment of the run. Then nobody is
    /// left to write a letter, and waiting for the deadline would change nothing.
    fn all_asleep(&self) -> Option<Error> {
        let all: Vec<MutexGuard<'_, Content>> = self
            .mailboxes
            .iter()
            .map(|mailbox| lock(&mailbox.content))
            .collect();
        let mut text =
            "expected the same collectives on all ranks, found every rank waiting:".to_owned();
        let mut sleepers = 0;
        for (rank, content) in all.iter().enumerate() {
            if self.returned[rank].load(Ordering::SeqCst) {
                let _ = write!(text, "\n   rank {rank} has returned");
                continue;
            }
            let missing = content.asleep.as_ref()?;
            let about_to_wake = missing
                .keys
                .iter()
                .any(|key| content.letters.contains_key(key));
            // A rank that waits for one that has returned finds that out itself, and says it better.
            if about_to_wake || !self.returned_among(missing).is_empty() || self.has_failed() {
                return None;
            }
            let ranks: Vec<usize> = missing.keys.iter().map(|&(_, rank, _)| rank).collect();
            let kind = missing.keys.first().map_or("", |key| key.0);
            let _ = write!(
                text,
                "\n   rank {rank} in {} of the {kind} group, for {}",
                missing.tag,
                list(&ranks)
            );
            sleepers += 1;
        }
        (sleepers > 0).then(|| Error::new(codes::MISMATCH, text))
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
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `rank 3`, `ranks 1 and 3`, `ranks 0 to 3`.
pub(crate) fn list(ranks: &[usize]) -> String {
    let mut ranks = ranks.to_vec();
    ranks.sort_unstable();
    match ranks.as_slice() {
        [] => "no rank".to_owned(),
        [one] => format!("rank {one}"),
        [first, .., last] if ranks.len() > 2 && last - first == ranks.len() - 1 => {
            format!("ranks {first} to {last}")
        }
        [init @ .., last] => {
            let init: Vec<String> = init.iter().map(ToString::to_string).collect();
            format!("ranks {} and {last}", init.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::list;

    #[test]
    fn ranks_are_listed_in_order() {
        let cases: [(&[usize], &str); 5] = [
            (&[], "no rank"),
            (&[7], "rank 7"),
            (&[3, 1], "ranks 1 and 3"),
            (&[2, 0, 1, 3], "ranks 0 to 3"),
            (&[4, 0, 1], "ranks 0, 1 and 4"),
        ];
        for (ranks, text) in cases {
            assert_eq!(list(ranks), text);
        }
    }
}
