//! The `local` engine: ranks are threads of one process, and a part is handed over by reference. With a [`World`] of several processes
//! it is the engine of those, whose letters go over [TCP](super::process).
//!
//! Each rank has one mailbox. `start` puts an envelope with the tag into the mailbox of every peer, also where there is no part, so
//! that every rank can compare what every other does. `wait` sleeps on the own mailbox until all envelopes are there.
//!
//! Four things end a wait otherwise, at once or in time, so that a run never hangs: another rank failed; a rank that is waited for
//! has returned; all ranks wait and none can go on (known among threads only); the deadline, which runs from the start of the collective. Each is a fault of the [`World`], which wakes everybody.

mod away;
mod mail;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use autosp_plan::codes;
#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::Tensor;

pub(crate) use mail::{Envelope, list};
use mail::{Missing, Taken};
pub(crate) use world::{Fault, World, lock};

use super::ring::short;
use super::{Engine, Pending, Tag};
use crate::{Error, Ledger, Result};

/// What one rank hands to another in one collective.
#[derive(Debug, Default)]
pub(crate) enum Letter {
    /// Nothing but the tag.
    #[default]
    Empty,
    /// A tensor, by reference.
    Part(Tensor),
    /// A tensor that comes another way: from one GPU to another.
    #[cfg(feature = "cuda")]
    Announced(Vec<usize>, DType),
}

/// A group of ranks.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// `sp`, `dp` or `world`, for messages.
    pub(crate) kind: &'static str,
    /// World ranks, in the group's order.
    pub(crate) members: Vec<usize>,
}

/// A rank's handle on one group of threads.
pub(crate) struct LocalEngine {
    world: Arc<World>,
    group: Group,
    world_rank: usize,
    rank: usize,
    ledger: Arc<Ledger>,
    next: AtomicU64,
}

impl LocalEngine {
    /// The handle of the member `rank` of `group`.
    pub(crate) fn new(world: Arc<World>, group: Group, rank: usize, ledger: Arc<Ledger>) -> Self {
        Self {
            world,
            world_rank: group.members[rank],
            group,
            rank,
            ledger,
            next: AtomicU64::new(0),
        }
    }

    fn peers(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.group
            .members
            .iter()
            .copied()
            .enumerate()
            .filter(|&(place, _)| place != self.rank)
    }

    /// # Errors
    /// AS0406 unless there is one part for each rank.
    pub(super) fn expect_parts(&self, tag: Tag, found: usize) -> Result<()> {
        if found == self.group.members.len() {
            return Ok(());
        }
        let text = format!(
            "{tag}: expected one part for each of {} ranks, found {found}",
            self.group.members.len(),
        );
        Err(Error::new(codes::COLLECTIVE_ARGUMENT, text))
    }

    /// Starts a collective: posts a letter to every peer; what is for this rank itself stays behind. Never blocks.
    pub(super) fn send(&self, tag: Tag, mut letters: Vec<Letter>) -> Result<u64> {
        self.world.check(self.world_rank)?;
        let sequence = self.next.fetch_add(1, Ordering::Relaxed);
        if letters.len() > 1 {
            self.world
                .started(self.world_rank, self.group.kind, sequence, tag);
        }
        for (place, rank) in self.peers() {
            let letter = std::mem::take(&mut letters[place]);
            let bytes = match &letter {
                Letter::Empty => 0,
                Letter::Part(part) => part.elem_count() * part.dtype().size_in_bytes(),
                #[cfg(feature = "cuda")]
                Letter::Announced(dims, dtype) => {
                    dims.iter().product::<usize>() * dtype.size_in_bytes()
                }
            };
            if !matches!(letter, Letter::Empty) {
                self.ledger.count(bytes as u64, tag.exchange);
            }
            let key = (self.group.kind, self.world_rank, sequence);
            self.world.deliver(rank, key, Envelope { tag, letter });
        }
        Ok(sequence)
    }

