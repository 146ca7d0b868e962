//! The fast kernel: tiles of scores in cache, an online softmax, register-tiled products.
//!
//! A tile of scores is stored key by key (`scores[j][i]`), so that the softmax runs over queries in vector lanes and needs no
//! horizontal sums, and the products that follow read it in place.
//!
//! Work is split by shape alone and no two tasks write the same number, so results do not depend on the number of threads:
//! - forward: one task per (batch row, query head, query tile);
//! - backward: one task per (batch row, kv head, block of keys), which owns dK and dV of its keys; its part of dQ is summed over
//!   blocks in their order at the end.

mod backward;
mod forward;
mod micro;
mod pack;
mod scores;

pub(super) use backward::backward;
pub(super) use forward::forward;

/// Queries in a tile, for sequences that fill it. A multiple of both sides of a register tile.
const QUERIES: usize = 96;
/// Keys in a tile.
const KEYS: usize = 96;
/// What tile sides are multiples of.
const UNIT: usize = 48;

/// The side of a tile over a sequence of `length`.
fn side(length: usize, full: usize) -> usize {
    length.next_multiple_of(UNIT).clamp(UNIT, full)
}
