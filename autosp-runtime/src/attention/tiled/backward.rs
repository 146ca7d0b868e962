//! dQ, dK and dV by blocks of keys.

use rayon::prelude::*;
use std::ops::Range;

use super::micro::{self, MR, NR, lanes, lanes_mut};
use super::{KEYS, QUERIES, pack, scores, side};
use crate::attention::real::{Element, Real};
use crate::attention::simd::{Job, dispatch};
use crate::attention::{Given, Problem};
use crate::mask::{Block, Prepared};

/// Tasks that the work is split into when there are few heads.
const TASKS: usize = 8;
/// Keys below which a block is not worth its part of dQ.
const BLOCK: usize = 4 * KEYS;

/// Sizes of tiles; widths are padded to a multiple of [`NR`].
#[derive(Clone, Copy)]
struct Tiles {
    queries: usize,
    keys: usize,
    d: usize,
    dv: usize,
}

/// What one task computes: its part of dQ of the heads of its kv head, [heads][S][d], and dK and dV of its keys.
struct Part<E: Element> {
    q: Vec<E::Acc>,
    k: Vec<E>,
    v: Vec<E>,
}

/// dQ [b, h, S, d], dK [b, g, S, d] and dV [b, g, S, dv].
pub(in crate::attention) fn backward<E: Element>(
    p: &Problem<'_, E>,
    given: &Given<'_, E>,
) -> (Vec<E>, Vec<E>, Vec<E>) {
    let s = p.sizes;
    let tiles = Tiles {
        queries: side(p.queries(), QUERIES),
        keys: side(p.keys(), KEYS),
        d: s.d.next_multiple_of(NR),
        dv: s.dv.next_multiple_of(NR),
    };
    let delta: Vec<E::Acc> = (0..s.batch * s.heads * s.queries)
        .into_par_iter()
        .with_min_len(256)
        .map(|at| {
            let (b, h, i) = (
                at / s.queries / s.heads,
                at / s.queries % s.heads,
                at % s.queries,
            );
            let pairs = given.grad.row(b, h, i).iter().zip(given.o.row(b, h, i));
            pairs.fold(E::Acc::ZERO, |sum, (g, o)| sum + g.up() * o.up())
        })
        .collect();

    let zero = E::down(E::Acc::ZERO);
    let mut dk = vec![zero; s.batch * s.kv_heads * s.keys * s.d];
    let mut dv = vec![zero; s.batch * s.kv_heads * s.keys * s.dv];
    let mut dq = vec![zero; s.batch * s.heads * s.queries * s.d];
    if p.keys() == 0 || s.batch * s.kv_heads == 0 {
        return (dq, dk, dv);
    }
    let pairs = s.batch * s.kv_heads;
    let blocks = TASKS.div_ceil(pairs).min(p.keys().div_ceil(BLOCK)).max(1);
    let block = p.keys().div_ceil(blocks).next_multiple_of(tiles.keys);
    let blocks = p.keys().div_ceil(block);
    let heads: Vec<Vec<usize>> = (0..s.kv_heads).map(|g| p.heads_of(g)).collect();

    let parts: Vec<Part<E>> = (0..pairs * blocks)
        .into_par_iter()
        .map(|task| {
            let (b, g) = (task / blocks / s.kv_heads, task / blocks % s.kv_heads);
            let first = task % blocks * block;
            let keys = first..(first + block).min(p.keys());
            dispatch(KeyBlock {
                p,
                given,
                delta: &delta,
                tiles,
                b,
                g,
                heads: &heads[g],
                keys,
            })
        })
        .collect();

    for (task, part) in parts.iter().enumerate() {
        let first = task / blocks * s.keys + task % blocks * block;
        dk[first * s.d..][..part.k.len()].copy_from_slice(&part.k);
        dv[first * s.dv..][..part.v.len()].copy_from_slice(&part.v);
    }
    if s.d > 0 && s.queries > 0 {
        dq.par_chunks_mut(s.queries * s.d)
            .enumerate()
            .for_each(|(at, out)| {
                let (b, h) = (at / s.heads, at % s.heads);
                let g = p.spec.kv_of[h];
                let place =
                    heads[g].iter().position(|&other| other == h).unwrap_or(0) * s.queries * s.d;
                let parts = &parts[(b * s.kv_heads + g) * blocks..][..blocks];
                for (x, out) in out.iter_mut().enumerate() {
                    *out = E::down(
                        parts
                            .iter()
                            .fold(E::Acc::ZERO, |sum, part| sum + part.q[place + x]),
                    );
                }
            });
    }
    (dq, dk, dv)
}

