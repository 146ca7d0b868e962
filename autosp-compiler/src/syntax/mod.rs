//! The first room: attribute and item become a scope of types, functions and names.

pub(crate) mod args;
pub(crate) mod asserts;
pub(crate) mod depth;
pub(crate) mod include;
pub(crate) mod inner;
pub(crate) mod library;
pub(crate) mod number;
pub(crate) mod plan_file;
pub(crate) mod rows;
mod text;
pub(crate) mod types;

use std::collections::{HashMap, HashSet};

use syn::spanned::Spanned;
pub(crate) use text::text;
use types::{Names, Ty};

/// A struct or a variant of an enum: its fields in order.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    pub(crate) fields: Vec<(String, Ty)>,
}

impl Fields {
    pub(crate) fn get(&self, name: &str) -> Option<&Ty> {
        self.fields
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, ty)| ty)
    }
}

/// A struct or enum of the scope.
#[derive(Debug)]
pub(crate) enum TypeDef {
    Struct(Fields),
    Enum(HashMap<String, Fields>),
}

/// Whether `#[derive(.., Clone, ..)]` stands on an item.
fn derives_clone(attrs: &[syn::Attribute]) -> bool {
    attrs
        .iter()
        .filter(|a| a.path().is_ident("derive"))
        .any(|a| {
            let mut found = false;
            let _ = a.parse_nested_meta(|meta| {
                found |= meta.path.is_ident("Clone");
                Ok(())
            });
            found
        })
}

/// A function or method of the scope.
pub(crate) struct Function<'a> {
    /// `Attention::forward`, or the name of a free function.
    pub(crate) path: String,
    /// The type whose `impl` holds it.
    pub(crate) owner: Option<String>,
    pub(crate) name: String,
    pub(crate) sig: &'a syn::Signature,
    pub(crate) block: &'a syn::Block,
    /// Can be called from outside: `pub`, or part of a trait.
    pub(crate) public: bool,
    /// Item (and item of the `impl`) that holds it.
    pub(crate) place: (usize, Option<usize>),
    pub(crate) numbers: number::Numbers<'a>,
    pub(crate) effects: number::Effects,
}

impl Function<'_> {
    pub(crate) fn line(&self) -> usize {
        self.sig.ident.span().start().line
    }
}

/// All that the analysis sees.
pub(crate) struct Scope<'a> {
    /// Name of the module, empty for a file.
    pub(crate) name: String,
    pub(crate) types: HashMap<String, TypeDef>,
    pub(crate) functions: Vec<Function<'a>>,
    /// Type and name to the methods that are called so: inherent ones, and those of traits.
    methods: HashMap<(String, String), (Vec<usize>, Vec<usize>)>,
    free: HashMap<String, usize>,
    /// Functions of libraries with a definition of our own, by absolute path.
    library: HashMap<String, usize>,
    pub(crate) names: Names,
    pub(crate) consts: HashMap<String, &'a syn::Expr>,
    /// Whether functions that keep one token are given a loss over all tokens.
    pub(crate) loss: bool,
    /// Types that are `Clone`.
    pub(crate) cloneable: HashSet<String>,
    /// Modules of it that stand in files of their own (`mod x;`), which are not seen.
    pub(crate) elsewhere: Vec<String>,
    /// What is said of functions and fields.
    pub(crate) asserts: Vec<asserts::Assert>,
}

impl<'a> Scope<'a> {
    /// Reads the items of a module. Items under a false `cfg` are still here: both alternatives are analysed.
    pub(crate) fn new(name: &str, items: &'a [syn::Item]) -> Self {
        let mut scope = Self {
            name: name.to_string(),
            types: HashMap::new(),
            functions: Vec::new(),
            methods: HashMap::new(),
            free: HashMap::new(),
            library: HashMap::new(),
            names: Names::default(),
            loss: false,
            consts: HashMap::new(),
            cloneable: HashSet::new(),
            elsewhere: Vec::new(),
            asserts: Vec::new(),
        };
        for item in items {
            if let syn::Item::Use(u) = item {
                scope.names.add(&u.tree, "");
            }
        }
        let own: Vec<String> = items
            .iter()
            .filter_map(|item| match item {
                syn::Item::Struct(s) => Some(s.ident.to_string()),
                syn::Item::Enum(e) => Some(e.ident.to_string()),
                _ => None,
            })
            .collect();
        for (i, item) in items.iter().enumerate() {
            scope.item(i, item, &own);
        }
        // A handful of short functions; the process ends with the expansion.
        let definitions: &'static [syn::Item] = Box::leak(library::items().into_boxed_slice());
        for (i, item) in definitions.iter().enumerate() {
            if let syn::Item::Fn(f) = item {
                let name = f.sig.ident.to_string();
                scope
                    .library
                    .insert(library::path(&name), scope.functions.len());
                scope.function(None, &f.sig, &f.block, false, (items.len() + i, None));
            }
        }
        scope
    }

