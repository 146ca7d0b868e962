//! A closure that is called more than once has one body: what is emitted for one call must be what the others need.

use std::collections::{BTreeMap, HashMap, HashSet};

use autosp_plan::codes;
use autosp_plan::plan::Edit;

use crate::error::Refusal;
use crate::place::Placed;
use crate::syntax::number;
use crate::trace::Trace;
use crate::trace::graph::{ActId, NodeId};

/// Whether an expression is one of the lazy values of an attention, and its edits.
type Asked<'e> = (bool, Vec<&'e Edit>);

/// Holds the edits that each tensor asks for against those of the same expression in other calls.
///
/// # Errors
/// The first expression of which two calls differ.
pub(super) fn check(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    asked: &[(NodeId, Edit)],
) -> Result<(), Refusal> {
    let mut edits: HashMap<NodeId, Vec<&Edit>> = HashMap::new();
    for (node, edit) in asked {
        edits.entry(*node).or_default().push(edit);
    }
    let mut calls: BTreeMap<(ActId, u32), BTreeMap<u32, Asked<'_>>> = BTreeMap::new();
    let mut spans = HashMap::new();
    for (node, n) in trace.nodes.iter().enumerate() {
        if n.call == 0 || !placed.live.contains(&node) {
            continue;
        }
        let place = (n.at.act, n.at.expr);
        spans.insert(place, n.at.span);
        let (lazy, all) = calls.entry(place).or_default().entry(n.call).or_default();
        *lazy |= placed.place[node].lazy();
        for edit in edits.get(&node).into_iter().flatten() {
            if !all.contains(edit) {
                all.push(edit);
            }
        }
    }
    let alike = |(a, x): &Asked<'_>, (b, y): &Asked<'_>| {
        a == b && x.len() == y.len() && x.iter().all(|edit| y.contains(edit))
    };
    for (place, of) in &calls {
        let mut of = of.values();
        if let Some(first) = of.next()
            && !of.all(|other| alike(first, other))
        {
            return Err(differ(spans[place]));
        }
    }
    sizes(trace, placed)
}

/// A length that becomes one of the sequence does so in every call, or in none.
fn sizes(trace: &Trace<'_, '_>, placed: &Placed) -> Result<(), Refusal> {
    let mut known: HashSet<(usize, u32)> = HashSet::new();
    for u in placed.valid.iter().filter(|u| u.call > 0) {
        if !known.insert((u.act, u.expr)) {
            continue;
        }
        let numbers = &trace.scope.functions[trace.acts[u.act].function].numbers;
        let holds = |closure: u32| {
            let body = numbers.get(closure);
            body.is_some_and(|e| number::within(numbers, e).contains(&u.expr))
        };
        for (act, closure, given) in &trace.closure_calls {
            let other = |(a, c, g): &(usize, u32, _)| a == act && c == closure && g != given;
            if *act == u.act && trace.closure_calls.iter().any(other) && holds(*closure) {
                return Err(differ(u.span));
            }
        }
    }
    Ok(())
}

fn differ(span: proc_macro2::Span) -> Refusal {
    Refusal::new(
        codes::TWO_WAYS,
        span,
        "two calls of a closure need different code, and it has one body",
    )
    .help("make a function of it, or a closure for each call")
}
