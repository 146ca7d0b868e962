//! Finds the loop over a model's blocks and the call that can be a checkpoint scope.

use autosp_plan::plan;
use syn::visit::Visit;

use super::last::{self, Carried};
use crate::place::{Place, Placed};
use crate::syntax::types::Ty;
use crate::syntax::{number, text};
use crate::trace::Trace;
use crate::trace::graph::{ActId, NodeId};
use crate::trace::value::{Presence, Value};

/// A loop and, if there is a scope, the call in its body.
pub(super) struct Found {
    pub(super) plan: plan::Block,
    pub(super) scope: Option<(ActId, u32, plan::Checkpoint)>,
}

/// All loops over blocks that hold a site.
pub(super) fn find(trace: &Trace<'_, '_>, placed: &Placed) -> Vec<Found> {
    let mut found = Vec::new();
    let mut carried = Vec::new();
    for (act, a) in trace.acts.iter().enumerate() {
        for l in &a.loops {
            let numbers = &trace.scope.functions[a.function].numbers;
            let Some(body) = numbers.get(l.expr) else {
                continue;
            };
            let inside = number::within(numbers, body);
            let holds_site = a
                .calls
                .iter()
                .any(|(e, callee)| inside.contains(e) && has_site(trace, placed, *callee));
            if !holds_site {
                continue;
            }
            let scope = scope(trace, placed, act, (body, &inside), &l.carried);
            let (call, why_none) = match &scope {
                Ok((call, _, _)) => (numbers.get(*call).map(text), None),
                Err(why) => (None, Some(why.clone())),
            };
            let scope = scope
                .ok()
                .map(|(call, checkpoint, (callee, input, result))| {
                    carried.push(Carried {
                        act,
                        expr: l.expr,
                        callee,
                        input,
                        result,
                    });
                    (act, call, checkpoint)
                });
            found.push(Found {
                plan: plan::Block {
                    function: trace.scope.full_name(a.function),
                    line: l.span.start().line,
                    scope: call,
                    why_none,
                },
                scope,
            });
        }
    }
    let scopes = found.iter_mut().filter_map(|f| f.scope.as_mut());
    for ((_, _, checkpoint), this) in scopes.zip(&carried) {
        checkpoint.last &= last::alone(trace, this, &carried);
    }
    found
}

pub(super) fn has_site(trace: &Trace<'_, '_>, placed: &Placed, act: ActId) -> bool {
    placed.sites.iter().any(|s| {
        let mut at = Some(trace.nodes[s.matmul].at.act);
        while let Some(a) = at {
            if a == act {
                return true;
            }
            at = trace.acts[a].parent.map(|(p, _)| p);
        }
        false
    })
}

/// The evaluation of a block, its input and its result.
type Tensors = (ActId, NodeId, NodeId);

/// A variable that a loop carries, before and after a round.
type Variable = (String, NodeId, NodeId);

fn scope(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    act: ActId,
    (body, inside): (&syn::Expr, &[u32]),
    carried: &[Variable],
) -> Result<(u32, plan::Checkpoint, Tensors), String> {
    let a = &trace.acts[act];
    let sharded: Vec<&Variable> = carried
        .iter()
        .filter(|(_, phi, _)| placed.place[*phi] == Place::Sharded)
        .collect();
    let [(name, phi, after)] = sharded.as_slice() else {
        return Err(format!(
            "the loop carries {} sharded tensors, a scope needs exactly one",
            sharded.len()
        ));
    };
    let calls: Vec<(u32, ActId)> = a
        .calls
        .iter()
        .filter(|(e, callee)| inside.contains(e) && has_site(trace, placed, *callee))
        .copied()
        .collect();
    let [(call, callee)] = calls.as_slice() else {
        return Err("attention is called from more than one place in the loop".to_string());
    };
    if trace.acts[*callee].result != Value::Tensor(*after) {
        return Err(format!("`{name}` is not what the block's call gives"));
    }
    let numbers = &trace.scope.functions[a.function].numbers;
    let Some(syn::Expr::MethodCall(m)) = numbers.get(*call) else {
        return Err("the block is not called as a method".to_string());
    };
    let input = m
        .args
        .iter()
        .find(|e| a.values.get(&numbers.id(e)) == Some(&Value::Tensor(*phi)));
    let Some(input) = input else {
        return Err(format!("`{name}` is not an argument of the block's call"));
    };
    let mut captures: Vec<(String, bool)> = Vec::new();
    let others =
        std::iter::once(&*m.receiver).chain(m.args.iter().filter(|e| !std::ptr::eq(*e, input)));
    for (i, e) in others.enumerate() {
        for id in number::within(numbers, e) {
            let Some(syn::Expr::Path(p)) = numbers.get(id) else {
                continue;
            };
            let Some(ident) = p.path.get_ident() else {
                continue;
            };
            if ident == "self" {
                return Err(format!("`{}` borrows the model; pass a variable", text(e)));
            }
            let Some(value) = a.values.get(&id) else {
                continue;
            };
            let bare = std::ptr::eq(e, numbers.get(id).unwrap_or(e));
            let parameter = |(name, own): &(String, Value)| ident == name && own == value;
            if a.params.iter().any(parameter)
                && borrowed_option(trace, act, &ident.to_string())
                && !matches!(value, Value::Option(Presence::None, _))
            {
                return Err(format!(
                    "`{ident}` is borrowed from the caller; pass an `&Option<Tensor>`"
                ));
            }
            if captured(trace, placed, value, &ident.to_string())? {
                // A variable that holds a reference is captured as a value and passed by reference again.
                let by_ref = bare && i > 0 && takes_reference(trace, *callee, m, e);
                if !captures.iter().any(|(n, _)| ident == n) {
                    captures.push((ident.to_string(), by_ref));
                }
            }
        }
    }
    Ok((
        *call,
        plan::Checkpoint {
            variable: name.clone(),
            input: numbers.id(input),
            captures,
            last: read_once(body, name),
        },
        (*callee, *phi, *after),
    ))
}

