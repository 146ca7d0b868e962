//! Names the axes of a site's operands: batch `b`, query heads `h`, key heads `g`, sequence `s`, width `d`.

use super::sites::Layout;
use crate::trace::Trace;
use crate::trace::graph::NodeId;
use crate::trace::shape::{Dim, Factor};
use crate::trace::size::{AtomId, AtomKind};

/// The batch or sequence that a dimension is, merged with heads or alone.
pub(super) fn token_axis(trace: &Trace<'_, '_>, dim: &Dim) -> Option<AtomId> {
    // Whether a layer runs along it is another matter, which is refused later with its reason.
    let from_input = |f: &&Factor| {
        let mut atoms = trace
            .atoms
            .normal(&f.size)
            .atoms()
            .collect::<Vec<_>>()
            .into_iter();
        atoms.any(|atom| matches!(trace.atoms.kind(atom), AtomKind::Dim(..)))
    };
    let mut found = dim.0.iter().filter(from_input);
    let (Some(factor), None) = (found.next(), found.next()) else {
        return None;
    };
    trace.atoms.normal(&factor.size).as_atom()
}

/// The layout of `q [.., s, d]`, `k [.., d, s]` and `v [.., s, d]`; None where batch, heads and sequence cannot be told apart.
pub(super) fn find(
    trace: &Trace<'_, '_>,
    [q, k, v]: [NodeId; 3],
    sequence: AtomId,
) -> Option<Layout> {
    let mut names = Names {
        trace,
        sequence,
        rows: None,
        batch: None,
    };
    let (q, k, v) = (
        names.operand(q, "h", 1)?,
        names.operand(k, "g", 2)?,
        names.operand(v, "g", 1)?,
    );
    Some(Layout {
        q,
        k,
        v,
        batch: names.batch,
    })
}

struct Names<'t, 's, 'a> {
    trace: &'t Trace<'s, 'a>,
    sequence: AtomId,
    /// The first dimension of the input that is met beside the sequence: the batch. Another one is the heads.
    rows: Option<AtomId>,
    /// The batch, if it is merged with heads somewhere.
    batch: Option<AtomId>,
}

impl Names<'_, '_, '_> {
    /// The axes of an operand whose width is the `width`-th dimension from the end.
    fn operand(&mut self, node: NodeId, heads: &'static str, width: usize) -> Option<String> {
        let dims = self.trace.nodes[node].shape.known()?;
        let width = dims.len().checked_sub(width)?;
        let mut seen: Vec<&str> = Vec::new();
        let mut text: Vec<String> = Vec::new();
        for (i, dim) in dims.iter().enumerate() {
            if i == width {
                let size = |f: &Factor| self.trace.atoms.normal(&f.size);
                if dim.0.iter().any(|f| size(f).contains(self.sequence)) {
                    return None;
                }
                text.push("d".to_string());
                continue;
            }
            let axes = self.dim(dim, heads)?;
            if axes.iter().any(|axis| seen.contains(axis)) {
                return None;
            }
            seen.extend(&axes);
            text.push(match axes.as_slice() {
                [one] => (*one).to_string(),
                many => format!("({})", many.join(" ")),
            });
        }
        seen.contains(&"s").then(|| text.join(" "))
    }

    /// The axes of one dimension, outermost first.
    fn dim(&mut self, dim: &Dim, heads: &'static str) -> Option<Vec<&'static str>> {
        let mut axes: Vec<&'static str> = Vec::new();
        let mut batch = None;
        for factor in &dim.0 {
            let size = self.trace.atoms.normal(&factor.size);
            let axis = if size.as_atom() == Some(self.sequence) && !factor.repeat {
                "s"
            } else if !self.trace.atoms.anchored(&size) {
                heads
            } else if *self.rows.get_or_insert(size.as_atom()?) == size.as_atom()? {
                batch = self.rows;
                "b"
            } else {
                heads
            };
            if axes.last() != Some(&axis) {
                axes.push(axis);
            } else if axis != heads {
                return None;
            }
        }
        if axes.len() > 1 && batch.is_some() {
            self.batch = batch;
        }
        Some(axes)
    }
}
