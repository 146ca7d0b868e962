//! The types of the scope, as far as the trace needs them.

use std::collections::HashMap;

/// A type, references and smart pointers looked through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ty {
    Tensor,
    /// An integer that can be a size.
    Int,
    Float,
    Bool,
    /// A struct or enum of the scope.
    Scope(String),
    /// A type of a library, by absolute path.
    Lib(String),
    Option(Box<Ty>),
    List(Box<Ty>),
    /// A dictionary: the type of its values.
    Map(Box<Ty>),
    Tuple(Vec<Ty>),
    /// Anything else.
    Other,
}

impl Ty {
    pub(crate) fn holds_tensor(&self) -> bool {
        match self {
            Self::Tensor => true,
            Self::Option(t) | Self::List(t) | Self::Map(t) => t.holds_tensor(),
            Self::Tuple(ts) => ts.iter().any(Self::holds_tensor),
            _ => false,
        }
    }
}

/// Names that `use` brings into the scope: alias to absolute path.
#[derive(Debug, Default)]
pub(crate) struct Names(HashMap<String, String>);

/// Crates under another name: what candle's own users call them.
const CRATES: &[(&str, &str)] = &[
    ("candle", "candle_core"),
    ("candle_core", "candle_core"),
    ("candle_nn", "candle_nn"),
];

/// Paths under which the libraries re-export an item, and the path in the table.
const SAME: &[(&str, &str)] = &[
    ("candle_nn::linear::Linear", "candle_nn::Linear"),
    ("candle_nn::embedding::Embedding", "candle_nn::Embedding"),
    ("candle_nn::layer_norm::RmsNorm", "candle_nn::RmsNorm"),
    ("candle_nn::layer_norm::LayerNorm", "candle_nn::LayerNorm"),
    ("candle_nn::activation::Activation", "candle_nn::Activation"),
    ("candle_nn::ops::Dropout", "candle_nn::Dropout"),
    ("candle_nn::conv::Conv1d", "candle_nn::Conv1d"),
    ("candle_nn::conv::Conv2d", "candle_nn::Conv2d"),
    ("candle_nn::LSTM", "candle_nn::rnn::LSTM"),
    ("candle_nn::GRU", "candle_nn::rnn::GRU"),
    ("candle_core::tensor::Tensor", "candle_core::Tensor"),
];

/// Where candle-transformers keeps what its models share, seen from a crate that holds a copy or a re-export of it.
const SHARED: &[&str] = &["with_tracing", "utils"];

/// A path into candle-transformers' own helpers, wherever a crate keeps them: `crate::models::with_tracing::Linear`,
/// `super::with_tracing::Linear` and `candle_transformers::models::with_tracing::Linear` are one. What such a name stands
/// for is checked when the program runs.
fn shared(full: &str) -> Option<String> {
    let mut rest: Vec<&str> = full.split("::").collect();
    let outside = ["crate", "super", "candle_transformers"].contains(rest.first()?);
    while rest
        .first()
        .is_some_and(|s| ["crate", "super", "candle_transformers"].contains(s))
    {
        rest.remove(0);
    }
    if rest.first() == Some(&"models") {
        rest.remove(0);
    }
    let [module, _, ..] = rest.as_slice() else {
        return None;
    };
    let home = if *module == "utils" {
        "candle_transformers"
    } else {
        "candle_transformers::models"
    };
    (outside && SHARED.contains(module)).then(|| format!("{home}::{}", rest.join("::")))
}

impl Names {
    pub(crate) fn add(&mut self, tree: &syn::UseTree, prefix: &str) {
        let join = |name: &str| {
            if prefix.is_empty() {
                name.to_string()
            } else {
                format!("{prefix}::{name}")
            }
        };
        match tree {
            syn::UseTree::Path(p) => self.add(&p.tree, &join(&p.ident.to_string())),
            syn::UseTree::Name(n) if n.ident == "self" => {
                let last = prefix.rsplit("::").next().unwrap_or(prefix);
                self.0.insert(last.to_string(), prefix.to_string());
            }
            syn::UseTree::Name(n) => {
                self.0
                    .insert(n.ident.to_string(), join(&n.ident.to_string()));
            }
            syn::UseTree::Rename(r) => {
                let path = if r.ident == "self" {
                    prefix.to_string()
                } else {
                    join(&r.ident.to_string())
                };
                self.0.insert(r.rename.to_string(), path);
            }
            syn::UseTree::Group(g) => g.items.iter().for_each(|t| self.add(t, prefix)),
            syn::UseTree::Glob(_) => {}
        }
    }

