//! Why a module has no attention: what stands in the way of one, or in its place.

use autosp_plan::codes;

use crate::error::Refusal;
use crate::ops::Table;
use crate::syntax::Scope;
use crate::trace::Trace;

/// What a module without attention computes along its tokens: the first operation that is not followed or that a shard would
/// refuse, in the functions that a user calls.
pub(super) fn recurrence(scope: &Scope<'_>, table: &'static Table) -> Option<Refusal> {
    let mut called = std::collections::HashSet::new();
    let mut found: Option<Refusal> = None;
    for (id, f) in scope.functions.iter().enumerate().rev() {
        let takes = |input: &syn::FnArg| matches!(input, syn::FnArg::Typed(t) if scope.ty(&t.ty, f.owner.as_deref()).holds_tensor());
        let gives = matches!(&f.sig.output, syn::ReturnType::Type(_, ty) if scope.ty(ty, f.owner.as_deref()).holds_tensor());
        if !f.public
            || scope.is_library(id)
            || called.contains(&id)
            || !gives
            || !f.sig.inputs.iter().any(takes)
        {
            continue;
        }
        let trace = Trace::run(scope, table, id, Vec::new());
        called.extend(trace.acts.iter().skip(1).map(|a| a.function));
        let first = trace.nodes.iter().find_map(|n| match &n.op {
            crate::trace::graph::Op::Unknown(r) => {
                Some((n.at.span, r.message.clone(), r.help.clone()))
            }
            crate::trace::graph::Op::Row(row)
                if matches!(
                    row.place,
                    crate::ops::PlaceRule::Mix | crate::ops::PlaceRule::Host
                ) =>
            {
                let message = format!(
                    "`{}` computes along the tokens or reads them to the host",
                    n.text
                );
                Some((
                    n.at.span,
                    message,
                    "only attention is shared out along the sequence".to_string(),
                ))
            }
            _ => None,
        });
        let lost = trace.acts[0]
            .result
            .lost()
            .and_then(|r| Some((r.span?, r.message.clone(), r.help.clone())));
        let Some((span, message, help)) = first.or(lost) else {
            continue;
        };
        let refusal = Refusal::new(codes::NO_ATTENTION, span, format!("no attention found in this module, and {message}"))
            .note("an attention is a product of queries and keys, a softmax over the keys, and a product with the values; a scan, a recurrence or a convolution along the tokens is not shared out")
            .help(help);
        if found.as_ref().is_none_or(|f| refusal.line() < f.line()) {
            found = Some(refusal);
        }
    }
    found
}

/// The first thing that could not be followed and that a softmax depends on: what stands in the way of an attention.
pub(super) fn in_the_way(trace: &Trace<'_, '_>) -> Option<Refusal> {
    let softmax = |n: &usize| {
        trace.nodes[*n]
            .row()
            .is_some_and(|r| r.name().starts_with("softmax"))
    };
    let mut stack: Vec<usize> = (0..trace.nodes.len()).filter(softmax).collect();
    let mut seen = std::collections::BTreeSet::new();
    while let Some(node) = stack.pop() {
        if seen.insert(node) {
            stack.extend(trace.nodes[node].inputs.iter().map(|i| i.node));
        }
    }
    let unknown = seen.iter().find_map(|n| match &trace.nodes[*n].op {
        crate::trace::graph::Op::Unknown(r) => {
            let mut refusal = Refusal::new(r.code, trace.nodes[*n].at.span, r.message.clone())
                .note("no attention was found in this module; this stands in the way of one")
                .help(r.help.clone());
            refusal.branch = trace.nodes[*n].branch;
            Some(refusal)
        }
        _ => None,
    });
    // Else a product whose dimensions were not followed, and the first tensor on the way to it that has none.
    let shapeless = |n: &usize| trace.nodes[*n].shape.known().is_none();
    let product = |n: &usize| {
        let row = trace.nodes[*n].row();
        row.is_some_and(|r| r.shape == crate::ops::ShapeRule::Matmul) && shapeless(n)
    };
    unknown.or_else(|| {
        let product = seen.iter().copied().find(product)?;
        let mut first = product;
        while let Some(input) = trace.nodes[first]
            .inputs
            .iter()
            .map(|i| i.node)
            .find(shapeless)
        {
            first = input;
        }
        let (n, p) = (&trace.nodes[first], &trace.nodes[product]);
        let message = format!(
            "cannot follow the dimensions of `{}`, which `{}` depends on",
            n.text, p.text
        );
        Some(
            Refusal::new(codes::NOT_FOLLOWED, n.at.span, message)
                .note("no attention was found in this module; this stands in the way of one")
                .help(
                    "read its sizes, such as `let (b, s, h) = x.dims3()?;`, before they are used",
                ),
        )
    })
}
