//! O and LSE by query tiles.

use rayon::prelude::*;

use super::micro::{self, MR, NR, lanes, lanes_mut};
use super::{KEYS, QUERIES, pack, scores, side};
use crate::attention::real::{Element, Real};
use crate::attention::simd::{Job, dispatch};
use crate::attention::{Problem, log_sum};
use crate::mask::{Block, Prepared};

/// Keys and values of one (batch row, kv head), packed once for all tiles of queries.
struct Packed<R> {
    /// Panels of [`MR`] keys.
    k: Vec<R>,
    /// Rows padded to a multiple of [`NR`].
    v: Vec<R>,
    /// The largest 2-norm of a key, computed when something needs it.
    norm: f64,
}

/// Sizes of tiles.
#[derive(Clone, Copy)]
struct Tiles {
    /// Queries in a tile.
    queries: usize,
    /// Keys in a tile.
    keys: usize,
    /// Value width padded to a multiple of [`NR`].
    dv: usize,
}

/// O [b, h, S, dv], LSE and its rest [b, h, S].
pub(in crate::attention) fn forward<E: Element>(
    p: &Problem<'_, E>,
) -> (Vec<E>, Vec<E::Acc>, Vec<E::Acc>) {
    let s = p.sizes;
    let tiles = Tiles {
        queries: side(p.queries(), QUERIES),
        keys: side(p.keys(), KEYS),
        dv: s.dv.next_multiple_of(NR),
    };
    let bounded = p.spec.cap.is_none() && p.spec.terms.iter().any(crate::mask::Term::adds);
    let padded = p.keys().next_multiple_of(tiles.keys);
    let packed: Vec<Packed<E::Acc>> = (0..s.batch * s.kv_heads)
        .into_par_iter()
        .map(|at| {
            let (b, g) = (at / s.kv_heads, at % s.kv_heads);
            let mut k = vec![E::Acc::ZERO; padded * s.d];
            let mut v = vec![E::Acc::ZERO; padded * tiles.dv];
            pack::panels::<E, MR>(p.k.rows(b, g, 0..p.keys()), s.d, &mut k);
            pack::matrix::<E>(p.v.rows(b, g, 0..p.keys()), tiles.dv, &mut v);
            Packed {
                k,
                v,
                norm: if bounded {
                    pack::largest_norm(p.k.rows(b, g, 0..p.keys()))
                } else {
                    0.0
                },
            }
        })
        .collect();

    let mut o = vec![E::down(E::Acc::ZERO); s.batch * s.heads * s.queries * s.dv];
    let mut lse = vec![E::Acc::ZERO; s.batch * s.heads * s.queries];
    let mut rest = lse.clone();
    if s.queries == 0 || s.dv == 0 {
        return (o, lse, rest);
    }
    let heads = lse.chunks_mut(s.queries).zip(rest.chunks_mut(s.queries));
    let tasks: Vec<_> = o
        .chunks_mut(s.queries * s.dv)
        .zip(heads)
        .enumerate()
        .flat_map(|(at, (o, (lse, rest)))| {
            let rows = lse
                .chunks_mut(tiles.queries)
                .zip(rest.chunks_mut(tiles.queries));
            let parts = o.chunks_mut(tiles.queries * s.dv).zip(rows);
            parts
                .enumerate()
                .map(move |(tile, (o, (lse, rest)))| (at, tile * tiles.queries, o, lse, rest))
        })
        .filter(|(_, first, ..)| *first < p.queries())
        .collect();
    tasks.into_par_iter().for_each(|(at, first, o, lse, rest)| {
        let (b, h) = (at / s.heads, at % s.heads);
        let packed = &packed[b * s.kv_heads + p.spec.kv_of[h]];
        dispatch(Tile {
            p,
            packed,
            tiles,
            b,
            h,
            first,
            o,
            lse,
            rest,
        });
    });
    (o, lse, rest)
}

/// The task of one tile of queries.
struct Tile<'a, E: Element> {
    p: &'a Problem<'a, E>,
    packed: &'a Packed<E::Acc>,
    tiles: Tiles,
    b: usize,
    h: usize,
    first: usize,
    o: &'a mut [E],
    lse: &'a mut [E::Acc],
    rest: &'a mut [E::Acc],
}

/// What the online softmax carries from tile to tile, one number per query.
struct Running<R> {
    max: Vec<R>,
    total: Vec<R>,
    /// By how much what was summed so far shrinks with the new maximum.
    shrink: Vec<R>,
}

impl<R: Real> Running<R> {
    /// Turns scores into exp(score - max) under the new maximum and adds them to the totals.
    #[inline(always)]
    fn absorb<const FMA: bool>(&mut self, scores: &mut [R], width: usize) {
        for lane in (0..width).step_by(NR) {
            let mut max = *lanes::<R, NR>(&self.max[lane..]);
            for row in scores.chunks_exact(width) {
                let x = lanes::<R, NR>(&row[lane..]);
                max = std::array::from_fn(|i| max[i].larger(x[i]));
            }
            // While a row has seen only -inf, differences to its maximum would be NaN: measure from zero.
            let base = max.map(|max| if max == R::NEG_INFINITY { R::ZERO } else { max });
            let mut total = [R::ZERO; NR];
            for row in scores.chunks_exact_mut(width) {
                let x = lanes_mut(&mut row[lane..]);
                // Loops: a closure here may stay a function of its own, compiled without the vector instructions.
                for i in 0..NR {
                    x[i] = (x[i] - base[i]).fast_exp::<FMA>();
                    total[i] += x[i];
                }
            }
            for i in 0..NR {
                let shrink = (self.max[lane + i] - base[i]).fast_exp::<FMA>();
                self.total[lane + i] = self.total[lane + i] * shrink + total[i];
                self.shrink[lane + i] = shrink;
                self.max[lane + i] = max[i];
            }
        }
    }
}