/// The task of one block of keys of one kv head.
struct KeyBlock<'a, E: Element> {
    p: &'a Problem<'a, E>,
    given: &'a Given<'a, E>,
    delta: &'a [E::Acc],
    tiles: Tiles,
    b: usize,
    g: usize,
    heads: &'a [usize],
    keys: Range<usize>,
}

/// A tile of queries with what belongs to it.
struct QueryTile<R> {
    /// Panels of [`NR`] queries, and their rows.
    panels: Vec<R>,
    rows: Vec<R>,
    /// The same of dO.
    grad_panels: Vec<R>,
    grad_rows: Vec<R>,
    lse: Vec<R>,
    rest: Vec<R>,
    delta: Vec<R>,
    /// Sums of dS K.
    dq: Vec<R>,
}

impl<R: Real> QueryTile<R> {
    fn new(tiles: Tiles, d: usize, dv: usize) -> Self {
        let zeros = |n: usize| vec![R::ZERO; n];
        let n = tiles.queries;
        Self {
            panels: zeros(n * d),
            rows: zeros(n * tiles.d),
            grad_panels: zeros(n * dv),
            grad_rows: zeros(n * tiles.dv),
            lse: zeros(n),
            rest: zeros(n),
            delta: zeros(n),
            dq: zeros(n * tiles.d),
        }
    }
}

impl<E: Element> KeyBlock<'_, E> {
    /// Loads a tile of queries.
    #[inline(always)]
    fn load(&self, h: usize, queries: &Range<usize>, tile: &mut QueryTile<E::Acc>) {
        let Self {
            p, given, tiles, b, ..
        } = self;
        let s = p.sizes;
        let rows = p.q.rows(*b, h, queries.clone());
        let grads = given.grad.rows(*b, h, queries.clone());
        pack::panels::<E, NR>(rows.clone(), s.d, &mut tile.panels);
        pack::matrix::<E>(rows, tiles.d, &mut tile.rows);
        pack::panels::<E, NR>(grads.clone(), s.dv, &mut tile.grad_panels);
        pack::matrix::<E>(grads, tiles.dv, &mut tile.grad_rows);
        let at = (b * s.heads + h) * s.queries;
        // Lanes without a query: exp(0 - inf) is a weight of zero.
        tile.lse.fill(-E::Acc::NEG_INFINITY);
        tile.rest.fill(E::Acc::ZERO);
        tile.delta.fill(E::Acc::ZERO);
        let (first, end) = (at + queries.start, at + queries.end);
        tile.lse[..queries.len()].copy_from_slice(&given.lse[first..end]);
        tile.rest[..queries.len()].copy_from_slice(&given.rest[first..end]);
        tile.delta[..queries.len()].copy_from_slice(&self.delta[first..end]);
        tile.dq.fill(E::Acc::ZERO);
    }
}

/// P and dS from scores and dP, in place, for all keys of a tile; `slope` is d score / d (scale q·k) where
/// scores are capped, else empty.
#[inline(always)]
fn weigh<R: Real, const FMA: bool>(
    scores: &mut [R],
    gradients: &mut [R],
    slope: &[R],
    tile: &QueryTile<R>,
    width: usize,
) {
    for lane in (0..width).step_by(NR) {
        let lse = *lanes::<R, NR>(&tile.lse[lane..]);
        let rest = *lanes::<R, NR>(&tile.rest[lane..]);
        let delta = *lanes::<R, NR>(&tile.delta[lane..]);
        for (p, ds) in scores
            .chunks_exact_mut(width)
            .zip(gradients.chunks_exact_mut(width))
        {
            let (p, ds) = (lanes_mut(&mut p[lane..]), lanes_mut(&mut ds[lane..]));
            // Loops: a closure here may stay a function of its own, compiled without the vector instructions.
            for i in 0..NR {
                p[i] = ((p[i] - lse[i]) - rest[i]).fast_exp::<FMA>();
                ds[i] = p[i] * (ds[i] - delta[i]);
            }
        }
    }
    for (ds, slope) in gradients.iter_mut().zip(slope) {
        *ds *= *slope;
    }
}

