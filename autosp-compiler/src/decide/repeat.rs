//! Finds where key and value heads are repeated for their query heads, so that the heads themselves are exchanged.

use autosp_plan::plan::HeadMap;

use crate::ops::{PlaceRule, ShapeRule};
use crate::place::sites::Site;
use crate::syntax::number;
use crate::trace::Trace;
use crate::trace::graph::{ActId, NodeId};
use crate::trace::shape::Dim;
use crate::trace::value::Value;

/// A repetition that can be left out.
pub(super) struct Repeat {
    pub(super) heads: HeadMap,
    /// Expressions that become one of their operands: activation, outer, inner.
    pub(super) elided: Vec<(ActId, u32, u32)>,
}

/// The repetition behind an operand of the site. None if there is none, or if more than the site depends on it.
pub(super) fn find(trace: &Trace<'_, '_>, site: &Site, operand: NodeId) -> Option<Repeat> {
    // The operand and what it was moved from, back to where nothing repeats.
    let mut chain = vec![operand];
    let mut base = None;
    while let Some(node) = chain.last().copied() {
        let dims = trace.nodes[node].shape.known()?;
        if !dims.iter().any(Dim::has_repeat) {
            base = Some(chain.len() - 1);
            break;
        }
        let row = trace.nodes[node].row()?;
        if !matches!(row.place, PlaceRule::Move | PlaceRule::Each)
            || trace.nodes[node].inputs.len() != 1
        {
            return None;
        }
        chain.push(trace.nodes[node].inputs[0].node);
    }
    // Singleton dimensions put in for the repetition lie behind the base.
    let mut k = base?;
    while let Some(input) = trace.nodes[chain[k]].inputs.first().filter(|_| {
        trace.nodes[chain[k]]
            .row()
            .is_some_and(|r| matches!(r.shape, ShapeRule::Unsqueeze))
    }) {
        chain.push(input.node);
        k += 1;
    }
    // One expression that stands for the whole repetition first; else its operations one by one.
    let repeating = chain.iter().take_while(|n| repeats(trace, **n)).count();
    let found = |step_by_step: bool| {
        (0..repeating)
            .take_while(|i| removable(trace, site, &chain, *i))
            .find_map(|i| at(trace, &chain, i, step_by_step))
    };
    found(false).or_else(|| found(true))
}

fn repeats(trace: &Trace<'_, '_>, node: NodeId) -> bool {
    trace.nodes[node]
        .shape
        .known()
        .is_some_and(|d| d.iter().any(Dim::has_repeat))
}

/// Whatever stands between `chain[i]` and the site names no sizes, and nobody else reads any of it.
fn removable(trace: &Trace<'_, '_>, site: &Site, chain: &[NodeId], i: usize) -> bool {
    let between = &chain[..i];
    let sizeless = |n: &NodeId| {
        trace.nodes[*n].row().is_some_and(|r| {
            matches!(
                r.shape,
                ShapeRule::Same | ShapeRule::T | ShapeRule::Transpose
            )
        })
    };
    let alone = |n: &NodeId| {
        let only = |r: &NodeId| between.contains(r) || *r == site.matmul || *r == site.out;
        !trace.nodes[*n].sizes_read && readers(trace, *n).iter().all(only)
    };
    between.iter().all(sizeless) && chain[..=i].iter().all(alone)
}

/// The repetition that ends at `chain[i]`.
fn at(trace: &Trace<'_, '_>, chain: &[NodeId], i: usize, step_by_step: bool) -> Option<Repeat> {
    let dims = trace.nodes[chain[i]].shape.known()?;
    let plain: Vec<Dim> = dims.iter().map(Dim::unrepeated).collect();
    let bases = (i + 1..chain.len())
        .filter(|k| trace.nodes[chain[*k]].shape.known() == Some(plain.as_slice()));
    for k in bases {
        let elided = if step_by_step {
            steps(trace, &chain[i..k])
        } else {
            expressions(trace, chain[i], chain[k]).map(|e| vec![e])
        };
        if let Some(elided) = elided {
            return Some(Repeat {
                heads: head_map(dims)?,
                elided,
            });
        }
    }
    None
}

fn readers(trace: &Trace<'_, '_>, node: NodeId) -> Vec<NodeId> {
    (0..trace.nodes.len())
        .filter(|r| trace.nodes[*r].inputs.iter().any(|i| i.node == node))
        .collect()
}

fn head_map(dims: &[Dim]) -> Option<HeadMap> {
    let factors = &dims.iter().find(|d| d.has_repeat())?.0;
    if factors.first()?.repeat && factors.len() > 1 {
        Some(HeadMap::Interleaved)
    } else {
        Some(HeadMap::Blocked)
    }
}

/// The outermost expression with the repeated value that holds one with the base.
fn expressions(trace: &Trace<'_, '_>, repeated: NodeId, base: NodeId) -> Option<(ActId, u32, u32)> {
    for (act, a) in trace.acts.iter().enumerate() {
        let numbers = &trace.scope.functions[a.function].numbers;
        let mut outers: Vec<u32> = a
            .values
            .iter()
            .filter(|(_, v)| **v == Value::Tensor(repeated))
            .map(|(e, _)| *e)
            .collect();
        outers.sort_unstable();
        for outer in outers {
            let Some(e) = numbers.get(outer) else {
                continue;
            };
            // A block or branch is not an operand; its tail is.
            if matches!(
                e,
                syn::Expr::If(_) | syn::Expr::Block(_) | syn::Expr::Match(_)
            ) {
                continue;
            }
            let inner = number::within(numbers, e)
                .into_iter()
                .find(|i| *i != outer && a.values.get(i) == Some(&Value::Tensor(base)));
            if let Some(inner) = inner {
                return Some((act, outer, inner));
            }
        }
    }
    None
}

/// Each operation of the repetition gives its operand, where no single expression holds them all.
fn steps(trace: &Trace<'_, '_>, chain: &[NodeId]) -> Option<Vec<(ActId, u32, u32)>> {
    chain
        .iter()
        .map(|node| {
            let n = &trace.nodes[*node];
            let numbers = &trace.scope.functions[trace.acts[n.at.act].function].numbers;
            let inner = n.inputs.first()?.expr?;
            // A cast or a copy is not part of the repetition.
            let repeats = n
                .row()
                .is_some_and(|r| r.place == PlaceRule::Move && r.shape != ShapeRule::Same);
            let holds = number::within(numbers, numbers.get(n.at.expr)?).contains(&inner);
            (repeats && holds && !n.sizes_read).then_some((n.at.act, n.at.expr, inner))
        })
        .collect()
}
