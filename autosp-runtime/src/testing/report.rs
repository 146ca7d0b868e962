//! What a comparison found, and how it is told.

use std::fmt::{self, Write as _};

use autosp_plan::codes;
use autosp_plan::settings::Policy;

use super::{Cases, Gradient, Outcome};
use crate::{Error, Result};

/// One combination of what [`Cases`] list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Case {
    /// Ranks that share a sequence.
    pub sp: usize,
    /// Replicas.
    pub dp: usize,
    /// Head groups.
    pub groups: usize,
    /// What the forward keeps.
    pub policy: Policy,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = self.policy.name();
        write!(
            f,
            "sp {}, dp {}, groups {}, policy {policy}",
            self.sp, self.dp, self.groups
        )
    }
}

/// All runs of a comparison.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report {
    /// One for each case.
    pub runs: Vec<Run>,
}

/// One case against one rank.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Run {
    /// The case.
    pub case: Case,
    /// Its loss.
    pub loss: f64,
    /// The loss of one rank.
    pub expected_loss: f64,
    /// Every gradient, in the order of the variables' names.
    pub gradients: Vec<Difference>,
    /// How far the loss may be from that of one rank.
    pub allowed_loss: f64,
}

/// How far one gradient is from that of one rank.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Difference {
    /// The variable.
    pub name: String,
    /// 2-norm of the difference.
    pub error: f64,
    /// 2-norm of one rank's gradient.
    pub norm: f64,
    /// What the error may be.
    pub allowed: f64,
    /// Where the largest difference is.
    pub index: Vec<usize>,
    /// The element there.
    pub found: f64,
    /// One rank's element there.
    pub expected: f64,
}

impl Difference {
    fn new(found: &Gradient, expected: &Gradient, relative: f64, floor: f64) -> Self {
        let pairs = || found.values.iter().zip(&expected.values);
        // Compared through the total order, so that a NaN is the largest difference.
        let worst = pairs()
            .enumerate()
            .max_by(|(_, a), (_, b)| (a.0 - a.1).abs().total_cmp(&(b.0 - b.1).abs()));
        let (place, found_there, expected_there) =
            worst.map_or((0, 0.0, 0.0), |(i, (&a, &b))| (i, a, b));
        let error = norm(pairs().map(|(a, b)| a - b));
        let own = norm(expected.values.iter().copied());
        Self {
            name: found.name.clone(),
            error,
            norm: own,
            allowed: relative * own + floor,
            index: unravel(place, &found.dims),
            found: found_there,
            expected: expected_there,
        }
    }

    /// Whether the error is within what is allowed.
    pub fn is_small(&self) -> bool {
        self.error <= self.allowed
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            error,
            norm,
            allowed,
            index,
            found,
            expected,
        } = self;
        write!(
            f,
            "the gradient of `{name}` differs by {error:.2e} (2-norm; its own is {norm:.2e}, allowed {allowed:.2e}), "
        )?;
        write!(
            f,
            "most at {index:?}: expected {expected:e}, found {found:e}"
        )
    }
}

impl Run {
    pub(super) fn new(
        cases: &Cases,
        case: Case,
        found: &Outcome,
        expected: &Outcome,
    ) -> Result<Self> {
        let names = |outcome: &Outcome| {
            outcome
                .gradients
                .iter()
                .map(|g| (g.name.clone(), g.dims.clone()))
                .collect::<Vec<_>>()
        };
        let (ours, theirs) = (names(found), names(expected));
        if let Some((name, dims)) = ours
            .iter()
            .find(|own| !theirs.contains(own))
            .or(theirs.iter().find(|own| !ours.contains(own)))
        {
            let text = format!(
                "expected the same variables in both models, found `{name}` of shape {dims:?} in one of them"
            );
            return Err(Error::new(codes::NOT_EQUIVALENT, text).context(case));
        }
        let global = norm(
            expected
                .gradients
                .iter()
                .flat_map(|g| g.values.iter().copied()),
        );
        let pairs = found.gradients.iter().zip(&expected.gradients);
        Ok(Self {
            case,
            loss: found.loss,
            expected_loss: expected.loss,
            gradients: pairs
                .map(|(a, b)| Difference::new(a, b, cases.relative, cases.floor * global))
                .collect(),
            allowed_loss: cases.relative * expected.loss.abs(),
        })
    }

    /// Whether the loss and all gradients are within what is allowed.
    pub fn is_equivalent(&self) -> bool {
        self.loss_is_close() && self.gradients.iter().all(Difference::is_small)
    }

    fn loss_is_close(&self) -> bool {
        (self.loss - self.expected_loss).abs() <= self.allowed_loss
    }

    /// The gradient that is furthest beyond what is allowed, relative to it.
    pub fn worst(&self) -> Option<&Difference> {
        let excess = |d: &Difference| {
            if d.error == 0.0 {
                0.0
            } else {
                d.error / d.allowed
            }
        };
        self.gradients
            .iter()
            .max_by(|a, b| excess(a).total_cmp(&excess(b)))
    }
}

impl Report {
    /// Whether every run is equivalent to one rank.
    pub fn is_equivalent(&self) -> bool {
        self.runs.iter().all(Run::is_equivalent)
    }

    /// # Errors
    /// AS0517 naming the first run that differs, the tensor that differs most, where, and by how much.
    pub fn check(&self) -> Result<()> {
        let Some(run) = self.runs.iter().find(|run| !run.is_equivalent()) else {
            return Ok(());
        };
        let case = run.case;
        let wrong = run.gradients.iter().filter(|d| !d.is_small()).count();
        let mut text = format!("{case}: expected what one rank computes, found a difference");
        if !run.loss_is_close() {
            let (found, expected, allowed) = (run.loss, run.expected_loss, run.allowed_loss);
            let _ = write!(
                text,
                "\n  the loss is {found}, expected {expected} (allowed {allowed:.1e})"
            );
        }
        if let Some(worst) = run.worst().filter(|_| wrong > 0) {
            let _ = write!(
                text,
                "\n  {worst}\n  {wrong} of {} gradients differ",
                run.gradients.len()
            );
        }
        Err(Error::new(codes::NOT_EQUIVALENT, text))
    }
}

pub(super) fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// The index of an element, from its place in row-major order.
pub(super) fn unravel(mut place: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (slot, &size) in index.iter_mut().zip(dims).rev() {
        *slot = place % size.max(1);
        place /= size.max(1);
    }
    index
}
