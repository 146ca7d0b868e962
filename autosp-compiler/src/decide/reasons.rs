//! Why a module has no attention: what stands in the way of one, or in its place.

use std::collections::BTreeSet;

use autosp_plan::codes;

use crate::error::Refusal;
use crate::ops::{ShapeRule, Table};
use crate::syntax::Scope;
use crate::syntax::types::Ty;
use crate::trace::Trace;
use crate::trace::graph::Op;
use crate::trace::shape::Dim;
use crate::trace::value::{Presence, Value};

/// A bias that a layer makes and that is added to scores on their way into a softmax.
pub(super) fn learned_bias(trace: &Trace<'_, '_>) -> Option<Refusal> {
    let row = |n: usize| trace.nodes[n].row();
    let is_product = |n: usize| row(n).is_some_and(|r| r.shape == ShapeRule::Matmul);
    let reaches_product = |from: usize| {
        let mut stack = vec![from];
        let mut seen = BTreeSet::new();
        while let Some(n) = stack.pop() {
            if is_product(n) {
                return true;
            }
            if seen.insert(n) {
                stack.extend(trace.nodes[n].inputs.iter().map(|i| i.node));
            }
        }
        false
    };
    let softmax = |n: &usize| row(*n).is_some_and(|r| r.name().starts_with("softmax"));
    let mut stack: Vec<usize> = (0..trace.nodes.len()).filter(softmax).collect();
    let mut seen = BTreeSet::new();
    while let Some(n) = stack.pop() {
        // Scores come through no layer.
        let operation = row(n).is_none_or(|r| {
            r.path.starts_with("candle_core::Tensor::") || r.path.starts_with("candle_nn::ops::")
        });
        let lost = matches!(trace.nodes[n].op, Op::Unknown(_));
        if !seen.insert(n) || is_product(n) || !operation || lost {
            continue;
        }
        let node = &trace.nodes[n];
        stack.extend(node.inputs.iter().map(|i| i.node));
        let adds = row(n).is_some_and(|r| ["add", "broadcast_add"].contains(&r.name()));
        let [a, b] = node.inputs.as_slice() else {
            continue;
        };
        for (scores, bias) in [(a.node, b.node), (b.node, a.node)] {
            if !adds || !reaches_product(scores) {
                continue;
            }
            if let Some(layer) = trace.learned(bias) {
                let message = format!("`{}` adds a learned bias to the scores", node.text);
                return Some(
                    Refusal::new(codes::LEARNED_BIAS, node.at.span, message)
                        .note(format!("it comes out of `{}`", trace.nodes[layer].text))
                        .note("a bias between each two tokens, which no rank holds whole, would need a gradient of its own")
                        .help("`.detach()` it if it is not trained, or use rotary or absolute positions"),
                );
            }
        }
    }
    None
}

/// Where a module is refused, what rules sharding out is said first, and what was lost on the way to it is not said.
pub(super) fn causes_first(refusals: &mut Vec<Refusal>, mut causes: Vec<Refusal>) {
    causes.sort_by_key(|r| (r.code != codes::SCAN, r.line(), r.column()));
    causes.dedup_by(|a, b| a.message == b.message);
    if causes.is_empty() {
        return;
    }
    let lost = [
        codes::NO_ATTENTION,
        codes::UNKNOWN_CALL,
        codes::SIZE_USE,
        codes::NOT_FOLLOWED,
        codes::SHAPES,
    ];
    // Sizes that contradict each other are most often followed wrongly.
    let lost = |r: &Refusal| lost.contains(&r.code) || r.message.contains("keep the order");
    refusals.retain(|r| !lost(r) && causes.iter().all(|c| c.code != r.code));
    for cause in &mut causes {
        cause.first = true;
    }
    refusals.splice(0..0, causes);
}

