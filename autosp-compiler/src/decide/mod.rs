//! The fourth room: findings become a plan, which is plain data.

mod blocks;
mod last;
mod loss;
mod mask;
mod reasons;
mod repeat;
mod tail;
mod tiles;
mod twice;
mod twins;
pub(crate) mod verify;

use autosp_plan::codes;
use autosp_plan::plan;

use reasons::{
    causes_first, in_the_way, learned_bias, lost_result, nothing_here, pairs_tokens, recurrence,
};

use crate::error::Refusal;
use crate::ops::Table;
use crate::place::{Placed, place};
use crate::syntax::Scope;
use crate::syntax::asserts::Kind;
use crate::syntax::types::Ty;
use crate::trace::Trace;
use crate::trace::shape::{Dim, Shape, show};
use crate::trace::size::AtomKind;

/// A plan, or every refusal. A module without attention is refused too.
pub(crate) fn decide(
    scope: &Scope<'_>,
    table: &'static Table,
    module_span: proc_macro2::Span,
) -> (plan::Plan, Vec<Refusal>) {
    let mut plan = plan::Plan {
        module: scope.name.clone(),
        ..plan::Plan::default()
    };
    let mut refusals: Vec<Refusal> = scope.wrong_asserts();
    if !refusals.is_empty() {
        return (plan, refusals);
    }
    let mut fallback: Vec<Refusal> = Vec::new();
    let mut inner: Vec<usize> = Vec::new();
    let mut no_loss: Vec<Refusal> = Vec::new();
    let Roots {
        candidates,
        pairs,
        mut causes,
        hidden,
    } = roots(scope, table);
    let mut sharded: Vec<String> = Vec::new();
    for (root, trace) in candidates {
        let (trace, placed) = without_branches(scope, table, root, trace);
        refusals.extend(lost_result(&trace, root));
        match placed {
            Ok(placed) => {
                if let Err(more) = add(&mut plan, &trace, &placed, (root, false), &mut no_loss) {
                    refusals.extend(more);
                }
                sharded.extend(
                    trace
                        .acts
                        .iter()
                        .map(|a| scope.functions[a.function].name.clone()),
                );
                for function in holders(&trace, &placed) {
                    if !inner.contains(&function) {
                        inner.push(function);
                    }
                }
            }
            Err(more) => refusals.extend(more),
        }
        causes.extend(trace.causes.iter().cloned());
        causes.extend(learned_bias(&trace));
        // What could not be followed on the way explains why no attention was found.
        fallback.extend(in_the_way(&trace));
    }
    if plan.sites.is_empty() && refusals.is_empty() {
        let nothing = || nothing_here(scope, module_span);
        let instead = || recurrence(scope, table);
        // What stands in the way of a softmax comes before functions that have none.
        let first = fallback.into_iter().chain(pairs).next().or_else(instead);
        refusals.push(first.unwrap_or_else(nothing));
    }
    // What a user calls has to be seen to come to what is sharded.
    let comes = |names: &[String]| names.iter().any(|name| sharded.contains(name));
    let around = hidden.into_iter().filter(|(names, _)| comes(names));
    refusals.extend(around.map(|(_, refusal)| refusal));
    if !refusals.is_empty() && causes.is_empty() {
        causes = inner_causes(scope, table);
    }
    if !refusals.is_empty() {
        causes_first(&mut refusals, causes);
    }
    // A loss was asked for: one function has to have it.
    if plan.roots.iter().all(|r| r.loss.is_none()) {
        refusals.extend(no_loss);
    }
    if refusals.is_empty() {
        for function in inner {
            add_inner(&mut plan, scope, table, function);
        }
        refusals = scope.unused_asserts();
    }
    dedupe(&mut refusals);
    (plan, refusals)
}

