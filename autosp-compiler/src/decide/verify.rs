//! Checks a plan before anything is emitted: what each operation requires against what the plan gives it.
//!
//! This reads the trace and the plan and decides nothing. It asks other questions than the rooms that made the plan, so
//! that a mistake there is an error here and never a wrong number.

use std::collections::HashSet;

use autosp_plan::codes;
use autosp_plan::plan::{Action, Plan};

use crate::error::Refusal;
use crate::ops::ShapeRule;
use crate::place::{Conversion, Place, Placed};
use crate::trace::Trace;
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::{Dim, Shape};

/// Holds the plan against the trace.
pub(crate) fn check(plan: &Plan, trace: &Trace<'_, '_>, placed: &Placed) -> Result<(), Refusal> {
    let fault = |node: NodeId, what: &str| {
        Refusal::new(
            codes::VERIFY,
            trace.nodes[node].at.span,
            format!(
                "the plan does not hold at `{}`: {what}",
                trace.nodes[node].text
            ),
        )
    };
    for node in placed.live.iter().copied() {
        property(trace, placed, node).map_err(|what| fault(node, &what))?;
    }
    sites(plan).map_err(|what| fault(placed.sites.first().map_or(0, |s| s.matmul), &what))?;
    calls(plan).map_err(|what| fault(0, &what))
}

/// What the operands of a node are after the plan's conversions, against what the operation needs.
fn property(trace: &Trace<'_, '_>, placed: &Placed, node: NodeId) -> Result<(), String> {
    let n = &trace.nodes[node];
    let Op::Row(row) = &n.op else { return Ok(()) };
    let in_site = placed.place[node].lazy() || placed.sites.iter().any(|s| s.out == node);
    if in_site {
        return Ok(());
    }
    let sequence = |d: &Dim| {
        d.0.iter()
            .any(|f| trace.atoms.normal(&f.size).contains(placed.sequence))
    };
    let ranges = |m: NodeId| matches!(&trace.nodes[m].shape, Shape::Known(dims) if dims.iter().any(sequence));
    let sharded = |i: usize| {
        let input = n.inputs[i].node;
        matches!(placed.place[input], Place::Sharded | Place::Either)
            || placed.conversions.iter().any(|(m, c)| {
                *m == node && matches!(c, Conversion::Slice { input, .. } if *input == i)
            })
    };
    let any = (0..n.inputs.len()).any(sharded);
    if !any {
        return Ok(());
    }
    // Every operand that ranges over the sequence is a shard where one is.
    for (i, input) in n.inputs.iter().enumerate() {
        if ranges(input.node) && !sharded(i) {
            return Err(format!("operand {i} is whole while another is a shard"));
        }
        if placed.place[input.node].lazy() {
            return Err(format!("operand {i} is never made"));
        }
    }
    // Nothing is computed along the sequence.
    for (i, d) in &n.touches {
        let Some(input) = n.inputs.get(*i) else {
            continue;
        };
        if let Shape::Known(dims) = &trace.nodes[input.node].shape
            && sharded(*i)
            && dims.get(*d).is_some_and(sequence)
            && !matches!(row.shape, ShapeRule::Rope | ShapeRule::RopeThd)
        {
            return Err(format!("it computes along dimension {d}, the sequence"));
        }
    }
    match &n.shape {
        Shape::Known(dims) if dims.iter().filter(|d| sequence(d)).count() > 1 => {
            Err("its result would pair all tokens".to_string())
        }
        Shape::Unknown(why) => Err(format!("its shape is not known: {why}")),
        _ => Ok(()),
    }
}

/// Every site is entered once, and a softmax stands in its way.
fn sites(plan: &Plan) -> Result<(), String> {
    let all: Vec<&Action> = plan
        .twins
        .iter()
        .flat_map(|t| t.edits.iter().map(|e| &e.action))
        .collect();
    for id in 0..plan.sites.len() {
        if !all
            .iter()
            .any(|a| matches!(a, Action::Scores(k) if *k == id))
        {
            return Err(format!("site {id} is never entered"));
        }
    }
    if !plan.sites.is_empty() && !all.iter().any(|a| matches!(a, Action::Softmax)) {
        return Err("no softmax is replaced".to_string());
    }
    Ok(())
}

/// Every call of a twin has its twin, and no two edits of one kind stand at one place.
fn calls(plan: &Plan) -> Result<(), String> {
    let names: HashSet<&str> = plan.twins.iter().map(|t| t.name.as_str()).collect();
    for twin in &plan.twins {
        for edit in &twin.edits {
            if let Action::Twin(name) = &edit.action
                && !names.contains(name.as_str())
            {
                return Err(format!(
                    "`{}` calls `{name}`, which is not planned",
                    twin.function
                ));
            }
        }
    }
    Ok(())
}
