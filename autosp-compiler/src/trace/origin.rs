//! What a tensor comes from.

use std::collections::HashSet;

use super::Trace;
use super::graph::{NodeId, Op};
use super::shape::Shape;

impl Trace<'_, '_> {
    /// Whether a tensor comes from what the model holds alone.
    pub(crate) fn is_table(&self, node: NodeId) -> bool {
        let mut stack = vec![node];
        let mut seen = HashSet::new();
        while let Some(n) = stack.pop() {
            let node = &self.nodes[n];
            match node.op {
                Op::Field => {}
                Op::Row(_) if !node.inputs.is_empty() => {}
                _ => return false,
            }
            if seen.insert(n) {
                stack.extend(node.inputs.iter().map(|i| i.node));
            }
        }
        true
    }

    /// The input that a tensor is, or is element by element, as long as nobody has said how many dimensions it has.
    pub(crate) fn unread_input(&self, mut node: NodeId) -> Option<(NodeId, &str)> {
        loop {
            let n = &self.nodes[node];
            match (&n.op, &n.shape) {
                (_, Shape::Known(_) | Shape::Either(_) | Shape::Unknown(_)) => return None,
                (Op::Param(name), _) => return Some((node, name)),
                (Op::Row(row), _) if row.shape == crate::ops::ShapeRule::Same => {
                    node = n.inputs.first()?.node;
                }
                _ => return None,
            }
        }
    }

    /// The layer that a tensor comes out of, if it does and nothing detaches it.
    pub(crate) fn learned(&self, node: NodeId) -> Option<NodeId> {
        let mut stack = vec![node];
        let mut seen = HashSet::new();
        while let Some(n) = stack.pop() {
            let row = self.nodes[n].row();
            if !seen.insert(n) || row.is_some_and(|r| r.name() == "detach") {
                continue;
            }
            let layer = |r: &crate::ops::Row| {
                let own = r.path.starts_with("candle_core::Tensor::");
                !own && !r.path.starts_with("candle_nn::ops::")
            };
            if row.is_some_and(layer) {
                return Some(n);
            }
            stack.extend(self.nodes[n].inputs.iter().map(|i| i.node));
        }
        None
    }
}
