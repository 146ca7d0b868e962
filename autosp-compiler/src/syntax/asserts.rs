//! What a user says of functions and fields that the analysis cannot see into: `#[tokenwise]`, `#[replicated]` and `#[sharded]`,
//! or the same as lists in the attribute and in the settings file.

use std::cell::Cell;

use autosp_plan::codes;
use proc_macro2::Span;
use syn::spanned::Spanned;

use super::types::Ty;
use super::{Scope, TypeDef};
use crate::error::Refusal;

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Every token is computed by itself; the result has the dimensions of the first tensor but the last.
    Tokenwise,
    /// Every rank gets the same.
    Replicated,
    /// The function gives this rank's tokens, and its callers know.
    Sharded,
}

impl Kind {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "tokenwise" => Some(Self::Tokenwise),
            "replicated" => Some(Self::Replicated),
            "sharded" => Some(Self::Sharded),
            _ => None,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tokenwise => "tokenwise",
            Self::Replicated => "replicated",
            Self::Sharded => "sharded",
        }
    }
}

/// One thing that is said: of `Type::field`, `Type::function` or a free function.
#[derive(Debug, Clone)]
pub(crate) struct Assert {
    pub(crate) kind: Kind,
    pub(crate) path: String,
    pub(crate) span: Span,
    /// Where it is said, if the span cannot show it: `autosp.toml:3:1`.
    pub(crate) place: Option<String>,
    used: Cell<bool>,
}

impl Assert {
    pub(crate) fn new(kind: Kind, path: String, span: Span, place: Option<String>) -> Self {
        Self {
            kind,
            path,
            span,
            place,
            used: Cell::new(false),
        }
    }

    fn refuse(&self, message: &str) -> Refusal {
        let place = self
            .place
            .as_ref()
            .map_or(String::new(), |p| format!("{p}: "));
        Refusal::new(codes::ASSERTION, self.span, format!("{place}{message}"))
    }
}

/// Takes the attributes out of the items: the compiler does not know them.
pub(crate) fn take(items: &mut [syn::Item]) -> Vec<Assert> {
    let mut found = Vec::new();
    let mut cut = |attrs: &mut Vec<syn::Attribute>, path: &str| {
        attrs.retain(|a| {
            let name = a.path().segments.last().map(|s| s.ident.to_string());
            let own = a.path().segments.len() == 1 || a.path().segments[0].ident == "autosp";
            match name.and_then(|n| Kind::parse(&n)).filter(|_| own) {
                Some(kind) => {
                    found.push(Assert::new(kind, path.to_string(), a.path().span(), None));
                    false
                }
                None => true,
            }
        });
    };
    for item in items {
        match item {
            syn::Item::Struct(s) => {
                let owner = s.ident.to_string();
                for (i, field) in s.fields.iter_mut().enumerate() {
                    let name = field
                        .ident
                        .as_ref()
                        .map_or_else(|| i.to_string(), ToString::to_string);
                    cut(&mut field.attrs, &format!("{owner}::{name}"));
                }
                cut(&mut s.attrs, &owner);
            }
            syn::Item::Fn(f) => {
                let name = f.sig.ident.to_string();
                cut(&mut f.attrs, &name);
            }
            syn::Item::Impl(imp) => {
                let owner = match &*imp.self_ty {
                    syn::Type::Path(p) => p.path.segments.last().map(|s| s.ident.to_string()),
                    _ => None,
                };
                let owner = owner.unwrap_or_default();
                for member in &mut imp.items {
                    if let syn::ImplItem::Fn(f) = member {
                        cut(&mut f.attrs, &format!("{owner}::{}", f.sig.ident));
                    }
                }
                cut(&mut imp.attrs, &owner);
            }
            syn::Item::Enum(e) => {
                let name = e.ident.to_string();
                cut(&mut e.attrs, &name);
            }
            _ => {}
        }
    }
    found
}