    fn item(&mut self, i: usize, item: &'a syn::Item, own: &[String]) {
        let is_scope = |n: &str| own.iter().any(|o| o == n);
        match item {
            syn::Item::Struct(s) => {
                let fields = self.fields(&s.fields, &is_scope);
                if derives_clone(&s.attrs) {
                    self.cloneable.insert(s.ident.to_string());
                }
                self.types
                    .insert(s.ident.to_string(), TypeDef::Struct(fields));
            }
            syn::Item::Enum(e) => {
                let variants = e
                    .variants
                    .iter()
                    .map(|v| (v.ident.to_string(), self.fields(&v.fields, &is_scope)));
                let variants = variants.collect();
                if derives_clone(&e.attrs) {
                    self.cloneable.insert(e.ident.to_string());
                }
                self.types
                    .insert(e.ident.to_string(), TypeDef::Enum(variants));
            }
            syn::Item::Fn(f) => {
                let public = !matches!(f.vis, syn::Visibility::Inherited);
                self.function(None, &f.sig, &f.block, public, (i, None));
            }
            syn::Item::Mod(m) if m.content.is_none() => self.elsewhere.push(m.ident.to_string()),
            syn::Item::Const(c) => {
                self.consts.insert(c.ident.to_string(), &c.expr);
            }
            syn::Item::Impl(imp) => {
                let owner = match &*imp.self_ty {
                    syn::Type::Path(p) => p.path.segments.last().map(|s| s.ident.to_string()),
                    _ => None,
                };
                let Some(owner) = owner else { return };
                if imp.trait_.as_ref().is_some_and(|(path, _)| {
                    path.segments.last().is_some_and(|s| s.ident == "Clone")
                }) {
                    self.cloneable.insert(owner.clone());
                }
                for (k, member) in imp.items.iter().enumerate() {
                    if let syn::ImplItem::Fn(f) = member {
                        let public =
                            imp.trait_.is_some() || !matches!(f.vis, syn::Visibility::Inherited);
                        let key = (owner.clone(), f.sig.ident.to_string());
                        let (own, of_traits) = self.methods.entry(key).or_default();
                        let list = if imp.trait_.is_some() { of_traits } else { own };
                        list.push(self.functions.len());
                        self.function(Some(owner.clone()), &f.sig, &f.block, public, (i, Some(k)));
                    }
                }
            }
            _ => {}
        }
    }

    fn fields(&self, fields: &syn::Fields, is_scope: &dyn Fn(&str) -> bool) -> Fields {
        let named = fields.iter().enumerate().map(|(i, f)| {
            let name = f
                .ident
                .as_ref()
                .map_or_else(|| i.to_string(), ToString::to_string);
            (name, self.names.ty(&f.ty, is_scope))
        });
        Fields {
            fields: named.collect(),
        }
    }

    fn function(
        &mut self,
        owner: Option<String>,
        sig: &'a syn::Signature,
        block: &'a syn::Block,
        public: bool,
        place: (usize, Option<usize>),
    ) {
        let name = sig.ident.to_string();
        let path = owner
            .as_ref()
            .map_or_else(|| name.clone(), |o| format!("{o}::{name}"));
        let id = self.functions.len();
        if owner.is_none() && !self.library.values().any(|known| *known == id) {
            self.free.entry(name.clone()).or_insert(id);
        }
        let numbers = number::Numbers::new(block);
        self.functions.push(Function {
            path,
            owner,
            name,
            sig,
            block,
            public,
            place,
            numbers,
            effects: number::Effects::of(block),
        });
    }

