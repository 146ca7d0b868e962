//! Masks as the kernels see them: what a block of queries and keys has to be changed by, or whether it can be left out.

// Inlined into the kernels, to be compiled for their vectors.
#![allow(
    clippy::inline_always,
    reason = "inlining decides which instructions are used"
)]

use std::ops::Range;
use std::sync::Arc;

use autosp_plan::codes;

use super::{Change, Declared, Mask, Rule, Source};
use crate::attention::real::Real;
use crate::error::{Error, Result};
use crate::scores::View;

/// What a mask does to the scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Action {
    /// Scores become `value` where the mask is non-zero (`nonzero`), or where it is zero.
    Fill { value: f64, nonzero: bool },
    /// The mask is added to the scores.
    Add,
}

impl Action {
    fn fills(self, x: f64) -> bool {
        matches!(self, Self::Fill { nonzero, .. } if (x != 0.0) == nonzero)
    }

    /// Whether a mask value leaves a score as it is.
    fn idle(self, x: f64) -> bool {
        match self {
            Self::Fill { .. } => !self.fills(x),
            Self::Add => x == 0.0,
        }
    }
}

/// What is this or less counts for nothing beside scores of half precision.
#[cfg(any(feature = "cuda", test))]
const HIDDEN: f64 = -6e4;

enum Values {
    Band(Declared),
    Rule(Arc<dyn Rule>, Vec<Change>),
    Dense {
        data: Arc<Vec<f64>>,
        strides: [usize; 4],
        changes: Vec<Change>,
    },
}

/// One mask applied to the scores; cheap to clone.
#[derive(Clone)]
pub(crate) struct Term {
    values: Arc<Values>,
    action: Action,
}

impl std::fmt::Debug for Term {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let values = match &*self.values {
            Values::Band(declared) => format!("{declared:?}"),
            Values::Rule(..) => "rule".to_owned(),
            Values::Dense { .. } => "dense".to_owned(),
        };
        write!(f, "{:?} by {values}", self.action)
    }
}

/// A block of scores: batch row, global query head, queries and keys (valid ones, non-empty).
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) batch: usize,
    pub(crate) head: usize,
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
}

/// What one term is on one block.
enum Part {
    Uniform(f64),
    Band(Declared),
    /// Key by key, `stride` values each.
    Values {
        values: Vec<f64>,
        stride: usize,
    },
}

/// All terms on one block, ready to be applied.
pub(crate) struct Prepared {
    parts: Vec<(Action, Part)>,
    /// An upper bound of the scores after all terms.
    pub(crate) upper: f64,
    /// Whether a term covers the whole block with a fill or a large negative number: such blocks rarely count.
    pub(crate) covered: bool,
}

impl Term {
    /// Resolves a mask against the sizes of a site: `batch` rows, `heads` global query heads, `length` valid tokens.
    ///
    /// # Errors
    /// `AS0325` for sizes that do not fit the scores, or a float mask as condition or an integer mask as summand.
    pub(crate) fn new(
        mask: &Mask,
        action: Action,
        batch: usize,
        heads: usize,
        length: usize,
    ) -> Result<Self> {
        Self::aligned(mask, action, &View::plain(batch, heads, length))
    }

