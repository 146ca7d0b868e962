//! The innermost products: `MR x NR` results held in registers while the shared index runs.
//!
//! Three forms, by how the left operand is read:
//! - [`panels`]: both operands packed, `a[p][MR]` and `b[p][NR]`;
//! - [`columns`]: the left operand is a transposed matrix, `a[p * lda + i]`;
//! - [`rows`]: the left operand is row-major, `a[i * lda + p]`.
//!
//! The right operand is `b[p * ldb + j]`. Six rows by sixteen columns of `f32` are twelve 8-wide accumulators: with two for
//! `b` and one for a broadcast of `a`, they fill the sixteen vector registers of AVX2.

use crate::attention::real::Real;

/// Rows of a register tile.
pub(super) const MR: usize = 6;
/// Columns of a register tile.
pub(super) const NR: usize = 16;

/// A register tile of results.
pub(super) type Acc<R> = [[R; NR]; MR];

#[inline(always)]
fn step<R: Real, const FMA: bool>(acc: &mut Acc<R>, a: [R; MR], b: &[R; NR]) {
    for i in 0..MR {
        for j in 0..NR {
            acc[i][j] = a[i].fused::<FMA>(b[j], acc[i][j]);
        }
    }
}

#[inline(always)]
pub(super) fn lanes<R: Real, const N: usize>(x: &[R]) -> &[R; N] {
    match x.first_chunk::<N>() {
        Some(x) => x,
        None => unreachable!("a packed operand is a whole number of lanes"),
    }
}

/// `sum_p a[p][i] b[p][j]` for packed operands of the same length.
#[inline(always)]
pub(super) fn panels<R: Real, const FMA: bool>(a: &[R], b: &[R]) -> Acc<R> {
    let mut acc = [[R::ZERO; NR]; MR];
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
        step::<R, FMA>(&mut acc, *lanes::<R, MR>(a), lanes::<R, NR>(b));
    }
    acc
}

/// `sum_p a[p * lda + i] b[p * ldb + j]` for `p < k`.
#[inline(always)]
pub(super) fn columns<R: Real, const FMA: bool>(
    a: &[R],
    lda: usize,
    b: &[R],
    ldb: usize,
    k: usize,
) -> Acc<R> {
    let mut acc = [[R::ZERO; NR]; MR];
    for (a, b) in a.chunks(lda).zip(b.chunks(ldb)).take(k) {
        step::<R, FMA>(&mut acc, *lanes::<R, MR>(a), lanes::<R, NR>(b));
    }
    acc
}

/// `sum_p a[i * lda + p] b[p * ldb + j]` for `p < k`.
#[inline(always)]
pub(super) fn rows<R: Real, const FMA: bool>(
    a: &[R],
    lda: usize,
    b: &[R],
    ldb: usize,
    k: usize,
) -> Acc<R> {
    let mut acc = [[R::ZERO; NR]; MR];
    let a: [&[R]; MR] = std::array::from_fn(|i| &a[i * lda..i * lda + k]);
    for (p, b) in (0..k).zip(b.chunks(ldb)) {
        step::<R, FMA>(
            &mut acc,
            std::array::from_fn(|i| a[i][p]),
            lanes::<R, NR>(b),
        );
    }
    acc
}

/// [`NR`] numbers that are written.
#[inline(always)]
pub(super) fn lanes_mut<R: Real>(x: &mut [R]) -> &mut [R; NR] {
    match x.first_chunk_mut::<NR>() {
        Some(x) => x,
        None => unreachable!("rows of a tile are a whole number of lanes"),
    }
}

/// Adds a register tile to `c[i * ldc + j]`.
#[inline(always)]
pub(super) fn accumulate<R: Real>(acc: &Acc<R>, c: &mut [R], ldc: usize) {
    for (i, acc) in acc.iter().enumerate() {
        for (c, x) in c[i * ldc..i * ldc + NR].iter_mut().zip(acc) {
            *c += *x;
        }
    }
}

/// Writes a register tile times `factor` to `c[i * ldc + j]`.
#[inline(always)]
pub(super) fn store<R: Real>(acc: &Acc<R>, factor: R, c: &mut [R], ldc: usize) {
    for (i, acc) in acc.iter().enumerate() {
        for (c, x) in c[i * ldc..i * ldc + NR].iter_mut().zip(acc) {
            *c = *x * factor;
        }
    }
}
