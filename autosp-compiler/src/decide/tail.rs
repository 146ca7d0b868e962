//! The end of a model in its loss: from the last linear layer on, logits are never made.
//!
//! Backwards from the result, through what works on each logit alone, to products with a weight that every rank holds whole. There the
//! twin of the loss gets a handle in the place of a tensor (`rt::Logits`), which the rest of the model's own code passes on.

use std::collections::{HashMap, HashSet};

use crate::ops::{Row, ShapeRule};
use crate::place::{Conversion, Place, Placed};
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::Shape;
use crate::trace::value::Value;
use crate::trace::{Role, Trace};

/// Which tensors of a loss are not made.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// Products with the vocabulary, and what stands in their place below `rt::`.
    pub(super) heads: HashMap<NodeId, &'static str>,
    /// These and what is made of them.
    pub(super) lazy: HashSet<NodeId>,
}

/// The end of the root, if it is a linear layer and what logits can pass through.
///
/// # Errors
/// What stands in the way.
pub(super) fn find(trace: &Trace<'_, '_>, placed: &Placed) -> Result<Tail, String> {
    let Value::Tensor(result) = trace.acts[0].result else {
        return Err("the result is not one tensor".to_string());
    };
    let mut tail = Tail::default();
    let mut stack = vec![result];
    while let Some(node) = stack.pop() {
        if !tail.lazy.insert(node) {
            continue;
        }
        let n = &trace.nodes[node];
        if let Some(name) = head(trace, placed, node) {
            tail.heads.insert(node, name);
            continue;
        }
        match &n.op {
            Op::Phi { carried: false } => stack.extend(n.inputs.iter().map(|i| i.node)),
            Op::Row(row) if passes(trace, node, row) => stack.push(n.inputs[0].node),
            // A token is taken of the logits: in the loss, all of them as rows.
            Op::Pick { .. } if picked(placed, node) => stack.push(n.inputs[0].node),
            Op::Row(_) => {
                return Err(format!("`{}` stands behind the last linear layer", n.text));
            }
            _ => return Err("its result does not come from a linear layer".to_string()),
        }
    }
    let looks = |n: NodeId| {
        !tail.lazy.contains(&n)
            && placed.live.contains(&n)
            && trace.nodes[n]
                .inputs
                .iter()
                .any(|i| tail.lazy.contains(&i.node))
    };
    if let Some(other) = (0..trace.nodes.len()).find(|n| looks(*n)) {
        return Err(format!("`{}` uses the logits too", trace.nodes[other].text));
    }
    let sized = |n: &NodeId| {
        trace.nodes[*n].sizes_read
            || trace.reads.contains(n)
            || trace
                .sizes
                .iter()
                .any(|u| u.size.origins.contains(n) || matches!(u.role, Role::SizeOf(m) if m == *n))
    };
    match tail.lazy.iter().find(|n| sized(n)) {
        Some(n) => Err(format!("the sizes of `{}` are read", trace.nodes[*n].text)),
        None => Ok(tail),
    }
}

fn picked(placed: &Placed, node: NodeId) -> bool {
    let pick = |c: &Conversion| matches!(c, Conversion::Pick { .. });
    placed
        .conversions
        .iter()
        .any(|(n, c)| *n == node && pick(c))
}

/// What stands in the place of a product with a weight.
fn head(trace: &Trace<'_, '_>, placed: &Placed, node: NodeId) -> Option<&'static str> {
    let n = &trace.nodes[node];
    let row = n.row()?;
    let call = matches!(
        expression(trace, node),
        Some(syn::Expr::MethodCall(_) | syn::Expr::Call(_))
    );
    if !call {
        return None;
    }
    match row.twin.as_deref() {
        Some("ops::linear") => return Some("head::linear"),
        Some("ops::layer") if row.shape == ShapeRule::Linear && held(trace, node) => {
            return Some("head::layer");
        }
        _ => {}
    }
    let product = ["matmul", "broadcast_matmul"].contains(&row.name());
    let [_, weight] = n.inputs.as_slice() else {
        return None;
    };
    let weight = weight.node;
    let given = product && placed.place[weight] == Place::Replicated && matrix(trace, weight);
    given.then_some("head::matmul")
}

/// Whether a layer is a field, which can be cloned, and not behind a variable, which may borrow.
fn held(trace: &Trace<'_, '_>, node: NodeId) -> bool {
    let Some(syn::Expr::MethodCall(m)) = expression(trace, node) else {
        return false;
    };
    let layer = match m.args.first() {
        Some(syn::Expr::Reference(layer)) if m.method == "apply" => &layer.expr,
        _ => &m.receiver,
    };
    matches!(**layer, syn::Expr::Field(_))
}

/// A weight of two dims: of known shape, or one that the model holds, perhaps turned. The runtime asks again.
fn matrix(trace: &Trace<'_, '_>, node: NodeId) -> bool {
    let n = &trace.nodes[node];
    match (&n.shape, &n.op) {
        (Shape::Known(dims), _) => {
            dims.len() == 2 && !dims.iter().any(|d| d.anchored(&trace.atoms))
        }
        (Shape::Partial(_), Op::Field) => true,
        (Shape::Partial(_), Op::Row(row)) => {
            let turned = ["t", "transpose", "contiguous", "to_dtype"].contains(&row.name());
            turned && matches!(n.inputs.as_slice(), [only] if matrix(trace, only.node))
        }
        _ => false,
    }
}

/// An operation on each logit alone that the handle has too, in the form in which it has it.
fn passes(trace: &Trace<'_, '_>, node: NodeId, row: &Row) -> bool {
    let n = &trace.nodes[node];
    let [only] = n.inputs.as_slice() else {
        return false;
    };
    match expression(trace, node) {
        Some(syn::Expr::MethodCall(_)) => {
            let names = [
                "to_dtype",
                "affine",
                "tanh",
                "contiguous",
                "squeeze",
                "unsqueeze",
            ];
            row.path.starts_with("candle_core::Tensor::") && names.contains(&row.name())
        }
        // A number behind the operator.
        Some(syn::Expr::Binary(b)) => {
            let numbers = &trace.scope.functions[trace.acts[n.at.act].function].numbers;
            let operator = matches!(
                b.op,
                syn::BinOp::Add(_) | syn::BinOp::Sub(_) | syn::BinOp::Mul(_) | syn::BinOp::Div(_)
            );
            operator && only.expr == Some(numbers.id(&b.left))
        }
        _ => false,
    }
}

fn expression<'t>(trace: &'t Trace<'_, '_>, node: NodeId) -> Option<&'t syn::Expr> {
    let at = trace.nodes[node].at;
    trace.scope.functions[trace.acts[at.act].function]
        .numbers
        .get(at.expr)
}