/// A module without attention in which nothing else is to be said: what it holds instead.
pub(super) fn nothing_here(scope: &Scope<'_>, span: proc_macro2::Span) -> Refusal {
    let computes = |id: &usize| {
        let f = &scope.functions[*id];
        let takes = |input: &syn::FnArg| matches!(input, syn::FnArg::Typed(t) if scope.ty(&t.ty, f.owner.as_deref()).holds_tensor());
        let gives = matches!(&f.sig.output, syn::ReturnType::Type(_, ty) if scope.ty(ty, f.owner.as_deref()).holds_tensor());
        gives && f.sig.inputs.iter().any(takes) && !scope.is_library(*id)
    };
    let any = (0..scope.functions.len()).any(|id| computes(&id));
    let (instead, help) = match scope.elsewhere.first() {
        Some(first) if !any => {
            let all: Vec<String> = scope.elsewhere.iter().map(|m| format!("`{m}`")).collect();
            (
                format!(
                    ": its modules {} stand in files of their own",
                    all.join(", ")
                ),
                format!(
                    "mod {first} {{ include!(\"{first}.rs\"); }} with the attribute, for the module that holds the attention"
                ),
            )
        }
        _ => {
            let instead = if any {
                ", and no softmax"
            } else {
                ": no function of it takes a tensor and gives one"
            };
            let help = "annotate the module that holds the attention, or remove the attribute";
            (instead.to_string(), help.to_string())
        }
    };
    Refusal::new(codes::NO_ATTENTION, span, format!("no attention found in this module{instead}"))
        .note("an attention is a product of queries and keys, a softmax over the keys, and a product with the values")
        .help(help)
}

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

/// A product of all tokens with all tokens in a function that has no softmax.
pub(super) fn pairs_tokens(trace: &Trace<'_, '_>) -> Option<Refusal> {
    let product = trace.nodes.iter().find(|n| {
        let matmul = n
            .row()
            .is_some_and(|r| r.shape == crate::ops::ShapeRule::Matmul);
        let atom = |d: &Dim| match d.0.as_slice() {
            [f] => trace
                .atoms
                .normal(&f.size)
                .as_atom()
                .filter(|a| trace.atoms.is_dim(*a)),
            _ => None,
        };
        let pair = n.shape.known().and_then(|dims| match dims {
            [.., q, k] => atom(q).filter(|a| atom(k) == Some(*a)),
            _ => None,
        });
        matmul && pair.is_some()
    })?;
    Some(
        Refusal::new(
            codes::NO_SOFTMAX,
            product.at.span,
            format!(
                "`{}` pairs every token with every token, and no softmax over the keys follows",
                product.text
            ),
        )
        .note("what is sharded is `softmax(q k^T) v`, of which the scores are never made whole")
        .help("`candle_nn::ops::softmax_last_dim(&scores)?` before the product with the values"),
    )
}

/// A root whose result was lost on the way: nothing can be said of the numbers that come out.
pub(super) fn lost_result(trace: &Trace<'_, '_>, root: usize) -> Option<Refusal> {
    fn followed(value: &Value, ty: &Ty) -> bool {
        match (ty, value) {
            (Ty::Tensor, value) => matches!(value, Value::Tensor(_) | Value::Never),
            (Ty::Option(_), Value::Option(Presence::None, _)) => true,
            (Ty::Option(ty), Value::Option(_, value)) => followed(value, ty),
            (Ty::List(ty), Value::List { any, .. }) => followed(any, ty),
            (Ty::Tuple(tys), Value::Tuple(values)) => {
                tys.iter().zip(values).all(|(t, v)| followed(v, t))
            }
            (ty, _) => !ty.holds_tensor(),
        }
    }
    let f = &trace.scope.functions[root];
    let syn::ReturnType::Type(_, ty) = &f.sig.output else {
        return None;
    };
    let result = &trace.acts[0].result;
    if followed(result, &trace.scope.ty(ty, f.owner.as_deref())) {
        return None;
    }
    let span = f.sig.ident.span();
    let name = trace.scope.full_name(root);
    Some(match result.lost() {
        Some(r) => Refusal::new(
            r.code,
            r.span.unwrap_or(span),
            format!("{}, which `{name}` depends on", r.message),
        )
        .help(r.help.clone()),
        None => Refusal::new(
            codes::NOT_FOLLOWED,
            span,
            format!("cannot follow what `{name}` returns"),
        )
        .help("return a tensor that comes from the module's own functions and candle's operations"),
    })
}