/// Whether the loop reads the variable in one place alone, so that nobody has the block's input after the block. A macro may read
/// anything.
fn read_once(body: &syn::Expr, name: &str) -> bool {
    struct Reads<'n>(&'n str, usize);
    impl Visit<'_> for Reads<'_> {
        fn visit_expr_path(&mut self, p: &syn::ExprPath) {
            self.1 += usize::from(p.path.is_ident(self.0));
        }
        fn visit_expr_assign(&mut self, a: &syn::ExprAssign) {
            if !matches!(&*a.left, syn::Expr::Path(p) if p.path.is_ident(self.0)) {
                self.visit_expr(&a.left);
            }
            self.visit_expr(&a.right);
        }
        fn visit_macro(&mut self, _: &syn::Macro) {
            self.1 += 2;
        }
    }
    let mut reads = Reads(name, 0);
    reads.visit_expr(body);
    reads.1 == 1
}

/// Whether a parameter of the function is an `Option` of a reference, which a scope cannot keep.
fn borrowed_option(trace: &Trace<'_, '_>, act: ActId, name: &str) -> bool {
    let sig = trace.scope.functions[trace.acts[act].function].sig;
    sig.inputs.iter().any(|input| match input {
        syn::FnArg::Typed(t) => {
            matches!(&*t.pat, syn::Pat::Ident(p) if p.ident == name)
                && matches!(&*t.ty, syn::Type::Path(p) if p.path.segments.last().is_some_and(|s| {
                    s.ident == "Option" && matches!(&s.arguments, syn::PathArguments::AngleBracketed(a)
                        if a.args.iter().any(|a| matches!(a, syn::GenericArgument::Type(syn::Type::Reference(_)))))
                }))
        }
        syn::FnArg::Receiver(_) => false,
    })
}

/// Whether a variable must be cloned into the scope's closure.
fn captured(
    trace: &Trace<'_, '_>,
    placed: &Placed,
    value: &Value,
    name: &str,
) -> Result<bool, String> {
    match value {
        Value::Tensor(n)
            if matches!(placed.place[*n], Place::Sharded | Place::Either)
                && !trace.data_only(*n) =>
        {
            Err(format!("the block takes a second sharded tensor, `{name}`"))
        }
        Value::Object {
            ty: Ty::Scope(ty), ..
        } if !trace.scope.cloneable.contains(ty) => Err(format!(
            "`{ty}` is not `Clone`, and a scope keeps its block; add `#[derive(Clone)]`"
        )),
        Value::Tensor(_) | Value::Object { .. } | Value::List { .. } => Ok(true),
        Value::Asserted(_) => Err(format!("`{name}` is not seen into")),
        Value::Option(Presence::None, _) => Ok(false),
        Value::Option(_, inner) => captured(trace, placed, inner, name),
        _ => Ok(false),
    }
}

pub(super) fn takes_reference(
    trace: &Trace<'_, '_>,
    callee: ActId,
    m: &syn::ExprMethodCall,
    arg: &syn::Expr,
) -> bool {
    let position = m.args.iter().position(|e| std::ptr::eq(e, arg));
    let typed = trace.scope.functions[trace.acts[callee].function]
        .sig
        .inputs
        .iter()
        .filter_map(|i| match i {
            syn::FnArg::Typed(t) => Some(&*t.ty),
            syn::FnArg::Receiver(_) => None,
        });
    position
        .and_then(|i| typed.into_iter().nth(i))
        .is_some_and(|ty| matches!(ty, syn::Type::Reference(_)))
}
