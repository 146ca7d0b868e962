//! What is emitted inside and around a model's blocks.

use autosp_plan::plan::{Checkpoint, Tiled};
use quote::{format_ident, quote};
use syn::{Expr, parse_quote};

use super::rewrite::call;

/// The form of an operation that a block's tape takes.
pub(super) fn recorded(e: &mut Expr, rt: &syn::Ident) {
    match e {
        Expr::Binary(b) => {
            let operator = match b.op {
                syn::BinOp::Add(_) => format_ident!("add"),
                syn::BinOp::Mul(_) => format_ident!("mul"),
                _ => return,
            };
            let (left, right) = (bare(&b.left), bare(&b.right));
            *e = parse_quote!(#rt::ops::#operator(#left, #right));
        }
        Expr::MethodCall(m) if m.method == "add" || m.method == "mul" => {
            let name = m.method.clone();
            *e = call(&quote!(#rt::ops::#name), e);
        }
        Expr::MethodCall(m) => {
            m.method = format_ident!("{}__sp", m.method, span = m.method.span());
        }
        _ => {}
    }
}

/// Without the parentheses that an operator needed.
fn bare(e: &Expr) -> &Expr {
    match e {
        Expr::Paren(p) => &p.expr,
        other => other,
    }
}

/// The call of a part of the model, a few tokens at a time.
pub(super) fn tiled(e: &mut Expr, tiled: Tiled, rt: &syn::Ident) {
    let Expr::MethodCall(m) = &mut *e else { return };
    let (layer, method) = (&m.receiver, &m.method);
    let Some(input) = m.args.first() else { return };
    let input: Expr = match input {
        Expr::Reference(_) => input.clone(),
        other => parse_quote!(&#other),
    };
    let dim = proc_macro2::Literal::usize_unsuffixed(tiled.dim);
    // Names that no model has, so that the input means what it means outside.
    let x: Expr = if tiled.by_ref {
        parse_quote!(autosp_x)
    } else {
        parse_quote!(autosp_x.clone())
    };
    *e = parse_quote!({
        let autosp_layer = #layer.clone();
        #rt::tiled(#input, #dim, move |autosp_x| autosp_layer.#method(#x))
    });
}

/// The call of a block as a scope of its own.
pub(super) fn checkpoint(e: &mut Expr, scope: &Checkpoint, rt: &syn::Ident) {
    let Expr::MethodCall(m) = &mut *e else { return };
    for arg in &mut m.args {
        match arg {
            // A variable that held a reference is a value in the closure.
            Expr::Path(p)
                if scope
                    .captures
                    .iter()
                    .any(|(name, by_ref)| *by_ref && p.path.is_ident(name)) =>
            {
                *arg = parse_quote!(&#arg);
            }
            _ => {}
        }
    }
    let clones = scope.captures.iter().map(|(name, _)| {
        let name = format_ident!("{name}");
        quote!(let #name = #name.clone();)
    });
    let variable = format_ident!("{}", scope.variable);
    let function = format_ident!(
        "{}",
        if scope.last {
            "checkpoint_last"
        } else {
            "checkpoint"
        }
    );
    *e = parse_quote!({
        #(#clones)*
        #rt::#function(&#variable, move |#variable| #e)
    });
}
