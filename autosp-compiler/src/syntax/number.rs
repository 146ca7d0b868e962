//! Expressions numbered in preorder: how a plan names a place in a function without holding syntax.

use std::collections::{HashMap, HashSet};

use syn::visit::{self, Visit};

/// The expressions of one function body.
pub(crate) struct Numbers<'a> {
    exprs: Vec<&'a syn::Expr>,
    of: HashMap<*const syn::Expr, u32>,
}

impl<'a> Numbers<'a> {
    pub(crate) fn new(block: &'a syn::Block) -> Self {
        let mut numbers = Self {
            exprs: Vec::new(),
            of: HashMap::new(),
        };
        numbers.visit_block(block);
        numbers
    }

    pub(crate) fn id(&self, e: &syn::Expr) -> u32 {
        // Expressions that stand outside the body (constants of the module) share one number that no plan uses.
        self.of
            .get(&std::ptr::from_ref(e))
            .copied()
            .unwrap_or(u32::MAX)
    }

    pub(crate) fn get(&self, id: u32) -> Option<&'a syn::Expr> {
        self.exprs.get(id as usize).copied()
    }
}

impl<'a> Visit<'a> for Numbers<'a> {
    fn visit_expr(&mut self, e: &'a syn::Expr) {
        self.of
            .insert(std::ptr::from_ref(e), self.exprs.len() as u32);
        self.exprs.push(e);
        visit::visit_expr(self, e);
    }
}

/// Numbers of all expressions within `e`, itself included.
pub(crate) fn within<'a>(numbers: &Numbers<'a>, e: &'a syn::Expr) -> Vec<u32> {
    struct Collect<'n, 'a>(&'n Numbers<'a>, Vec<u32>);
    impl<'a> Visit<'a> for Collect<'_, 'a> {
        fn visit_expr(&mut self, e: &'a syn::Expr) {
            self.1.push(self.0.id(e));
            visit::visit_expr(self, e);
        }
    }
    let mut collect = Collect(numbers, Vec::new());
    collect.visit_expr(e);
    collect.1
}

/// The name of the field that a place expression is in: `kvs` for `cache.kvs[i]`.
pub(crate) fn place_field(e: &syn::Expr) -> Option<String> {
    match e {
        syn::Expr::Field(f) => match &f.member {
            syn::Member::Named(n) => Some(n.to_string()),
            syn::Member::Unnamed(_) => None,
        },
        syn::Expr::Index(i) => place_field(&i.expr),
        syn::Expr::Paren(p) => place_field(&p.expr),
        syn::Expr::Reference(r) => place_field(&r.expr),
        syn::Expr::Unary(u) => place_field(&u.expr),
        syn::Expr::MethodCall(m)
            if matches!(
                m.method.to_string().as_str(),
                "lock" | "borrow_mut" | "unwrap" | "write" | "as_mut"
            ) =>
        {
            place_field(&m.receiver)
        }
        _ => None,
    }
}

/// Methods that write to the place they are called on.
pub(crate) const WRITERS: &[&str] = &[
    "insert",
    "push",
    "replace",
    "take",
    "clear",
    "append",
    "extend",
    "get_or_insert_with",
    "entry",
    "push_back",
    "get_or_insert",
];

/// What a body does to the world round it.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// Fields that it assigns to or calls a writing method on.
    pub(crate) writes: HashSet<String>,
    /// Names of the functions and methods that it calls.
    pub(crate) calls: HashSet<String>,
}

impl Effects {
    pub(crate) fn of(block: &syn::Block) -> Self {
        let mut effects = Self::default();
        effects.visit_block(block);
        effects
    }
}

