//! The number of dimensions of tensors: what is read later says what was before.

use super::Trace;
use super::graph::{NodeId, Op};
use super::shape::{Dim, Shape};

impl Trace<'_, '_> {
    /// The dimensions of a tensor, once its rank is known from a use such as `dims3()`.
    pub(crate) fn with_rank(&mut self, node: NodeId, rank: usize) -> Option<Vec<Dim>> {
        match &self.nodes[node].shape {
            Shape::Known(dims) => return (dims.len() == rank).then(|| dims.clone()),
            Shape::Either(all) => return all.iter().find(|d| d.len() == rank).cloned(),
            Shape::Unknown(_) => return None,
            Shape::Partial(_) => {}
        }
        let Shape::Partial(known) = self.nodes[node].shape.clone() else {
            return None;
        };
        let op = self.nodes[node].op.clone();
        let source = self.nodes[node].inputs.first().map(|i| i.node);
        let mut dims: Vec<Dim> = match (&op, source) {
            (Op::Param(name), _) => {
                self.atoms.rank_of(name, rank);
                (0..rank)
                    .map(|d| Dim::of(self.atoms.dim(name, d as i64)))
                    .collect()
            }
            (Op::Row(row), Some(source))
                if row.shape == crate::ops::ShapeRule::Embedding && rank > 0 =>
            {
                let mut dims = self.with_rank(source, rank - 1)?;
                dims.push(Dim::of(
                    self.feature(format!("{}.width", self.nodes[node].text.clone())),
                ));
                dims
            }
            (Op::Row(row), Some(source))
                if row.shape == crate::ops::ShapeRule::Linear && rank > 0 =>
            {
                let mut dims = self.with_rank(source, rank)?;
                dims[rank - 1] =
                    Dim::of(self.feature(format!("{}.out", self.nodes[node].text.clone())));
                dims
            }
            (Op::Row(row), Some(source))
                if matches!(
                    row.shape,
                    crate::ops::ShapeRule::Same | crate::ops::ShapeRule::Broadcast
                ) =>
            {
                self.with_rank(source, rank)?
            }
            (Op::Row(row), Some(source))
                if row.shape == crate::ops::ShapeRule::AlongLast && rank > 0 =>
            {
                let dims = self.with_rank(source, rank)?;
                if row.name() == "forward" {
                    let width = dims[rank - 1].size(&self.atoms);
                    self.atoms.is_width(&width);
                }
                self.nodes[node].touches = vec![(0, rank - 1)];
                dims
            }
            (Op::Phi { .. }, Some(source)) => self.with_rank(source, rank)?,
            _ => {
                let table = self.is_table(node);
                (0..rank)
                    .map(|d| {
                        let size =
                            self.feature(format!("{}.dim({d})", self.nodes[node].text.clone()));
                        if table {
                            self.atoms.unseen(&size);
                        }
                        Dim::of(size)
                    })
                    .collect()
            }
        };
        for (d, dim) in known {
            if let Some(slot) = dims.get_mut(d) {
                *slot = dim;
            }
        }
        self.nodes[node].shape = Shape::Known(dims.clone());
        Some(dims)
    }

    /// The rank of a tensor whose dimensions were not known when it was made, if that of what it was made of is known by now.
    pub(super) fn late_rank(&self, node: NodeId) -> Option<usize> {
        use crate::ops::ShapeRule::{AlongLast, Broadcast, Embedding, Linear, Same};
        let n = &self.nodes[node];
        let first = || self.late_rank(n.inputs.first()?.node);
        match (&n.shape, &n.op) {
            (Shape::Known(dims), _) => Some(dims.len()),
            (Shape::Partial(_), Op::Row(row)) => match row.shape {
                Same | Broadcast | Linear | AlongLast => first(),
                Embedding => first().map(|rank| rank + 1),
                _ => None,
            },
            _ => None,
        }
    }

    /// The inputs of which the function reads the dimensions, and how many they are, if that came too late for an operation that
    /// computes along one of them.
    pub(super) fn read_too_late(&self) -> Vec<(String, usize)> {
        use crate::ops::ShapeRule::{Reduce, ReduceKeep};
        let late = self.nodes.iter().any(|n| {
            let of = n.inputs.first().map(|i| &self.nodes[i.node].shape);
            n.row()
                .is_some_and(|r| matches!(r.shape, Reduce | ReduceKeep))
                && matches!(n.shape, Shape::Partial(_))
                && matches!(of, Some(Shape::Known(_)))
        });
        let rank = |n: &super::graph::Node| match (&n.op, &n.shape) {
            (Op::Param(name), Shape::Known(dims)) => Some((name.clone(), dims.len())),
            _ => None,
        };
        let ranks = self.nodes.iter().filter(|_| late).filter_map(rank);
        ranks.collect()
    }

    /// Takes inputs to have these numbers of dimensions from the beginning, which is compared when the model is entered.
    pub(super) fn take_ranks(&mut self, ranks: &[(String, usize)]) {
        for node in 0..self.nodes.len() {
            let Op::Param(name) = &self.nodes[node].op else {
                continue;
            };
            if let Some((_, rank)) = ranks.iter().find(|(known, _)| known == name) {
                self.assume_rank(node, *rank);
            }
        }
    }

    /// Takes an input to have `rank` dimensions, which is compared when the model is entered.
    pub(super) fn assume_rank(&mut self, node: NodeId, rank: usize) {
        let Some((_, name)) = self.unread_input(node) else {
            return;
        };
        let name = name.to_string();
        if self.with_rank(node, rank).is_some() && !self.assumed_ranks.contains(&name) {
            self.assumed_ranks.push(name);
        }
    }

    /// An operation that needs to know where the dimensions of its operand are: one more than the highest dimension that
    /// was read or that it names.
    pub(super) fn needs_rank(&mut self, node: NodeId, named: Option<i64>) {
        let Some((input, _)) = self.unread_input(node) else {
            return;
        };
        let read = match &self.nodes[input].shape {
            Shape::Partial(known) => known.iter().map(|(d, _)| d + 1).max(),
            _ => None,
        };
        let named = named
            .and_then(|d| usize::try_from(d).ok())
            .map(|d| (d + 1).max(2));
        if let Some(rank) = read.max(named) {
            self.assume_rank(node, rank);
        }
    }
}
