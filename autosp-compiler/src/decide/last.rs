//! Whether a block may take the memory of its input: the result of the block before it, which nobody else has.

use std::collections::HashSet;

use syn::visit::{self, Visit};

use crate::syntax::number;
use crate::trace::Trace;
use crate::trace::graph::{ActId, NodeId, Op};

/// What a loop with a scope carries from block to block.
pub(super) struct Carried {
    pub(super) act: ActId,
    /// The loop.
    pub(super) expr: u32,
    /// The block's call.
    pub(super) callee: ActId,
    /// What comes into a round, and what the block gives.
    pub(super) input: NodeId,
    pub(super) result: NodeId,
}

/// Whether nobody but the next block has what a block of this loop gives. `all` are the loops of the root, this one among them: the
/// first block of one may come after the last of another.
pub(super) fn alone(trace: &Trace<'_, '_>, this: &Carried, all: &[Carried]) -> bool {
    let numbers = &trace.scope.functions[trace.acts[this.act].function].numbers;
    let Some(body) = numbers.get(this.expr) else {
        return false;
    };
    if leaves(body) {
        return false;
    }
    let inside = number::within(numbers, body);
    // What the input of a round is, through the loops and branches that it comes by.
    let mut ways = HashSet::new();
    let mut stack = vec![this.input];
    while let Some(node) = stack.pop() {
        if ways.insert(node) && phi(trace, node) {
            stack.extend(trace.nodes[node].inputs.iter().map(|i| i.node));
        }
    }
    let again = ways
        .iter()
        .any(|n| *n != this.input && matches!(trace.nodes[*n].op, Op::Phi { carried: true }));
    let memory = |n: &NodeId| phi(trace, *n) || all.iter().any(|c| c.result == *n);
    let mut results = Vec::new();
    trace.acts[0].result.tensors(&mut results);
    if results
        .iter()
        .any(|n| ways.contains(n) && memory(n) && (*n != this.result || again))
    {
        return false;
    }
    (0..trace.nodes.len()).all(|user| {
        let uses = trace.nodes[user].inputs.iter().map(|i| i.node);
        uses.filter(|n| ways.contains(n) && memory(n)).all(|n| {
            // On the way here, or into the next round of a loop that is over.
            let passed_on = ways.contains(&user) && phi(trace, user)
                || n != this.input && all.iter().any(|c| c.input == user && c.result == n);
            let block = n == this.input && within(trace, user, this.callee);
            let after = n == this.result
                && !again
                && user > this.result
                && !in_loop(trace, user, this.act, &inside);
            passed_on || block || after
        })
    })
}

fn phi(trace: &Trace<'_, '_>, node: NodeId) -> bool {
    matches!(trace.nodes[node].op, Op::Phi { .. })
}

/// Whether a round may end before the result has taken the place of the input.
fn leaves(body: &syn::Expr) -> bool {
    struct Leaves(bool);
    impl Visit<'_> for Leaves {
        fn visit_expr(&mut self, e: &syn::Expr) {
            self.0 |= matches!(e, syn::Expr::Break(_) | syn::Expr::Continue(_));
            visit::visit_expr(self, e);
        }
    }
    let mut leaves = Leaves(false);
    leaves.visit_expr(body);
    leaves.0
}

/// Whether a tensor is made in an evaluation, or in what that calls.
fn within(trace: &Trace<'_, '_>, node: NodeId, callee: ActId) -> bool {
    let mut at = Some(trace.nodes[node].at.act);
    while let Some(act) = at {
        if act == callee {
            return true;
        }
        at = trace.acts[act].parent.map(|(parent, _)| parent);
    }
    false
}

fn in_loop(trace: &Trace<'_, '_>, node: NodeId, act: ActId, inside: &[u32]) -> bool {
    let at = trace.nodes[node].at;
    let mut here = Some((at.act, at.expr));
    while let Some((of, expr)) = here {
        if of == act {
            return inside.contains(&expr);
        }
        here = trace.acts[of].parent;
    }
    false
}
