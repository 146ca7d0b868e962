//! The compiler of AutoSP: from the source of a model to its sequence-parallel twin.
//!
//! One way through, five rooms: `syntax` reads the module into a scope, `trace` interprets the global program and writes
//! its dataflow graph, `place` finds the attention and gives every tensor a placement, `decide` makes a [`plan`] of plain
//! data and verifies it, `emit` is a function of the source and the plan. What the operations of the library do stands in
//! a table, [`ops`].
//!
//! [`plan`]: autosp_plan::plan

// A refusal ends the run: its size does not matter.
#![allow(clippy::result_large_err)]

pub mod adopt;
mod decide;
mod emit;
mod error;
pub mod ops;
mod place;
mod syntax;
mod trace;

use std::path::Path;

use autosp_plan::codes;
use autosp_plan::plan::Plan;
use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote};

pub use error::Refusal;
use syntax::args::Args;
use syntax::asserts::Assert;

/// What the compiler makes of a source.
#[derive(Debug, Clone)]
pub struct Analysis {
    /// The decisions. Where something is refused, what was decided before.
    pub plan: Plan,
    /// Everything that cannot be done, in the order of the source.
    pub refusals: Vec<Refusal>,
}

/// A source that is not Rust, or that nests too deeply to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// AS0105 or AS0107.
    pub code: codes::Code,
    /// 1-based line.
    pub line: usize,
    /// 1-based column.
    pub column: usize,
    /// What the parser expected.
    pub message: String,
}

impl std::fmt::Display for ParseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)?;
        if self.code == codes::PARSE {
            return Ok(());
        }
        write!(f, " [{}]", self.code.id)
    }
}

impl std::error::Error for ParseError {}

impl From<syn::Error> for ParseError {
    fn from(e: syn::Error) -> Self {
        let start = e.span().start();
        Self {
            code: codes::PARSE,
            line: start.line,
            column: start.column + 1,
            message: e.to_string(),
        }
    }
}

/// Parses a file, unless it nests too deeply for a parser.
fn parse(source: &str) -> Result<syn::File, ParseError> {
    let tokens: TokenStream = source
        .parse()
        .map_err(|e: proc_macro2::LexError| syn::Error::new(e.span(), e.to_string()))?;
    if let Some(span) = syntax::depth::too_deep(tokens) {
        let refusal = too_deep(span);
        return Err(ParseError {
            code: refusal.code,
            ..ParseError::from(syn::Error::new(span, refusal.message))
        });
    }
    Ok(syn::parse_file(source)?)
}

fn too_deep(span: Span) -> Refusal {
    let message = "expected brackets and chains of calls that a person can read, found them nested too deeply";
    Refusal::new(codes::NESTING, span, message)
        .help("give the inner part a name: `let inner = ..;`")
}

/// Analyses a whole file, annotated or not: the annotated module if there is one, else the file itself.
///
/// # Errors
/// If the file is not Rust.
pub fn analyse(source: &str) -> Result<Analysis, ParseError> {
    analyse_with(source, ops::candle())
}

/// The file that the annotated module of a source includes, as it is written there; relative to the source's own file.
///
/// # Errors
/// If the source is not Rust.
pub fn included(source: &str) -> Result<Option<String>, ParseError> {
    let module = module_of(parse(source)?);
    Ok(match module.items.as_slice() {
        [only] => syntax::include::included_path(only).map(|path| path.value()),
        _ => None,
    })
}

/// The same with another operation table.
///
/// # Errors
/// If the file is not Rust.
pub fn analyse_with(source: &str, table: &'static ops::Table) -> Result<Analysis, ParseError> {
    let module = module_of(parse(source)?);
    Ok(analyse_items(&module, Span::call_site(), table))
}

