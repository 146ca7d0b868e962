//! Makes a model file of another crate into an annotated module of one's own: the text as it is, with its paths fixed.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use quote::format_ident;

use crate::ParseError;

/// Where a file comes from, and what its paths are called in the crate that it comes to.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// What `crate` is there: `candle_transformers`.
    pub krate: String,
    /// The module that holds the file: `["models"]`.
    pub parent: Vec<String>,
    /// Crates that are called otherwise there and here, such as `candle` and `candle_core`.
    pub renamed: Vec<(String, String)>,
}

/// A file that was adopted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// The new file: an annotated module and a re-export of what it makes public.
    pub text: String,
    /// What became of paths: before, after, how often; in the order of the names.
    pub changed: Vec<(String, String, usize)>,
    /// The first names of all paths: among them the crates that the file needs.
    pub names: BTreeSet<String>,
    /// Modules of the file that stand in files of their own (`mod x;`), which are not copied.
    pub elsewhere: Vec<String>,
    /// Functions that keep one token and get a loss over all of them, `NAME_loss`.
    pub losses: Vec<String>,
}

/// Wraps the text of a file in `#[autosp::sequence_parallel] pub mod name`, and points its paths at where they lead from there.
///
/// Comments, documentation and licence texts stay. What is fixed: `crate::`, `super::` that leads out of the file, and crates
/// that go by another name. A function under `#[cfg(test)]` is copied like any other.
///
/// # Errors
/// If the text is no Rust, or `name` is no identifier.
pub fn adopt(source: &str, name: &str, origin: &Origin) -> Result<Adopted, ParseError> {
    let tokens: TokenStream = source.parse().map_err(|e: proc_macro2::LexError| {
        ParseError::from(syn::Error::new(e.span(), e.to_string()))
    })?;
    let file = crate::parse(source)?;
    syn::parse_str::<syn::Ident>(name).map_err(|e| ParseError {
        code: autosp_plan::codes::PARSE,
        line: 0,
        column: 0,
        message: format!("`{name}` is no name for a module: {e}"),
    })?;
    let mut paths = Paths {
        origin,
        edits: Vec::new(),
        changed: BTreeMap::new(),
        names: BTreeSet::new(),
    };
    paths.stream(tokens, 0);
    let mut text = source.to_string();
    paths.edits.sort_by_key(|(range, _)| range.start);
    for (range, new) in paths.edits.iter().rev() {
        text.replace_range(range.clone(), new);
    }
    let krate = &origin.krate;
    let from = origin.parent.join("::");
    let module = format_ident!("{name}");
    let body = text;
    let annotated = |arguments: &str| {
        format!(
            "// Adopted by `cargo autosp adopt` from `{krate}::{from}::{name}`; the code below is that crate's, under its licence.\n\n\
         #[autosp::sequence_parallel{arguments}]\n\
         #[allow(clippy::all, clippy::pedantic, dead_code, missing_docs)]\n\
         pub mod {module} {{\n{}\n}}\n\n\
         pub use self::{module}::*;\n",
            body.trim_end()
        )
    };
    let with_loss = annotated("(loss)");
    let losses: Vec<String> = match crate::analyse(&with_loss)? {
        analysis if analysis.refusals.is_empty() => {
            let roots = analysis.plan.roots.into_iter();
            roots
                .filter(|r| r.loss.is_some())
                .map(|r| r.function)
                .collect()
        }
        _ => Vec::new(),
    };
    let text = if losses.is_empty() {
        annotated("")
    } else {
        with_loss
    };
    let changed = paths.changed.into_iter();
    let elsewhere = file.items.iter().filter_map(|item| match item {
        syn::Item::Mod(m) if m.content.is_none() => Some(m.ident.to_string()),
        _ => None,
    });
    Ok(Adopted {
        text,
        changed: changed.map(|((a, b), n)| (a, b, n)).collect(),
        names: paths.names,
        elsewhere: elsewhere.collect(),
        losses,
    })
}

struct Paths<'o> {
    origin: &'o Origin,
    edits: Vec<(std::ops::Range<usize>, String)>,
    changed: BTreeMap<(String, String), usize>,
    names: BTreeSet<String>,
}

