//! Applies the edits of a twin to a copy of the function's body.

use std::collections::{HashMap, HashSet};

use autosp_plan::plan::{Action, Bound, MaskRule, Twin};
use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::visit_mut::{self, VisitMut};
use syn::{Expr, parse_quote};

use super::blocks;

pub(super) fn block(block: &syn::Block, twin: &Twin, rt: &syn::Ident) -> syn::Block {
    let mut edits: HashMap<u32, Vec<&Action>> = HashMap::new();
    let mut wanted: HashSet<u32> = HashSet::new();
    let mut inputs: HashMap<u32, &str> = HashMap::new();
    for edit in &twin.edits {
        edits.entry(edit.expr).or_default().push(&edit.action);
        match &edit.action {
            Action::Inner(e) => {
                wanted.insert(*e);
            }
            Action::Rule(r) => {
                wanted.extend([r.ends.0, r.ends.1, r.closures.0, r.closures.1]);
                let bounds = r.band.iter().flat_map(|b| b.lo.iter().chain(&b.hi));
                wanted.extend(bounds.flat_map(|b| b.terms.iter().map(|t| t.1)));
            }
            Action::Checkpoint(c) => {
                inputs.insert(c.input, &c.variable);
            }
            _ => {}
        }
    }
    let mut rewriter = Rewriter {
        next: 0,
        edits,
        wanted,
        inputs,
        saved: HashMap::new(),
        untyped: HashSet::new(),
        rt,
    };
    let mut block = block.clone();
    rewriter.visit_block_mut(&mut block);
    block
}

struct Rewriter<'e> {
    next: u32,
    edits: HashMap<u32, Vec<&'e Action>>,
    /// Expressions that another edit moves elsewhere.
    wanted: HashSet<u32>,
    /// The inputs of checkpointed calls, with the variable that carries them.
    inputs: HashMap<u32, &'e str>,
    saved: HashMap<u32, Expr>,
    untyped: HashSet<u32>,
    rt: &'e syn::Ident,
}

/// What stands for an expression that is left out.
fn nothing() -> Expr {
    Expr::Verbatim(TokenStream::new())
}

fn is_nothing(e: &Expr) -> bool {
    matches!(e, Expr::Verbatim(t) if t.is_empty())
}