/// The code that the attribute emits for a file: its items with their twins.
///
/// # Errors
/// If the file is not Rust.
pub fn expand(source: &str) -> Result<Result<syn::File, Vec<Refusal>>, ParseError> {
    let module = module_of(parse(source)?);
    let analysis = analyse_items(&module, Span::call_site(), ops::candle());
    if !analysis.refusals.is_empty() {
        return Ok(Err(analysis.refusals));
    }
    let tokens = emit::items(&module.items, &analysis.plan, &quote!(::autosp));
    Ok(Ok(syn::parse2(tokens)?))
}

/// What is analysed: items without what is said of them, and what is said.
struct Module {
    name: String,
    items: Vec<syn::Item>,
    asserts: Vec<Assert>,
    loss: bool,
}

impl Module {
    fn new(name: String, mut items: Vec<syn::Item>, args: &Args) -> Self {
        let mut asserts = args.asserts.clone();
        asserts.extend(syntax::asserts::take(&mut items));
        Self {
            name,
            items,
            asserts,
            loss: args.loss,
        }
    }
}

/// The annotated inline module of a file, or the file's own items.
fn module_of(file: syn::File) -> Module {
    for item in &file.items {
        if let syn::Item::Mod(m) = item {
            let attribute = m.attrs.iter().find(|a| {
                a.path()
                    .segments
                    .last()
                    .is_some_and(|s| s.ident == "sequence_parallel")
            });
            if let (Some(attribute), Some((_, items))) = (attribute, &m.content) {
                let args = match &attribute.meta {
                    syn::Meta::List(list) => Args::parse(list.tokens.clone()),
                    _ => Ok(Args::default()),
                };
                let mut args = args.unwrap_or_default();
                // The command line runs where the file is named from.
                let plan = args
                    .plan
                    .as_ref()
                    .map(|lit| syntax::plan_file::read(lit, Some(Path::new("autosp.toml"))));
                if let Some(Ok(plan)) = plan {
                    args.asserts.extend(plan.asserts);
                }
                return Module::new(m.ident.to_string(), items.clone(), &args);
            }
        }
    }
    Module::new(String::new(), file.items, &Args::default())
}

fn analyse_items(module: &Module, span: Span, table: &'static ops::Table) -> Analysis {
    let mut scope = syntax::Scope::new(&module.name, &module.items);
    scope.loss = module.loss;
    scope.asserts.clone_from(&module.asserts);
    let (plan, mut refusals) = decide::decide(&scope, table, span);
    if let (false, Some(inner)) = (
        refusals.is_empty(),
        syntax::inner::holds_attention(&module.items),
    ) {
        refusals = vec![inner];
    }
    refusals.sort_by_key(|r| (!r.first, r.line(), r.column()));
    Analysis { plan, refusals }
}

