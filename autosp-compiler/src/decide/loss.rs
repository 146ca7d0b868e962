//! A loss for models whose forward keeps one token: in the place of the pick, all tokens become rows of the batch, and what
//! follows runs as it stands.

use std::collections::HashSet;

use autosp_plan::codes;
use autosp_plan::plan::Plan;

use crate::error::Refusal;
use crate::ops::{PlaceRule, ShapeRule};
use crate::place::{Conversion, Placed};
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::Dim;
use crate::trace::value::Value;
use crate::trace::{Role, Trace};

/// The twin of a root for every token, where a loss is asked for and can be had; why it cannot goes to `no_loss` and the notes.
///
/// # Errors
/// Those of `build`.
pub(super) fn twin(
    plan: &mut Plan,
    trace: &Trace<'_, '_>,
    placed: &Placed,
    root: usize,
    no_loss: &mut Vec<Refusal>,
    build: impl FnOnce(&mut Plan) -> Result<usize, Refusal>,
) -> Result<Option<usize>, Refusal> {
    if !trace.scope.loss {
        return Ok(None);
    }
    match foldable(trace, placed) {
        Ok(true) => build(plan).map(Some),
        Ok(false) => Ok(None),
        Err(refusal) => {
            let function = trace.scope.full_name(root);
            let note = format!("`{function}` has no loss of its own: {}", refusal.message);
            plan.notes.push(note);
            no_loss.push(refusal);
            Ok(None)
        }
    }
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
            row_by_row(trace, node, &after)?;
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
fn row_by_row(trace: &Trace<'_, '_>, node: NodeId, after: &HashSet<NodeId>) -> Result<(), Refusal> {
    let n = &trace.nodes[node];
    let row = match &n.op {
        Op::Phi { carried: false } => {
            let all = n.inputs.iter().all(|i| after.contains(&i.node));
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
