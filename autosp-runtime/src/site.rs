//! Running a site: heads are planned, the emitted schedule is executed on this rank's shards, and one operation is recorded.

mod backward;
mod forward;
mod heads;
mod memo;
mod pieces;
mod recorded;

pub use heads::{HeadPlan, exchange_bytes};
pub(crate) use memo::{Memo, bytes};

use std::any::TypeId;
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;

use crate::attention::{Kernel, Output, Spec};
use crate::comm::{Engine, Tag};
use crate::error::Result;
use crate::layout::Layout;
use crate::schedule::{HeadMap, Recorder, Site};
use crate::scope::{Scope, Shard};
pub(crate) use recorded::run;

/// A site without its type: what the compiler found, and its schedule for this rank.
#[derive(Clone, Copy)]
pub(crate) struct SiteRef {
    pub(crate) name: &'static str,
    pub(crate) layout: Layout,
    pub(crate) heads: HeadMap,
    check: fn(&[Vec<usize>]) -> Result<()>,
    forward: fn(&mut forward::RankForward<'_>) -> candle_core::Result<()>,
    replay: fn(&mut forward::RankForward<'_>) -> candle_core::Result<()>,
    backward: fn(&mut backward::RankBackward<'_>) -> candle_core::Result<()>,
}

impl SiteRef {
    pub(crate) fn new<S: Site>() -> Self {
        Self {
            name: S::NAME,
            layout: S::LAYOUT,
            heads: S::HEADS,
            check: check::<S>,
            forward: |io| S::forward(io),
            replay: |io| S::replay(io),
            backward: |io| S::backward(io),
        }
    }
}

impl std::fmt::Debug for SiteRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Site")
            .field("name", &self.name)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

/// Schedules that were checked: of a site, for the kv heads that its groups use.
type Known = HashSet<(TypeId, Vec<Vec<usize>>)>;

/// Runs a schedule on the recorder, once in a process for each site and division into groups.
fn check<S: Site>(needs: &[Vec<usize>]) -> Result<()> {
    static CHECKED: Mutex<Option<Known>> = Mutex::new(None);
    let key = (TypeId::of::<S>(), needs.to_vec());
    let known = |set: &mut Option<Known>| set.get_or_insert_with(HashSet::new).contains(&key);
    if known(&mut CHECKED.lock().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(());
    }
    Recorder::forward::<S>(needs)?;
    Recorder::replay::<S>(needs)?;
    Recorder::backward::<S>(needs)?;
    CHECKED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert_with(HashSet::new)
        .insert(key);
    Ok(())
}

/// What forward and backward of one run of a site share.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) site: SiteRef,
    pub(crate) scope: Scope,
    pub(crate) shard: Shard,
    plan: HeadPlan,
    kernel: Kernel,
    /// Scale, cap and masks, for the heads of the whole model; each group takes its own.
    spec: Spec,
    /// Width of keys and values.
    widths: (usize, usize),
}

impl Place {
    fn engine(&self) -> &dyn Engine {
        self.scope.sp().sp_group()
    }

    fn rank(&self) -> usize {
        self.shard.rank
    }

    fn tag(&self, direction: &'static str, group: usize) -> Tag {
        Tag {
            name: self.site.name,
            direction,
            group,
            step: self.scope.step(),
            exchange: true,
        }
    }

    /// The problem of group `g` on this rank.
    fn group_spec(&self, g: usize) -> Spec {
        let kv = self.plan.kv_of_group(g);
        let kv_of = self.plan.locals(g).map(|l| {
            kv.iter()
                .position(|&at| at == self.plan.kv_of_local(l))
                .unwrap_or(0)
        });
        Spec {
            kv_of: kv_of.collect(),
            heads: self.plan.q_heads(self.rank(), g).to_vec(),
            ..self.spec.clone()
        }
    }
}

/// What a group keeps from its forward, in head layout [b, heads, S, d].
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Output,
}

impl Kept {
    /// All tensors, and whether each came with the exchange.
    fn tensors(&self) -> impl Iterator<Item = (&Tensor, bool)> {
        let Output { o, lse, rest } = &self.output;
        let landed = [&self.q, &self.k, &self.v].map(|x| (x, true));
        landed.into_iter().chain([o, lse, rest].map(|x| (x, false)))
    }
}

#[cfg(test)]
mod tests;
