//! The verbs of a forward on one rank.

use candle_core::Tensor;

use super::memo::{Memo, Remembered};
use super::pieces::{joined, packed, runs, unpacked};
use super::{Kept, Place};
use crate::attention::{self, Output};
use crate::comm::{Pending, Tag};
use crate::error::Result;
use crate::schedule::timeline::timed;
use crate::schedule::{Check, Direction, Forward, Verb};

/// One run of a site's forward, or of its replay: q, k, v are this rank's sequence shards [b, heads, len, d], detached.
pub(crate) struct RankForward<'a> {
    place: &'a Place,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    direction: Direction,
    check: Check,
    groups: Vec<Group>,
    out: Option<Tensor>,
}

/// What a run leaves.
pub(super) struct Ran {
    /// The output [b, H, len, dv].
    pub(super) out: Tensor,
    /// What the backward needs of each group.
    pub(super) kept: Vec<Kept>,
    /// The keys and values that came with each group.
    pub(super) kv: Vec<Option<(Tensor, Tensor)>>,
}

/// What is known of a group.
#[derive(Default)]
struct Group {
    coming: Option<Pending>,
    /// The kv heads that come with this group, and their keys and values [b, kv heads, S, d] once they have landed.
    brings: Vec<usize>,
    kv: Option<(Tensor, Tensor)>,
    q: Option<Tensor>,
    /// In a replay, what the forward has kept.
    memo: Option<Remembered>,
    kept: Option<Kept>,
    going: Option<Pending>,
}

impl Group {
    /// The result of the group's attention, once there is one.
    fn output(&self) -> Option<&Output> {
        let computed = self.kept.as_ref().map(|kept| &kept.output);
        computed.or(self.memo.as_ref().map(|memo| &memo.output))
    }
}

impl<'a> RankForward<'a> {
    pub(super) fn new(place: &'a Place, q: Tensor, k: Tensor, v: Tensor) -> Self {
        Self::begin(place, Direction::Forward, [q, k, v])
    }

    /// A replay with what a forward has kept.
    ///
    /// # Errors
    /// AS0351 if it was the forward of another site.
    pub(super) fn replay(place: &'a Place, qkv: [Tensor; 3], memo: &Memo) -> Result<Self> {
        let mut run = Self::begin(place, Direction::Replay, qkv);
        memo.expect(place.site.name, run.groups.len())?;
        for (group, memo) in run.groups.iter_mut().zip(&memo.groups) {
            group.memo = Some(memo.clone());
        }
        Ok(run)
    }

    fn begin(place: &'a Place, direction: Direction, [q, k, v]: [Tensor; 3]) -> Self {
        let check = Check::new(place.site.name, direction, &place.plan.needs());
        let groups = (0..check.groups()).map(|_| Group::default()).collect();
        Self {
            place,
            q,
            k,
            v,
            direction,
            check,
            groups,
            out: None,
        }
    }

    pub(super) fn finish(mut self) -> Result<Ran> {
        self.check.end()?;
        let absent = || missing(self.place.site.name);
        for g in 0..self.groups.len() {
            // A forward has put this together when it attended; a replay has not attended.
            if self.groups[g].kept.is_none() {
                let (k, v) = self.kv_of(g)?;
                let group = &mut self.groups[g];
                let q = group.q.take().ok_or_else(absent)?;
                let output = group.output().cloned().ok_or_else(absent)?;
                group.kept = Some(Kept { q, k, v, output });
            }
        }
        let out = self.out.take().ok_or_else(absent)?;
        let (kept, kv): (Vec<_>, Vec<_>) = self
            .groups
            .into_iter()
            .map(|group| (group.kept, group.kv))
            .unzip();
        let kept = kept.into_iter().flatten().collect();
        Ok(Ran { out, kept, kv })
    }

    /// The queries, keys and values of group `g` that the forward has kept.
    fn remembered(&self, g: usize) -> Option<(Tensor, Option<(Tensor, Tensor)>)> {
        self.groups[g].memo.as_ref()?.qkv.clone()
    }

