//! A loss over all tokens, as a function of its own.
//!
//! Where a model keeps one token, all tokens become rows of the batch in the place of the pick, and what follows runs as it stands.
//! Where the model ends in a linear layer, its logits are not made ([`tail`]): the loss computes them for some tokens at a time.

use std::collections::HashSet;

use autosp_plan::codes;
use autosp_plan::plan::Plan;

use super::tail::{self, Tail};
use crate::error::Refusal;
use crate::ops::{PlaceRule, ShapeRule};
use crate::place::{Conversion, Place, Placed};
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::Dim;
use crate::trace::value::Value;
use crate::trace::{Role, Trace};

/// How the twin for a loss differs from the root's own.
#[derive(Debug)]
pub(super) struct Loss {
    /// Whether all tokens are rows of the batch where the root takes one.
    pub(super) fold: bool,
    pub(super) tail: Tail,
}

/// The twin of a root for every token, where a loss is asked for and can be had; why it cannot goes to `no_loss` and the notes.
/// `inner` says that another root calls this one.
///
/// # Errors
/// Those of `build`.
pub(super) fn twin(
    plan: &mut Plan,
    trace: &Trace<'_, '_>,
    placed: &Placed,
    (root, inner): (usize, bool),
    no_loss: &mut Vec<Refusal>,
    build: impl FnOnce(&mut Plan, &Loss) -> Result<usize, Refusal>,
) -> Result<Option<usize>, Refusal> {
    if !trace.scope.loss {
        return Ok(None);
    }
    let f = &trace.scope.functions[root];
    let function = trace.scope.full_name(root);
    let none = |plan: &mut Plan, why: &str| {
        let note = format!("`{function}` has no loss of its own: {why}");
        if !plan.notes.contains(&note) {
            plan.notes.push(note);
        }
        Ok(None)
    };
    let taken = format!("{}_loss", f.name);
    let taken = |g: &crate::syntax::Function<'_>| g.owner == f.owner && g.name == taken;
    if trace.scope.functions.iter().any(taken) {
        return none(plan, "the module has a function of that name");
    }
    let (fold, tail) = (foldable(trace, placed), tail::find(trace, placed));
    let (fold, tail) = match (fold, tail) {
        (Err(refusal), _) => {
            let why = refusal.message.clone();
            no_loss.push(refusal);
            return none(plan, &why);
        }
        (Ok(true), Ok(tail)) => (true, tail),
        (Ok(true), Err(why)) => {
            plan.notes
                .push(format!("the loss of `{function}` makes all logits: {why}"));
            (true, Tail::default())
        }
        (Ok(false), _) if inner => return Ok(None),
        (Ok(false), Err(why)) => return none(plan, &why),
        (Ok(false), Ok(_)) if !rows_and_tokens(trace, placed, &trace.acts[0].result) => {
            return none(plan, "its result is not [batch, sequence, classes]");
        }
        (Ok(false), Ok(tail)) => (false, tail),
    };
    build(plan, &Loss { fold, tail }).map(Some)
}

/// Whether a value is a tensor of this rank's tokens, behind their batch.
fn rows_and_tokens(trace: &Trace<'_, '_>, placed: &Placed, value: &Value) -> bool {
    let Value::Tensor(node) = *value else {
        return false;
    };
    let sequence = |d: &Dim| match d.0.as_slice() {
        [f] => trace.atoms.normal(&f.size).as_atom() == Some(placed.sequence),
        _ => false,
    };
    let batch = |d: &Dim| d.0.len() == 1 && d.anchored(&trace.atoms) && !sequence(d);
    let dims = trace.nodes[node].shape.known();
    placed.place[node] == Place::Sharded
        && dims.is_some_and(
            |dims| matches!(dims, [b, s, rest @ ..] if batch(b) && sequence(s) && rest.len() == 1 && !rest[0].anchored(&trace.atoms)),
        )
}

