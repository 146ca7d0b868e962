//! Attention on a GPU.
//!
//! In half precision cuDNN computes it, in memory that grows with the length, for bands (causal, windows), full attention and kv heads
//! that serve consecutive query heads. What it cannot do is refused, with the way out. In `f32` and `f64`, and where the setting
//! `attention` is `reference`, it is put together from matrix products over blocks of queries.
//!
//! cuDNN adds up dQ in the order in which blocks finish: a backward is not repeatable to the bit, here as everywhere on GPUs.

use autosp_plan::codes;
use candle_core::{DType, Tensor};

use super::cudnn::{Key, with_plan};
use super::memory::{address, device_of, unwritten};
use crate::attention::graphs::{Element, GradientStrides, Problem, Role};
use crate::attention::{Gradients, Kernel, Output, Spec};
use crate::mask::Band;
use crate::{Error, Result};

/// Device memory that one backward may take besides its operands; more heads than fit go one after the other.
const SCRATCH: u64 = 1 << 30;

fn refuse(why: impl std::fmt::Display) -> Error {
    Error::new(codes::KERNEL, format!("attention on a GPU: {why}")).with_help(
        "AUTOSP_ATTENTION=reference computes it from matrix products, with more memory and time",
    )
}

/// The band that all terms together leave visible.
fn band(spec: &Spec) -> Result<Band> {
    let mut all = Band { lo: None, hi: None };
    for term in &spec.terms {
        let Some(Band { lo, hi }) = term.visible_band() else {
            return Err(Error::new(
                codes::KERNEL,
                format!("attention on a GPU: expected masks that hide what is outside of a band, found {term:?}"),
            )
            .with_help("train on the CPU, or mask with -inf outside of a causal band or window"));
        };
        all.lo = [all.lo, lo].into_iter().flatten().max();
        all.hi = [all.hi, hi].into_iter().flatten().min();
    }
    Ok(all)
}

fn strides(x: &Tensor) -> Result<[i64; 4]> {
    let (_, _, _, _) = x.dims4()?;
    let stride = x.stride();
    Ok(std::array::from_fn(|dim| stride[dim] as i64))
}

/// With adjacent elements along the last dim, which kernels read 16 bytes at a time.
fn adjacent(x: &Tensor) -> Result<Tensor> {
    let x = x.detach();
    let steps = x.stride();
    let fits = steps[3] == 1
        && steps[..3].iter().all(|step| step % 8 == 0)
        && x.layout().start_offset().is_multiple_of(8);
    if fits {
        Ok(x)
    } else {
        super::ops::contiguous(&x)
    }
}

/// Whether matrix products compute this problem, and not cuDNN.
fn by_blocks(kernel: Kernel, q: &Tensor) -> bool {
    kernel == Kernel::Reference || !matches!(q.dtype(), DType::BF16 | DType::F16)
}

