//! The verbs of a backward on one rank.

use candle_core::Tensor;

use super::forward::{by_head, missing, received};
use super::pieces::{joined, packed, runs, unpacked};
use super::{Kept, Place};
use crate::attention::{self, Output};
use crate::comm::Pending;
use crate::error::Result;
use crate::schedule::timeline::timed;
use crate::schedule::{Backward, Check, Direction, Verb};

/// One run of a site's backward: the output's gradient is this rank's sequence shard [b, H, len, dv], detached.
pub(crate) struct RankBackward<'a> {
    place: &'a Place,
    kept: &'a [Kept],
    /// The output where the forward did not keep it, on a single rank.
    output: &'a Tensor,
    grad: Tensor,
    check: Check,
    groups: Vec<Group>,
    /// Gradients [b, 1, S, d] of the kv heads that this rank holds, summed over the groups so far.
    kv: Vec<Option<(Tensor, Tensor)>>,
    done: Option<[Tensor; 3]>,
}

#[derive(Default)]
struct Group {
    coming: Option<Pending>,
    grad: Option<Tensor>,
    dq: Option<Tensor>,
    /// The kv heads whose gradients travel with this group.
    completes: Vec<usize>,
    going: Option<Pending>,
}

impl<'a> RankBackward<'a> {
    pub(super) fn new(
        place: &'a Place,
        kept: &'a [Kept],
        output: &'a Tensor,
        grad: Tensor,
    ) -> Self {
        let check = Check::new(place.site.name, Direction::Backward, &place.plan.needs());
        let groups = (0..check.groups()).map(|_| Group::default()).collect();
        let kv = vec![None; place.plan.kv_held(0).len()];
        Self {
            place,
            kept,
            output,
            grad,
            check,
            groups,
            kv,
            done: None,
        }
    }

    /// dQ [b, H, len, d], dK [b, G, len, d] and dV [b, G, len, dv] of this rank's shard.
    pub(super) fn finish(self) -> Result<[Tensor; 3]> {
        self.check.end()?;
        self.done.ok_or_else(|| missing(self.place.site.name))
    }