/// The memory that a task works in.
struct Work<R> {
    /// The queries, in panels of [`NR`].
    q: Vec<R>,
    /// One tile of scores, key by key.
    scores: Vec<R>,
    /// Sums of weights times values, query by query.
    sums: Vec<R>,
    running: Running<R>,
}

impl<E: Element> Tile<'_, E> {
    /// Adds the keys of one block, whose masks are `prepared`, to the running softmax.
    ///
    /// This is a method that is inlined, not a closure: a closure would be compiled without the wide vectors.
    #[inline(always)]
    fn absorb<const FMA: bool>(&self, block: &Block, prepared: &Prepared, work: &mut Work<E::Acc>) {
        let Self {
            p, packed, tiles, ..
        } = self;
        let (spec, d, width, at) = (p.spec, p.sizes.d, tiles.queries, block.keys.start);
        let Work {
            q,
            scores,
            sums,
            running,
        } = work;
        let k = &packed.k[at * d..(at + tiles.keys) * d];
        scores::product::<_, FMA>(k, q, d, E::Acc::from_double(spec.scale), width, scores);
        if let Some(cap) = spec.cap {
            scores::cap::<_, FMA>(scores, E::Acc::from_double(cap));
        }
        scores::mask(prepared, block, width, scores);
        running.absorb::<FMA>(scores, width);
        for (row, shrink) in sums.chunks_exact_mut(tiles.dv).zip(&running.shrink) {
            if *shrink != E::Acc::ONE {
                for x in row {
                    *x *= *shrink;
                }
            }
        }
        let v = &packed.v[at * tiles.dv..(at + tiles.keys) * tiles.dv];
        let there = block.keys.len();
        for c in (0..tiles.dv).step_by(NR) {
            for i in (0..width).step_by(MR) {
                let acc = micro::columns::<_, FMA>(&scores[i..], width, &v[c..], tiles.dv, there);
                micro::accumulate(&acc, &mut sums[i * tiles.dv + c..], tiles.dv);
            }
        }
    }

    /// Writes O, LSE and its rest.
    fn write(self, work: &Work<E::Acc>, queries: usize) {
        let Self {
            p,
            tiles,
            o,
            lse,
            rest,
            ..
        } = self;
        for (i, o) in o.chunks_mut(p.sizes.dv).take(queries).enumerate() {
            let total = work.running.total[i];
            let empty = total == E::Acc::ZERO;
            let factor = if empty {
                E::Acc::NAN
            } else {
                E::Acc::ONE / total
            };
            for (o, sum) in o.iter_mut().zip(&work.sums[i * tiles.dv..]) {
                *o = E::down(*sum * factor);
            }
            (lse[i], rest[i]) = log_sum(work.running.max[i], total);
        }
    }
}

impl<E: Element> Job for Tile<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self {
            p,
            packed,
            tiles,
            b,
            h,
            first,
            ..
        } = self;
        let (spec, width) = (p.spec, tiles.queries);
        let queries = first..(first + width).min(p.queries());
        let rows = p.q.rows(b, h, queries.clone());
        let mut work = Work {
            q: vec![E::Acc::ZERO; width * p.sizes.d],
            scores: vec![E::Acc::ZERO; tiles.keys * width],
            sums: vec![E::Acc::ZERO; width * tiles.dv],
            running: Running {
                max: vec![E::Acc::NEG_INFINITY; width],
                total: vec![E::Acc::ZERO; width],
                shrink: vec![E::Acc::ZERO; width],
            },
        };
        pack::panels::<E, NR>(rows.clone(), p.sizes.d, &mut work.q);
        let bound = match spec.cap {
            Some(cap) => cap.abs(),
            None if packed.norm > 0.0 => {
                spec.scale.abs() * packed.norm * pack::largest_norm(rows) * 1.001
            }
            None => f64::INFINITY,
        };

        // Blocks under a finite fill come last: they count only for rows whose other scores are as low, mostly fully masked rows.
        let mut todo: Vec<usize> = (0..p.keys()).step_by(tiles.keys).collect();
        for last in [false, true] {
            for key in std::mem::take(&mut todo) {
                let keys = key..(key + tiles.keys).min(p.keys());
                let block = Block {
                    batch: b,
                    head: spec.heads[h],
                    queries: queries.clone(),
                    keys,
                };
                let prepared = Prepared::new(&spec.terms, &block, bound);
                if prepared.upper == f64::NEG_INFINITY {
                    continue;
                }
                if prepared.covered && !last {
                    todo.push(key);
                    continue;
                }
                let seen = work.running.max[..queries.len()].iter();
                let low = seen.fold(f64::INFINITY, |low, max| low.min(max.double()));
                if last && prepared.upper - low < E::Acc::EXP_UNDERFLOW {
                    continue;
                }
                self.absorb::<FMA>(&block, &prepared, &mut work);
            }
        }
        self.write(&work, queries.len());
    }
}
