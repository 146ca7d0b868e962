//! Modules inside of the annotated one, which are not looked into.

use autosp_plan::codes;
use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;

use crate::error::Refusal;

/// What is said where a module has no softmax of its own and one inside of it has: that is the one to annotate.
pub(crate) fn holds_attention(items: &[syn::Item]) -> Option<Refusal> {
    let mut inner = None;
    for item in items {
        let softmax = mentions(item.to_token_stream());
        match item {
            syn::Item::Mod(m) if softmax && inner.is_none() => inner = Some(m),
            _ if softmax && !matches!(item, syn::Item::Mod(_)) => return None,
            _ => {}
        }
    }
    let module = inner?;
    let name = &module.ident;
    let message =
        format!("no attention found in this module: `mod {name}` inside of it is not looked into");
    Some(
        Refusal::new(codes::NO_ATTENTION, name.span(), message)
            .note(
                "the functions and types of one module are analysed, with what it names of others",
            )
            .help(format!(
                "#[autosp::sequence_parallel] on `mod {name}` itself"
            )),
    )
}

fn mentions(tokens: TokenStream) -> bool {
    tokens.into_iter().any(|t| match t {
        TokenTree::Ident(i) => i.to_string().starts_with("softmax"),
        TokenTree::Group(g) => mentions(g.stream()),
        _ => false,
    })
}
