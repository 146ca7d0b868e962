//! Collectives on top of the all-to-all: the same for every engine, and deterministic.
//!
//! Sums are taken in the order of the ranks, by one rank for each element, so that all ranks get the same bits, run after run.
//! Sums of half-precision values are taken in f32 and rounded once. Without peers nothing is copied.

use std::ops::Range;

use autosp_plan::codes;
use candle_core::{DType, Tensor};

use super::{Engine, Tag};
use crate::ops::{cast, sum_as, wide};
use crate::{Error, Result};

/// The part of `0..n` that belongs to `rank` of `size`: contiguous, in the order of the ranks, of sizes that differ by at most 1.
pub fn chunk(n: usize, size: usize, rank: usize) -> Range<usize> {
    let at = |rank: usize| (rank as u128 * n as u128 / size as u128) as usize;
    at(rank)..at(rank + 1)
}

/// Hands `parts[p]` to rank `p` and returns what each rank handed here, in the order of the ranks.
///
/// # Errors
/// As [`Engine::start`] and [`Engine::wait`].
pub fn all_to_all(
    engine: &dyn Engine,
    tag: Tag,
    parts: Vec<Option<Tensor>>,
) -> Result<Vec<Option<Tensor>>> {
    let pending = engine.start(tag, parts)?;
    engine.wait(pending)
}

/// Waits until every rank of the group is here.
///
/// # Errors
/// As [`Engine::wait`].
pub fn barrier(engine: &dyn Engine, tag: Tag) -> Result<()> {
    all_to_all(engine, tag, vec![None; engine.size()]).map(drop)
}

/// Every rank gets the tensor of rank `root`. All ranks pass one of the same shape and type.
///
/// # Errors
/// AS0406 if shapes or types differ, or the group has no such rank; else as [`Engine::wait`].
pub fn broadcast(engine: &dyn Engine, tag: Tag, x: &Tensor, root: usize) -> Result<Tensor> {
    let size = engine.size();
    if root >= size {
        return Err(refuse(
            tag,
            format!("expected a root below {size}, found {root}"),
        ));
    }
    let x = &value(engine, x)?;
    let sends = engine.rank() == root;
    let mut received = all_to_all(engine, tag, vec![sends.then(|| x.clone()); size])?;
    let root_tensor = received[root]
        .take()
        .ok_or_else(|| absent(engine, tag, root))?;
    expect_like(engine, tag, root, x, &root_tensor)?;
    Ok(root_tensor)
}

/// The tensors of all ranks, joined along `dim` in the order of the ranks. Lengths along `dim` may differ, also be 0.
///
/// # Errors
/// AS0406 if another dimension or the type differs; else as [`Engine::wait`].
pub fn all_gather(engine: &dyn Engine, tag: Tag, x: &Tensor, dim: usize) -> Result<Tensor> {
    let x = &value(engine, x)?;
    let received = all_to_all(engine, tag, vec![Some(x.clone()); engine.size()])?;
    let mut parts = Vec::with_capacity(received.len());
    for (rank, part) in received.into_iter().enumerate() {
        let part = part.ok_or_else(|| absent(engine, tag, rank))?;
        let same_elsewhere = part.rank() == x.rank()
            && part
                .dims()
                .iter()
                .zip(x.dims())
                .enumerate()
                .all(|(d, (a, b))| d == dim || a == b);
        if !same_elsewhere || part.dtype() != x.dtype() {
            return Err(unlike(engine, tag, rank, x, &part));
        }
        if part.dim(dim)? > 0 {
            parts.push(part);
        }
    }
    match parts.as_slice() {
        [] => Ok(x.clone()),
        [one] => Ok(one.clone()),
        _ => Ok(Tensor::cat(&parts, dim)?),
    }
}

/// The sum over all ranks, of which rank `r` gets the part [`chunk`]`(n, size, r)` along `dim`; `n` is the length along `dim`.
///
/// # Errors
/// AS0406 if shapes or types differ; else as [`Engine::wait`].
pub fn reduce_scatter(engine: &dyn Engine, tag: Tag, x: &Tensor, dim: usize) -> Result<Tensor> {
    reduce_scatter_as(engine, tag, x, dim, x.dtype())
}