impl VisitMut for Rewriter<'_> {
    fn visit_expr_mut(&mut self, e: &mut Expr) {
        let id = self.next;
        self.next += 1;
        let receiver_is_ref =
            matches!(e, Expr::MethodCall(m) if matches!(&*m.receiver, Expr::Reference(_)));
        visit_mut::visit_expr_mut(self, e);
        if let (Expr::MethodCall(m), false) = (&mut *e, receiver_is_ref) {
            // A conversion put `&` before what stands in front of a dot.
            if let Expr::Reference(r) = &*m.receiver {
                *m.receiver = (*r.expr).clone();
            }
        }
        tidy(e);
        for action in self.edits.remove(&id).unwrap_or_default() {
            self.apply(e, action, id);
        }
        if let Some(variable) = self.inputs.get(&id) {
            // Inside the scope's closure the variable is its parameter, a reference.
            let variable = format_ident!("{variable}");
            *e = match &*e {
                Expr::Reference(_) => parse_quote!(#variable),
                _ => parse_quote!(#variable.clone()),
            };
        }
        if self.wanted.contains(&id) {
            self.saved.insert(id, e.clone());
        }
    }

    fn visit_local_mut(&mut self, local: &mut syn::Local) {
        let first = self.next;
        visit_mut::visit_local_mut(self, local);
        if self.untyped.contains(&first)
            && let syn::Pat::Type(t) = &local.pat
        {
            local.pat = (*t.pat).clone();
        }
    }

    fn visit_block_mut(&mut self, block: &mut syn::Block) {
        visit_mut::visit_block_mut(self, block);
        block.stmts.retain(|stmt| match stmt {
            syn::Stmt::Expr(e, _) => !is_nothing(e),
            _ => true,
        });
        // What is left of a decided branch at the end of a block needs no braces of its own.
        while let Some(syn::Stmt::Expr(Expr::Block(inner), None)) = block.stmts.last() {
            if inner.label.is_some() || !inner.attrs.is_empty() {
                break;
            }
            let stmts = inner.block.stmts.clone();
            block.stmts.pop();
            block.stmts.extend(stmts);
        }
    }
}

impl Rewriter<'_> {
    fn apply(&mut self, e: &mut Expr, action: &Action, id: u32) {
        let rt = &self.rt.clone();
        match action {
            Action::Replace(path) => {
                let path: syn::Path =
                    syn::parse_str(path).unwrap_or_else(|_| parse_quote!(unknown));
                *e = layer_call(&path, e, rt).unwrap_or_else(|| call(&quote!(#rt::#path), e));
            }
            Action::Recorded => blocks::recorded(e, rt),
            Action::Twin(name) => twin_call(e, name),
            Action::Scores(site) => {
                let site = format_ident!("Site{site}");
                *e = call(&quote!(#rt::scores::<autosp_sites::#site>), e);
            }
            Action::Softmax => {
                let scores = match &*e {
                    Expr::Call(c) => c.args.first().cloned(),
                    Expr::MethodCall(m) => Some(m.receiver.as_ref().clone()),
                    _ => None,
                };
                *e = parse_quote!(#rt::softmax(#scores));
            }
            Action::Attend => *e = call(&quote!(#rt::Weights::matmul), e),
            Action::Valid => *e = parse_quote!(#rt::valid(#e)),
            Action::ValidParts(count, parts) => *e = valid_parts(e, *count, parts, rt),
            Action::Slice(dim) => {
                let operand: Expr = if matches!(e, Expr::Reference(_)) {
                    e.clone()
                } else {
                    parse_quote!(&#e)
                };
                *e = if let Ok(dim) = usize::try_from(*dim) {
                    let dim = proc_macro2::Literal::usize_unsuffixed(dim);
                    parse_quote!(&#rt::slice(#operand, #dim)?)
                } else {
                    let back = proc_macro2::Literal::u64_unsuffixed(dim.unsigned_abs());
                    parse_quote!(&{
                        let table = #operand;
                        #rt::slice(table, table.rank() - #back)?
                    })
                };
            }
            Action::Pick(dim) => pick(e, *dim, rt),
            Action::Draw(rows, tokens) => draw(e, *rows, *tokens, rt),
            Action::Keys(all_queries) => {
                let mask = format_ident!("{}", if *all_queries { "key_mask" } else { "mask" });
                let operand = by_reference(e);
                *e = parse_quote!(&#rt::#mask(#operand)?);
            }
            Action::Fold(dim) => {
                let Some((operand, _, keep)) = picked(e) else {
                    return;
                };
                let dim = proc_macro2::Literal::usize_unsuffixed(*dim);
                *e = parse_quote!(#rt::fold(#operand, #dim, #keep));
            }
            Action::Inner(inner) => {
                if let Some(saved) = self.saved.get(inner) {
                    let owned = strip(saved);
                    // An operation gives a `Result`; behind its `?` stands the tensor itself.
                    *e = if matches!(e, Expr::Try(_)) {
                        parse_quote!(#owned.clone())
                    } else {
                        parse_quote!(#rt::same(&#owned))
                    };
                }
            }
            Action::Then => always(e),
            Action::Else => {
                if let Expr::If(i) = &*e {
                    *e = match &i.else_branch {
                        Some((_, other)) => (**other).clone(),
                        None => nothing(),
                    };
                }
            }
            Action::Arm(k) => arm(e, *k),
            Action::Untaken(k, why) => untaken(e, *k, why, rt),
            Action::Drop => *e = nothing(),
            Action::Rule(rule) => *e = self.rule(rule, rt),
            Action::Mask => {
                if let Expr::Call(c) = &mut *e
                    && let Expr::Path(p) = &*c.func
                {
                    let name = p.path.segments.last().map(|s| s.ident.clone());
                    *c.func = parse_quote!(#rt::Mask::#name);
                }
            }
            Action::Untyped => {
                self.untyped.insert(id);
            }
            Action::Checkpoint(scope) => blocks::checkpoint(e, scope, rt),
            Action::Tiled(tiled) => blocks::tiled(e, *tiled, rt),
        }
    }

    /// `rt::mask_rule(rows, keys, |i, j| ..)`, with the band if there is one.
    fn rule(&self, rule: &MaskRule, rt: &syn::Ident) -> Expr {
        let get = |id: u32| self.saved.get(&id).cloned().unwrap_or_else(nothing);
        let (rows, keys) = (get(rule.ends.0), get(rule.ends.1));
        let (Expr::Closure(outer), Expr::Closure(inner)) =
            (get(rule.closures.0), get(rule.closures.1))
        else {
            return nothing();
        };
        let (i, j) = (outer.inputs.first(), inner.inputs.first());
        let body = &inner.body;
        // What the outer closure computes once per query is computed with every element.
        let body: Expr = match &*outer.body {
            Expr::Block(b) if b.block.stmts.len() > 1 => {
                let before = &b.block.stmts[..b.block.stmts.len() - 1];
                parse_quote!({ #(#before)* #body })
            }
            _ => (**body).clone(),
        };
        let mut body = body;
        let owned = own_fields(&mut body);
        let base: Expr = if owned.is_empty() {
            parse_quote!(#rt::mask_rule(#rows, #keys, move |#i, #j| #body))
        } else {
            parse_quote!(#rt::mask_rule(#rows, #keys, { #(#owned)* move |#i, #j| #body }))
        };
        let Some(band) = &rule.band else { return base };
        let bound = |b: &Option<Bound>| -> TokenStream {
            match b {
                None => quote!(None),
                Some(b) => {
                    let constant = proc_macro2::Literal::i64_unsuffixed(b.constant.abs());
                    let mut sum = match b.constant {
                        0 if !b.terms.is_empty() => TokenStream::new(),
                        c if c < 0 => quote!(-#constant),
                        _ => quote!(#constant),
                    };
                    for (c, e) in &b.terms {
                        let e = get(*e);
                        let sign = if *c < 0 {
                            quote!(-)
                        } else if sum.is_empty() {
                            quote!()
                        } else {
                            quote!(+)
                        };
                        let factor = proc_macro2::Literal::i64_unsuffixed(c.abs());
                        sum = if c.abs() == 1 {
                            quote!(#sum #sign (#e as i64))
                        } else {
                            quote!(#sum #sign #factor * (#e as i64))
                        };
                    }
                    quote!(Some(#sum))
                }
            }
        };
        let (lo, hi) = (bound(&band.lo), bound(&band.hi));
        let value = |text: &str| syn::parse_str::<Expr>(text).unwrap_or_else(|_| nothing());
        let (inside, outside) = (value(&band.inside), value(&band.outside));
        parse_quote!(#base.band(#rt::Band { lo: #lo, hi: #hi }, #inside, #outside))
    }
}

/// A rule outlives the call that made it: fields of the model that it names become variables of its own, which are returned.
fn own_fields(body: &mut Expr) -> Vec<syn::Stmt> {
    struct Own(Vec<(String, syn::Stmt)>);
    impl Own {
        fn of_self(e: &Expr) -> bool {
            match e {
                Expr::Field(f) => Self::of_self(&f.base),
                Expr::Path(p) => p.path.is_ident("self"),
                _ => false,
            }
        }
    }
    impl VisitMut for Own {
        fn visit_expr_mut(&mut self, e: &mut Expr) {
            if let (Expr::Field(f), true) = (&*e, Self::of_self(e)) {
                let text = quote!(#f).to_string().replace([' ', '.'], "_");
                let name = format_ident!("{text}");
                if self.0.iter().all(|(known, _)| *known != text) {
                    self.0.push((text, parse_quote!(let #name = #f.clone();)));
                }
                *e = parse_quote!(#name);
                return;
            }
            visit_mut::visit_expr_mut(self, e);
        }
    }
    let mut own = Own(Vec::new());
    own.visit_expr_mut(body);
    own.0.into_iter().map(|(_, stmt)| stmt).collect()
}

/// A branch that became empty, and exclusive borrows of what is not written any more.
fn tidy(e: &mut Expr) {
    match e {
        Expr::If(i) => {
            let pure = matches!(&*i.cond, Expr::Path(_) | Expr::Field(_) | Expr::Unary(_));
            if i.then_branch.stmts.is_empty() && i.else_branch.is_none() && pure {
                *e = nothing();
            }
        }
        Expr::MethodCall(m) if m.method == "iter_mut" => {
            m.method = format_ident!("iter", span = m.method.span());
        }
        Expr::Reference(r) => r.mutability = None,
        _ => {}
    }
}

/// A tuple of sizes, of which some become valid ones.
fn valid_parts(e: &Expr, count: usize, parts: &[usize], rt: &syn::Ident) -> Expr {
    let tuple = strip(e);
    let each = (0..count).map(|i| {
        let place = syn::Index::from(i);
        if parts.contains(&i) {
            quote!(#rt::valid(sizes.#place))
        } else {
            quote!(sizes.#place)
        }
    });
    parse_quote!({
        let sizes = #tuple;
        (#(#each),*)
    })
}

/// The expression below `&` and parentheses.
fn strip(e: &Expr) -> Expr {
    match e {
        Expr::Reference(r) => strip(&r.expr),
        Expr::Paren(p) => strip(&p.expr),
        other => other.clone(),
    }
}

/// The call of a layer whose type is not the runtime's and that is no field: a variable may be the layer or a reference to it, which
/// the call of a method does not ask.
fn layer_call(path: &syn::Path, e: &Expr, rt: &syn::Ident) -> Option<Expr> {
    let name = &path.segments.last()?.ident;
    let Expr::MethodCall(m) = e else { return None };
    let layer = name == "layer" || name == "norm_layer";
    if !layer || m.method != "forward" || matches!(&*m.receiver, Expr::Field(_)) {
        return None;
    }
    let (layer, x, method) = (&m.receiver, &m.args, format_ident!("{name}__sp"));
    Some(parse_quote!({
        use #rt::ops::Layer as _;
        #layer.#method(#x)
    }))
}

fn by_reference(e: &Expr) -> Expr {
    if matches!(e, Expr::Reference(_)) {
        e.clone()
    } else {
        parse_quote!(&#e)
    }
}

/// The call with another callee: a receiver becomes the first argument, and `x.apply(&layer)` is `f(&layer, &x)`.
pub(super) fn call(callee: &TokenStream, e: &Expr) -> Expr {
    match e {
        Expr::MethodCall(m) if m.method == "apply" => {
            // `apply` takes a reference, however it is written.
            let (layer, x) = (m.args.first(), by_reference(&m.receiver));
            parse_quote!(#callee(#layer, #x))
        }
        Expr::MethodCall(m) if m.method == "apply_t" => {
            let (layer, x) = (m.args.first().map(by_reference), by_reference(&m.receiver));
            let rest = m.args.iter().skip(1);
            parse_quote!(#callee(#layer, #x, #(#rest),*))
        }
        Expr::MethodCall(m) => {
            let (receiver, args) = (by_reference(&m.receiver), m.args.iter());
            parse_quote!(#callee(#receiver, #(#args),*))
        }
        Expr::Call(c) => {
            let args = c.args.iter();
            parse_quote!(#callee(#(#args),*))
        }
        other => other.clone(),
    }
}

fn twin_call(e: &mut Expr, name: &str) {
    match e {
        // A method of the model that is called `apply` itself has a twin of that name.
        Expr::MethodCall(m) if m.method == "apply" && !name.starts_with("apply__sp") => {
            let name = format_ident!("{name}", span = m.method.span());
            let (layer, x) = (m.args.first().map(strip), by_reference(&m.receiver));
            *e = parse_quote!(#layer.#name(#x));
        }
        Expr::MethodCall(m) => m.method = format_ident!("{name}", span = m.method.span()),
        Expr::Call(c) => {
            if name.contains("::") {
                *c.func = syn::parse_str(name).unwrap_or_else(|_| nothing());
            } else if let Expr::Path(p) = &mut *c.func
                && let Some(last) = p.path.segments.last_mut()
            {
                last.ident = format_ident!("{name}", span = last.ident.span());
            }
        }
        _ => {}
    }
}

/// A dropout, with the dimensions of rows and tokens behind its own arguments.
fn draw(e: &mut Expr, rows: Option<usize>, tokens: Option<usize>, rt: &syn::Ident) {
    let function = matches!(e, Expr::Call(c) if c.args.len() == 2);
    let name = format_ident!("{}", if function { "dropout" } else { "dropout_layer" });
    *e = call(&quote!(#rt::ops::#name), e);
    let axis = |d: Option<usize>| {
        let d = d.map(proc_macro2::Literal::usize_unsuffixed);
        d.map_or_else(|| quote!(None), |d| quote!(Some(#d)))
    };
    let (rows, tokens) = (axis(rows), axis(tokens));
    if let Expr::Call(c) = e {
        c.args.push(parse_quote!([#rows, #tokens]));
    }
}

/// The branch that is always taken.
fn always(e: &mut Expr) {
    let Expr::If(i) = &mut *e else { return };
    if matches!(&*i.cond, Expr::Let(_)) {
        if let Some((_, other)) = &mut i.else_branch {
            **other = parse_quote!({ unreachable!("decided when the module was compiled") });
        }
    } else {
        let block = &i.then_branch;
        *e = parse_quote!(#block);
    }
}

/// The operand, the arguments behind it, and whether it narrows: of `x.i(..)`, `x.narrow(..)` and their forms as functions.
fn picked(e: &Expr) -> Option<(Expr, Vec<&Expr>, bool)> {
    match e {
        Expr::MethodCall(m) => Some((
            by_reference(&m.receiver),
            m.args.iter().collect(),
            m.method == "narrow",
        )),
        Expr::Call(c) => {
            let narrows = matches!(&*c.func, Expr::Path(p) if p.path.segments.last().is_some_and(|s| s.ident == "narrow"));
            Some((
                by_reference(c.args.first()?),
                c.args.iter().skip(1).collect(),
                narrows,
            ))
        }
        _ => None,
    }
}

/// `x.i((.., index, ..))` and `x.narrow(dim, index, 1)` as the pick of one token.
fn pick(e: &mut Expr, dim: usize, rt: &syn::Ident) {
    let Some((operand, args, narrows)) = picked(e) else {
        return;
    };
    let (name, index) = if narrows {
        ("pick_narrow", args.get(1).copied())
    } else {
        let by_dim = matches!(&*e, Expr::MethodCall(m) if m.method == "get_on_dim");
        let index = match args.first() {
            _ if by_dim => args.get(1).copied(),
            Some(Expr::Tuple(t)) => t.elems.get(dim),
            other => other.copied(),
        };
        ("pick", index)
    };
    let (name, dim) = (
        format_ident!("{name}"),
        proc_macro2::Literal::usize_unsuffixed(dim),
    );
    *e = parse_quote!(#rt::#name(#operand, #dim, #index));
}

/// The arm that is always taken; where its pattern binds nothing, its body alone.
fn arm(e: &mut Expr, k: usize) {
    let Expr::Match(m) = &mut *e else { return };
    let Some(arm) = m.arms.get(k).cloned() else {
        return;
    };
    let binds = !matches!(&arm.pat, syn::Pat::Wild(_))
        && !matches!(&arm.pat, syn::Pat::Ident(i) if i.ident == "None");
    if binds {
        let rest: syn::Arm =
            parse_quote!(_ => unreachable!("decided when the module was compiled"),);
        m.arms = vec![arm, rest];
    } else {
        *e = *arm.body;
    }
}

/// What cannot be sharded is an error where the configuration asks for it.
fn untaken(e: &mut Expr, k: usize, why: &str, rt: &syn::Ident) {
    let refused: syn::Block = parse_quote!({ return Err(#rt::untaken(#why).into()); });
    match e {
        Expr::If(i) if k == 0 => i.then_branch = refused,
        Expr::If(i) => {
            if let Some((_, other)) = &mut i.else_branch {
                **other = parse_quote!(#refused);
            }
        }
        Expr::Match(m) => {
            if let Some(arm) = m.arms.get_mut(k) {
                *arm.body = parse_quote!(#refused);
                arm.comma = Some(syn::Token![,](proc_macro2::Span::call_site()));
            }
        }
        _ => {}
    }
}
