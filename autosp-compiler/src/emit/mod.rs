//! The fifth room: the module with its twins, from the source and the plan alone.

mod rewrite;
mod schedule;
mod signature;

use std::collections::HashMap;

use autosp_plan::plan::{Plan, Root, Twin};
use proc_macro2::TokenStream;
use quote::{ToTokens, format_ident, quote};

/// The items of the module: the originals, each followed by its twins, then the sites' schedules.
pub(crate) fn items(items: &[syn::Item], plan: &Plan, facade: &TokenStream) -> TokenStream {
    let names = &Paths::new(items, facade);
    let mut by_item: HashMap<usize, Vec<(usize, &Twin)>> = HashMap::new();
    for (id, twin) in plan.twins.iter().enumerate() {
        by_item.entry(twin.place.0).or_default().push((id, twin));
    }
    let mut out = TokenStream::new();
    for (i, item) in items.iter().enumerate() {
        let twins = by_item.remove(&i).unwrap_or_default();
        original(item, i, plan, names).to_tokens(&mut out);
        emit_twins(item, &twins, plan, names).to_tokens(&mut out);
    }
    schedule::sites(plan, facade).to_tokens(&mut out);
    out
}

/// How emitted code names the runtime.
pub(crate) struct Paths {
    /// `::autosp::rt`, for signatures.
    full: TokenStream,
    /// `rt`, which every twin brings into scope; another name where the module has an `rt` of its own.
    short: syn::Ident,
}

