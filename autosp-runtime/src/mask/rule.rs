//! Masks as rules: a function of (query, key) instead of S x S values, and bands that a rule was recognised to be.

use candle_core::WithDType;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result as SiteResult};
use autosp_plan::codes;

/// A diagonal band of visible pairs: query `i` sees key `j` when `lo <= j - i <= hi`; `None` leaves that side open.
///
/// Causal attention is `Band { lo: None, hi: Some(0) }`; a sliding window of `w` keys `Band { lo: Some(1 - w), hi: Some(0) }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// Smallest visible `j - i`.
    pub lo: Option<i64>,
    /// Largest visible `j - i`.
    pub hi: Option<i64>,
}

impl Band {
    /// Whether query `i` sees key `j`.
    pub fn contains(self, i: usize, j: usize) -> bool {
        let distance = j as i64 - i as i64;
        self.lo.is_none_or(|lo| lo <= distance) && self.hi.is_none_or(|hi| distance <= hi)
    }

    /// Whether a block of queries and keys lies wholly inside the band (`Some(true)`), wholly outside it (`Some(false)`), or
    /// across an edge (`None`). Both ranges are non-empty.
    pub(crate) fn covers(self, queries: &Range<usize>, keys: &Range<usize>) -> Option<bool> {
        let smallest = keys.start as i64 - (queries.end as i64 - 1);
        let largest = keys.end as i64 - 1 - queries.start as i64;
        if self.lo.is_some_and(|lo| largest < lo) || self.hi.is_some_and(|hi| smallest > hi) {
            return Some(false);
        }
        let inside =
            self.lo.is_none_or(|lo| lo <= smallest) && self.hi.is_none_or(|hi| largest <= hi);
        inside.then_some(true)
    }

    /// The queries among `queries` that see key `j`.
    pub(crate) fn queries(self, j: usize, queries: &Range<usize>) -> Range<usize> {
        let clamp = |x: i64| x.clamp(queries.start as i64, queries.end as i64) as usize;
        let first = self.hi.map_or(queries.start, |hi| clamp(j as i64 - hi));
        let end = self
            .lo
            .map_or(queries.end, |lo| clamp((j as i64 - lo).saturating_add(1)));
        first..end.max(first)
    }
}

/// A rule without its types: values are doubles, which hold every mask element exactly.
pub(crate) trait Rule: Send + Sync {
    fn value(&self, i: usize, j: usize) -> f64;
    /// Writes the values of a block, key by key: `out[(j - keys.start) * stride + (i - queries.start)]`.
    fn block(&self, queries: Range<usize>, keys: Range<usize>, out: &mut [f64], stride: usize);
}

struct Closure<F>(F);

impl<T: WithDType, F: Fn(usize, usize) -> T + Send + Sync> Rule for Closure<F> {
    fn value(&self, i: usize, j: usize) -> f64 {
        (self.0)(i, j).to_f64()
    }

    fn block(&self, queries: Range<usize>, keys: Range<usize>, out: &mut [f64], stride: usize) {
        for (j, row) in keys.zip(out.chunks_mut(stride)) {
            for (i, x) in queries.clone().zip(row) {
                *x = (self.0)(i, j).to_f64();
            }
        }
    }
}

/// A band with the values that a mask has inside and outside of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Declared {
    pub(crate) band: Band,
    pub(crate) inside: f64,
    pub(crate) outside: f64,
}

/// A mask that would be `rows x cols` elements on the host, kept as the rule that makes them; see [`mask_rule`].
pub struct HostMask<T> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) rule: Arc<dyn Rule>,
    pub(crate) declared: Option<Declared>,
    element: PhantomData<T>,
}

impl<T> Clone for HostMask<T> {
    fn clone(&self) -> Self {
        Self {
            rows: self.rows,
            cols: self.cols,
            rule: self.rule.clone(),
            declared: self.declared,
            element: PhantomData,
        }
    }
}

impl<T> std::fmt::Debug for HostMask<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMask")
            .field("rows", &self.rows)
            .field("cols", &self.cols)
            .field("band", &self.declared)
            .finish_non_exhaustive()
    }
}

/// A host mask of `rows` queries by `cols` keys whose element (i, j) is `rule(i, j)`, never stored.
///
/// Sizes are global valid ones. The rule is evaluated block by block inside the attention kernel, which is exact; declare a
/// [`band`](HostMask::band) where there is one to skip blocks that are masked altogether.
pub fn mask_rule<T, F>(rows: usize, cols: usize, rule: F) -> HostMask<T>
where
    T: WithDType,
    F: Fn(usize, usize) -> T + Send + Sync + 'static,
{
    HostMask {
        rows,
        cols,
        rule: Arc::new(Closure(rule)),
        declared: None,
        element: PhantomData,
    }
}

impl<T: WithDType> HostMask<T> {
    /// Declares that the rule is `inside` within `band` and `outside` elsewhere. Compared with the rule where the mask is
    /// made into a [`Mask`](crate::mask::Mask).
    #[must_use]
    pub fn band(mut self, band: Band, inside: T, outside: T) -> Self {
        self.declared = Some(Declared {
            band,
            inside: inside.to_f64(),
            outside: outside.to_f64(),
        });
        self
    }

    /// Number of elements that the mask stands for.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the mask has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Compares a declared band with the rule: the leading corner, a coarse lattice over the whole mask, and both edges of
    /// the band.
    ///
    /// # Errors
    /// `AS0326`, naming the first pair where they differ.
    pub(crate) fn check(&self) -> SiteResult<()> {
        const CORNER: usize = 48;
        const LATTICE: usize = 37;
        const EDGE: usize = 192;
        let Some(declared) = self.declared else {
            return Ok(());
        };
        for i in 0..self.rows.min(CORNER) {
            for j in 0..self.cols.min(CORNER) {
                self.check_at(declared, i, j)?;
            }
        }
        for i in (0..self.rows).step_by(self.rows.div_ceil(LATTICE).max(1)) {
            for j in (0..self.cols).step_by(self.cols.div_ceil(LATTICE).max(1)) {
                self.check_at(declared, i, j)?;
            }
        }
        for i in (0..self.rows)
            .step_by(self.rows.div_ceil(EDGE).max(1))
            .chain(self.rows.checked_sub(1))
        {
            for edge in [declared.band.lo, declared.band.hi].into_iter().flatten() {
                for j in (i as i64 + edge - 1)..=(i as i64 + edge + 1) {
                    if (0..self.cols as i64).contains(&j) {
                        self.check_at(declared, i, j as usize)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_at(&self, declared: Declared, i: usize, j: usize) -> SiteResult<()> {
        let expected = if declared.band.contains(i, j) {
            declared.inside
        } else {
            declared.outside
        };
        let found = self.rule.value(i, j);
        // Bits, so that NaN equals itself; the two zeros are one mask value.
        if (expected + 0.0).to_bits() == (found + 0.0).to_bits() {
            return Ok(());
        }
        Err(Error::new(
            codes::BAND_DIFFERS,
            format!("the mask is not the band it was taken for: at query {i}, key {j} expected {expected}, found {found}"),
        )
        .with_help("report this with the function that builds the mask; a mask from a rule without a band is always exact"))
    }
}
