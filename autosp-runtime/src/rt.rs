//! What the code that the attribute emits names, as `autosp::rt`. Not for writing by hand.

pub use candle_core::{self, D, Result};
pub use candle_nn;

pub use crate::layout::Layout;
pub use crate::library;
pub use crate::loss::head::fold;
pub use crate::loss::{Logits, head, token_loss};
pub use crate::mask::{Band, HostMask, Mask, key_mask, mask, mask_rule};
pub use crate::memory::{checkpoint, checkpoint_last, tiled};
pub use crate::ops;
pub use crate::ops::Recorded;
pub use crate::ops::{pick, pick_narrow, sequence, slice};
pub use crate::schedule::{Backward, Forward, HeadMap, Schedule, Site, Ulysses};
pub use crate::scores::{Scores, Weights, scores, softmax};

use autosp_plan::codes;
use candle_core::Tensor;

use crate::{Error, scope};

/// Whether this thread is in a sharded scope, where functions run their twins.
pub fn sharded() -> bool {
    scope::is_sharded()
}

/// A call from outside enters the model with sharded tensors: `(name, tensor, its sequence dim)`. Finds which shard they are, by the
/// tensor that `sp.shard` returned, else by its length.
///
/// # Errors
/// AS0303 if a length is not the length of a shard; AS0307 if it is that of several.
pub fn enter(function: &str, inputs: &[(&str, &Tensor, usize)]) -> Result<()> {
    crate::memory::entered_model();
    Ok(scope::enter(function, inputs)?)
}

/// The batch of this forward is dim `dim` of `x`: what a site needs to know where rows and heads are merged in one dim.
///
/// # Errors
/// Candle's error for a dim that is not there.
pub fn batch(x: &Tensor, dim: usize) -> Result<()> {
    scope::set_batch(x.dim(dim)?);
    Ok(())
}

/// A tensor beside those that [`enter`] looked at: it has `rank` dims, as the compiler took it to have, and its dim `dim` is the
/// sequence that is in progress.
///
/// # Errors
/// AS0313 for another number of dims; AS0303 and AS0307 as [`enter`].
pub fn enter_beside(function: &str, name: &str, x: &Tensor, dim: usize, rank: usize) -> Result<()> {
    Ok(scope::enter_beside(function, name, x, dim, rank)?)
}

/// A sharded forward starts at position 0.
///
/// # Errors
/// AS0304 if the argument `name` of `function` is not 0.
pub fn no_offset(function: &str, name: &str, offset: usize) -> Result<()> {
    if offset == 0 {
        return Ok(());
    }
    let text =
        format!("`{function}`: expected `{name}` = 0 inside a sharded scope, found {offset}");
    Err(Error::new(codes::CACHE_OFFSET, text)
        .with_help("call the model outside `sp.scope` to generate")
        .into())
}

/// A function that is sharded only as a part of the functions that call it is called by itself.
pub fn unsharded(function: &str, why: &str) -> candle_core::Error {
    let text = format!("`{function}` cannot be called by itself inside a sharded scope: {why}");
    Error::new(codes::UNTAKEN, text)
        .with_help("call the model that it is a part of")
        .into()
}

/// A loss over all tokens is for shards.
///
/// # Errors
/// AS0305 outside a sharded scope.
pub fn in_scope(function: &str) -> Result<()> {
    scope::require(function)?;
    Ok(())
}

/// A branch that the attribute could not follow is taken; `why` says what stands in it.
pub fn untaken(why: &str) -> candle_core::Error {
    let text = format!("this configuration takes a branch that is not sharded: {why}");
    Error::new(codes::UNTAKEN, text)
        .with_help(
            "set the option that leads there to off; `cargo autosp plan` lists such branches",
        )
        .into()
}

/// The valid number of tokens for a size that a shard shows: `c` times the local length becomes `c` times S. Other sizes, and all sizes
/// outside of a scope, stay as they are.
pub fn valid(n: usize) -> usize {
    match scope::current().map(|scope| scope.shard()) {
        Some(Ok(shard)) if shard.len > 0 && n.is_multiple_of(shard.len) => {
            n / shard.len * shard.valid
        }
        _ => n,
    }
}

/// The tensor itself, where the program on one device repeats key and value heads for their query heads: the exchange takes them as they
/// are, and the attention knows which serves which.
///
/// # Errors
/// None; the type is that of the operation it stands for.
pub fn same(x: &Tensor) -> Result<Tensor> {
    Ok(x.clone())
}