/// The problem without strides, of valid tokens.
fn problem(spec: &Spec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Problem> {
    if let Some(cap) = spec.cap {
        return Err(refuse(format_args!(
            "expected scores without a cap, found one of {cap}"
        )));
    }
    let (batch, heads, queries, d) = q.dims4()?;
    let (_, kv_heads, keys, dv) = v.dims4()?;
    let share = heads / kv_heads.max(1);
    if share * kv_heads != heads || spec.kv_of.iter().enumerate().any(|(h, &g)| g != h / share) {
        return Err(refuse(format_args!(
            "expected each kv head to serve {share} consecutive query heads, found {:?}",
            spec.kv_of
        )));
    }
    if d % 8 != 0 || dv % 8 != 0 || d > 256 || dv > 256 {
        return Err(refuse(format_args!(
            "expected heads of a width that 8 divides, at most 256, found {d} and {dv}"
        )));
    }
    let Band { lo, hi } = band(spec)?;
    let bound = |x: Option<i64>| {
        x.filter(|x| x.unsigned_abs() < keys as u64)
            .map(|x| x as i32)
    };
    Ok(Problem {
        element: if q.dtype() == DType::F16 {
            Element::F16
        } else {
            Element::Bf16
        },
        batch: batch as i64,
        heads: heads as i64,
        kv_heads: kv_heads as i64,
        queries: queries as i64,
        keys: keys as i64,
        d: d as i64,
        dv: dv as i64,
        scale: (spec.scale as f32).to_bits(),
        lo: bound(lo),
        hi: bound(hi),
        q: strides(q)?,
        k: strides(k)?,
        v: strides(v)?,
        o: [0; 4],
        lse: [0; 4],
    })
}

/// A tensor whose first `valid` rows are to be written: zeros where there are others.
fn target(
    like: &Tensor,
    dims: (usize, usize, usize, usize),
    dtype: DType,
    valid: usize,
) -> Result<Tensor> {
    if valid < dims.2 {
        return Ok(Tensor::zeros(dims, dtype, like.device())?);
    }
    unwritten(&device_of(like)?, dims, dtype)
}

/// O and LSE of [`crate::attention::forward`], for tensors on a GPU.
///
/// # Errors
/// AS0329 for what it cannot do, AS0411 if a library refuses.
pub(crate) fn forward(
    kernel: Kernel,
    spec: &Spec,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Output> {
    if by_blocks(kernel, q) {
        return crate::attention::blocks::forward(spec, &band(spec)?, q, k, v);
    }
    let (batch, heads, queries, _) = q.dims4()?;
    let valid = spec.valid.min(queries);
    let [q, k, v] = [q, k, v].map(|x| adjacent(&x.narrow(2, 0, valid)?));
    let (q, k, v) = (q?, k?, v?);
    let dv = v.dim(3)?;
    let o = target(&q, (batch, heads, queries, dv), q.dtype(), valid)?;
    let lse = target(&q, (batch, heads, queries, 1), DType::F32, valid)?;
    let key = Key {
        problem: Problem {
            o: strides(&o)?,
            lse: strides(&lse)?,
            ..problem(spec, &q, &k, &v)?
        },
        gradients: None,
    };
    let device = device_of(&q)?;
    let at = [&q, &k, &v, &o, &lse].map(address);
    let [q_at, k_at, v_at, o_at, lse_at] = at;
    let (q_at, k_at, v_at, o_at, lse_at) = (q_at?, k_at?, v_at?, o_at?, lse_at?);
    with_plan(&device.cuda_stream(), &key, |handle, plan| {
        plan.run(handle, &device, |role| match role {
            Role::Q => Some(q_at),
            Role::K => Some(k_at),
            Role::V => Some(v_at),
            Role::O => Some(o_at),
            Role::Lse => Some(lse_at),
            _ => None,
        })
    })
    .map_err(|error| not_taken(error, &key.problem, "forward"))?;
    Ok(Output {
        o,
        lse: lse.squeeze(3)?,
        rest: Tensor::zeros(0, DType::F32, q.device())?,
    })
}

/// What cuDNN said, with the problem that it said it about.
fn not_taken(error: Error, problem: &Problem, direction: &str) -> Error {
    let Problem {
        element,
        batch,
        heads,
        kv_heads,
        queries,
        d,
        dv,
        lo,
        hi,
        ..
    } = problem;
    error.context(format_args!(
        "attention {direction} of {heads} query and {kv_heads} kv heads of width {d} and {dv}, {batch} x {queries} tokens, {element:?}, \
         band {lo:?} to {hi:?}"
    ))
}

/// Gradients of [`crate::attention::backward`], for tensors on a GPU.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(
    kernel: Kernel,
    spec: &Spec,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Output,
    grad: &Tensor,
) -> Result<Gradients> {
    if by_blocks(kernel, q) {
        return crate::attention::blocks::backward(spec, &band(spec)?, (q, k, v), output, grad);
    }
    let (batch, heads, queries, d) = q.dims4()?;
    let (_, kv_heads, keys, dv) = v.dims4()?;
    let valid = spec.valid.min(queries);
    let gradients = Gradients {
        q: target(q, (batch, heads, queries, d), q.dtype(), valid)?,
        k: target(q, (batch, kv_heads, keys, d), q.dtype(), valid)?,
        v: target(q, (batch, kv_heads, keys, dv), q.dtype(), valid)?,
    };
    let row = |x: &Tensor| -> Result<Tensor> { adjacent(&x.narrow(2, 0, valid)?) };
    let (q, k, v, o, grad) = (row(q)?, row(k)?, row(v)?, row(&output.o)?, row(grad)?);
    let lse = output.lse.unsqueeze(3)?.narrow(2, 0, valid)?;
    let whole = problem(spec, &q, &k, &v)?;
    // As many kv heads at once as the scratch allows, in parts of one size where that is possible.
    let fit = (SCRATCH.saturating_mul(kv_heads as u64) / whole.scratch().max(1))
        .clamp(1, kv_heads as u64) as usize;
    let parts = kv_heads.div_ceil(fit);
    let share = heads / kv_heads;
    for part in 0..parts {
        let first = part * kv_heads / parts;
        let count = (part + 1) * kv_heads / parts - first;
        let of_queries = |x: &Tensor| x.narrow(1, first * share, count * share);
        let of_keys = |x: &Tensor| x.narrow(1, first, count);
        let (q, o, grad, lse) = (
            of_queries(&q)?,
            of_queries(&o)?,
            of_queries(&grad)?,
            of_queries(&lse)?,
        );
        let (k, v) = (of_keys(&k)?, of_keys(&v)?);
        let (dq, dk, dv) = (
            of_queries(&gradients.q)?,
            of_keys(&gradients.k)?,
            of_keys(&gradients.v)?,
        );
        backward_part([&q, &k, &v, &o, &lse, &grad, &dq, &dk, &dv], &whole)?;
    }
    Ok(gradients)
}

/// One part of the heads.
fn backward_part([q, k, v, o, lse, grad, dq, dk, dv]: [&Tensor; 9], whole: &Problem) -> Result<()> {
    let key = Key {
        problem: Problem {
            heads: q.dim(1)? as i64,
            kv_heads: k.dim(1)? as i64,
            q: strides(q)?,
            k: strides(k)?,
            v: strides(v)?,
            o: strides(o)?,
            lse: strides(lse)?,
            ..*whole
        },
        gradients: Some(GradientStrides {
            o: strides(grad)?,
            q: strides(dq)?,
            k: strides(dk)?,
            v: strides(dv)?,
        }),
    };
    let device = device_of(q)?;
    let (batch, heads, queries, d) = q.dims4()?;
    let delta = unwritten(&device, (batch, heads, queries, 1), DType::F32)?;
    let sum = unwritten(&device, (batch, heads, queries, d), DType::F32)?;
    let roles = [
        (Role::Q, q),
        (Role::K, k),
        (Role::V, v),
        (Role::O, o),
        (Role::Lse, lse),
        (Role::GradO, grad),
        (Role::GradQ, dq),
        (Role::GradK, dk),
        (Role::GradV, dv),
        (Role::Delta, &delta),
        (Role::SumQ, &sum),
    ];
    let at = roles
        .iter()
        .map(|(role, x)| Ok((*role, address(x)?)))
        .collect::<Result<Vec<_>>>()?;
    with_plan(&device.cuda_stream(), &key, |handle, plan| {
        plan.run(handle, &device, |role| {
            at.iter()
                .find(|(known, _)| *known == role)
                .map(|(_, at)| *at)
        })
    })
    .map_err(|error| not_taken(error, &key.problem, "backward"))
}