/// The attribute: `#[sequence_parallel]` on an inline module, or on an `impl` or a function that holds everything it needs.
///
/// `source` is the file that holds the attribute, for finding files that it names. On errors the item stays in the output, so
/// that editors keep working.
pub fn sequence_parallel(
    args: TokenStream,
    item: &TokenStream,
    source: Option<&Path>,
) -> TokenStream {
    if let Some(span) = syntax::depth::too_deep(item.clone()) {
        return refused(&[too_deep(span)], None, item);
    }
    let mut parsed = match syn::parse2::<syn::Item>(item.clone()) {
        Ok(parsed) => parsed,
        Err(e) => {
            let error = e.to_compile_error();
            return quote!(#error #item);
        }
    };
    // The compiler does not know what is said of functions and fields, on errors either.
    let said = match &mut parsed {
        syn::Item::Mod(syn::ItemMod {
            content: Some((_, items)),
            ..
        }) => syntax::asserts::take(items),
        other => syntax::asserts::take(std::slice::from_mut(other)),
    };
    let plain = &parsed.to_token_stream();
    let mut args = match Args::parse(args) {
        Ok(args) => args,
        Err(refusal) => return refused(&[refusal], None, plain),
    };
    args.asserts.extend(said);
    let mut tracking = TokenStream::new();
    if let Some(lit) = &args.plan {
        match syntax::plan_file::read(lit, source) {
            Ok(plan) => {
                args.asserts.extend(plan.asserts);
                tracking = plan.tracking;
            }
            Err(refusal) => return refused(&[refusal], None, plain),
        }
    }
    match parsed {
        syn::Item::Mod(module) => inline(&args, &module, plain, source, &tracking),
        syn::Item::Fn(_) | syn::Item::Impl(_) => single(&args, parsed, plain, &tracking),
        other => refused(&[not_a_module(&other)], None, plain),
    }
}

/// An inline module.
fn inline(
    args: &Args,
    module: &syn::ItemMod,
    item: &TokenStream,
    source: Option<&Path>,
    tracking: &TokenStream,
) -> TokenStream {
    let Some((_, items)) = &module.content else {
        let name = &module.ident;
        let refusal = Refusal::new(
            codes::FILE_MODULE,
            name.span(),
            format!("the attribute does not see the file of `mod {name};`"),
        )
        .help(format!("mod {name} {{ include!(\"{name}.rs\"); }}"));
        return refused(&[refusal], None, item);
    };
    if let [only] = items.as_slice()
        && let Some(lit) = syntax::include::included_path(only)
    {
        return match syntax::include::read(&lit, source) {
            Ok(included) => include_module(args, module, &lit, &included, item, tracking),
            Err(refusal) => refused(&[refusal], None, item),
        };
    }
    if let Some(lit) = items.iter().find_map(syntax::include::included_path) {
        let refusal = Refusal::new(codes::INCLUDE, lit.span(), "`include!` stands beside other items")
            .note("the analysis reads either the items of the module or one included file, so that positions are those of one file")
            .help("move the other items into the included file, or into a module of their own");
        return refused(&[refusal], None, item);
    }
    let analysed = Module::new(module.ident.to_string(), items.clone(), args);
    let analysis = analyse_items(&analysed, module.ident.span(), ops::candle());
    if !analysis.refusals.is_empty() {
        return refused(&analysis.refusals, None, item);
    }
    let body = emit::items(items, &analysis.plan, &args.facade());
    with_body(module, &quote!(#tracking #body))
}

/// An `impl` or a function that holds everything that the decisions need.
fn single(
    args: &Args,
    item: syn::Item,
    plain: &TokenStream,
    tracking: &TokenStream,
) -> TokenStream {
    let (what, span) = match &item {
        syn::Item::Impl(i) => (
            syntax::text(&i.self_ty),
            syn::spanned::Spanned::span(&i.self_ty),
        ),
        syn::Item::Fn(f) => (f.sig.ident.to_string(), f.sig.ident.span()),
        _ => (String::new(), Span::call_site()),
    };
    let analysed = Module::new(String::new(), vec![item], args);
    let mut analysis = analyse_items(&analysed, span, ops::candle());
    for refusal in &mut analysis.refusals {
        refusal.notes.push(format!(
            "the attribute on `{what}` sees this item alone: no struct, function or `use` outside of it"
        ));
        if refusal.code == codes::UNKNOWN_CALL || refusal.code == codes::NO_ATTENTION {
            refusal.code = codes::ITEM;
            refusal.help = Some(
                "put the model into `mod model { .. }` and the attribute on the module".to_string(),
            );
        }
    }
    if !analysis.refusals.is_empty() {
        return refused(&analysis.refusals, None, plain);
    }
    let body = emit::items(&analysed.items, &analysis.plan, &args.facade());
    // Several items of one module have sites of their own.
    let own: String = what
        .chars()
        .map(|c| {
            if c.is_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '_'
            }
        })
        .collect();
    let names = ["autosp_sites", syntax::library::MODULE];
    let body = renamed(body, &|ident| {
        names.contains(&ident).then(|| format!("{ident}_{own}"))
    });
    quote!(#tracking #body)
}

/// The tokens with other names for some identifiers.
fn renamed(tokens: TokenStream, name: &dyn Fn(&str) -> Option<String>) -> TokenStream {
    use proc_macro2::{Group, Ident, TokenTree};
    let one = |token: TokenTree| match token {
        TokenTree::Ident(ident) => match name(&ident.to_string()) {
            Some(other) => Ident::new(&other, ident.span()).into(),
            None => ident.into(),
        },
        TokenTree::Group(group) => {
            let mut inner = Group::new(group.delimiter(), renamed(group.stream(), name));
            inner.set_span(group.span());
            inner.into()
        }
        other => other,
    };
    tokens.into_iter().map(one).collect()
}

/// The module's attributes, visibility and name round other items.
fn with_body(module: &syn::ItemMod, body: &TokenStream) -> TokenStream {
    let syn::ItemMod {
        attrs, vis, ident, ..
    } = module;
    // `//!` comments stand inside.
    let (outer, inner): (Vec<_>, Vec<_>) = attrs
        .iter()
        .partition(|a| matches!(a.style, syn::AttrStyle::Outer));
    quote!(#(#outer)* #vis mod #ident { #(#inner)* #body })
}

fn refused(refusals: &[Refusal], file: Option<&str>, item: &TokenStream) -> TokenStream {
    let errors: TokenStream = refusals.iter().map(|r| r.to_tokens(file)).collect();
    quote!(#errors #item)
}

fn not_a_module(item: &syn::Item) -> Refusal {
    let (what, span) = match item {
        syn::Item::Struct(s) => ("a struct", s.ident.span()),
        other => ("this item", syn::spanned::Spanned::span(other)),
    };
    Refusal::new(codes::ITEM, span, format!("expected an inline module, found {what}"))
        .note("the analysis needs the types of the fields and every function that the attention goes through")
        .help("put the model into `mod model { .. }` and the attribute on the module")
}

/// A module whose items stand in another file. Everything is computed with positions of that file; the tokens that come
/// out carry the attribute's.
fn include_module(
    args: &Args,
    module: &syn::ItemMod,
    lit: &syn::LitStr,
    included: &syntax::include::Included,
    item: &TokenStream,
    plan: &TokenStream,
) -> TokenStream {
    let name = module.ident.to_string();
    let facade = args.facade().to_string();
    let outcome = positions(|| -> Result<String, Vec<(String, &'static str)>> {
        let file = parse(&included.text).map_err(|e| {
            vec![(
                format!(
                    "{}\n   = at: {}:{}:{}",
                    e.message, included.path, e.line, e.column
                ),
                e.code.id,
            )]
        })?;
        let analysed = Module::new(name.clone(), file.items, args);
        let analysis = analyse_items(&analysed, Span::call_site(), ops::candle());
        if !analysis.refusals.is_empty() {
            return Err(analysis
                .refusals
                .iter()
                .map(|r| (r.text(Some(&included.path)), ""))
                .collect());
        }
        let facade: TokenStream = facade.parse().map_err(|_| Vec::new())?;
        Ok(emit::items(&analysed.items, &analysis.plan, &facade).to_string())
    });
    // Cargo builds again when the included file changes.
    let tracking = quote!(
        const _: &[u8] = include_bytes!(#lit);
        #plan
    );
    match outcome {
        Ok(text) => match text.parse::<TokenStream>() {
            Ok(body) => with_body(module, &quote!(#tracking #body)),
            Err(e) => {
                let message = e.to_string();
                quote!(::core::compile_error!(#message); #item)
            }
        },
        Err(messages) => {
            let errors = messages.into_iter().map(|(text, code)| {
                let text = if code.is_empty() {
                    text
                } else {
                    format!("{text} [{code}]")
                };
                let error = quote::quote_spanned!(lit.span()=> ::core::compile_error!(#text););
                error
            });
            let errors: TokenStream = errors.collect();
            quote!(#errors #tracking #item)
        }
    }
}

/// Runs with tokens that know their lines and columns, which the compiler's own do not for text parsed in a macro.
fn positions<T>(f: impl FnOnce() -> T) -> T {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            proc_macro2::fallback::unforce();
        }
    }
    proc_macro2::fallback::force();
    let _restore = Restore;
    f()
}