/// Keys and values of a task in the orders that its products read, the sums that it makes, and a tile of scores.
struct Work<R> {
    /// Panels of [`MR`] keys, and their rows.
    k_panels: Vec<R>,
    k_rows: Vec<R>,
    /// Panels of [`MR`] values.
    v_panels: Vec<R>,
    /// The largest 2-norm of a key, if something needs it.
    norm: f64,
    dk: Vec<R>,
    dv: Vec<R>,
    scores: Vec<R>,
    grads: Vec<R>,
    /// d score / d (scale q·k), where scores are capped.
    slope: Vec<R>,
}

impl<E: Element> KeyBlock<'_, E> {
    #[inline(always)]
    fn work(&self, bounded: bool) -> Work<E::Acc> {
        let Self {
            p,
            tiles,
            b,
            g,
            keys,
            ..
        } = self;
        let s = p.sizes;
        let padded = keys.len().next_multiple_of(tiles.keys);
        let (zeros, tile) = (|n: usize| vec![E::Acc::ZERO; n], tiles.keys * tiles.queries);
        let rows = p.k.rows(*b, *g, keys.clone());
        let mut work = Work {
            k_panels: zeros(padded * s.d),
            k_rows: zeros(padded * tiles.d),
            v_panels: zeros(padded * s.dv),
            norm: if bounded {
                pack::largest_norm(rows.clone())
            } else {
                0.0
            },
            dk: zeros(padded * tiles.d),
            dv: zeros(padded * tiles.dv),
            scores: zeros(tile),
            grads: zeros(tile),
            slope: zeros(if p.spec.cap.is_some() { tile } else { 0 }),
        };
        pack::panels::<E, MR>(rows.clone(), s.d, &mut work.k_panels);
        pack::matrix::<E>(rows, tiles.d, &mut work.k_rows);
        pack::panels::<E, MR>(p.v.rows(*b, *g, keys.clone()), s.dv, &mut work.v_panels);
        work
    }

    /// Adds what the queries of `tile` and the keys of `block` have to do with each other; the keys begin at `at` in the task's.
    #[inline(always)]
    fn absorb<const FMA: bool>(
        &self,
        block: &Block,
        at: usize,
        prepared: &Prepared,
        tile: &mut QueryTile<E::Acc>,
        work: &mut Work<E::Acc>,
    ) {
        let Self { p, tiles, .. } = self;
        let (spec, s, width) = (p.spec, p.sizes, tiles.queries);
        let Work {
            scores,
            grads,
            slope,
            ..
        } = work;
        let k = &work.k_panels[at * s.d..(at + tiles.keys) * s.d];
        scores::product::<_, FMA>(
            k,
            &tile.panels,
            s.d,
            E::Acc::from_double(spec.scale),
            width,
            scores,
        );
        if let Some(cap) = spec.cap.map(E::Acc::from_double) {
            for (x, slope) in scores.iter_mut().zip(slope.iter_mut()) {
                let t = x.fast_tanh::<FMA>();
                *slope = cap * (E::Acc::ONE - t * t);
                *x = cap * t;
            }
        }
        scores::mask(prepared, block, width, scores);
        let v = &work.v_panels[at * s.dv..(at + tiles.keys) * s.dv];
        scores::product::<_, FMA>(v, &tile.grad_panels, s.dv, E::Acc::ONE, width, grads);
        weigh::<_, FMA>(scores, grads, slope, tile, width);
        let there = block.keys.len() * width;
        prepared.clear_filled(block, &mut grads[..there], width);
        scores[there..].fill(E::Acc::ZERO);
        grads[there..].fill(E::Acc::ZERO);

        let dv = &mut work.dv[at * tiles.dv..];
        product_rows::<_, FMA>(scores, width, &tile.grad_rows, tiles.dv, tiles.keys, dv);
        let dk = &mut work.dk[at * tiles.d..];
        product_rows::<_, FMA>(grads, width, &tile.rows, tiles.d, tiles.keys, dk);
        let k = &work.k_rows[at * tiles.d..];
        for c in (0..tiles.d).step_by(NR) {
            for i in (0..width).step_by(MR) {
                let acc = micro::columns::<_, FMA>(
                    &grads[i..],
                    width,
                    &k[c..],
                    tiles.d,
                    block.keys.len(),
                );
                micro::accumulate(&acc, &mut tile.dq[i * tiles.d + c..], tiles.d);
            }
        }
    }

    /// The blocks of keys and where they begin in the task's.
    fn blocks(&self, head: usize, queries: &Range<usize>) -> impl Iterator<Item = (usize, Block)> {
        let Self {
            p, tiles, b, keys, ..
        } = self;
        let (batch, head, step, keys) = (*b, p.spec.heads[head], tiles.keys, keys.clone());
        let queries = queries.clone();
        (0..keys.len()).step_by(step).map(move |at| {
            let keys = keys.start + at..(keys.start + at + step).min(keys.end);
            (
                at,
                Block {
                    batch,
                    head,
                    queries: queries.clone(),
                    keys,
                },
            )
        })
    }
}

