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
        return keys(trace, placed, node);
    }
    let sequence = |d: &Dim| {
        d.0.iter()
            .any(|f| trace.atoms.normal(&f.size).contains(placed.sequence))
    };
    let varies = |d: &Dim| sequence(&d.unrepeated());
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
    // Nothing is computed along the sequence, but what the plan computes over all ranks.
    let over_ranks = placed
        .conversions
        .iter()
        .any(|(m, c)| *m == node && matches!(c, Conversion::Sequence));
    for (i, d) in n.touches.iter().filter(|_| !over_ranks) {
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
        Shape::Known(dims) if dims.iter().filter(|d| varies(d)).count() > 1 => {
            Err("its result would pair all tokens".to_string())
        }
        Shape::Unknown(why) => Err(format!("its shape is not known: {why}")),
        _ => Ok(()),
    }
}

/// A shard that meets scores is a mask over keys, which the plan gathers.
fn keys(trace: &Trace<'_, '_>, placed: &Placed, node: NodeId) -> Result<(), String> {
    let scores = placed.place[node] == Place::Scores || placed.place[node] == Place::Mask;
    let product = placed.sites.iter().any(|s| s.matmul == node);
    if !scores || product {
        return Ok(());
    }
    for (i, input) in trace.nodes[node].inputs.iter().enumerate() {
        let gathered = placed
            .conversions
            .iter()
            .any(|(m, c)| *m == node && matches!(c, Conversion::Keys { input, .. } if *input == i));
        let constant = crate::place::sites::constant(trace, input.node);
        if placed.place[input.node] == Place::Sharded && !gathered && !constant {
            return Err(format!("operand {i} is one rank's part of a mask"));
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::place;
    use crate::syntax::Scope;

    const MODEL: &str = "
        use candle_core::{Result, Tensor};
        pub struct Attention { scale: f64, cos: Tensor }
        impl Attention {
            fn soft(&self, s: &Tensor) -> Result<Tensor> { candle_nn::ops::softmax_last_dim(s) }
            pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
                let (b, h, s, d) = x.dims4()?;
                let table = self.cos.narrow(0, 0, s)?.reshape((s, d))?;
                let q = x.broadcast_mul(&table)?;
                let weights = self.soft(&(q.matmul(&x.t()?)? * self.scale)?)?;
                weights.matmul(x)
            }
        }";

    /// A plan that holds, its trace and its placements, to be tampered with.
    fn with_plan(tamper: impl FnOnce(&mut Plan, &mut Placed)) -> Result<(), Refusal> {
        let file = syn::parse_file(MODEL).expect("Rust");
        let scope = Scope::new("", &file.items);
        let root = scope
            .functions
            .iter()
            .position(|f| f.name == "forward")
            .expect("the root");
        let mut trace = Trace::run(&scope, crate::ops::candle(), root, Vec::new());
        let mut placed = place(&mut trace).expect("placements");
        let (mut plan, refusals) =
            crate::decide::decide(&scope, crate::ops::candle(), proc_macro2::Span::call_site());
        assert!(refusals.is_empty(), "{}", refusals[0].text(None));
        tamper(&mut plan, &mut placed);
        check(&plan, &trace, &placed)
    }

    fn faulty(tamper: impl FnOnce(&mut Plan, &mut Placed), what: &str) {
        let refusal = with_plan(tamper).expect_err("a fault");
        assert_eq!(refusal.code, codes::VERIFY);
        assert!(refusal.message.contains(what), "{}", refusal.message);
    }

    #[test]
    fn a_plan_as_it_was_made_holds() {
        with_plan(|_, _| {}).expect("no fault");
    }

    #[test]
    fn a_table_that_is_not_cut_is_found() {
        faulty(
            |_, placed| placed.conversions.clear(),
            "is whole while another is a shard",
        );
    }

    #[test]
    fn a_site_that_is_never_entered_is_found() {
        let no_scores = |plan: &mut Plan, _: &mut Placed| {
            for twin in &mut plan.twins {
                twin.edits
                    .retain(|e| !matches!(e.action, Action::Scores(_)));
            }
        };
        faulty(no_scores, "site 0 is never entered");
        let no_softmax = |plan: &mut Plan, _: &mut Placed| {
            for twin in &mut plan.twins {
                twin.edits.retain(|e| !matches!(e.action, Action::Softmax));
            }
        };
        faulty(no_softmax, "no softmax is replaced");
    }

    #[test]
    fn a_call_without_its_twin_is_found() {
        let renamed = |plan: &mut Plan, _: &mut Placed| {
            let soft = plan.twins.iter_mut().filter(|t| t.name == "soft__sp");
            soft.for_each(|t| t.name.clear());
        };
        faulty(renamed, "calls `soft__sp`, which is not planned");
    }
}