impl<'a> Visit<'a> for Effects {
    fn visit_expr(&mut self, e: &'a syn::Expr) {
        match e {
            syn::Expr::Assign(a) => self.writes.extend(place_field(&a.left)),
            syn::Expr::MethodCall(m) => {
                let name = m.method.to_string();
                if WRITERS.contains(&name.as_str()) {
                    self.writes.extend(place_field(&m.receiver));
                }
                // `x.apply(&layer)` is `layer.forward(&x)`.
                self.calls.insert(if name == "apply" {
                    "forward".to_string()
                } else {
                    name
                });
            }
            syn::Expr::Path(p) => self
                .calls
                .extend(p.path.segments.last().map(|s| s.ident.to_string())),
            _ => {}
        }
        visit::visit_expr(self, e);
    }
}

/// Local variables that a body writes to (by assignment, a writing method or `&mut`), for the values carried round a loop.
pub(crate) fn assigned_locals(block: &syn::Block) -> Vec<String> {
    struct Find(Vec<String>);
    impl Find {
        /// The variables on the left of an assignment, in a tuple of them or behind a reference too.
        fn left(&mut self, e: &syn::Expr) {
            match e {
                syn::Expr::Path(p) => self.0.extend(p.path.get_ident().map(ToString::to_string)),
                syn::Expr::Tuple(t) => t.elems.iter().for_each(|e| self.left(e)),
                syn::Expr::Array(a) => a.elems.iter().for_each(|e| self.left(e)),
                syn::Expr::Index(i) => self.left(&i.expr),
                syn::Expr::Paren(p) => self.left(&p.expr),
                syn::Expr::Unary(u) => self.left(&u.expr),
                syn::Expr::Field(f) => self.left(&f.base),
                _ => {}
            }
        }
    }
    impl<'a> Visit<'a> for Find {
        fn visit_expr(&mut self, e: &'a syn::Expr) {
            let place = match e {
                syn::Expr::Assign(a) => {
                    self.left(&a.left);
                    None
                }
                syn::Expr::Binary(b) if is_assignment(&b.op) => Some(&*b.left),
                syn::Expr::MethodCall(m) if WRITERS.contains(&m.method.to_string().as_str()) => {
                    Some(&*m.receiver)
                }
                syn::Expr::Reference(r) if r.mutability.is_some() => Some(&*r.expr),
                _ => None,
            };
            if let Some(syn::Expr::Path(p)) = place
                && let Some(ident) = p.path.get_ident()
            {
                self.0.push(ident.to_string());
            }
            visit::visit_expr(self, e);
        }
    }
    let mut find = Find(Vec::new());
    find.visit_block(block);
    find.0
}

/// Whether the operation writes to its left side.
pub(crate) fn is_assignment(op: &syn::BinOp) -> bool {
    matches!(
        op,
        syn::BinOp::AddAssign(_)
            | syn::BinOp::SubAssign(_)
            | syn::BinOp::MulAssign(_)
            | syn::BinOp::DivAssign(_)
            | syn::BinOp::RemAssign(_)
            | syn::BinOp::BitAndAssign(_)
            | syn::BinOp::BitOrAssign(_)
            | syn::BinOp::BitXorAssign(_)
            | syn::BinOp::ShlAssign(_)
            | syn::BinOp::ShrAssign(_)
    )
}

/// Whether a body reads a variable, other than by giving it another value.
pub(crate) fn reads(block: &syn::Block, name: &str) -> bool {
    struct Find<'n>(&'n str, bool);
    impl<'a> Visit<'a> for Find<'_> {
        fn visit_expr(&mut self, e: &'a syn::Expr) {
            match e {
                syn::Expr::Assign(a) if matches!(&*a.left, syn::Expr::Path(_)) => {
                    return self.visit_expr(&a.right);
                }
                // Names in macros are not looked for one by one.
                syn::Expr::Macro(_) => self.1 = true,
                syn::Expr::Path(p) => self.1 |= p.path.is_ident(self.0),
                _ => {}
            }
            visit::visit_expr(self, e);
        }
    }
    let mut find = Find(name, false);
    find.visit_block(block);
    find.1
}