impl<E: Element> Job for KeyBlock<'_, E> {
    type Out = Part<E>;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Part<E> {
        let Self {
            p, tiles, ref keys, ..
        } = self;
        let (spec, s) = (p.spec, p.sizes);
        let scale = E::Acc::from_double(spec.scale);
        let bounded = spec.cap.is_none() && spec.terms.iter().any(crate::mask::Term::adds);
        let mut work = self.work(bounded);
        let mut tile = QueryTile::new(tiles, s.d, s.dv);
        let mut dq = vec![E::Acc::ZERO; self.heads.len() * s.queries * s.d];

        for (place, &h) in self.heads.iter().enumerate() {
            for first in (0..p.queries()).step_by(tiles.queries) {
                let queries = first..(first + tiles.queries).min(p.queries());
                let low = lowest(&self, h, &queries);
                let bound = match spec.cap {
                    Some(cap) => cap.abs(),
                    None if bounded => {
                        let norm = pack::largest_norm(p.q.rows(self.b, h, queries.clone()));
                        spec.scale.abs() * work.norm * norm * 1.001
                    }
                    None => f64::INFINITY,
                };
                let mut loaded = false;
                for (at, block) in self.blocks(h, &queries) {
                    let prepared = Prepared::new(&spec.terms, &block, bound);
                    if prepared.upper - low < E::Acc::EXP_UNDERFLOW {
                        continue;
                    }
                    if !loaded {
                        self.load(h, &queries, &mut tile);
                        loaded = true;
                    }
                    self.absorb::<FMA>(&block, at, &prepared, &mut tile, &mut work);
                }
                if loaded {
                    let out = &mut dq[(place * s.queries + first) * s.d..];
                    let rows = out
                        .chunks_mut(s.d.max(1))
                        .zip(tile.dq.chunks(tiles.d.max(1)));
                    for (out, x) in rows.take(queries.len()) {
                        for (out, x) in out.iter_mut().zip(x) {
                            *out = *x * scale;
                        }
                    }
                }
            }
        }
        let rows = |x: &[E::Acc], width: usize, d: usize, factor: E::Acc| -> Vec<E> {
            let rows = x.chunks(width.max(1)).take(keys.len());
            rows.flat_map(|row| row[..d].iter().map(|x| E::down(*x * factor)))
                .collect()
        };
        Part {
            q: dq,
            k: rows(&work.dk, tiles.d, s.d, scale),
            v: rows(&work.dv, tiles.dv, s.dv, E::Acc::ONE),
        }
    }
}

/// The smallest LSE among `queries`, NaN if one is.
fn lowest<E: Element>(task: &KeyBlock<'_, E>, h: usize, queries: &Range<usize>) -> f64 {
    let at = (task.b * task.p.sizes.heads + h) * task.p.sizes.queries;
    let lse = &task.given.lse[at + queries.start..at + queries.end];
    lse.iter().fold(f64::INFINITY, |low, x| {
        if low.is_nan() || x.double() >= low {
            low
        } else {
            x.double()
        }
    })
}

/// Adds `left` [keys][queries] times `right` [queries][d] to `out` [keys][d]; `d` is a multiple of [`NR`].
#[inline(always)]
fn product_rows<R: Real, const FMA: bool>(
    left: &[R],
    queries: usize,
    right: &[R],
    d: usize,
    keys: usize,
    out: &mut [R],
) {
    for c in (0..d).step_by(NR) {
        for j in (0..keys).step_by(MR) {
            let acc = micro::rows::<R, FMA>(&left[j * queries..], queries, &right[c..], d, queries);
            micro::accumulate(&acc, &mut out[j * d + c..], d);
        }
    }
}
