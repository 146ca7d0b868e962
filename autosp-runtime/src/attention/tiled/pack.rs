//! Copies of operands in the order in which the register tiles read them.

use crate::attention::real::{Element, Real};

/// `rows` packed as panels of `W`: element (row r, column c) at `[r / W][c][r % W]`; missing rows are zero.
///
/// `out` holds `n * d` numbers with `n` a multiple of `W`.
#[inline(always)]
pub(super) fn panels<'a, E: Element, const W: usize>(
    rows: impl Iterator<Item = &'a [E]>,
    d: usize,
    out: &mut [E::Acc],
) {
    out.fill(E::Acc::ZERO);
    for (r, row) in rows.enumerate() {
        let panel = &mut out[r / W * W * d..][..W * d];
        for (x, out) in row.iter().zip(panel.iter_mut().skip(r % W).step_by(W)) {
            *out = x.up();
        }
    }
}

/// `rows` one after the other, each padded with zeros to `width`; missing rows are zero.
#[inline(always)]
pub(super) fn matrix<'a, E: Element>(
    rows: impl Iterator<Item = &'a [E]>,
    width: usize,
    out: &mut [E::Acc],
) {
    out.fill(E::Acc::ZERO);
    for (row, out) in rows.zip(out.chunks_mut(width.max(1))) {
        for (x, out) in row.iter().zip(out) {
            *out = x.up();
        }
    }
}

/// The largest 2-norm of `rows`.
pub(super) fn largest_norm<'a, E: Element>(rows: impl Iterator<Item = &'a [E]>) -> f64 {
    rows.map(|row| row.iter().map(|x| x.up().double().powi(2)).sum::<f64>())
        .fold(0.0, f64::max)
        .sqrt()
}
