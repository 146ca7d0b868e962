//! `mod model { include!("model.rs"); }`: the model's file stays as it is, the attribute goes on from outside.
//!
//! A macro sees `include!` unexpanded, so the file is read here. Its tokens cannot carry spans of another file on stable
//! Rust; messages name file, line and column instead, and the file is tracked with `include_bytes!`.

use std::path::Path;

use autosp_plan::codes;

use crate::error::Refusal;

/// A file that a module includes.
#[derive(Debug, Clone)]
pub(crate) struct Included {
    /// As it is written.
    pub(crate) path: String,
    /// What it holds.
    pub(crate) text: String,
}

/// The path in `include!("..")`, if the item is one.
pub(crate) fn included_path(item: &syn::Item) -> Option<syn::LitStr> {
    let syn::Item::Macro(m) = item else {
        return None;
    };
    if m.ident.is_some() || !m.mac.path.is_ident("include") {
        return None;
    }
    m.mac.parse_body::<syn::LitStr>().ok()
}

/// Reads the file, relative to the file that holds the attribute.
///
/// # Errors
/// `AS0104` if it cannot be read, with the path that was tried.
pub(crate) fn read(lit: &syn::LitStr, from: Option<&Path>) -> Result<Included, Refusal> {
    let path = lit.value();
    let Some(from) = from else {
        return Err(Refusal::new(codes::INCLUDE, lit.span(), format!("cannot find `{path}`, for the file that includes it has no path here"))
            .help("give an absolute path: `include!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/..\"))` is not followed, write the model inline"));
    };
    let file = from.parent().unwrap_or_else(|| Path::new(".")).join(&path);
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(Included { path, text }),
        Err(e) => Err(Refusal::new(
            codes::INCLUDE,
            lit.span(),
            format!("cannot read `{}`: {e}", file.display()),
        )
        .help("the path is relative to the file that holds the attribute")),
    }
}
