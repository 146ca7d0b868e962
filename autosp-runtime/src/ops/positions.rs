//! Tables of positions and single tokens under a sharded sequence.

use autosp_plan::codes;
use candle_core::{Result, Tensor};

use super::{owned, record, tracked};
use crate::comm::{Tag, all_to_all, broadcast};
use crate::scope::{self, Shard};
use crate::{Error, Sp};

/// This rank's rows of a replicated table that has one row a position along `dim`, at least S of them.
///
/// Returns as many rows as the rank has tokens; padding gets the row of position 0. A table that is itself trained (learned
/// positions) gets its gradient. Outside a sharded scope: the table as it is.
///
/// # Errors
/// AS0514 if the table has fewer than S rows; AS0305 if no forward is in progress.
pub fn slice(table: &Tensor, dim: usize) -> Result<Tensor> {
    let Some(scope) = scope::current() else {
        return Ok(table.clone());
    };
    let shard = scope.shard()?;
    let rows = table.dim(dim)?;
    if rows < shard.valid {
        let text = format!(
            "expected a table of at least {} positions along dim {dim}, found {rows}",
            shard.valid
        );
        return Err(Error::new(codes::TABLE_SHORT, text).into());
    }
    let here = shard.valid_here();
    if here == shard.len {
        return table.narrow(dim, shard.start, here);
    }
    let mut padding = table.dims().to_vec();
    padding[dim] = shard.len - here;
    let padding = table.narrow(dim, 0, 1)?.broadcast_as(padding)?;
    if here == 0 {
        padding.contiguous()
    } else {
        Tensor::cat(&[table.narrow(dim, shard.start, here)?, padding], dim)
    }
}

/// Token `global_index` (of the whole sequence) of a tensor that is sharded along `dim`, on every rank of the sequence; `dim` goes
/// away, as in `x.i((.., global_index))`.
///
/// The backward sums the gradients of all ranks to the rank that holds the token. Outside a sharded scope it is that index.
///
/// # Errors
/// AS0515 if the sequence has no such token; AS0303 if `x` has another length than this rank's shard; as
/// [`wait`](crate::comm::Engine::wait).
pub fn pick(x: &Tensor, dim: usize, global_index: usize) -> Result<Tensor> {
    pick_narrow(x, dim, global_index)?.squeeze(dim)
}

/// All tokens as rows of the batch, where a program takes one: `[b, s, ..]` (or `[s, b, ..]`, where `dim` is 0) becomes
/// `[b * s, ..]`, or `[b * s, 1, ..]` (`[1, b * s, ..]`) where `keep` says that the dimension stays with length 1.
///
/// # Errors
/// When a candle operation fails.
pub fn fold(x: &Tensor, dim: usize, keep: bool) -> Result<Tensor> {
    let x = if dim == 0 {
        x.transpose(0, 1)?
    } else {
        x.clone()
    };
    let rows = x.contiguous()?.flatten_to(1)?;
    if keep { rows.unsqueeze(dim) } else { Ok(rows) }
}

/// As [`pick`], with `dim` of length 1: `x.narrow(dim, global_index, 1)`.
///
/// # Errors
/// As [`pick`].
pub fn pick_narrow(x: &Tensor, dim: usize, global_index: usize) -> Result<Tensor> {
    let Some(scope) = scope::current() else {
        return x.narrow(dim, global_index, 1);
    };
    let shard = scope.shard()?;
    if x.dim(dim)? != shard.len {
        let text = format!(
            "`pick`: expected length {} along dim {dim} (this rank's shard), found {}",
            shard.len,
            x.dim(dim)?
        );
        return Err(Error::new(codes::LOCAL_LENGTH, text).into());
    }
    if global_index >= shard.valid {
        let text = format!(
            "expected a position below {}, found {global_index}",
            shard.valid
        );
        return Err(Error::new(codes::POSITION, text).into());
    }
    if shard.size == 1 {
        return x.narrow(dim, global_index, 1);
    }
    let (sp, step) = (scope.sp().clone(), scope.step());
    let owner = global_index / shard.len;
    let place = Place {
        dim,
        owner,
        local: global_index % shard.len,
        shard,
        step,
    };
    let mine = if shard.rank == owner {
        x.narrow(dim, place.local, 1)?
    } else {
        x.narrow(dim, 0, 1)?
    };
    let tag = Tag::new("pick", "token").at(step);
    let token = broadcast(sp.sp_group(), tag, &mine.detach().contiguous()?, owner)?;
    if !tracked(x) {
        return Ok(token);
    }
    record("pick", [x], owned(&token)?, move |[x], grad| {
        Ok([Some(place.give_back(&sp, x, grad)?)])
    })
}

/// Where a picked token lies.
#[derive(Clone, Copy)]
struct Place {
    dim: usize,
    owner: usize,
    local: usize,
    shard: Shard,
    step: u64,
}

impl Place {
    /// The gradient of x: all ranks' gradients of the token, added in rank order, at the owner's place; zero elsewhere.
    fn give_back(self, sp: &Sp, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let mut parts = vec![None; self.shard.size];
        parts[self.owner] = Some(grad.contiguous()?);
        let received = all_to_all(
            sp.sp_group(),
            Tag::new("pick", "grad_token").at(self.step),
            parts,
        )?;
        let mut sum: Option<Tensor> = None;
        for part in received.into_iter().flatten() {
            sum = Some(match sum {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        match sum {
            Some(sum) => {
                let after = self.shard.len - self.local - 1;
                sum.pad_with_zeros(self.dim, self.local, after)?
                    .contiguous()
            }
            None => x.zeros_like(),
        }
    }
}

#[cfg(test)]
mod tests;