    fn send(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Send, g)?;
        let plan = &self.place.plan;
        if plan.ranks() == 1 {
            return Ok(());
        }
        let mut parts = Vec::with_capacity(plan.ranks());
        for peer in 0..plan.ranks() {
            parts.push(Some(joined(
                &runs(&self.grad, 1, plan.q_heads(peer, g))?,
                1,
            )?));
        }
        self.groups[g].coming = Some(
            self.place
                .engine()
                .start(self.place.tag("grad_out", g), parts)?,
        );
        Ok(())
    }

    fn wait(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Wait, g)?;
        let group = &mut self.groups[g];
        group.grad = Some(match group.coming.take() {
            Some(coming) => joined(&received(self.place, coming)?, 2)?,
            None => self.grad.clone(),
        });
        Ok(())
    }

    fn compute(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Attend, g)?;
        let Place { plan, kernel, .. } = self.place;
        let group = &mut self.groups[g];
        let grad = group
            .grad
            .take()
            .ok_or_else(|| missing(self.place.site.name))?;
        let Kept { q, k, v, output } = &self.kept[g];
        let on_one_rank = Output {
            o: self.output.clone(),
            ..output.clone()
        };
        let output = if plan.ranks() == 1 {
            &on_one_rank
        } else {
            output
        };
        let gradients =
            attention::backward(*kernel, &self.place.group_spec(g), (q, k, v), output, &grad)?;
        group.dq = Some(gradients.q);
        if plan.ranks() == 1 {
            // One group, in the model's order of heads: nothing to sum or to put together.
            self.kv[0] = Some((gradients.k, gradients.v));
            return Ok(());
        }
        for (at, kv) in plan.kv_of_group(g).into_iter().enumerate() {
            let (k, v) = (gradients.k.narrow(1, at, 1)?, gradients.v.narrow(1, at, 1)?);
            self.kv[kv] = Some(match self.kv[kv].take() {
                Some((sum_k, sum_v)) => ((sum_k + k)?, (sum_v + v)?),
                None => (k, v),
            });
        }
        Ok(())
    }

    fn give_back(&mut self, g: usize) -> Result<()> {
        self.check.step(Verb::Return, g)?;
        let Place { plan, shard, .. } = self.place;
        if plan.ranks() == 1 {
            return Ok(());
        }
        let completes = self.check.completes(g);
        let group = &mut self.groups[g];
        let mut grads = vec![
            group
                .dq
                .take()
                .ok_or_else(|| missing(self.place.site.name))?,
        ];
        let sums = completes.iter().map(|&kv| {
            self.kv[kv]
                .take()
                .ok_or_else(|| missing(self.place.site.name))
        });
        let (k, v): (Vec<_>, Vec<_>) = sums.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        grads.extend(k);
        grads.extend(v);
        group.completes = completes;
        let mut parts = Vec::with_capacity(plan.ranks());
        for peer in 0..plan.ranks() {
            let rows = grads
                .iter()
                .map(|x| x.narrow(2, peer * shard.len, shard.len)?.transpose(0, 1))
                .collect::<candle_core::Result<Vec<_>>>()?;
            parts.push(Some(packed(&rows)?));
        }
        group.going = Some(
            self.place
                .engine()
                .start(self.place.tag("grad_qkv", g), parts)?,
        );
        Ok(())
    }

    fn gather(&mut self) -> Result<()> {
        self.check.step(Verb::Finish, 0)?;
        let Place {
            plan,
            shard,
            widths: (d, dv),
            site,
            ..
        } = self.place;
        if plan.ranks() == 1 {
            let dq = self.groups[0].dq.take().ok_or_else(|| missing(site.name))?;
            let (dk, dv) = self.kv[0].take().ok_or_else(|| missing(site.name))?;
            self.done = Some([dq, dk, dv]);
            return Ok(());
        }
        let batch = self.grad.dim(0)?;
        let mut dq = Vec::new();
        // What each rank computed for each kv head of the model, in the order of the ranks.
        let mut dk = vec![Vec::new(); plan.kv_heads()];
        let mut dvalue = vec![Vec::new(); plan.kv_heads()];
        for (g, group) in self.groups.iter_mut().enumerate() {
            let going = group.going.take().ok_or_else(|| missing(site.name))?;
            let heads = group.completes.len();
            let sizes = [(plan.locals(g).len(), *d), (heads, *d), (heads, *dv)];
            let mut of_ranks = Vec::new();
            for (rank, part) in received(self.place, going)?.iter().enumerate() {
                let part = unpacked(part, batch, shard.len, &sizes)?;
                let [q, k, v] = [0, 1, 2].map(|at| part[at].transpose(0, 1));
                let (k, v) = (k?, v?);
                of_ranks.push(q?);
                for (at, &kv) in group.completes.iter().enumerate() {
                    let head = plan.kv_held(rank)[kv];
                    dk[head].push((rank, k.narrow(1, at, 1)?));
                    dvalue[head].push((rank, v.narrow(1, at, 1)?));
                }
            }
            dq.push(of_ranks);
        }
        self.done = Some([by_head(self.place, &dq)?, summed(dk)?, summed(dvalue)?]);
        Ok(())
    }

    fn timed(
        &mut self,
        verb: Verb,
        g: usize,
        run: impl FnOnce(&mut Self) -> Result<()>,
    ) -> candle_core::Result<()> {
        let (rank, site) = (self.place.scope.sp().rank(), self.place.site.name);
        Ok(timed(
            rank,
            site,
            verb.name(Direction::Backward),
            g,
            || run(self),
        )?)
    }
}

/// [b, G, len, d]: each kv head summed over the ranks that hold it, in their order.
fn summed(heads: Vec<Vec<(usize, Tensor)>>) -> Result<Tensor> {
    let mut sums = Vec::with_capacity(heads.len());
    for mut parts in heads {
        parts.sort_by_key(|(rank, _)| *rank);
        let mut sum: Option<Tensor> = None;
        for (_, part) in parts {
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        sums.extend(sum);
    }
    joined(&sums, 1)
}

impl Backward for RankBackward<'_> {
    fn groups(&self) -> usize {
        self.check.groups()
    }
    fn send_grad_out(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Send, g, |io| io.send(g))
    }
    fn wait_grad_out(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Wait, g, |io| io.wait(g))
    }
    fn attend_backward(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Attend, g, |io| io.compute(g))
    }
    fn send_grad_qkv(&mut self, g: usize) -> candle_core::Result<()> {
        self.timed(Verb::Return, g, |io| io.give_back(g))
    }
    fn wait_grad_qkv(&mut self) -> candle_core::Result<()> {
        self.timed(Verb::Finish, 0, Self::gather)
    }
}
