//! The fifth room: the module with its twins, from the source and the plan alone.

mod blocks;
mod rewrite;
mod schedule;
mod signature;

use std::collections::HashMap;

use autosp_plan::plan::{Action, Kind, Plan, Root, Twin, Unsharded};
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
        emit_twins(item, &twins, names).to_tokens(&mut out);
        losses(item, i, plan, names).to_tokens(&mut out);
    }
    library(&by_item, items.len(), names, facade).to_tokens(&mut out);
    schedule::sites(plan, facade).to_tokens(&mut out);
    out
}

/// The twins of libraries' helpers, in a module of their own.
fn library(
    by_item: &HashMap<usize, Vec<(usize, &Twin)>>,
    own: usize,
    names: &Paths,
    facade: &TokenStream,
) -> TokenStream {
    let definitions = crate::syntax::library::items();
    let twins: TokenStream = definitions
        .iter()
        .enumerate()
        .filter_map(|(i, item)| Some(emit_twins(item, by_item.get(&(own + i))?, names)))
        .collect();
    if twins.is_empty() {
        return twins;
    }
    let module = format_ident!("{}", crate::syntax::library::MODULE);
    quote! {
        /// What shared helpers of the model compute, on one rank's shard of the sequence.
        #[allow(unused, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
        pub(crate) mod #module {
            use super::autosp_sites;
            use #facade::rt::{candle_core, candle_nn};
            #twins
        }
    }
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
    let calls = plan
        .roots
        .iter()
        .map(|r| (plan.twins[r.twin].place, Call::Twin(r, &plan.twins[r.twin])));
    let none = plan.unsharded.iter().map(|u| (u.place, Call::Refused(u)));
    let here: Vec<_> = calls
        .chain(none)
        .filter(|(place, _)| place.0 == index)
        .collect();
    if here.is_empty() {
        return item.to_token_stream();
    }
    let mut item = item.clone();
    for (place, call) in here {
        match (&mut item, place.1) {
            (syn::Item::Fn(f), None) => {
                let call = call.statement(&f.sig, plan, names);
                f.block.stmts.insert(0, call);
            }
            (syn::Item::Impl(imp), Some(k)) => {
                if let Some(syn::ImplItem::Fn(f)) = imp.items.get_mut(k) {
                    let call = call.statement(&f.sig, plan, names);
                    f.block.stmts.insert(0, call);
                }
            }
            _ => {}
        }
    }
    item.to_token_stream()
}

/// What a function does inside a sharded scope.
enum Call<'p> {
    Twin(&'p Root, &'p Twin),
    Refused(&'p Unsharded),
}

impl Call<'_> {
    fn statement(&self, sig: &syn::Signature, plan: &Plan, names: &Paths) -> syn::Stmt {
        match self {
            Self::Twin(root, twin) => dispatch(sig, root, twin, plan, names),
            Self::Refused(Unsharded { function, why, .. }) => {
                let rt = &names.full;
                syn::parse_quote!(if #rt::sharded() { return Err(#rt::unsharded(#function, #why).into()); })
            }
        }
    }
}

/// Checks what comes in, then the twin.
fn dispatch(
    sig: &syn::Signature,
    root: &Root,
    twin: &Twin,
    plan: &Plan,
    names: &Paths,
) -> syn::Stmt {
    let rt = &names.full;
    let call = twin_call(sig, twin);
    let checks = checks(sig, root, plan, names);
    syn::parse_quote!(if #rt::sharded() {
        #checks
        return #call;
    })
}

