//! One tile of scores, from packed queries and keys to masked scores.

use super::micro::{self, MR, NR};
use crate::attention::real::Real;
use crate::mask::{Block, Prepared};

/// `out[j][i] = factor * sum_c left[j][c] right[i][c]` for `left` in panels of [`MR`] and `right` in panels of [`NR`], both of
/// width `d`; the rows of `out` are `width` numbers.
#[inline(always)]
pub(super) fn product<R: Real, const FMA: bool>(
    left: &[R],
    right: &[R],
    d: usize,
    factor: R,
    width: usize,
    out: &mut [R],
) {
    if d == 0 {
        out.fill(R::ZERO);
        return;
    }
    for (i, right) in right.chunks_exact(NR * d).enumerate() {
        for (j, left) in left.chunks_exact(MR * d).enumerate() {
            let acc = micro::panels::<R, FMA>(left, right);
            micro::store(&acc, factor, &mut out[j * MR * width + i * NR..], width);
        }
    }
}

/// Caps scores: `s` becomes `cap * tanh(s)`.
#[inline(always)]
pub(super) fn cap<R: Real, const FMA: bool>(scores: &mut [R], cap: R) {
    for s in scores {
        *s = cap * s.fast_tanh::<FMA>();
    }
}

/// Applies the masks, then takes out keys from `keys` on, which do not exist.
#[inline(always)]
pub(super) fn mask<R: Real>(prepared: &Prepared, block: &Block, width: usize, scores: &mut [R]) {
    let keys = block.keys.len();
    prepared.apply(block, &mut scores[..keys * width], width);
    scores[keys * width..].fill(R::NEG_INFINITY);
}
