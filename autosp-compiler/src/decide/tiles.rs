//! Finds the calls in a block that compute each token by itself, so that they can run on a few tokens at a time.

use autosp_plan::plan::Tiled;

use super::blocks::{Found, has_site, takes_reference};
use crate::place::{Place, Placed};
use crate::syntax::types::Ty;
use crate::trace::Trace;
use crate::trace::graph::{ActId, NodeId};
use crate::trace::shape::Shape;
use crate::trace::value::Value;

/// Matrix products from which on a call is worth it: one alone has no large tensor inside.
const PRODUCTS: usize = 2;

/// The outermost such calls: activation and expression.
pub(super) fn find(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    blocks: &[Found],
) -> Vec<(ActId, u32, Tiled)> {
    let mut found = Vec::new();
    for (act, call, _) in blocks.iter().filter_map(|block| block.scope.as_ref()) {
        let callee = trace.acts[*act].calls.iter().find(|(e, _)| e == call);
        if let Some((_, callee)) = callee {
            inside(trace, placed, *callee, &mut found);
        }
    }
    found
}

fn inside(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    act: ActId,
    found: &mut Vec<(ActId, u32, Tiled)>,
) {
    for (call, callee) in &trace.acts[act].calls {
        match tiled(trace, placed, act, *call, *callee) {
            Some(tiled) => found.push((act, *call, tiled)),
            None => inside(trace, placed, *callee, found),
        }
    }
}

fn tiled(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    act: ActId,
    call: u32,
    callee: ActId,
) -> Option<Tiled> {
    let a = &trace.acts[act];
    let numbers = &trace.scope.functions[a.function].numbers;
    let Some(syn::Expr::MethodCall(m)) = numbers.get(call) else {
        return None;
    };
    let value = |e: &syn::Expr| a.values.get(&numbers.id(e));
    // The layer is kept by the scope: a part of the model that can be cloned.
    let Some(Value::Object {
        ty: Ty::Scope(ty), ..
    }) = value(&m.receiver)
    else {
        return None;
    };
    let (1, Some(input)) = (m.args.len(), m.args.first()) else {
        return None;
    };
    let (Some(Value::Tensor(x)), Value::Tensor(y)) = (value(input), &trace.acts[callee].result)
    else {
        return None;
    };
    let dim = sequence_dim(trace, placed, *x)?;
    let fits = trace.scope.cloneable.contains(ty)
        && sequence_dim(trace, placed, *y) == Some(dim)
        && !has_site(trace, placed, callee)
        && by_token(trace, placed, callee);
    fits.then(|| Tiled {
        dim,
        by_ref: takes_reference(trace, callee, m, input),
    })
}

/// Whether nothing in the evaluation asks for the whole sequence, and there are products enough.
fn by_token(trace: &Trace<'_, '_>, placed: &Placed, callee: ActId) -> bool {
    let within = |act: ActId| {
        let mut at = Some(act);
        while let Some(act) = at.filter(|act| *act != callee) {
            at = trace.acts[act].parent.map(|(parent, _)| parent);
        }
        at.is_some()
    };
    let products = trace.nodes.iter().filter(|n| {
        within(n.at.act)
            && n.row().is_some_and(|row| {
                row.path == "candle_nn::Linear::forward" || row.name() == "matmul"
            })
    });
    products.count() >= PRODUCTS
        && placed
            .conversions
            .iter()
            .all(|(node, _)| !within(trace.nodes[*node].at.act))
        && placed.valid.iter().all(|u| !within(u.act))
}

/// The dimension of a sharded tensor that is the sequence and nothing else.
fn sequence_dim(trace: &Trace<'_, '_>, placed: &Placed, node: NodeId) -> Option<usize> {
    let Shape::Known(dims) = &trace.nodes[node].shape else {
        return None;
    };
    if placed.place[node] != Place::Sharded {
        return None;
    }
    dims.iter().position(|dim| match dim.0.as_slice() {
        [only] => !only.repeat && trace.atoms.normal(&only.size).as_atom() == Some(placed.sequence),
        _ => false,
    })
}
