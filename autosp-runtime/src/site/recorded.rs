//! One recorded operation for each run of a site.

use std::sync::{Mutex, PoisonError};

use autosp_plan::codes;
use autosp_plan::settings::Policy;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Shape, Storage, Tensor};

use super::backward::RankBackward;
use super::forward::{Ran, RankForward};
use super::{HeadPlan, Kept, Memo, Place, SiteRef};
use crate::attention::Spec;
use crate::error::{Error, Result};
use crate::memory::tape::{self, Turn};
use crate::ops::taken;
use crate::scope::{Scope, Shard};

/// Runs a site on this rank's shards q [b, H, len, d], k [b, G, len, d] and v [b, G, len, dv], and returns the output
/// [b, H, len, dv], with a gradient if one of the three has one. `spec` is that of the whole model's heads.
///
/// # Errors
/// `AS0321` if heads and ranks do not fit, `AS0323` for shapes, `AS0328` for a wrong schedule, an error of the collectives if the run fails.
pub(crate) fn run(
    site: SiteRef,
    scope: Scope,
    shard: Shard,
    spec: Spec,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
) -> Result<Tensor> {
    let (batch, heads, len, d) = q.dims4()?;
    let (_, kv_heads, _, dv) = v.dims4()?;
    let expected = (
        [batch, kv_heads, shard.len, d],
        [batch, kv_heads, shard.len, dv],
    );
    if len != shard.len || k.dims() != expected.0 || v.dims() != expected.1 {
        let text = format!(
            "`{}`: expected q [{batch}, {heads}, {}, {d}], k {:?} and v {:?}, found {:?}, {:?} and {:?}",
            site.name,
            shard.len,
            expected.0,
            expected.1,
            q.dims(),
            k.dims(),
            v.dims()
        );
        return Err(Error::new(codes::SITE_SHAPE, text));
    }
    let settings = scope.sp().settings();
    let plan = HeadPlan::new(
        site.name,
        site.heads,
        heads,
        kv_heads,
        shard.size,
        settings.groups(),
    )?;
    (site.check)(&plan.needs())?;
    let kernel = settings.attention();
    let place = Place {
        site,
        shard,
        plan,
        kernel,
        spec,
        widths: (d, dv),
        scope,
    };

    let turn = tape::turn()?;
    let inputs = [q.detach(), k.detach(), v.detach()];
    let Ran { out, mut kept, kv } = if let Turn::Replay(memo) = &turn {
        let mut io = RankForward::replay(&place, inputs, memo)?;
        (site.replay)(&mut io)?;
        io.finish()?
    } else {
        let [q, k, v] = inputs;
        let mut io = RankForward::new(&place, q, k, v);
        (site.forward)(&mut io)?;
        io.finish()?
    };
    if let Turn::Keep(policy) = turn {
        if matches!(policy, Policy::Qkv | Policy::Attention) {
            let groups = kept.into_iter().zip(kv);
            let groups = groups.map(|(kept, kv)| (kept.q, kv, kept.output));
            tape::keep(Memo::new(site.name, policy, place.plan.ranks(), groups)?);
        }
        return Ok(out);
    }
    if ![q, k, v].iter().any(|x| x.track_op()) {
        return Ok(out);
    }
    if place.plan.ranks() == 1 {
        // The output is the kept one: the graph holds it, and its memory becomes the operation's result.
        for kept in &mut kept {
            kept.output.o = Tensor::zeros(0, out.dtype(), out.device())?;
        }
    }
    let shape = out.shape().clone();
    let finished = Mutex::new(Some((taken(&out)?, shape)));
    Ok(q.apply_op3(
        k,
        v,
        Recorded {
            place,
            kept,
            finished,
        },
    )?)
}

/// The operation q, k, v -> O: its forward hands over what the schedule computed, its backward runs the emitted one.
struct Recorded {
    place: Place,
    kept: Vec<Kept>,
    finished: Mutex<Option<(Storage, Shape)>>,
}

impl Recorded {
    fn result(&self) -> Result<(Storage, Shape)> {
        let finished = self
            .finished
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        finished.ok_or_else(|| super::forward::missing(self.place.site.name))
    }
}

impl CustomOp3 for Recorded {
    fn name(&self) -> &'static str {
        self.place.site.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &candle_core::Layout,
        _: &CpuStorage,
        _: &candle_core::Layout,
        _: &CpuStorage,
        _: &candle_core::Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.result()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => Err(super::forward::missing(self.place.site.name).into()),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &candle_core::Layout,
        _: &CudaStorage,
        _: &candle_core::Layout,
        _: &CudaStorage,
        _: &candle_core::Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.result()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => Err(super::forward::missing(self.place.site.name).into()),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        output: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let output = output.detach();
        let mut io = RankBackward::new(&self.place, &self.kept, &output, grad.detach());
        (self.place.site.backward)(&mut io)?;
        let [dq, dk, dv] = io.finish()?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}