    /// Blocks until the letters of all peers have arrived: entry `p` is what rank `p` sent, `Empty` for this rank.
    pub(super) fn receive(&self, tag: Tag, sequence: u64) -> Result<Vec<Letter>> {
        let size = self.group.members.len();
        let mut arrived: Vec<Letter> = (0..size).map(|_| Letter::Empty).collect();
        if size == 1 {
            return Ok(arrived);
        }
        let kind = self.group.kind;
        let keys = self
            .peers()
            .map(|(_, rank)| (kind, rank, sequence))
            .collect();
        let since = self.world.waits(self.world_rank, kind, sequence);
        let deadline = self.world.deadline(self.world_rank);
        let letters =
            match self
                .world
                .take(self.world_rank, &Missing { tag, keys }, since + deadline)?
            {
                Taken::Envelopes(letters) => letters,
                Taken::Late(ranks) => {
                    return Err(self.fault(self.late(tag, sequence, deadline, &ranks)));
                }
                Taken::Returned(ranks) => return Err(self.fault(self.returned(tag, &ranks))),
                Taken::Stuck(error) => return Err(self.fault(error)),
            };
        if let Some(((_, rank, _), other)) = letters.iter().find(|(_, letter)| letter.tag != tag) {
            return Err(self.fault(self.mismatch(tag, *rank, other.tag, sequence)));
        }
        for ((_, from, _), envelope) in letters {
            if let Some((place, _)) = self.peers().find(|&(_, rank)| rank == from) {
                arrived[place] = envelope.letter;
            }
        }
        Ok(arrived)
    }

    /// Notes that everything of a collective has arrived.
    pub(super) fn completed(&self, sequence: u64) {
        if self.group.members.len() > 1 {
            self.world
                .completed(self.world_rank, self.group.kind, sequence);
        }
    }

    /// A fault that this rank found: it ends the run.
    pub(super) fn fault(&self, error: Error) -> Error {
        let copy = error.copy();
        self.world.raise(self.world_rank, error);
        copy
    }

    fn mismatch(&self, own: Tag, rank: usize, other: Tag, sequence: u64) -> Error {
        let Group { kind, members } = &self.group;
        Error::new(
            codes::MISMATCH,
            format!(
                "expected the same collective on all ranks of the {kind} group ({}), found {own} on rank {} and {other} on rank {rank} \
                 (collective #{sequence} of the group)",
                list(members),
                self.world_rank,
            ),
        )
    }

    fn returned(&self, tag: Tag, ranks: &[usize]) -> Error {
        let text = format!(
            "rank {} waits in {tag} for {}, which has returned",
            self.world_rank,
            list(ranks)
        );
        Error::new(codes::RANK_RETURNED, text)
            .with_help("run the same number of steps on every rank")
    }

    fn late(&self, tag: Tag, sequence: u64, deadline: Duration, missing: &[usize]) -> Error {
        let concerned = [missing, &[self.world_rank]].concat();
        let Group { kind, members } = &self.group;
        Error::new(
            codes::DEADLINE,
            format!(
                "rank {} waited {} in {tag}, collective #{sequence} of the {kind} group ({}); missing: {}\n  the last collectives were:{}",
                self.world_rank,
                short(deadline),
                list(members),
                list(missing),
                self.world.history(&concerned),
            ),
        )
        .with_help("AUTOSP_DEADLINE=600 if the ranks only need longer")
    }
}

impl Engine for LocalEngine {
    fn rank(&self) -> usize {
        self.rank
    }

    fn members(&self) -> &[usize] {
        &self.group.members
    }

    fn world_rank(&self) -> usize {
        self.world_rank
    }

    fn start(&self, tag: Tag, mut parts: Vec<Option<Tensor>>) -> Result<Pending> {
        self.expect_parts(tag, parts.len())?;
        let own = parts[self.rank].take();
        let letters = parts.into_iter().map(|part| match part {
            Some(part) => Ok(Letter::Part(given(part)?)),
            None => Ok(Letter::Empty),
        });
        let sequence = self.send(tag, letters.collect::<Result<_>>()?)?;
        Ok(Pending { tag, sequence, own })
    }

    fn wait(&self, pending: Pending) -> Result<Vec<Option<Tensor>>> {
        let Pending { tag, sequence, own } = pending;
        let mut arrived: Vec<Option<Tensor>> = vec![None; self.size()];
        for (place, letter) in self.receive(tag, sequence)?.into_iter().enumerate() {
            if let Letter::Part(part) = letter {
                arrived[place] = Some(part);
            }
        }
        arrived[self.rank] = own;
        self.completed(sequence);
        Ok(arrived)
    }
}

/// A part as it is handed over: detached, contiguous, and a copy if it is a variable.
pub(super) fn given(part: Tensor) -> Result<Tensor> {
    let part = if part.is_variable() {
        part.copy()?
    } else {
        part
    };
    #[cfg(feature = "cuda")]
    if part.device().is_cuda() {
        return crate::cuda::ops::contiguous(&part);
    }
    Ok(part.detach().contiguous()?)
}

#[cfg(test)]
mod tests;
