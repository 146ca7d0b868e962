//! The plain kernel: one row of scores at a time, no tiles, no threads.

use super::real::{Element, Real};
use super::{Given, Problem, log_sum};

/// A score and what led to it.
#[derive(Clone, Copy)]
struct Score<R> {
    value: R,
    /// d score / d (q·k).
    slope: R,
}

fn dot<E: Element>(a: &[E], b: &[E]) -> E::Acc {
    a.iter()
        .zip(b)
        .fold(E::Acc::ZERO, |sum, (a, b)| sum + a.up() * b.up())
}

/// Scores of one query over all valid keys.
fn scores<E: Element>(p: &Problem<'_, E>, b: usize, h: usize, i: usize) -> Vec<Score<E::Acc>> {
    let (spec, group) = (p.spec, p.spec.kv_of[h]);
    let scale = E::Acc::from_double(spec.scale);
    (0..p.keys())
        .map(|j| {
            let scaled = scale * dot(p.q.row(b, h, i), p.k.row(b, group, j));
            let mut score = Score {
                value: scaled,
                slope: scale,
            };
            if let Some(cap) = spec.cap.map(E::Acc::from_double) {
                let t = E::Acc::from_double(scaled.double().tanh());
                score = Score {
                    value: cap * t,
                    slope: scale * cap * (E::Acc::ONE - t * t),
                };
            }
            for term in &spec.terms {
                let (value, filled) = term.at(b, spec.heads[h], i, j, score.value.double());
                score.value = E::Acc::from_double(value);
                if filled {
                    score.slope = E::Acc::ZERO;
                }
            }
            score
        })
        .collect()
}

fn exp<R: Real>(x: R) -> R {
    R::from_double(x.double().exp())
}

/// O [b, h, S, dv], LSE and its rest [b, h, S].
pub(super) fn forward<E: Element>(p: &Problem<'_, E>) -> (Vec<E>, Vec<E::Acc>, Vec<E::Acc>) {
    let s = p.sizes;
    let mut o = vec![E::down(E::Acc::ZERO); s.batch * s.heads * s.queries * s.dv];
    let mut lse = vec![E::Acc::ZERO; s.batch * s.heads * s.queries];
    let mut rest = lse.clone();
    for (at, (o, (lse, rest))) in o
        .chunks_mut(s.dv.max(1))
        .zip(lse.iter_mut().zip(&mut rest))
        .enumerate()
    {
        let (b, h, i) = (
            at / s.queries / s.heads,
            at / s.queries % s.heads,
            at % s.queries,
        );
        if i >= p.queries() {
            continue;
        }
        let row = scores(p, b, h, i);
        let max = row
            .iter()
            .fold(E::Acc::NEG_INFINITY, |max, score| max.larger(score.value));
        let weights: Vec<_> = row.iter().map(|score| exp(score.value - max)).collect();
        let total = weights.iter().fold(E::Acc::ZERO, |sum, w| sum + *w);
        let mut sums = vec![E::Acc::ZERO; s.dv];
        for (j, w) in weights.iter().enumerate() {
            for (sum, v) in sums.iter_mut().zip(p.v.row(b, p.spec.kv_of[h], j)) {
                *sum += *w * v.up();
            }
        }
        for (o, sum) in o.iter_mut().zip(sums) {
            *o = E::down(sum / total);
        }
        (*lse, *rest) = log_sum(max, total);
    }
    (o, lse, rest)
}

/// dQ, dK and dV.
pub(super) fn backward<E: Element>(
    p: &Problem<'_, E>,
    given: &Given<'_, E>,
) -> (Vec<E>, Vec<E>, Vec<E>) {
    let s = p.sizes;
    let mut dq = vec![E::Acc::ZERO; s.batch * s.heads * s.queries * s.d];
    let mut dk = vec![E::Acc::ZERO; s.batch * s.kv_heads * s.keys * s.d];
    let mut dv = vec![E::Acc::ZERO; s.batch * s.kv_heads * s.keys * s.dv];
    for at in 0..s.batch * s.heads * s.queries {
        let (b, h, i) = (
            at / s.queries / s.heads,
            at / s.queries % s.heads,
            at % s.queries,
        );
        if i >= p.queries() {
            continue;
        }
        let group = p.spec.kv_of[h];
        let (q, grad) = (p.q.row(b, h, i), given.grad.row(b, h, i));
        let delta = dot(grad, given.o.row(b, h, i));
        for (j, score) in scores(p, b, h, i).into_iter().enumerate() {
            let key = (b * s.kv_heads + group) * s.keys + j;
            let weight = exp((score.value - given.lse[at]) - given.rest[at]);
            for (dv, g) in dv[key * s.dv..][..s.dv].iter_mut().zip(grad) {
                *dv += weight * g.up();
            }
            // A filled score has no gradient, also where its weight is NaN.
            if score.slope == E::Acc::ZERO {
                continue;
            }
            let ds = weight * (dot(grad, p.v.row(b, group, j)) - delta) * score.slope;
            for (dq, k) in dq[at * s.d..][..s.d].iter_mut().zip(p.k.row(b, group, j)) {
                *dq += ds * k.up();
            }
            for (dk, q) in dk[key * s.d..][..s.d].iter_mut().zip(q) {
                *dk += ds * q.up();
            }
        }
    }
    let down = |x: Vec<E::Acc>| x.into_iter().map(E::down).collect();
    (down(dq), down(dk), down(dv))
}