    fn tag(&self, first: &'static str, again: &'static str, g: usize) -> Tag {
        let direction = match self.direction {
            Direction::Replay => again,
            Direction::Forward | Direction::Backward => first,
        };
        self.place.tag(direction, g)
    }

    fn send(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Send, g)?;
        let Place { plan, .. } = self.place;
        let brings = self.check.brings(g);
        self.groups[g].brings.clone_from(&brings);
        if plan.ranks() == 1 || self.remembered(g).is_some() {
            return Ok(());
        }
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.transpose(0, 1));
        let (q, k, v) = (q?, k?, v?);
        let mut parts = Vec::with_capacity(plan.ranks());
        for peer in 0..plan.ranks() {
            let kv: Vec<usize> = brings.iter().map(|&at| plan.kv_held(peer)[at]).collect();
            let mut part = runs(&q, 0, plan.q_heads(peer, g))?;
            part.extend(runs(&k, 0, &kv)?);
            part.extend(runs(&v, 0, &kv)?);
            parts.push(Some(packed(&part)?));
        }
        let tag = self.tag("qkv", "qkv_again", g);
        self.groups[g].coming = Some(self.place.engine().start(tag, parts)?);
        Ok(())
    }

    fn wait(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Wait, g)?;
        let Place {
            plan,
            shard,
            widths: (d, dv),
            ..
        } = self.place;
        let remembered = self.remembered(g);
        let group = &mut self.groups[g];
        if let Some((q, kv)) = remembered {
            (group.q, group.kv) = (Some(q), kv);
            return Ok(());
        }
        let Some(coming) = group.coming.take() else {
            // One rank: its shard is the whole sequence, viewed as it is.
            group.q = Some(self.q.clone());
            group.kv = Some((self.k.clone(), self.v.clone()));
            return Ok(());
        };
        let heads = plan.locals(g).len();
        let sizes = [
            (heads, *d),
            (group.brings.len(), *d),
            (group.brings.len(), *dv),
        ];
        let batch = self.q.dim(0)?;
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for part in received(self.place, coming)? {
            let mut part = unpacked(&part, batch, shard.len, &sizes)?.into_iter();
            q.extend(part.next());
            k.extend(part.next());
            v.extend(part.next());
        }
        let whole = |parts: &[Tensor]| -> Result<Tensor> { Ok(joined(parts, 2)?.transpose(0, 1)?) };
        group.q = Some(whole(&q)?);
        if !group.brings.is_empty() {
            group.kv = Some((whole(&k)?, whole(&v)?));
        }
        Ok(())
    }

    /// Keys and values of group `g`, [b, kv heads, S, d]: as they landed if they came with this group or are a single head.
    fn kv_of(&self, g: usize) -> Result<(Tensor, Tensor)> {
        let needs = self.place.plan.kv_of_group(g);
        if let Some((k, v)) = self.groups[g]
            .kv
            .as_ref()
            .filter(|_| self.groups[g].brings == needs)
        {
            return Ok((k.clone(), v.clone()));
        }
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in needs {
            for Group { brings, kv, .. } in &self.groups {
                if let (Some(at), Some((k, v))) = (brings.iter().position(|&kv| kv == head), kv) {
                    keys.push(k.narrow(1, at, 1)?);
                    values.push(v.narrow(1, at, 1)?);
                }
            }
        }
        Ok((side_by_side(keys)?, side_by_side(values)?))
    }

    fn compute(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Attend, g)?;
        let q = self.groups[g]
            .q
            .take()
            .ok_or_else(|| missing(self.place.site.name))?;
        let (k, v) = self.kv_of(g)?;
        self.place.scope.sp().ledger().attended();
        let output = attention::forward(self.place.kernel, &self.place.group_spec(g), &q, &k, &v)?;
        self.groups[g].kept = Some(Kept { q, k, v, output });
        Ok(())
    }

    fn give_back(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Return, g)?;
        let Place { plan, shard, .. } = self.place;
        if plan.ranks() == 1 {
            return Ok(());
        }
        let tag = self.tag("out", "out_again", g);
        let group = &mut self.groups[g];
        let output = group
            .output()
            .ok_or_else(|| missing(self.place.site.name))?;
        let parts = (0..plan.ranks())
            .map(|peer| Ok(Some(output.o.narrow(2, peer * shard.len, shard.len)?)))
            .collect::<Result<Vec<_>>>()?;
        group.going = Some(self.place.engine().start(tag, parts)?);
        Ok(())
    }

    fn gather(&mut self) -> Result<()> {
        self.check.step(Verb::Finish, 0)?;
        if self.place.plan.ranks() == 1 {
            let output = self.groups[0]
                .output()
                .ok_or_else(|| missing(self.place.site.name))?;
            self.out = Some(match self.direction {
                // The memo stays whole: another backward may come.
                Direction::Replay => output.o.force_contiguous()?,
                Direction::Forward | Direction::Backward => output.o.clone(),
            });
            return Ok(());
        }
        let mut parts = Vec::new();
        for group in &mut self.groups {
            let going = group
                .going
                .take()
                .ok_or_else(|| missing(self.place.site.name))?;
            parts.push(received(self.place, going)?);
        }
        self.out = Some(by_head(self.place, &parts)?);
        Ok(())
    }

    fn timed(
        &mut self,
        verb: Verb,
        g: usize,
        run: impl FnOnce(&mut Self) -> Result<()>,
    ) -> candle_core::Result<()> {
        let (rank, site) = (self.place.scope.sp().rank(), self.place.site.name);
        let name = verb.name(self.direction);
        Ok(timed(rank, site, name, g, || run(self))?)
    }
}

