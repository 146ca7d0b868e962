//! One recorded operation for each run of a site.

use autosp_plan::codes;
use autosp_plan::settings::Policy;
use candle_core::Tensor;

use super::backward::RankBackward;
use super::forward::{Ran, RankForward};
use super::{HeadPlan, Kept, Memo, Place, SiteRef};
use crate::attention::Spec;
use crate::error::{Error, Result};
use crate::memory::replay::{self, Turn};
use crate::ops::{record_gradient, record_result, taken, tape};
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

    let turn = replay::turn()?;
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
            replay::keep(Memo::new(site.name, policy, place.plan.ranks(), groups)?);
        }
        return Ok(out);
    }
    if ![q, k, v].iter().any(|x| x.track_op()) {
        return Ok(out);
    }
    if place.plan.ranks() == 1 {
        // The output is the kept one: whoever records it holds it, and its memory becomes the operation's result.
        for kept in &mut kept {
            kept.output.o = Tensor::zeros(0, out.dtype(), out.device())?;
        }
    }
    let result = (taken(&out)?, out.shape().clone());
    let single = place.plan.ranks() == 1;
    for (x, landed) in kept.iter().flat_map(Kept::tensors) {
        // What was exchanged is the site's own; on one rank queries, keys and values are the model's.
        if landed && single {
            [q, k, v].into_iter().for_each(tape::keep);
        } else {
            tape::keep_own(x);
        }
    }
    let backward = move |output: &Tensor, grad: &Tensor| {
        let mut io = RankBackward::new(&place, &kept, output, grad.detach());
        (place.site.backward)(&mut io)?;
        Ok(io.finish()?.map(Some))
    };
    Ok(if single {
        record_result(site.name, [q, k, v], result, backward)?
    } else {
        // The groups have kept their outputs in head layout.
        let none = Tensor::zeros(0, q.dtype(), q.device())?;
        record_gradient(site.name, [q, k, v], result, move |grad| {
            backward(&none, grad)
        })?
    })
}