    /// Resolves a mask against scores in the dims that the model gave them.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn aligned(mask: &Mask, action: Action, view: &View) -> Result<Self> {
        let refused = |message: String| Error::new(codes::SITE_MASK, message);
        match action {
            Action::Fill { .. } if !mask.is_select() => {
                return Err(refused(format!(
                    "where_cond: expected an integer mask, found {:?}",
                    mask.dtype()
                )));
            }
            Action::Add if mask.is_select() => {
                return Err(refused(format!(
                    "a mask that is added: expected a float mask, found {:?}",
                    mask.dtype()
                )));
            }
            _ => {}
        }
        let query = match &mask.source {
            Source::Rule { .. } => Some(mask.query),
            Source::Dense { .. } => None,
        };
        if !view.takes(mask.dims(), query) {
            return Err(refused(format!("expected a mask that broadcasts to the scores {:?}, found {:?}", view.dims(), mask.dims()))
                .with_help("masks are over the global sequence: build them from the length that the model computes"));
        }
        let length = view.sizes()[2];
        let values = match &mask.source {
            Source::Rule { rows, cols, .. } if (*rows, *cols) != (length, length) => {
                return Err(refused(format!(
                    "expected a mask of {length} queries by {length} keys, found {rows} by {cols}"
                )));
            }
            Source::Rule {
                declared:
                    Some(Declared {
                        band,
                        inside,
                        outside,
                    }),
                ..
            } => Values::Band(Declared {
                band: *band,
                inside: mask.changed_value(*inside),
                outside: mask.changed_value(*outside),
            }),
            Source::Rule { rule, .. } => Values::Rule(rule.clone(), mask.changes.clone()),
            Source::Dense { data, view: values } => Values::Dense {
                data: data.clone(),
                strides: view.strides(values.dims(), values.stride()),
                changes: mask.changes.clone(),
            },
        };
        Ok(Self {
            values: Arc::new(values),
            action,
        })
    }

    /// Whether the term needs an upper bound of the scores before it, to tell blocks that cannot count.
    pub(crate) fn adds(&self) -> bool {
        self.action == Action::Add
    }

    /// The band outside of which this term hides keys from a query, if that is all that it does: outside, scores are filled with
    /// or get added -6e4 or less, which no score in half precision outweighs; inside, they stay what they are.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn visible_band(&self) -> Option<super::Band> {
        use super::Band;
        let Values::Band(Declared {
            band,
            inside,
            outside,
        }) = &*self.values
        else {
            return None;
        };
        let hides = |x: f64| match self.action {
            Action::Fill { value, .. } => self.action.fills(x) && value <= HIDDEN,
            Action::Add => x <= HIDDEN,
        };
        let band = match (band.lo, band.hi) {
            _ if self.action.idle(*inside) && hides(*outside) => *band,
            // What the band covers is hidden: the other side is seen, where there is only one.
            (Some(lo), None) if hides(*inside) && self.action.idle(*outside) => Band {
                lo: None,
                hi: Some(lo - 1),
            },
            (None, Some(hi)) if hides(*inside) && self.action.idle(*outside) => Band {
                lo: Some(hi + 1),
                hi: None,
            },
            _ => return None,
        };
        // Every query sees itself, so that no row is empty.
        (band.lo.is_none_or(|lo| lo <= 0) && band.hi.is_none_or(|hi| hi >= 0)).then_some(band)
    }

    fn part(&self, block: &Block) -> Part {
        let Block { queries, keys, .. } = block;
        match &*self.values {
            Values::Band(declared) => match declared.band.covers(queries, keys) {
                Some(true) => Part::Uniform(declared.inside),
                Some(false) => Part::Uniform(declared.outside),
                None => Part::Band(*declared),
            },
            Values::Rule(rule, changes) => {
                let stride = queries.len();
                let mut values = vec![0.0; stride * keys.len()];
                rule.block(queries.clone(), keys.clone(), &mut values, stride);
                changed(&mut values, changes);
                gathered(values, stride)
            }
            Values::Dense {
                data,
                strides,
                changes,
            } => {
                let stride = queries.len();
                let mut values = Vec::with_capacity(stride * keys.len());
                let origin = block.batch * strides[0] + block.head * strides[1];
                for j in keys.clone() {
                    values.extend(
                        queries
                            .clone()
                            .map(|i| data[origin + i * strides[2] + j * strides[3]]),
                    );
                }
                changed(&mut values, changes);
                gathered(values, stride)
            }
        }
    }

    /// The score (`Some`) after this term, or the value that replaces it: for the plain kernel. Returns the new score and whether
    /// the score was replaced.
    pub(crate) fn at(
        &self,
        batch: usize,
        head: usize,
        i: usize,
        j: usize,
        score: f64,
    ) -> (f64, bool) {
        let x = match &*self.values {
            Values::Band(Declared {
                band,
                inside,
                outside,
            }) => {
                if band.contains(i, j) {
                    *inside
                } else {
                    *outside
                }
            }
            Values::Rule(rule, changes) => changes
                .iter()
                .fold(rule.value(i, j), |x, change| change.apply(x)),
            Values::Dense {
                data,
                strides,
                changes,
            } => {
                let at = batch * strides[0] + head * strides[1] + i * strides[2] + j * strides[3];
                changes.iter().fold(data[at], |x, change| change.apply(x))
            }
        };
        match self.action {
            Action::Fill { value, .. } if self.action.fills(x) => (value, true),
            Action::Fill { .. } => (score, false),
            Action::Add => (score + x, false),
        }
    }
}