impl Paths {
    fn new(items: &[syn::Item], facade: &TokenStream) -> Self {
        fn mentions(tokens: TokenStream, name: &str) -> bool {
            tokens.into_iter().any(|t| match t {
                proc_macro2::TokenTree::Ident(i) => i == name,
                proc_macro2::TokenTree::Group(g) => mentions(g.stream(), name),
                _ => false,
            })
        }
        let taken = items.iter().any(|i| mentions(i.to_token_stream(), "rt"));
        Self {
            full: quote!(#facade::rt),
            short: format_ident!("{}", if taken { "autosp_rt" } else { "rt" }),
        }
    }

    /// `use ::autosp::rt;`
    fn import(&self) -> syn::Stmt {
        let Self { full, short } = self;
        if short == "rt" {
            syn::parse_quote!(use #full;)
        } else {
            syn::parse_quote!(use #full as #short;)
        }
    }
}

/// The item as it was written; functions that a user calls go to their twin inside a sharded scope.
fn original(item: &syn::Item, index: usize, plan: &Plan, names: &Paths) -> TokenStream {
    let roots: Vec<(&Root, &Twin)> = plan
        .roots
        .iter()
        .map(|r| (r, &plan.twins[r.twin]))
        .filter(|(_, t)| t.place.0 == index)
        .collect();
    if roots.is_empty() {
        return item.to_token_stream();
    }
    let mut item = item.clone();
    for (_, twin) in roots {
        match (&mut item, twin.place.1) {
            (syn::Item::Fn(f), None) => {
                let call = dispatch(&f.sig, twin, names);
                f.block.stmts.insert(0, call);
            }
            (syn::Item::Impl(imp), Some(k)) => {
                if let Some(syn::ImplItem::Fn(f)) = imp.items.get_mut(k) {
                    let call = dispatch(&f.sig, twin, names);
                    f.block.stmts.insert(0, call);
                }
            }
            _ => {}
        }
    }
    item.to_token_stream()
}

fn dispatch(sig: &syn::Signature, twin: &Twin, names: &Paths) -> syn::Stmt {
    let rt = &names.full;
    let name = format_ident!("{}", twin.name);
    let args = sig.inputs.iter().filter_map(|input| match input {
        syn::FnArg::Typed(t) => Some(argument(&t.pat)),
        syn::FnArg::Receiver(_) => None,
    });
    let call = match (sig.receiver(), twin.place.1) {
        (Some(_), _) => quote!(self.#name(#(#args),*)),
        (None, Some(_)) => quote!(Self::#name(#(#args),*)),
        (None, None) => quote!(#name(#(#args),*)),
    };
    syn::parse_quote!(if #rt::sharded() { return #call; })
}

/// A parameter as an argument; `_` and patterns cannot be passed on by name.
fn argument(pat: &syn::Pat) -> TokenStream {
    match pat {
        syn::Pat::Ident(i) => {
            let name = &i.ident;
            quote!(#name)
        }
        other => quote!(#other),
    }
}

fn emit_twins(
    item: &syn::Item,
    twins: &[(usize, &Twin)],
    plan: &Plan,
    names: &Paths,
) -> TokenStream {
    if twins.is_empty() {
        return TokenStream::new();
    }
    let root = |id: usize| plan.roots.iter().find(|r| r.twin == id);
    match item {
        syn::Item::Fn(f) => twins
            .iter()
            .map(|(id, twin)| {
                let function = twin_fn(&f.sig, &f.block, twin, root(*id), names);
                quote!(#function)
            })
            .collect(),
        syn::Item::Impl(imp) => {
            let functions =
                twins
                    .iter()
                    .filter_map(|(id, twin)| match imp.items.get(twin.place.1?) {
                        Some(syn::ImplItem::Fn(f)) => {
                            Some(twin_fn(&f.sig, &f.block, twin, root(*id), names))
                        }
                        _ => None,
                    });
            let (generics, _, bounds) = imp.generics.split_for_impl();
            let ty = &imp.self_ty;
            quote!(impl #generics #ty #bounds { #(#functions)* })
        }
        _ => TokenStream::new(),
    }
}

fn twin_fn(
    sig: &syn::Signature,
    block: &syn::Block,
    twin: &Twin,
    root: Option<&Root>,
    names: &Paths,
) -> TokenStream {
    let rt = &names.short;
    let twin_sig = signature::twin(sig, twin, &names.full);
    let mut block = rewrite::block(block, twin, rt);
    if let Some(root) = root {
        let function = &root.function;
        let inputs = root.inputs.iter().map(|(name, dim)| {
            let ident = format_ident!("{name}");
            let dim = proc_macro2::Literal::usize_unsuffixed(*dim);
            let by_ref = sig.inputs.iter().any(|i| matches!(i, syn::FnArg::Typed(t) if matches!(&*t.ty, syn::Type::Reference(_)) && matches!(&*t.pat, syn::Pat::Ident(p) if p.ident == *name)));
            if by_ref { quote!((#name, #ident, #dim)) } else { quote!((#name, &#ident, #dim)) }
        });
        let checks = std::iter::once(quote!(#rt::enter(#function, &[#(#inputs),*])?;)).chain(
            root.batch.iter().map(|(name, dim)| {
                let ident = format_ident!("{name}");
                let dim = proc_macro2::Literal::usize_unsuffixed(*dim);
                quote!(#rt::batch(&#ident, #dim)?;)
            }),
        );
        let checks = checks.chain(root.offsets.iter().map(|name| {
            let ident = format_ident!("{name}");
            quote!(#rt::no_offset(#function, #name, #ident)?;)
        }));
        let beside = root.beside.iter().map(|b| {
            let (name, ident) = (&b.name, format_ident!("{}", b.name));
            let dim = proc_macro2::Literal::usize_unsuffixed(b.dim);
            let rank = proc_macro2::Literal::usize_unsuffixed(b.rank);
            if b.optional {
                quote!(if let Some(#ident) = &#ident {
                    #rt::enter_beside(#function, #name, #ident, #dim, #rank)?;
                })
            } else {
                quote!(#rt::enter_beside(#function, #name, &#ident, #dim, #rank)?;)
            }
        });
        let checks = checks.chain(beside);
        let checks: Vec<syn::Stmt> = checks.map(|c| syn::parse_quote!(#c)).collect();
        block.stmts.splice(0..0, checks);
    }
    block.stmts.insert(0, names.import());
    let doc = format!(
        " [`{}`] on one rank's shard of the sequence.",
        sig_name(twin)
    );
    quote! {
        #[doc = #doc]
        #[doc(hidden)]
        #[allow(unused, non_snake_case, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
        pub(crate) #twin_sig #block
    }
}

fn sig_name(twin: &Twin) -> String {
    twin.function
        .rsplit("::")
        .next()
        .map_or_else(String::new, |name| {
            if twin.place.1.is_some() {
                format!("Self::{name}")
            } else {
                name.to_string()
            }
        })
}