/// What rules sharding out in the public functions by themselves: on the way to them from another one, it may have been lost.
fn inner_causes(scope: &Scope<'_>, table: &'static Table) -> Vec<Refusal> {
    let mut causes = Vec::new();
    for (id, f) in scope.functions.iter().enumerate() {
        if f.public && !scope.is_library(id) && scope.on_tensors(id) {
            let trace = Trace::run(scope, table, id, Vec::new());
            causes.extend(trace.causes.iter().cloned());
            causes.extend(learned_bias(&trace));
        }
    }
    causes
}

/// Public functions that a root calls on the way to an attention, callees first.
fn holders(trace: &Trace<'_, '_>, placed: &Placed) -> Vec<usize> {
    let mut found = Vec::new();
    for site in &placed.sites {
        let mut at = Some(trace.nodes[site.matmul].at.act);
        while let Some(act) = at {
            let function = trace.acts[act].function;
            let f = &trace.scope.functions[function];
            if act != 0
                && f.public
                && !trace.scope.is_library(function)
                && !found.contains(&function)
            {
                found.push(function);
            }
            at = trace.acts[act].parent.map(|(parent, _)| parent);
        }
    }
    found
}

/// A function that can be called from outside too: a root of its own where that can be followed, else an error inside a scope.
fn add_inner(plan: &mut plan::Plan, scope: &Scope<'_>, table: &'static Table, function: usize) {
    let place = scope.functions[function].place;
    if plan.roots.iter().any(|r| plan.twins[r.twin].place == place) {
        return;
    }
    let trace = Trace::run(scope, table, function, Vec::new());
    let (trace, placed) = without_branches(scope, table, function, trace);
    let before = plan.clone();
    let outcome = match (lost_result(&trace, function), placed) {
        (Some(lost), _) => Err(vec![lost]),
        (None, Ok(placed)) => add(plan, &trace, &placed, (function, true), &mut Vec::new()),
        (None, Err(problems)) => Err(problems),
    };
    if let Err(problems) = outcome {
        *plan = before;
        let why = problems.first().map_or_else(
            || "no attention was followed in it".to_string(),
            |p| p.message.clone(),
        );
        let fallible = trace.may_fail(function);
        if fallible {
            let function = scope.full_name(function);
            plan.unsharded.push(plan::Unsharded {
                function,
                place,
                why,
            });
        }
    }
}

/// Branches that a model may have and that are left untaken; more say that the model itself is not followed.
const BRANCHES: usize = 16;

/// The trace and its placement, with branches left untaken that cannot be sharded and that the configuration decides.
fn without_branches<'s, 'a>(
    scope: &'s Scope<'a>,
    table: &'static Table,
    root: usize,
    mut trace: Trace<'s, 'a>,
) -> (Trace<'s, 'a>, Result<Placed, Vec<Refusal>>) {
    let mut untaken = Vec::new();
    loop {
        let problems = match place(&mut trace) {
            Ok(placed) => return (trace, Ok(placed)),
            Err(problems) if problems.is_empty() => in_the_way(&trace).into_iter().collect(),
            Err(problems) => problems,
        };
        let known = untaken.len();
        // A call into another library may be anything; what is known to be wrong is wrong in every configuration.
        let open = |p: &Refusal| {
            p.branch
                .filter(|_| p.code == codes::UNKNOWN_CALL || p.elsewhere)
        };
        for problem in &problems {
            if let Some(branch) = open(problem)
                && untaken.iter().all(|(b, _)| *b != branch)
            {
                untaken.push((
                    branch,
                    format!("line {}: {}", problem.line(), problem.message),
                ));
            }
        }
        // What stands in no such branch is refused, and is all that has to be said.
        let firm: Vec<Refusal> = problems
            .iter()
            .filter(|p| open(p).is_none())
            .cloned()
            .collect();
        if !firm.is_empty() || untaken.len() == known || known > BRANCHES {
            let sites = place(&mut trace).is_err_and(|p| p.is_empty());
            let said = if firm.is_empty() { problems } else { firm };
            return (trace, Err(if sites { Vec::new() } else { said }));
        }
        trace = Trace::run(scope, table, root, untaken.clone());
    }
}