fn changed(values: &mut [f64], changes: &[Change]) {
    for change in changes {
        for x in values.iter_mut() {
            *x = change.apply(*x);
        }
    }
}

/// Block values as they are, or as the one number that all of them are.
fn gathered(values: Vec<f64>, stride: usize) -> Part {
    match values.split_first() {
        Some((first, rest)) if rest.iter().all(|x| x.to_bits() == first.to_bits()) => {
            Part::Uniform(*first)
        }
        _ => Part::Values { values, stride },
    }
}

impl Prepared {
    /// Looks at all terms on a block whose scores are at most `bound` before them.
    pub(crate) fn new(terms: &[Term], block: &Block, bound: f64) -> Self {
        let mut prepared = Self {
            parts: Vec::new(),
            upper: bound,
            covered: false,
        };
        for term in terms {
            prepared.push(term.action, term.part(block));
        }
        prepared
    }

    fn push(&mut self, action: Action, part: Part) {
        if let Part::Uniform(x) = part {
            if action.idle(x) {
                return;
            }
            match action {
                Action::Fill { value, .. } => {
                    self.upper = value;
                    self.covered = true;
                }
                Action::Add => {
                    self.upper += x;
                    self.covered |= x < -1e3;
                }
            }
        } else {
            let largest = |a: f64, b: f64| if b > a { b } else { a };
            let added = match &part {
                Part::Band(declared) => largest(declared.inside, declared.outside),
                Part::Values { values, .. } => {
                    values.iter().copied().fold(f64::NEG_INFINITY, largest)
                }
                Part::Uniform(x) => *x,
            };
            self.upper = match action {
                Action::Fill { value, .. } => largest(self.upper, value),
                Action::Add => self.upper + added,
            };
        }
        self.parts.push((action, part));
    }

    /// Changes scores stored key by key, `scores[(j - keys.start) * stride + (i - queries.start)]`.
    #[inline(always)]
    pub(crate) fn apply<R: Real>(&self, block: &Block, scores: &mut [R], stride: usize) {
        for (action, part) in &self.parts {
            match *action {
                Action::Fill { value, .. } => {
                    let value = R::from_double(value);
                    part.visit(block, scores, stride, |x, mask| {
                        if action.fills(mask) {
                            *x = value;
                        }
                    });
                }
                Action::Add => part.visit(block, scores, stride, |x, mask| {
                    *x += R::from_double(mask);
                }),
            }
        }
    }

    /// Clears the gradients of scores that a term replaced.
    #[inline(always)]
    pub(crate) fn clear_filled<R: Real>(&self, block: &Block, gradients: &mut [R], stride: usize) {
        for (action, part) in &self.parts {
            if matches!(action, Action::Fill { .. }) {
                part.visit(block, gradients, stride, |x, mask| {
                    if action.fills(mask) {
                        *x = R::ZERO;
                    }
                });
            }
        }
    }
}

impl Part {
    #[inline(always)]
    fn visit<R: Real>(
        &self,
        block: &Block,
        scores: &mut [R],
        stride: usize,
        mut change: impl FnMut(&mut R, f64),
    ) {
        let width = block.queries.len();
        for (row, j) in scores.chunks_mut(stride).zip(block.keys.clone()) {
            let row = &mut row[..width];
            match self {
                Self::Uniform(value) => row.iter_mut().for_each(|x| change(x, *value)),
                Self::Band(Declared {
                    band,
                    inside,
                    outside,
                }) => {
                    let visible = band.queries(j, &block.queries);
                    let (first, end) = (
                        visible.start - block.queries.start,
                        visible.end - block.queries.start,
                    );
                    row[..first].iter_mut().for_each(|x| change(x, *outside));
                    row[first..end].iter_mut().for_each(|x| change(x, *inside));
                    row[end..].iter_mut().for_each(|x| change(x, *outside));
                }
                Self::Values { values, stride } => {
                    let at = (j - block.keys.start) * stride;
                    row.iter_mut()
                        .zip(&values[at..at + width])
                        .for_each(|(x, value)| change(x, *value));
                }
            }
        }
    }
}