    /// Whether a `use` of the module brings this name.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The absolute path of a path as written, generic arguments left out.
    pub(crate) fn resolve(&self, path: &syn::Path) -> String {
        let segments: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        self.resolve_segments(&segments)
    }

    pub(crate) fn resolve_segments(&self, segments: &[String]) -> String {
        let full = self.written(segments);
        shared(&full).unwrap_or(full)
    }

    /// The absolute path as the source has it, through its `use`s.
    pub(crate) fn written(&self, segments: &[String]) -> String {
        let Some(first) = segments.first() else {
            return String::new();
        };
        let head = match self.0.get(first) {
            // `use candle_nn;` names itself
            Some(full) if full != first => self.crate_name(full),
            _ => self.crate_name(first),
        };
        let full = std::iter::once(head.as_str())
            .chain(segments[1..].iter().map(String::as_str))
            .collect::<Vec<_>>()
            .join("::");
        for (from, to) in SAME {
            if full == *from {
                return (*to).to_string();
            }
            if let Some(rest) = full.strip_prefix(&format!("{from}::")) {
                return format!("{to}::{rest}");
            }
        }
        full
    }

    fn crate_name(&self, path: &str) -> String {
        let (first, rest) = path
            .split_once("::")
            .map_or((path, None), |(f, r)| (f, Some(r)));
        // A `use` may itself start at another alias: `use candle_core as candle; use candle::Tensor;`
        let first = match self.0.get(first) {
            Some(full) if full != path && !full.contains("::") => full.as_str(),
            _ => first,
        };
        let first = CRATES
            .iter()
            .find(|(alias, _)| *alias == first)
            .map_or(first, |(_, name)| name);
        rest.map_or_else(|| first.to_string(), |rest| format!("{first}::{rest}"))
    }

    /// The type that is written.
    pub(crate) fn ty(&self, ty: &syn::Type, is_scope: &dyn Fn(&str) -> bool) -> Ty {
        match ty {
            syn::Type::Reference(r) => self.ty(&r.elem, is_scope),
            syn::Type::Paren(p) => self.ty(&p.elem, is_scope),
            syn::Type::Group(g) => self.ty(&g.elem, is_scope),
            syn::Type::Tuple(t) => {
                Ty::Tuple(t.elems.iter().map(|t| self.ty(t, is_scope)).collect())
            }
            syn::Type::Slice(s) => Ty::List(Box::new(self.ty(&s.elem, is_scope))),
            syn::Type::Array(a) => Ty::List(Box::new(self.ty(&a.elem, is_scope))),
            syn::Type::Path(p) => self.path_ty(&p.path, is_scope),
            _ => Ty::Other,
        }
    }

    fn path_ty(&self, path: &syn::Path, is_scope: &dyn Fn(&str) -> bool) -> Ty {
        let Some(last) = path.segments.last() else {
            return Ty::Other;
        };
        let name = last.ident.to_string();
        let args: Vec<&syn::Type> = match &last.arguments {
            syn::PathArguments::AngleBracketed(a) => a
                .args
                .iter()
                .filter_map(|a| {
                    if let syn::GenericArgument::Type(t) = a {
                        Some(t)
                    } else {
                        None
                    }
                })
                .collect(),
            _ => Vec::new(),
        };
        let inner = |i: usize| Box::new(args.get(i).map_or(Ty::Other, |t| self.ty(t, is_scope)));
        if path.segments.len() == 1 && is_scope(&name) {
            return Ty::Scope(name);
        }
        match (name.as_str(), args.len()) {
            ("Option", 1) => return Ty::Option(inner(0)),
            ("Vec" | "VecDeque", _) => return Ty::List(inner(0)),
            ("HashMap" | "BTreeMap", 2) => return Ty::Map(inner(1)),
            ("Box" | "Arc" | "Rc" | "RefCell" | "Cell" | "Mutex" | "RwLock" | "Result", n)
                if n > 0 =>
            {
                return *inner(0);
            }
            ("usize" | "u64" | "u32" | "u16" | "u8" | "i64" | "i32" | "isize", 0) => {
                return Ty::Int;
            }
            ("f64" | "f32", 0) => return Ty::Float,
            ("bool", 0) => return Ty::Bool,
            _ => {}
        }
        match self.resolve(path) {
            full if full == "candle_core::Tensor" => Ty::Tensor,
            // Without a `use` in sight, what stands for it has to pass for it when the twin is compiled.
            full if full == "Tensor" && self.0.is_empty() => Ty::Tensor,
            full if full.contains("::") => Ty::Lib(full),
            _ => Ty::Other,
        }
    }
}