/// The same place is refused once, though several roots come by.
fn dedupe(refusals: &mut Vec<Refusal>) {
    let mut seen = Vec::new();
    refusals.retain(|r| {
        let key = (r.code.id, r.line(), r.column(), r.message.clone());
        let new = !seen.contains(&key);
        seen.push(key);
        new
    });
}

/// Functions with their traces, and what stands in the way of others.
struct Roots<'s, 'a> {
    candidates: Vec<(usize, Trace<'s, 'a>)>,
    pairs: Vec<Refusal>,
    /// What rules sharding out, in any function.
    causes: Vec<Refusal>,
    /// Calls in functions without an attention that may come to functions of these names, and are not followed.
    hidden: Vec<(Vec<String>, Refusal)>,
}

/// Functions that a user calls: they take a tensor, come to an attention or fail to, and no other function of the scope
/// calls them on the way to one. Each with its trace.
fn roots<'s, 'a>(scope: &'s Scope<'a>, table: &'static Table) -> Roots<'s, 'a> {
    let mut candidates: Vec<(usize, Trace<'s, 'a>)> = Vec::new();
    let (mut pairs, mut lost, mut causes) = (Vec::new(), Vec::new(), Vec::new());
    let mut unseen = Vec::new();
    let mut called = std::collections::HashSet::new();
    // What is called stands before its caller in most files; a function that is called needs no trace of its own.
    for (id, f) in scope.functions.iter().enumerate().rev() {
        if !scope.on_tensors(id) || called.contains(&id) || scope.is_library(id) {
            continue;
        }
        let hidden = [Kind::Tokenwise, Kind::Replicated];
        if scope
            .asserts
            .iter()
            .any(|a| a.path == f.path && hidden.contains(&a.kind))
        {
            continue;
        }
        let trace = Trace::run(scope, table, id, Vec::new());
        called.extend(trace.acts.iter().skip(1).map(|a| a.function));
        let softmax = |n: &crate::trace::graph::Node| {
            n.row().is_some_and(|r| r.name().starts_with("softmax"))
        };
        if trace.nodes.iter().any(softmax) || trace.lost_softmax {
            candidates.push((id, trace));
        } else {
            causes.extend(trace.causes.iter().cloned());
            pairs.extend(pairs_tokens(&trace));
            unseen.extend(trace.hidden.iter().filter(|_| f.public).map(|(names, r)| {
                let span = r.span.unwrap_or_else(|| f.sig.ident.span());
                let refusal = Refusal::new(r.code, span, r.message.clone()).help(r.help.clone());
                (names.clone(), refusal)
            }));
            lost.extend(lost_result(&trace, id));
        }
    }
    candidates.retain(|(id, _)| !called.contains(id));
    if candidates.iter().any(|(id, _)| scope.functions[*id].public) {
        candidates.retain(|(id, _)| scope.functions[*id].public);
    }
    candidates.reverse();
    pairs.extend(lost.into_iter().rev());
    Roots {
        candidates,
        pairs,
        causes,
        hidden: unseen,
    }
}