impl Scope<'_> {
    /// What is said of a function or field, which is used from now on.
    pub(crate) fn asserted(&self, path: &str, kinds: &[Kind]) -> Option<Kind> {
        let assert = self
            .asserts
            .iter()
            .find(|a| a.path == path && kinds.contains(&a.kind))?;
        assert.used.set(true);
        Some(assert.kind)
    }

    /// What is said of nothing that is here, wrongly, or twice.
    pub(crate) fn wrong_asserts(&self) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        for (i, assert) in self.asserts.iter().enumerate() {
            let (path, said) = (&assert.path, assert.kind.name());
            if let Some(other) = self.asserts[..i].iter().find(|a| a.path == *path) {
                refusals.push(
                    assert
                        .refuse(&format!(
                            "`{path}` is said to be {} and {said}",
                            other.kind.name()
                        ))
                        .help("say one of them"),
                );
                continue;
            }
            let function = self.functions.iter().find(|f| f.path == *path);
            let field = path
                .rsplit_once("::")
                .and_then(|(ty, name)| match self.types.get(ty) {
                    Some(TypeDef::Struct(fields)) => fields.get(name),
                    _ => None,
                });
            let wrong = match (function, field, assert.kind) {
                (Some(f), _, _) => {
                    let ty = match &f.sig.output {
                        syn::ReturnType::Type(_, ty) => self.ty(ty, f.owner.as_deref()),
                        syn::ReturnType::Default => Ty::Other,
                    };
                    (!ty.holds_tensor()).then_some("a function that gives no tensor")
                }
                (None, Some(_), Kind::Sharded) => Some("a field"),
                (None, Some(Ty::Int | Ty::Float | Ty::Bool), _) => Some("a number"),
                (None, Some(Ty::Tensor), Kind::Tokenwise) => Some("a tensor"),
                (None, Some(_), _) => None,
                (None, None, _) => {
                    refusals.push(
                        assert
                            .refuse(&format!(
                                "`{path}` is neither a function nor a field of this module"
                            ))
                            .help(self.near(path, said)),
                    );
                    continue;
                }
            };
            if let Some(what) = wrong {
                refusals.push(
                    assert
                        .refuse(&format!("`{path}` is {what}, which cannot be {said}"))
                        .help("say it of a function that gives a tensor, or of a field that holds a layer"),
                );
            }
        }
        refusals
    }

    /// What is said and nothing depends on.
    pub(crate) fn unused_asserts(&self) -> Vec<Refusal> {
        let unused = self.asserts.iter().filter(|a| !a.used.get());
        unused
            .map(|a| {
                a.refuse(&format!(
                    "nothing that is sharded depends on `{}` being {}",
                    a.path,
                    a.kind.name()
                ))
                .help(format!("remove `{}` from it", a.kind.name()))
            })
            .collect()
    }

    /// What could have been meant: the same name elsewhere, or the names of the type.
    fn near(&self, path: &str, said: &str) -> String {
        let name = path.rsplit("::").next().unwrap_or(path);
        let fields = self.types.iter().flat_map(|(ty, def)| {
            let fields = match def {
                TypeDef::Struct(fields) => fields
                    .fields
                    .iter()
                    .map(|(n, _)| format!("{ty}::{n}"))
                    .collect(),
                TypeDef::Enum(_) => Vec::new(),
            };
            fields.into_iter()
        });
        let mut all: Vec<String> = self
            .functions
            .iter()
            .map(|f| f.path.clone())
            .chain(fields)
            .collect();
        all.sort();
        let same = all.iter().find(|p| p.rsplit("::").next() == Some(name));
        let of_type = path.rsplit_once("::").map(|(ty, _)| format!("{ty}::"));
        let of_type = of_type.and_then(|ty| all.iter().find(|p| p.starts_with(&ty)));
        same.or(of_type).or(all.first()).map_or_else(
            || "remove it".to_string(),
            |p| format!("name it by its type, such as `{said}({p})`"),
        )
    }
}