/// A call of the twin with the function's own parameters.
fn twin_call(sig: &syn::Signature, twin: &Twin) -> TokenStream {
    let name = format_ident!("{}", twin.name);
    let args = sig.inputs.iter().filter_map(|input| match input {
        syn::FnArg::Typed(t) => Some(argument(&t.pat)),
        syn::FnArg::Receiver(_) => None,
    });
    match (sig.receiver(), twin.place.1) {
        (Some(_), _) => quote!(self.#name(#(#args),*)),
        (None, Some(_)) => quote!(Self::#name(#(#args),*)),
        (None, None) => quote!(#name(#(#args),*)),
    }
}

/// What is asked of the parameters of a root before its twin runs.
fn checks(sig: &syn::Signature, root: &Root, plan: &Plan, names: &Paths) -> TokenStream {
    let rt = &names.full;
    let function = &root.function;
    let inputs = root.inputs.iter().map(|(name, dim)| {
        let ident = format_ident!("{name}");
        let dim = proc_macro2::Literal::usize_unsuffixed(*dim);
        let by_ref = sig.inputs.iter().any(|i| matches!(i, syn::FnArg::Typed(t) if matches!(&*t.ty, syn::Type::Reference(_)) && matches!(&*t.pat, syn::Pat::Ident(p) if p.ident == *name)));
        if by_ref { quote!((#name, #ident, #dim)) } else { quote!((#name, &#ident, #dim)) }
    });
    let offsets = root.offsets.iter().map(|name| {
        let ident = format_ident!("{name}");
        quote!(#rt::no_offset(#function, #name, #ident)?;)
    });
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
    let helpers = plan.helpers.iter().filter_map(|(path, name)| {
        let path: syn::Path = syn::parse_str(path).ok()?;
        let name = format_ident!("{name}");
        Some(quote!(#rt::library::#name(#path)?;))
    });
    let batch = root.batch.iter().map(|(name, dim)| {
        let ident = format_ident!("{name}");
        let dim = proc_macro2::Literal::usize_unsuffixed(*dim);
        quote!(#rt::batch(&#ident, #dim)?;)
    });
    quote! {
        #rt::enter(#function, &[#(#inputs),*])?;
        #(#beside)*
        #(#batch)*
        #(#offsets)*
        #(#helpers)*
    }
}

/// For each function of the item that has one: the loss over all tokens.
fn losses(item: &syn::Item, index: usize, plan: &Plan, names: &Paths) -> TokenStream {
    let roots = plan
        .roots
        .iter()
        .filter_map(|r| Some((r, &plan.twins[r.loss?])));
    let here = roots.filter(|(_, twin)| twin.place.0 == index);
    let made = here.filter_map(|(root, twin)| match (item, twin.place.1) {
        (syn::Item::Fn(f), None) => Some(loss(&f.sig, root, twin, plan, names)),
        (syn::Item::Impl(imp), Some(k)) => match imp.items.get(k) {
            Some(syn::ImplItem::Fn(f)) => {
                let function = loss(&f.sig, root, twin, plan, names);
                let (generics, _, bounds) = imp.generics.split_for_impl();
                let ty = &imp.self_ty;
                Some(quote!(impl #generics #ty #bounds { #function }))
            }
            _ => None,
        },
        _ => None,
    });
    made.collect()
}

fn loss(sig: &syn::Signature, root: &Root, twin: &Twin, plan: &Plan, names: &Paths) -> TokenStream {
    let rt = &names.full;
    let mut own = sig.clone();
    own.ident = format_ident!("{}_loss", sig.ident);
    own.inputs
        .push(syn::parse_quote!(autosp_labels: &#rt::candle_core::Tensor));
    let (checks, call, function) = (
        checks(sig, root, plan, names),
        twin_call(sig, twin),
        &root.function,
    );
    let doc = format!(
        " The mean cross-entropy, over all ranks, of what [`{}`] gives for a token, for every token of the shard against its label.",
        sig_name(twin)
    );
    let value = if twin.result == Kind::Logits {
        quote!(#rt::head::loss(&#call?, autosp_labels))
    } else {
        quote!(#rt::token_loss(&#call?, autosp_labels))
    };
    quote! {
        #[doc = #doc]
        ///
        /// # Errors
        /// Outside a sharded scope, and as the function itself.
        #[allow(unused, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
        pub #own {
            #rt::in_scope(#function)?;
            #checks
            #value
        }
    }
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

fn emit_twins(item: &syn::Item, twins: &[(usize, &Twin)], names: &Paths) -> TokenStream {
    if twins.is_empty() {
        return TokenStream::new();
    }
    match item {
        syn::Item::Fn(f) => twins
            .iter()
            .map(|(_, twin)| {
                let (function, cfgs) = (twin_fn(&f.sig, &f.block, twin, names), cfgs(&f.attrs));
                quote!(#(#cfgs)* #function)
            })
            .collect(),
        syn::Item::Impl(imp) => {
            let functions =
                twins
                    .iter()
                    .filter_map(|(_, twin)| match imp.items.get(twin.place.1?) {
                        Some(syn::ImplItem::Fn(f)) => {
                            let (function, cfgs) =
                                (twin_fn(&f.sig, &f.block, twin, names), cfgs(&f.attrs));
                            Some(quote!(#(#cfgs)* #function))
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

/// The conditions under which an item exists.
fn cfgs(attrs: &[syn::Attribute]) -> impl Iterator<Item = &syn::Attribute> {
    attrs.iter().filter(|a| a.path().is_ident("cfg"))
}

fn twin_fn(sig: &syn::Signature, block: &syn::Block, twin: &Twin, names: &Paths) -> TokenStream {
    let rt = &names.short;
    let twin_sig = signature::twin(sig, twin, &names.full);
    let mut block = rewrite::block(block, twin, rt);
    block.stmts.insert(0, names.import());
    if twin.edits.iter().any(|e| e.action == Action::Recorded) {
        let full = &names.full;
        block
            .stmts
            .insert(1, syn::parse_quote!(use #full::Recorded as _;));
    }
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
