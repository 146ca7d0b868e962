//! The attribute's arguments.

use autosp_plan::codes;
use proc_macro2::TokenStream;
use syn::parse::Parser;
use syn::punctuated::Punctuated;

use super::asserts::{Assert, Kind};
use crate::error::Refusal;

/// What the attribute was given.
#[derive(Clone, Default)]
pub(crate) struct Args {
    /// The path of the facade, where it is not `::autosp`.
    pub(crate) facade: Option<syn::Path>,
    /// Whether models that keep one token get a loss over all tokens.
    pub(crate) loss: bool,
    /// The settings file.
    pub(crate) plan: Option<syn::LitStr>,
    /// What is said of functions and fields.
    pub(crate) asserts: Vec<Assert>,
}

/// The arguments that exist.
const KNOWN: &str = "`loss`, `crate = path::to::autosp`, `plan = \"autosp.toml\"`, and the lists `tokenwise(..)`, `replicated(..)` and `sharded(..)`";

impl Args {
    pub(crate) fn parse(tokens: TokenStream) -> Result<Self, Refusal> {
        let span = proc_macro2::Span::call_site();
        let list = Punctuated::<syn::Meta, syn::Token![,]>::parse_terminated
            .parse2(crate_as_ident(tokens))
            .map_err(|e| {
                Refusal::new(
                    codes::UNKNOWN_ARGUMENT,
                    e.span(),
                    format!("expected {KNOWN}, found something else"),
                )
            })?;
        let mut args = Self::default();
        for meta in list {
            let name = meta
                .path()
                .segments
                .first()
                .map(|s| s.ident.to_string())
                .unwrap_or_default();
            if let (syn::Meta::Path(_), "loss") = (&meta, name.as_str()) {
                args.loss = true;
            } else if let (syn::Meta::NameValue(nv), "r#crate" | "crate_") = (&meta, name.as_str())
            {
                let text = match &nv.value {
                    syn::Expr::Lit(syn::ExprLit {
                        lit: syn::Lit::Str(s),
                        ..
                    }) => s.parse::<syn::Path>().ok(),
                    syn::Expr::Path(p) => Some(p.path.clone()),
                    _ => None,
                };
                let path = text.ok_or_else(|| {
                    Refusal::new(
                        codes::UNKNOWN_ARGUMENT,
                        span,
                        "expected a path after `crate =`",
                    )
                    .help("`crate = my_autosp`")
                })?;
                args.facade = Some(path);
            } else if let (syn::Meta::NameValue(nv), "plan") = (&meta, name.as_str()) {
                args.plan = Some(file_name(&nv.value)?);
            } else if let (syn::Meta::List(list), Some(kind)) = (&meta, Kind::parse(&name)) {
                args.asserts.extend(names(list, kind)?);
            } else {
                let at = syn::spanned::Spanned::span(meta.path());
                return Err(Refusal::new(
                    codes::UNKNOWN_ARGUMENT,
                    at,
                    format!("unknown argument `{name}`"),
                )
                .help(format!("the arguments are: {KNOWN}")));
            }
        }
        Ok(args)
    }

    /// Tokens of the path to the facade.
    pub(crate) fn facade(&self) -> TokenStream {
        self.facade
            .as_ref()
            .map_or_else(|| quote::quote!(::autosp), |p| quote::quote!(#p))
    }
}

/// The text behind `plan =`.
fn file_name(value: &syn::Expr) -> Result<syn::LitStr, Refusal> {
    if let syn::Expr::Lit(syn::ExprLit {
        lit: syn::Lit::Str(s),
        ..
    }) = value
    {
        return Ok(s.clone());
    }
    Err(Refusal::new(
        codes::UNKNOWN_ARGUMENT,
        syn::spanned::Spanned::span(value),
        "expected the name of a settings file after `plan =`",
    )
    .help("`plan = \"autosp.toml\"`"))
}

/// The functions and fields of a list.
fn names(list: &syn::MetaList, kind: Kind) -> Result<Vec<Assert>, Refusal> {
    let paths = Punctuated::<syn::Path, syn::Token![,]>::parse_terminated
        .parse2(list.tokens.clone())
        .map_err(|e| {
            let example = format!("`{}(Type::function, Type::field)`", kind.name());
            Refusal::new(
                codes::UNKNOWN_ARGUMENT,
                e.span(),
                "expected names of functions and fields",
            )
            .help(example)
        })?;
    let named = paths.iter().map(|p| {
        let segments: Vec<String> = p.segments.iter().map(|s| s.ident.to_string()).collect();
        let last = segments.len().saturating_sub(2);
        let span = syn::spanned::Spanned::span(p);
        Assert::new(kind, segments[last..].join("::"), span, None)
    });
    Ok(named.collect())
}

/// `crate` is a keyword that a meta path cannot begin with before `=`; it is read as `crate_`.
fn crate_as_ident(tokens: TokenStream) -> TokenStream {
    use proc_macro2::TokenTree;
    let mut out: Vec<TokenTree> = tokens.into_iter().collect();
    for i in 0..out.len() {
        let equals = matches!(out.get(i + 1), Some(TokenTree::Punct(p)) if p.as_char() == '=');
        if let TokenTree::Ident(ident) = &out[i]
            && equals
            && ident == "crate"
        {
            out[i] = TokenTree::Ident(proc_macro2::Ident::new("crate_", ident.span()));
        }
    }
    out.into_iter().collect()
}