    /// The method that a call on a value of the type runs: an inherent one before one of a trait. None where several could be meant,
    /// under different `cfg`s or for different parameters of the type.
    pub(crate) fn method(&self, owner: &str, name: &str) -> Option<usize> {
        let (own, of_traits) = self.methods.get(&(owner.to_string(), name.to_string()))?;
        match (own.as_slice(), of_traits.as_slice()) {
            ([one], _) | ([], [one]) => Some(*one),
            _ => None,
        }
    }

    /// The `forward` that `x.apply(&layer)` runs, which is that of the trait.
    pub(crate) fn applied(&self, owner: &str) -> Option<usize> {
        match self
            .methods
            .get(&(owner.to_string(), "forward".to_string()))
        {
            Some((_, of_traits)) if !of_traits.is_empty() => match of_traits.as_slice() {
                [one] => Some(*one),
                _ => None,
            },
            _ => self.method(owner, "forward"),
        }
    }

    pub(crate) fn free(&self, name: &str) -> Option<usize> {
        self.free.get(name).copied()
    }

    /// Whether a free function stands in the source more than once, under different `cfg`s.
    pub(crate) fn has_alternatives(&self, name: &str) -> bool {
        let same = |f: &&Function<'_>| f.owner.is_none() && f.name == name;
        let ids = self.functions.iter().enumerate();
        ids.filter(|(id, f)| same(f) && !self.is_library(*id))
            .count()
            > 1
    }

    /// A library's function that has a definition of our own.
    pub(crate) fn library(&self, path: &str) -> Option<usize> {
        self.library.get(path).copied()
    }

    /// Whether a function is one of those.
    pub(crate) fn is_library(&self, function: usize) -> bool {
        self.library.values().any(|known| *known == function)
    }

    /// The fields that are written when a function runs, by it or by what it may call: what the model keeps between calls.
    pub(crate) fn written_by(&self, root: usize) -> HashSet<String> {
        let mut written = HashSet::new();
        let mut seen = HashSet::new();
        let mut stack = vec![root];
        while let Some(id) = stack.pop() {
            if seen.insert(id) {
                let effects = &self.functions[id].effects;
                written.extend(effects.writes.iter().cloned());
                let called = |f: &Function<'_>| effects.calls.contains(&f.name);
                stack.extend((0..self.functions.len()).filter(|k| called(&self.functions[*k])));
            }
        }
        written
    }

    /// Whether a function writes to a field of something that it was given.
    pub(crate) fn updates(&self, field: &str) -> bool {
        let given = |input: &syn::FnArg| match input {
            syn::FnArg::Receiver(_) => true,
            syn::FnArg::Typed(t) => {
                matches!(&*t.ty, syn::Type::Reference(r) if r.mutability.is_some())
            }
        };
        self.functions
            .iter()
            .any(|f| f.effects.writes.contains(field) && f.sig.inputs.iter().any(given))
    }

    /// The declared type, seen from the scope.
    pub(crate) fn ty(&self, ty: &syn::Type, owner: Option<&str>) -> Ty {
        if let (syn::Type::Path(p), Some(owner)) = (ty, owner)
            && p.path.is_ident("Self")
        {
            return Ty::Scope(owner.to_string());
        }
        self.names.ty(ty, &|n| self.types.contains_key(n))
    }

    /// Whether a function takes tensors and gives some.
    pub(crate) fn on_tensors(&self, function: usize) -> bool {
        let f = &self.functions[function];
        let holds = |ty: &syn::Type| self.ty(ty, f.owner.as_deref()).holds_tensor();
        let takes = f.sig.inputs.iter().any(|input| match input {
            syn::FnArg::Typed(t) => holds(&t.ty),
            syn::FnArg::Receiver(_) => false,
        });
        takes && matches!(&f.sig.output, syn::ReturnType::Type(_, ty) if holds(ty))
    }

    /// The full name of a function for messages: `llama::Attention::forward`.
    pub(crate) fn full_name(&self, function: usize) -> String {
        let path = &self.functions[function].path;
        if self.name.is_empty() {
            path.clone()
        } else {
            format!("{}::{path}", self.name)
        }
    }
}

/// A span for the whole of a syntax node where the compiler joins spans, else its beginning.
pub(crate) fn span(node: &impl Spanned) -> proc_macro2::Span {
    node.span()
}
