//! Parts of a block that compute each token by itself, a few tokens at a time.

use std::ops::Range;

use autosp_plan::settings::Policy;
use candle_core::{Result, Tensor};

use super::sink;
use crate::ops::{Gradient, Kept, taken, tape, tracked};
use crate::scope;

/// Runs `f(x)`, which computes each token along dim `dim` by itself.
///
/// In a block of which less is kept than all (see [`checkpoint`](super::checkpoint)), and if this rank has more tokens than the setting
/// `tile`, `f` runs on that many tokens at a time, forward and backward, so that what is large inside of it is never there for
/// all tokens. Weights' gradients are added over the tiles, in `f32` for half precision.
///
/// # Errors
/// Those of `f`.
pub fn tiled<F>(x: &Tensor, dim: usize, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + 'static,
{
    let Some(tiles) = tiles(x, dim)? else {
        return f(x);
    };
    let parts = tiles
        .iter()
        .map(|tile| tape::values(|| f(&cut(&x.detach(), dim, tile)?)))
        .collect::<Result<Vec<_>>>()?;
    let y = Tensor::cat(&parts, dim)?;
    drop(parts);
    if !tape::is_recording() {
        return Ok(y);
    }
    let result = tape::variable((taken(&y)?, y.shape().clone()));
    let (kept, wanted) = (Kept::new(x), tracked(x));
    tape::push(&[x], &result, (None, true), move |grad| {
        let x = kept.get()?;
        let mut parts = Vec::with_capacity(tiles.len());
        for tile in &tiles {
            let part = cut(&x, dim, tile)?;
            let (_, block) = tape::record(&tape::input(&part, wanted)?, &f)?;
            parts.extend(block.backward(&cut(&grad.tensor, dim, tile)?, &mut sink)?);
        }
        if parts.len() < tiles.len() {
            return Ok(vec![None]);
        }
        Ok(vec![Some(Gradient {
            tensor: Tensor::cat(&parts, dim)?,
            fresh: true,
        })])
    });
    Ok(result)
}

/// The tiles of `x`, if there are several.
fn tiles(x: &Tensor, dim: usize) -> Result<Option<Vec<Range<usize>>>> {
    let (Some(scope), Some(policy)) = (scope::current(), super::POLICY.get()) else {
        return Ok(None);
    };
    let (tokens, most) = (x.dim(dim)?, scope.sp().settings().tile());
    if policy == Policy::All || tokens <= most || !(tape::is_recording() || tape::is_for_values()) {
        return Ok(None);
    }
    // As even as they can be.
    let count = tokens.div_ceil(most);
    let bound = |i: usize| i * tokens / count;
    Ok(Some((0..count).map(|i| bound(i)..bound(i + 1)).collect()))
}

fn cut(x: &Tensor, dim: usize, tile: &Range<usize>) -> Result<Tensor> {
    x.narrow(dim, tile.start, tile.len())?.contiguous()
}