/// As [`reduce_scatter`], with the sum in the type `dtype`: what is added in `f32` need not be rounded to the type that travelled.
///
/// # Errors
/// As [`reduce_scatter`].
pub fn reduce_scatter_as(
    engine: &dyn Engine,
    tag: Tag,
    x: &Tensor,
    dim: usize,
    dtype: DType,
) -> Result<Tensor> {
    let x = value(engine, x)?;
    let (n, size) = (x.dim(dim)?, engine.size());
    let cut = |rank: usize| {
        let range = chunk(n, size, rank);
        x.narrow(dim, range.start, range.len())
    };
    let parts = (0..size)
        .map(|rank| Ok(Some(cut(rank)?)))
        .collect::<Result<Vec<_>>>()?;
    let received = all_to_all(engine, tag, parts)?;
    sum_in_order(engine, tag, received, dtype)
}

/// The sum over all ranks, the same bits on every rank: a reduce-scatter of flat chunks, then an all-gather.
///
/// # Errors
/// AS0406 if shapes or types differ; else as [`Engine::wait`].
pub fn all_reduce_sum(engine: &dyn Engine, tag: Tag, x: &Tensor) -> Result<Tensor> {
    if engine.size() == 1 {
        return Ok(x.detach());
    }
    let flat = value(engine, x)?.flatten_all()?;
    let mine = reduce_scatter(engine, tag, &flat, 0)?;
    let whole = all_gather(engine, tag, &mine, 0)?;
    // Ranks of another length have found chunks that differ.
    Ok(whole.reshape(x.shape())?)
}

/// Adds the parts in the order of the ranks; half precision is added in f32. The sum is of type `dtype`.
fn sum_in_order(
    engine: &dyn Engine,
    tag: Tag,
    parts: Vec<Option<Tensor>>,
    dtype: DType,
) -> Result<Tensor> {
    let own = parts[engine.rank()]
        .clone()
        .ok_or_else(|| absent(engine, tag, engine.rank()))?;
    let mut sum: Option<Tensor> = None;
    for (rank, part) in parts.into_iter().enumerate() {
        let part = part.ok_or_else(|| absent(engine, tag, rank))?;
        expect_like(engine, tag, rank, &own, &part)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => sum_as(&sum, &part, wide(own.dtype()))?,
        });
    }
    Ok(cast(&sum.unwrap_or_else(|| own.clone()), dtype)?)
}

/// What a rank gives away of `x`: detached, and a copy if `x` itself is a variable, which its owner may change in place.
fn value(engine: &dyn Engine, x: &Tensor) -> Result<Tensor> {
    if engine.size() > 1 && x.is_variable() {
        return Ok(x.copy()?.detach());
    }
    Ok(x.detach())
}

fn expect_like(
    engine: &dyn Engine,
    tag: Tag,
    rank: usize,
    own: &Tensor,
    other: &Tensor,
) -> Result<()> {
    if own.dims() == other.dims() && own.dtype() == other.dtype() {
        return Ok(());
    }
    Err(unlike(engine, tag, rank, own, other))
}

fn unlike(engine: &dyn Engine, tag: Tag, rank: usize, own: &Tensor, other: &Tensor) -> Error {
    let (here, there) = (engine.world_rank(), engine.members()[rank]);
    let show = |x: &Tensor| format!("{:?} {:?}", x.dims(), x.dtype());
    refuse(
        tag,
        format!(
            "expected shapes that agree, found {} on rank {here} and {} on rank {there}",
            show(own),
            show(other)
        ),
    )
}

fn absent(engine: &dyn Engine, tag: Tag, rank: usize) -> Error {
    refuse(
        tag,
        format!(
            "expected a part from rank {}, found none",
            engine.members()[rank]
        ),
    )
}

fn refuse(tag: Tag, text: String) -> Error {
    Error::new(codes::COLLECTIVE_ARGUMENT, text).context(tag)
}
