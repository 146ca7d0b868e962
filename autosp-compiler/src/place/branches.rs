//! Branches that give a whole tensor, and copies of tokens behind each other.

use autosp_plan::codes;

use super::{Place, Placer};
use crate::ops::{PlaceRule, Row, ShapeRule};
use crate::trace::branch::Branch;
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::Shape;

impl Placer<'_, '_, '_> {
    /// The branch of a configuration that gives a whole tensor where the other one gives a shard.
    pub(super) fn whole_branch(&self, mut node: NodeId) -> Option<Branch> {
        loop {
            let n = &self.trace.nodes[node];
            let [first, .., last] = n.inputs.as_slice() else {
                node = n.inputs.first()?.node;
                continue;
            };
            if !matches!(n.op, Op::Phi { carried: false }) || n.inputs.len() != 2 {
                return None;
            }
            let function = self.trace.acts[n.at.act].function;
            if !self.trace.settled.contains(&(function, n.at.expr)) {
                return None;
            }
            let arm = match (self.place[first.node], self.place[last.node]) {
                (Place::Sharded, Place::Replicated | Place::Given) => 1,
                (Place::Replicated | Place::Given, Place::Sharded) => 0,
                _ => return None,
            };
            return Some(Branch {
                function,
                expr: n.at.expr,
                arm,
            });
        }
    }

    /// What is refused at a tensor can be left out with a branch.
    pub(super) fn elsewhere(&mut self, node: NodeId, branch: Branch) {
        if let Some(problem) = self.problems.get_mut(&node) {
            problem.branch = Some(branch);
            problem.elsewhere = true;
        }
    }

    /// Copies of all tokens behind each other are a shard only until a reshape has made them a dimension of their own.
    pub(super) fn uses_copies(&mut self, node: NodeId, row: &Row) -> Option<Place> {
        let inputs = &self.trace.nodes[node].inputs;
        let copies = inputs.iter().find(|i| self.copied(i.node))?.node;
        if row.shape == ShapeRule::Reshape
            || (row.shape == ShapeRule::Same && row.place == PlaceRule::Move)
        {
            return None;
        }
        Some(self.behind_each_other(node, copies))
    }

    /// Whether a dimension holds the sequence several times.
    pub(super) fn copied(&self, node: NodeId) -> bool {
        let dims = self.trace.nodes[node].shape.known().unwrap_or_default();
        dims.iter()
            .any(|dim| self.in_dim(&dim.unrepeated()) && dim.has_repeat())
    }

    pub(super) fn behind_each_other(&mut self, node: NodeId, copies: NodeId) -> Place {
        let text = self.trace.nodes[copies].text.clone();
        let help = "reshape the copies into a dimension of their own right away";
        let message = format!(
            "`{text}` puts tokens behind tokens, so that a shard is no longer a range of positions"
        );
        self.refuse(node, codes::MIXES_TOKENS, message, None, help)
    }

    /// Whether a dimension is the sequence and nothing else, once.
    pub(super) fn rows_alone(&self, node: NodeId, d: usize) -> bool {
        let Shape::Known(dims) = &self.trace.nodes[node].shape else {
            return true;
        };
        match dims.get(d).map(|dim| dim.0.as_slice()) {
            Some([row]) => self.trace.atoms.normal(&row.size).as_atom() == Some(self.sequence),
            _ => false,
        }
    }
}