fn add(
    plan: &mut plan::Plan,
    trace: &Trace<'_, '_>,
    placed: &Placed,
    (root, inner): (usize, bool),
    no_loss: &mut Vec<Refusal>,
) -> Result<(), Vec<Refusal>> {
    let first_site = plan.sites.len();
    let mut elided = Vec::new();
    let mut site_ids = Vec::new();
    for site in &placed.sites {
        let k = repeat::find(trace, site, site.k.node);
        let v = repeat::find(trace, site, site.v.node);
        // Keys and values share the kv heads: both are exchanged before the repetition, or neither.
        let (heads, unrepeated) = match (&k, &v) {
            (Some(k), Some(v)) if k.heads == v.heads => (k.heads, true),
            _ => (plan::HeadMap::Blocked, false),
        };
        if unrepeated {
            elided.extend(k.iter().chain(&v).flat_map(|r| r.elided.iter().copied()));
        }
        let described = describe(trace, site, heads, unrepeated);
        // Two roots that come to the same attention share its site.
        let same = |s: &plan::Site| {
            (&s.function, s.line, &s.layout, s.heads, s.unrepeated)
                == (
                    &described.function,
                    described.line,
                    &described.layout,
                    described.heads,
                    described.unrepeated,
                )
        };
        let known = plan.sites.iter().position(same);
        site_ids.push(known.unwrap_or_else(|| {
            plan.sites.push(described);
            plan.sites.len() - 1
        }));
    }
    let blocks = blocks::find(trace, placed);
    for block in &blocks {
        if !plan.blocks.contains(&block.plan) {
            plan.blocks.push(block.plan.clone());
        }
    }
    let twin = match twins::build(plan, trace, placed, &site_ids, &elided, &blocks, None) {
        Ok(twin) => twin,
        Err(refusal) => {
            plan.sites.truncate(first_site);
            return Err(vec![refusal]);
        }
    };
    let every_token = |plan: &mut plan::Plan, loss: &loss::Loss| {
        twins::build(plan, trace, placed, &site_ids, &elided, &blocks, Some(loss))
    };
    let loss = loss::twin(plan, trace, placed, (root, inner), no_loss, every_token)
        .map_err(|r| vec![r])?;
    let f = &trace.scope.functions[root];
    let (plain, beside) = entries(trace, placed, root)?;
    returns(trace, placed, root).map_err(|r| vec![r])?;
    plan.roots.push(plan::Root {
        function: trace.scope.full_name(root),
        line: f.line(),
        inputs: plain,
        beside,
        batch: batch(trace, placed),
        offsets: trace.offsets.clone(),
        twin,
        loss,
    });
    for a in &trace.acts {
        for (_, fact) in &a.facts {
            if let crate::trace::Fact::Untaken(_, why) = fact {
                let function = trace.scope.full_name(a.function);
                let note = format!(
                    "`{function}` has a branch that is not sharded and is an error if it is taken: {why}"
                );
                if !plan.notes.contains(&note) {
                    plan.notes.push(note);
                }
            }
        }
    }
    for read in &trace.row_reads {
        let (n, sharded) = (
            &trace.nodes[*read],
            placed.place[*read] == crate::place::Place::Sharded,
        );
        let note = format!(
            "`{}` (line {}) is read to the host row by row, so that no gradient flows through it",
            n.text,
            n.at.span.start().line
        );
        if sharded && !plan.notes.contains(&note) {
            plan.notes.push(note);
        }
    }
    for helper in &trace.helpers {
        if !plan.helpers.contains(helper) {
            plan.helpers.push(helper.clone());
        }
    }
    verify::check(plan, trace, placed).map_err(|r| vec![r])
}

/// What a root returns shows where the tokens are, or its callers know.
fn returns(trace: &Trace<'_, '_>, placed: &Placed, root: usize) -> Result<(), Refusal> {
    let f = &trace.scope.functions[root];
    let said = trace.scope.asserted(&f.path, &[Kind::Sharded]).is_some();
    let mut tensors = Vec::new();
    trace.acts[0].result.tensors(&mut tensors);
    for node in tensors {
        let Some(dims) = trace.nodes[node].shape.known() else {
            continue;
        };
        let sequence = |d: &&Dim| {
            d.0.iter()
                .any(|f| trace.atoms.normal(&f.size).contains(placed.sequence))
        };
        let merged = dims.iter().find(sequence).is_some_and(|d| d.0.len() > 1);
        if placed.place[node] == crate::place::Place::Sharded && merged && !said {
            let name = trace.scope.full_name(root);
            return Err(Refusal::new(
                codes::RETURNS_SHARD,
                f.sig.ident.span(),
                format!("`{name}` returns one rank's tokens without saying so"),
            )
            .note(format!(
                "its result is {}: rows and tokens are one dimension",
                show(&trace.atoms, dims)
            ))
            .help(format!(
                "keep the sequence a dimension of its own, or `sequence_parallel(sharded({}))`",
                f.path
            )));
        }
    }
    Ok(())
}

