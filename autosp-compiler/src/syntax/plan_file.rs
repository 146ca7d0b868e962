//! `plan = "autosp.toml"`: what the settings file says to the compiler.

use std::path::{Path, PathBuf};

use autosp_plan::codes;
use autosp_plan::settings::build;
use proc_macro2::TokenStream;
use quote::quote;

use super::asserts::{Assert, Kind};
use crate::error::Refusal;

/// What was read, and an item by which cargo builds again when the file changes.
pub(crate) struct PlanFile {
    pub(crate) asserts: Vec<Assert>,
    pub(crate) tracking: TokenStream,
}

/// Reads the file: relative to the package, else to the source file that names it.
///
/// # Errors
/// `AS0310` if it cannot be read or is not TOML, `AS0308` and `AS0309` for what is wrong in it, with line and column.
pub(crate) fn read(lit: &syn::LitStr, from: Option<&Path>) -> Result<PlanFile, Refusal> {
    let name = lit.value();
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let beside = from.and_then(Path::parent).map(Path::to_path_buf);
    let places: Vec<PathBuf> = [package, beside]
        .into_iter()
        .flatten()
        .map(|folder| folder.join(&name))
        .collect();
    let found = places.iter().find(|path| path.is_file());
    let Some(path) = found else {
        return Err(Refusal::new(
            codes::SETTINGS_FILE,
            lit.span(),
            format!("cannot find the settings file `{name}`"),
        )
        .note("it is looked for in the package, then beside the source file")
        .help("create it there; a file without lines is one too"));
    };
    let text = std::fs::read_to_string(path).map_err(|e| {
        let why = autosp_plan::io_reason(&e);
        Refusal::new(
            codes::SETTINGS_FILE,
            lit.span(),
            format!("cannot read the settings file `{name}`: {why}"),
        )
        .help("it is a text file of lines such as `sp = 4`")
    })?;
    let entries = build(&name, &text).map_err(|e| {
        let mut refusal = Refusal::new(e.code, lit.span(), e.message);
        refusal.help = e.help;
        refusal
    })?;
    let asserts = entries.into_iter().filter_map(|e| {
        let place = format!("{name}:{}:{}", e.line, e.column);
        Some(Assert::new(
            Kind::parse(e.key)?,
            e.name,
            lit.span(),
            Some(place),
        ))
    });
    let absolute = path.canonicalize().unwrap_or_else(|_| path.clone());
    let absolute = absolute.to_string_lossy().into_owned();
    Ok(PlanFile {
        asserts: asserts.collect(),
        tracking: quote!(
            const _: &[u8] = include_bytes!(#absolute);
        ),
    })
}