impl Forward for RankForward<'_> {
    fn groups(&self) -> usize {
        self.check.groups()
    }
    fn send_qkv(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Send, g, |io| io.send(g))
    }
    fn wait_qkv(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Wait, g, |io| io.wait(g))
    }
    fn attend(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Attend, g, |io| io.compute(g))
    }
    fn send_out(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Return, g, |io| io.give_back(g))
    }
    fn wait_out(&mut self) -> candle_core::Result<()> {
        self.timed(Verb::Finish, 0, Self::gather)
    }
}

/// The state that [`Check`] vouches for is not there: only a bug of the runtime gets here.
pub(super) fn missing(site: &str) -> crate::Error {
    crate::Error::new(
        autosp_plan::codes::SCHEDULE,
        format!("schedule of `{site}`: a tensor is used that has not landed"),
    )
}

/// Waits for an exchange in which every rank sends something.
pub(super) fn received(place: &Place, pending: Pending) -> Result<Vec<Tensor>> {
    let parts = place.engine().wait(pending)?;
    parts
        .into_iter()
        .map(|part| part.ok_or_else(|| missing(place.site.name)))
        .collect()
}

/// Heads along dim 1; a single one as it is.
fn side_by_side(mut heads: Vec<Tensor>) -> Result<Tensor> {
    if heads.len() == 1 {
        return Ok(heads.swap_remove(0));
    }
    joined(&heads, 1)
}

/// [b, H, len, d] in the model's order of heads, from what each rank sent for its heads of each group (`parts[group][rank]`).
pub(super) fn by_head(place: &Place, parts: &[Vec<Tensor>]) -> Result<Tensor> {
    let plan = &place.plan;
    let mut source = vec![(0, 0, 0); plan.heads()];
    for (g, ranks) in parts.iter().enumerate() {
        for rank in 0..ranks.len() {
            for (at, &head) in plan.q_heads(rank, g).iter().enumerate() {
                source[head] = (g, rank, at);
            }
        }
    }
    let mut views = Vec::new();
    let mut first = 0;
    while first < source.len() {
        let (g, rank, at) = source[first];
        let mut end = first + 1;
        while end < source.len() && source[end] == (g, rank, at + end - first) {
            end += 1;
        }
        views.push(parts[g][rank].narrow(1, at, end - first)?);
        first = end;
    }
    joined(&views, 1)
}