/// Shards among a root's parameters: with their sequence dimension, and those of which more is compared at the entry.
type Entries = (Vec<(String, usize)>, Vec<plan::Beside>);

fn entries(trace: &Trace<'_, '_>, placed: &Placed, root: usize) -> Result<Entries, Vec<Refusal>> {
    let f = &trace.scope.functions[root];
    let inputs = f.sig.inputs.iter().filter_map(|input| match input {
        syn::FnArg::Typed(t) => Some((
            crate::trace::param_name(&t.pat),
            trace.scope.ty(&t.ty, f.owner.as_deref()),
        )),
        syn::FnArg::Receiver(_) => None,
    });
    let (mut plain, mut beside) = (Vec::new(), Vec::new());
    for (name, ty) in inputs {
        let optional = matches!(&ty, Ty::Option(inner) if **inner == Ty::Tensor);
        if ty != Ty::Tensor && !optional {
            continue;
        }
        let Some((dim, rank)) = sharded_dim(trace, placed, &name) else {
            continue;
        };
        let assumed = trace.assumed_ranks.contains(&name);
        match rank {
            Some(rank) if optional || assumed => beside.push(plan::Beside {
                name,
                dim,
                rank,
                optional,
            }),
            _ if optional => {
                return Err(vec![
                    Refusal::new(
                        codes::NOT_FOLLOWED,
                        f.sig.ident.span(),
                        format!("cannot tell how many dimensions `{name}` has"),
                    )
                    .help(format!(
                        "read its sizes, such as `let (b, s) = {name}.dims2()?;`"
                    )),
                ]);
            }
            _ => plain.push((name, dim)),
        }
    }
    Ok((plain, beside))
}

/// The parameter and dimension that is the batch, if a site needs to be told.
fn batch(trace: &Trace<'_, '_>, placed: &Placed) -> Option<(String, usize)> {
    let atom = placed.sites.iter().find_map(|s| s.layout.batch)?;
    match trace.atoms.kind(atom) {
        AtomKind::Dim(name, dim) => Some((name.clone(), *dim)),
        _ => None,
    }
}

/// The sequence dimension of a root's parameter, and its rank, if that is known.
fn sharded_dim(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    name: &str,
) -> Option<(usize, Option<usize>)> {
    let node = trace
        .nodes
        .iter()
        .position(|n| matches!(&n.op, crate::trace::graph::Op::Param(p) if p == name))?;
    let sequence = |d: &Dim| {
        d.0.iter()
            .any(|f| trace.atoms.normal(&f.size).contains(placed.sequence))
    };
    match &trace.nodes[node].shape {
        Shape::Known(dims) => Some((dims.iter().position(sequence)?, Some(dims.len()))),
        Shape::Partial(known) => {
            let (d, _) = known.iter().find(|(_, dim)| sequence(dim))?;
            Some((*d, None))
        }
        _ => None,
    }
}

fn describe(
    trace: &Trace<'_, '_>,
    site: &crate::place::sites::Site,
    heads: plan::HeadMap,
    unrepeated: bool,
) -> plan::Site {
    let n = &trace.nodes[site.matmul];
    let shape = |node: usize| match trace.nodes[node].shape.known() {
        Some(dims) if unrepeated => show(
            &trace.atoms,
            &dims.iter().map(Dim::unrepeated).collect::<Vec<_>>(),
        ),
        Some(dims) => show(&trace.atoms, dims),
        None => "?".to_string(),
    };
    plan::Site {
        function: trace.scope.full_name(trace.acts[n.at.act].function),
        line: n.at.span.start().line,
        layout: plan::Layout {
            q: site.layout.q.clone(),
            k: site.layout.k.clone(),
            v: site.layout.v.clone(),
        },
        operands: plan::Operands {
            q: shape(site.q.node),
            k: shape(site.k.node),
            v: shape(site.v.node),
        },
        heads,
        unrepeated,
        mask: mask::describe(trace, site),
        strategies: vec!["ulysses".to_string()],
        bytes: plan::ULYSSES_BYTES.to_string(),
    }
}
