//! Letters between ranks, and the sleep until they come.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use autosp_plan::codes;
use candle_core::Tensor;

use super::world::{World, lock};
use crate::comm::Tag;
use crate::{Error, Result};

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
pub(super) struct Mailbox {
    pub(super) content: Mutex<Content>,
    pub(super) bell: Condvar,
}

/// Letters that have come, and what the rank is doing about them.
#[derive(Debug, Default)]
pub(super) struct Content {
    letters: HashMap<Key, Envelope>,
    asleep: Option<Missing>,
    /// Collectives that the rank has started and not waited for.
    pub(super) open: Vec<(&'static str, u64, Tag)>,
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

impl World {
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
        if let Some((_, error)) = self.all_asleep() {
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

    /// If every rank that has not returned sleeps, and no letter is there for any: the first of them, and who waits where.
    ///
    /// All mailboxes are locked together (by index, and nobody else holds two), so that this is one moment of the run. Then nobody is
    /// left to write a letter, and waiting for the deadline would change nothing.
    pub(super) fn all_asleep(&self) -> Option<(usize, Error)> {
        let all: Vec<MutexGuard<'_, Content>> = self
            .mailboxes
            .iter()
            .map(|mailbox| lock(&mailbox.content))
            .collect();
        let mut text =
            "expected the same collectives on all ranks, found every rank waiting:".to_owned();
        let mut first = None;
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
            first = first.or(Some(rank));
        }
        first.map(|rank| (rank, Error::new(codes::MISMATCH, text)))
    }
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
