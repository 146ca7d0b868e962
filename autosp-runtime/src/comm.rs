//! Collectives: what ranks say to each other.
//!
//! An [`Engine`] is one rank's handle on one group of ranks. It knows a single primitive, an all-to-all split into
//! [`start`](Engine::start), which never blocks, and [`wait`](Engine::wait); whatever runs between the two overlaps the exchange.
//! Everything else ([`all_gather`], [`all_reduce_sum`], ..) is built on that primitive, once for all engines.
//!
//! Every collective carries a [`Tag`], which ranks compare: a rank that takes another way through the program is found at the first
//! collective where the ways part, and the error names both ranks and both collectives.

mod collectives;
mod local;
#[cfg(feature = "cuda")]
mod nccl;
pub(crate) mod process;
mod ring;
#[cfg(test)]
pub(crate) mod testing;

use std::fmt;

use candle_core::Tensor;

pub use collectives::{
    all_gather, all_reduce_sum, all_to_all, barrier, broadcast, chunk, reduce_scatter,
    reduce_scatter_as,
};
pub(crate) use local::{Fault, Group, LocalEngine, World, list};
#[cfg(feature = "cuda")]
pub(crate) use nccl::{NcclEngine, connect};

use crate::Result;

/// What a collective is for. Ranks compare all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "callers write it as a literal")]
pub struct Tag {
    /// The site or the purpose, such as `llama::Attention::forward` or `gradients`.
    pub name: &'static str,
    /// What travels: `qkv`, `out`, `grad_out`, `grad_qkv`, `sum`, ..
    pub direction: &'static str,
    /// The head group, 0 where there is none.
    pub group: usize,
    /// The step of the scope, 0 outside of one.
    pub step: u64,
    /// Whether the bytes are the exchange of a site, which the plan's formula predicts.
    pub exchange: bool,
}

impl Tag {
    /// The tag of a collective that belongs to no site.
    pub const fn new(name: &'static str, direction: &'static str) -> Self {
        Self {
            name,
            direction,
            group: 0,
            step: 0,
            exchange: false,
        }
    }

    /// The same collective at step `step`.
    #[must_use]
    pub const fn at(self, step: u64) -> Self {
        Self { step, ..self }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.name, self.direction)?;
        if self.exchange {
            write!(f, " (head group {}, step {})", self.group, self.step)
        } else {
            write!(f, " (step {})", self.step)
        }
    }
}

/// A collective that was started and not yet waited for.
#[derive(Debug)]
#[must_use = "a collective that is started must be waited for, by every rank"]
pub struct Pending {
    /// What it is.
    pub(crate) tag: Tag,
    /// Its place in the order of the group's collectives, from 0.
    pub(crate) sequence: u64,
    /// What this rank keeps for itself.
    pub(crate) own: Option<Tensor>,
}

impl Pending {
    /// What the collective is for.
    pub fn tag(&self) -> Tag {
        self.tag
    }
}

/// One rank's handle on one group of ranks.
///
/// All ranks of the group start the same collectives in the same order. They may wait for them in any order, and start further
/// ones before they wait. Only the thread of the rank uses its handle.
pub trait Engine: Send + Sync {
    /// This rank's place in the group.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize {
        self.members().len()
    }

    /// The world ranks of the group, in the group's order.
    fn members(&self) -> &[usize];

    /// This rank's place in the world.
    fn world_rank(&self) -> usize;

    /// Starts an all-to-all; never waits for data. `parts[p]` goes to rank `p` of the group, `None` is nothing for `p`. The own part is handed
    /// back by [`wait`](Self::wait) as it is.
    ///
    /// Parts are detached and made contiguous. On threads they are handed over without a copy, so that neither side may write to their
    /// storage afterwards; a variable, which is made to be written to, is copied, but not a view of one.
    ///
    /// # Errors
    /// AS0406 if `parts` has not one entry a rank; AS0404 if the run has already failed.
    fn start(&self, tag: Tag, parts: Vec<Option<Tensor>>) -> Result<Pending>;

    /// Blocks until the parts of all ranks have arrived; entry `p` is what rank `p` sent here.
    ///
    /// # Errors
    /// AS0402 if ranks run different collectives, AS0403 after the deadline, AS0404 if another rank failed,
    /// AS0405 if a rank that is waited for has returned. Each of them ends the run.
    fn wait(&self, pending: Pending) -> Result<Vec<Option<Tensor>>>;
}

#[cfg(test)]
mod tests;
