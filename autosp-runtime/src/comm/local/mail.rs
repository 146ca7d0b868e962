//! Letters between ranks, and the sleep until they come.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use autosp_plan::codes;

use super::Letter;
use super::world::{World, lock};
use crate::comm::Tag;
use crate::{Error, Result};

/// Kind of the group, world rank of the sender, sequence number: where an envelope belongs.
pub(super) type Key = (&'static str, usize, u64);

/// What one rank hands to another in one collective.
#[derive(Debug)]
pub(crate) struct Envelope {
    pub(crate) tag: Tag,
    pub(crate) letter: Letter,
}

/// A collective that was started and not yet waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Open {
    pub(super) kind: &'static str,
    pub(super) sequence: u64,
    pub(super) tag: Tag,
    pub(super) since: Instant,
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
    /// All envelopes, or some and one among them of another collective.
    Envelopes(Vec<(Key, Envelope)>),
    /// The deadline passed without the letters of these ranks.
    Late(Vec<usize>),
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
    pub(super) asleep: Option<Missing>,
    /// Collectives that the rank has started and not waited for.
    pub(super) open: Vec<Open>,
}

impl Content {
    /// Whether there is something to wake up for: all letters, or one of another collective.
    fn ready(&self, missing: &Missing) -> bool {
        let letter = |key| self.letters.get(key);
        let other = |key| letter(key).is_some_and(|envelope| envelope.tag != missing.tag);
        missing.keys.iter().all(|key| letter(key).is_some()) || missing.keys.iter().any(other)
    }

    /// Takes the letters among `keys` that are there.
    fn pick(&mut self, keys: &[Key]) -> Vec<(Key, Envelope)> {
        keys.iter()
            .filter_map(|key| Some((*key, self.letters.remove(key)?)))
            .collect()
    }

    /// The world ranks whose letters are not there.
    fn absent(&self, missing: &Missing) -> Vec<usize> {
        let absent = missing
            .keys
            .iter()
            .filter(|key| !self.letters.contains_key(key));
        absent.map(|&(_, from, _)| from).collect()
    }
}

impl World {
    /// Puts an envelope into the mailbox of `to`, in this process, and wakes it if that was the last one it sleeps for.
    pub(super) fn post(&self, to: usize, key: Key, envelope: Envelope) {
        let mailbox = &self.mailboxes[to];
        let mut content = lock(&mailbox.content);
        content.letters.insert(key, envelope);
        let wakes = content
            .asleep
            .as_ref()
            .is_some_and(|missing| content.ready(missing));
        drop(content);
        if wakes {
            mailbox.bell.notify_all();
        }
    }

    /// Blocks until all the missing envelopes are there, or one of another collective, and takes those that are there.
    ///
    /// What has arrived is taken even if the run has failed meanwhile, so that an error which all ranks find is found by all.
    pub(super) fn take(&self, rank: usize, missing: &Missing, until: Instant) -> Result<Taken> {
        {
            let mut content = lock(&self.mailboxes[rank].content);
            if content.ready(missing) {
                return Ok(Taken::Envelopes(content.pick(&missing.keys)));
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
            if content.ready(missing) {
                break Ok(Taken::Envelopes(content.pick(&missing.keys)));
            }
            if let Err(error) = self.check(rank) {
                break Err(error);
            }
            // A rank posts before it returns, and the mailbox is locked: what is not here now will never come.
            let absent = content.absent(missing);
            let gone = self.returned_among(&absent);
            if !gone.is_empty() {
                break Ok(Taken::Returned(gone));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Ok(Taken::Late(absent));
            }
            let woken = mailbox.bell.wait_timeout(content, left);
            content = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        content.asleep = None;
        taken
    }

    fn returned_among(&self, ranks: &[usize]) -> Vec<usize> {
        ranks
            .iter()
            .copied()
            .filter(|&rank| self.returned[rank].load(Ordering::SeqCst))
            .collect()
    }

    /// If every rank that has not returned sleeps, and no letter is there for any: the first of them, and who waits where.
    ///
    /// All mailboxes are locked together (by index, and nobody else holds two), so that this is one moment of the run. Then nobody is
    /// left to write a letter, and waiting for the deadline would change nothing. What ranks of other processes do is not known for any
    /// one moment.
    pub(super) fn all_asleep(&self) -> Option<(usize, Error)> {
        if self.away.is_some() {
            return None;
        }
        let all: Vec<_> = self
            .mailboxes
            .iter()
            .map(|mailbox| lock(&mailbox.content))
            .collect();
        let returned = |rank: usize| self.returned[rank].load(Ordering::SeqCst);
        let stuck = |(rank, content): (usize, &MutexGuard<'_, Content>)| {
            returned(rank)
                || content.asleep.as_ref().is_some_and(|missing| {
                    // A rank that waits for one that has returned finds that out itself, and says it better.
                    !content.ready(missing)
                        && self.returned_among(&content.absent(missing)).is_empty()
                })
        };
        if self.has_failed() || !all.iter().enumerate().all(stuck) {
            return None;
        }
        let first = (0..all.len()).find(|&rank| !returned(rank))?;
        let mut text =
            "expected the same collectives on all ranks, found every rank waiting:".to_owned();
        for (rank, content) in all.iter().enumerate() {
            match content.asleep.as_ref().filter(|_| !returned(rank)) {
                None => _ = write!(text, "\n   rank {rank} has returned"),
                Some(missing) => {
                    let kind = missing.keys.first().map_or("", |key| key.0);
                    let ranks = list(&content.absent(missing));
                    let _ = write!(
                        text,
                        "\n   rank {rank} in {} of the {kind} group, for {ranks}",
                        missing.tag
                    );
                }
            }
        }
        Some((first, Error::new(codes::MISMATCH, text)))
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