/// Whether the root keeps one token, and what follows would do for every token what it does for that one.
///
/// # Errors
/// If a token is kept and what follows cannot be followed for all of them.
fn foldable(trace: &Trace<'_, '_>, placed: &Placed) -> Result<bool, Refusal> {
    let picks: Vec<NodeId> = placed
        .conversions
        .iter()
        .filter(|(_, c)| matches!(c, Conversion::Pick { .. }))
        .map(|(n, _)| *n)
        .collect();
    let pick = match picks.as_slice() {
        [] => return Ok(false),
        [pick] => *pick,
        [_, second, ..] => {
            return Err(refusal(trace, *second, "it takes a second token"));
        }
    };
    let Op::Pick { dim } = trace.nodes[pick].op else {
        return Ok(false);
    };
    // [batch, sequence, ..] or [sequence, batch, ..]
    let input = trace.nodes[pick].inputs[0].node;
    let rows = trace.nodes[input].shape.known().and_then(|dims| {
        let batch = dims.get(1 - dim.min(1))?;
        (dim < 2 && batch.0.len() == 1 && batch.anchored(&trace.atoms)).then_some(())
    });
    if rows.is_none() {
        return Err(refusal(
            trace,
            pick,
            "it is not clear which dimension is the batch",
        ));
    }
    let mut after: HashSet<NodeId> = HashSet::from([pick]);
    for node in 0..trace.nodes.len() {
        let n = &trace.nodes[node];
        if node != pick
            && n.inputs.iter().any(|i| after.contains(&i.node))
            && placed.live.contains(&node)
        {
            // A branch that takes no token has them all already, in the same order.
            let all = |n: NodeId| dim == 1 && rows_and_tokens(trace, placed, &Value::Tensor(n));
            row_by_row(trace, node, &after, &all)?;
            after.insert(node);
        }
    }
    let counted = trace.sizes.iter().find(|u| {
        u.size.origins.iter().any(|o| after.contains(o))
            || matches!(u.role, Role::SizeOf(n) if n != pick && after.contains(&n))
    });
    if let Some(u) = counted {
        let at = Refusal::new(
            codes::LOSS,
            u.span,
            "no loss over all tokens: the number of rows is used after the token is taken",
        );
        return Err(at.help(HELP));
    }
    match trace.acts[0].result {
        Value::Tensor(out) if after.contains(&out) => Ok(true),
        _ => Err(refusal(
            trace,
            pick,
            "the result does not come from the token that is taken",
        )),
    }
}

const HELP: &str = "leave out `loss` and call the part of the model before the pick";

fn refusal(trace: &Trace<'_, '_>, node: NodeId, why: &str) -> Refusal {
    let n = &trace.nodes[node];
    Refusal::new(
        codes::LOSS,
        n.at.span,
        format!("no loss over all tokens: `{}`: {why}", n.text),
    )
    .help(HELP)
}

/// An operation that computes each row of the batch by itself, and nothing from another row.
fn row_by_row(
    trace: &Trace<'_, '_>,
    node: NodeId,
    after: &HashSet<NodeId>,
    all_tokens: &dyn Fn(NodeId) -> bool,
) -> Result<(), Refusal> {
    let n = &trace.nodes[node];
    let row = match &n.op {
        Op::Phi { carried: false } => {
            let ways = &mut n.inputs.iter().map(|i| i.node);
            let all = ways.all(|way| after.contains(&way) || all_tokens(way));
            return if all {
                Ok(())
            } else {
                Err(refusal(trace, node, "a branch gives something else"))
            };
        }
        Op::Row(row) => row,
        _ => return Err(refusal(trace, node, "it cannot be followed")),
    };
    let shapes = matches!(
        row.shape,
        ShapeRule::Same
            | ShapeRule::Broadcast
            | ShapeRule::Matmul
            | ShapeRule::Linear
            | ShapeRule::AlongLast
            | ShapeRule::Along
            | ShapeRule::Reduce
            | ShapeRule::ReduceKeep
            | ShapeRule::Squeeze
            | ShapeRule::Unsqueeze
            | ShapeRule::T
            | ShapeRule::Transpose
            | ShapeRule::Narrow
    );
    let places = matches!(
        row.place,
        PlaceRule::Each | PlaceRule::Tokenwise | PlaceRule::Move
    );
    let anchored = |d: &Dim| d.anchored(&trace.atoms);
    // Weights are the same for every row.
    let others = n.inputs.iter().filter(|i| !after.contains(&i.node));
    let whole = others
        .map(|i| trace.nodes[i.node].shape.known())
        .all(|dims| dims.is_none_or(|dims| !dims.iter().any(anchored)));
    let along_rows = n.touches.iter().any(|(i, d)| {
        let dims = n
            .inputs
            .get(*i)
            .and_then(|i| trace.nodes[i.node].shape.known());
        dims.and_then(|dims| dims.get(*d)).is_some_and(anchored)
    });
    if shapes && places && whole && !along_rows {
        Ok(())
    } else {
        Err(refusal(trace, node, "it may mix rows"))
    }
}