/// `::` at the place.
fn colons(tokens: &[TokenTree], at: usize) -> bool {
    matches!(
        (tokens.get(at), tokens.get(at + 1)),
        (Some(TokenTree::Punct(a)), Some(TokenTree::Punct(b))) if a.as_char() == ':' && b.as_char() == ':'
    )
}

impl Paths<'_> {
    /// `depth`: modules of the file that the tokens are inside of.
    fn stream(&mut self, tokens: TokenStream, depth: usize) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let is = |at: usize, word: &str| matches!(tokens.get(at), Some(TokenTree::Ident(i)) if i == word);
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => {
                    let module = at >= 2 && is(at - 2, "mod");
                    self.stream(group.stream(), depth + usize::from(module));
                }
                // The first name of a path.
                TokenTree::Ident(first)
                    if colons(&tokens, at + 1) && (at < 2 || !colons(&tokens, at - 2)) =>
                {
                    self.names.insert(first.to_string());
                    let mut supers = 0;
                    while is(at + 3 * supers, "super") && colons(&tokens, at + 3 * supers + 1) {
                        supers += 1;
                    }
                    let (old, new, last) = if first == "crate" {
                        ("crate".to_string(), self.origin.krate.clone(), at)
                    } else if supers > depth {
                        let up = supers - depth;
                        let keep = (self.origin.parent.len() + 1).saturating_sub(up);
                        let mut new = vec![self.origin.krate.clone()];
                        new.extend(self.origin.parent.iter().take(keep).cloned());
                        (
                            vec!["super"; supers].join("::"),
                            new.join("::"),
                            at + 3 * (supers - 1),
                        )
                    } else if let Some((_, new)) =
                        self.origin.renamed.iter().find(|(old, _)| first == old)
                    {
                        (first.to_string(), new.clone(), at)
                    } else {
                        at += 1;
                        continue;
                    };
                    let range =
                        first.span().byte_range().start..tokens[last].span().byte_range().end;
                    self.edits.push((range, new.clone()));
                    *self.changed.entry((old, new)).or_default() += 1;
                    at = last;
                }
                _ => {}
            }
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "// Copyright of somebody\n//! A model.\nuse super::with_tracing::{linear, Linear};\nuse candle::{Result, Tensor};\nuse crate::utils::repeat_kv;\n\npub(crate) struct A(Linear); // crate:: in a comment\n\npub fn f(x: &Tensor) -> Result<Tensor> {\n    if x.rank() > 9 { candle::bail!(\"crate:: {}\", super::super::other(1)) }\n    my::candle::g(x)\n}\n\n#[cfg(test)]\nmod tests {\n    use super::*;\n    use super::super::llama;\n    fn t() { crate::x(super::f) }\n}\n";

    fn origin() -> Origin {
        Origin {
            krate: "candle_transformers".into(),
            parent: vec!["models".into()],
            renamed: vec![("candle".into(), "candle_core".into())],
        }
    }

    #[test]
    fn paths_lead_where_they_led() {
        let adopted = adopt(FILE, "tiny", &origin()).expect("Rust");
        for line in [
            "// Copyright of somebody",
            "//! A model.",
            "#[autosp::sequence_parallel]",
            "pub mod tiny {",
            "use candle_transformers::models::with_tracing::{linear, Linear};",
            "use candle_core::{Result, Tensor};",
            "use candle_transformers::utils::repeat_kv;",
            "pub(crate) struct A(Linear); // crate:: in a comment",
            "candle_core::bail!(\"crate:: {}\", candle_transformers::other(1))",
            "my::candle::g(x)",
            "use super::*;",
            "use candle_transformers::models::llama;",
            "fn t() { candle_transformers::x(super::f) }",
            "pub use self::tiny::*;",
        ] {
            assert!(adopted.text.contains(line), "{line}: {}", adopted.text);
        }
        let crates = ("crate".to_string(), "candle_transformers".to_string(), 2);
        assert!(adopted.changed.contains(&crates), "{:?}", adopted.changed);
        assert!(adopted.names.contains("candle") && !adopted.names.contains("linear"));
        assert!(adopted.elsewhere.is_empty());
    }

    #[test]
    fn what_is_no_rust_or_no_name_is_an_error() {
        assert!(adopt("fn f( {", "tiny", &origin()).is_err());
        assert!(adopt("fn f() {}", "7b", &origin()).is_err());
    }
}
