//! Writes that go round the name of a variable: through `&mut`, a dereference, a place inside of it, a closure that captured it. What is
//! written so is not followed: the variable is lost, so that nothing is concluded from what it held before.

use std::collections::HashSet;

use syn::visit::{self, Visit};

use super::Trace;
use super::graph::{ActId, At, NodeId};
use super::value::{Cond, Presence, Value};
use crate::syntax::number::{WRITERS, is_assignment};
use crate::syntax::text;

/// The variable that a place is in: `ys` for `ys[0].1`, `*ys` and `ys.as_mut().unwrap()`.
pub(super) fn root(e: &syn::Expr) -> Option<String> {
    match e {
        syn::Expr::Path(p) => p.path.get_ident().map(ToString::to_string),
        syn::Expr::Field(f) => root(&f.base),
        syn::Expr::Index(i) => root(&i.expr),
        syn::Expr::Paren(p) => root(&p.expr),
        syn::Expr::Group(g) => root(&g.expr),
        syn::Expr::Reference(r) => root(&r.expr),
        syn::Expr::Unary(u) if matches!(u.op, syn::UnOp::Deref(_)) => root(&u.expr),
        syn::Expr::Try(t) => root(&t.expr),
        syn::Expr::MethodCall(m) => {
            let copies = ["clone", "cloned", "copied", "to_owned", "to_vec"];
            let copied = copies.iter().any(|name| m.method == name);
            (!copied).then(|| root(&m.receiver)).flatten()
        }
        _ => None,
    }
}

/// Methods that hand out a place to write to, or write to their receiver.
pub(super) fn writes(method: &str) -> bool {
    let others = [
        "swap",
        "reverse",
        "remove",
        "swap_remove",
        "truncate",
        "rotate_left",
        "rotate_right",
        "retain",
        "drain",
        "split_off",
        "fill",
        "resize",
        "sort",
        "sort_by",
        "sort_by_key",
        "dedup",
        "set",
        "lock",
        "write",
    ];
    method.ends_with("_mut") || others.contains(&method) || WRITERS.contains(&method)
}

/// Data that is followed; layers and structs of the model are known by their paths.
fn followed(value: &Value) -> bool {
    !matches!(
        value,
        Value::Object { .. }
            | Value::Opaque
            | Value::Unit
            | Value::Never
            | Value::Closure(_)
            | Value::Asserted(_)
            | Value::EmptyStore
            | Value::Unknown(_)
    )
}

impl<'a> Trace<'_, 'a> {
    /// Loses the variable that a place is in, if it holds something that is followed. Returns its new value.
    pub(super) fn lose_place(
        &mut self,
        act: ActId,
        place: &syn::Expr,
        what: &str,
    ) -> Option<Value> {
        let name = root(place)?;
        self.lose(act, &name, what)
    }

    fn lose(&mut self, act: ActId, name: &str, what: &str) -> Option<Value> {
        let value = self.lookup(act, name)?.value;
        // A list of the model's parts is one, whatever is taken from it.
        let parts = matches!(&value, Value::List { any, .. } if !followed(any));
        if !followed(&value) || parts || absent(&value) {
            return None;
        }
        let lost = Self::lost(what);
        self.assign(act, name, lost.clone());
        Some(lost)
    }

    /// `*p = value`: whatever else is known to hold what `p` pointed at is lost.
    pub(super) fn assign_through(&mut self, act: ActId, left: &syn::Expr, value: Value) {
        let Some(name) = root(left) else { return };
        let old: HashSet<NodeId> = self
            .lookup(act, &name)
            .map_or_else(HashSet::new, |b| nodes(&b.value));
        let whole = matches!(left, syn::Expr::Unary(u) if matches!(&*u.expr, syn::Expr::Path(_)));
        if whole {
            self.assign(act, &name, value);
        } else {
            self.lose(act, &name, &text(left));
        }
        let names: Vec<String> = self.acts[act]
            .scopes
            .iter()
            .flat_map(|s| s.keys().cloned())
            .collect();
        for other in names {
            let holds = self
                .lookup(act, &other)
                .is_some_and(|b| !nodes(&b.value).is_disjoint(&old));
            if other != name && holds {
                self.lose(act, &other, &text(left));
            }
        }
    }

    /// What a closure writes to outside of itself may be written whenever it is called.
    pub(super) fn closure_writes(&mut self, act: ActId, c: &syn::ExprClosure) {
        let mut written = Written(Vec::new());
        written.visit_expr(&c.body);
        let mut params = Params(HashSet::new());
        c.inputs.iter().for_each(|pat| params.visit_pat(pat));
        for name in written.0 {
            if !params.0.contains(&name) {
                self.lose(act, &name, &text(c));
            }
        }
    }

    /// A block that can be left from the middle: what it gives, and what it writes to, is one thing or another.
    pub(super) fn labelled(
        &mut self,
        act: ActId,
        label: &syn::Label,
        block: &'a syn::Block,
        what: &str,
    ) -> Value {
        let value = self.block(act, block);
        let mut breaks = Breaks(label.name.ident.to_string(), false);
        breaks.visit_block(block);
        if !breaks.1 {
            return value;
        }
        let mut written = Written(Vec::new());
        written.visit_block(block);
        for name in written.0 {
            self.lose(act, &name, what);
        }
        Self::lost(what)
    }

    /// Names that a block's own items give another meaning than the module's.
    pub(super) fn local_item(&mut self, act: ActId, item: &'a syn::Item) {
        fn names(tree: &syn::UseTree, out: &mut Vec<String>) {
            match tree {
                syn::UseTree::Path(p) => names(&p.tree, out),
                syn::UseTree::Name(n) => out.push(n.ident.to_string()),
                syn::UseTree::Rename(r) => out.push(r.rename.to_string()),
                syn::UseTree::Group(g) => g.items.iter().for_each(|t| names(t, out)),
                syn::UseTree::Glob(_) => {}
            }
        }
        let mut hidden = Vec::new();
        match item {
            syn::Item::Const(c) => {
                let value = self.eval(act, &c.expr);
                self.declare(act, &c.ident.to_string(), value, false);
            }
            syn::Item::Static(s) => hidden.push(s.ident.to_string()),
            syn::Item::Fn(f) => hidden.push(f.sig.ident.to_string()),
            syn::Item::Use(u) => names(&u.tree, &mut hidden),
            _ => {}
        }
        for name in hidden {
            if self.scope.free(&name).is_some()
                || self.scope.consts.contains_key(&name)
                || self.scope.names.knows(&name)
            {
                let lost = Self::lost(&format!("{name}, an item inside of a function"));
                self.declare(act, &name, lost, false);
            }
        }
    }
}

/// A loop that evaluation is in.
pub(super) struct Round {
    pub(super) act: ActId,
    /// Variables that it carries round, and what stands for them at the beginning of each round.
    carried: Vec<(String, NodeId)>,
    /// Those that had another value where a round was left early.
    torn: Vec<String>,
    /// Options that hold nothing before the loop and that it reads: they have to hold nothing after a round too.
    absent: Vec<String>,
    /// What else it writes to, with what that held before: what it holds where there is no round.
    others: Vec<(String, Value)>,
    /// Lists that it fills.
    pub(super) filled: Vec<super::each::Filled>,
    /// How many rounds there are, where each runs to its end.
    pub(super) over: Option<super::value::Size>,
    at: At,
}

impl Round {
    pub(super) fn new(
        act: ActId,
        carried: Vec<(String, NodeId)>,
        absent: Vec<String>,
        others: Vec<(String, Value)>,
        at: At,
    ) -> Self {
        let torn = Vec::new();
        Self {
            act,
            carried,
            torn,
            absent,
            others,
            filled: Vec::new(),
            over: None,
            at,
        }
    }
}

impl Trace<'_, '_> {
    /// `break` or `continue`: what this round has changed so far is seen by what comes after, and the rest of the round is not.
    pub(super) fn leave_round(&mut self, act: ActId) {
        for i in 0..self.rounds.len() {
            if self.rounds[i].act != act {
                continue;
            }
            let changed = |(name, phi): &(String, NodeId)| {
                let now = self.lookup(act, name).map(|b| b.value);
                (now != Some(Value::Tensor(*phi))).then(|| name.clone())
            };
            let torn: Vec<String> = self.rounds[i].carried.iter().filter_map(changed).collect();
            self.rounds[i].torn.extend(torn);
        }
    }

    /// The end of a loop.
    pub(super) fn end_rounds(&mut self, act: ActId) {
        let Some(round) = self.rounds.pop() else {
            return;
        };
        self.end_filling(act, round.filled, round.over.as_ref(), round.at);
        for (name, before) in round.others {
            if let Some(after) = self.lookup(act, &name).map(|b| b.value) {
                let value = self.join(before, after, &Cond::Unknown, round.at);
                self.assign(act, &name, value);
            }
        }
        for name in round.torn {
            let what = format!("{name}, which a round changes before it is left early");
            self.assign(act, &name, Self::lost(&what));
        }
        for name in round.absent {
            let now = self.lookup(act, &name).map(|b| b.value);
            if !matches!(now, Some(Value::Option(Presence::None, _))) {
                let lost = Self::lost(&format!(
                    "{name}, which changes from round to round of a loop"
                ));
                if let Value::Unknown(reason) = &lost {
                    self.refuse_all(round.at, &name, reason);
                }
                self.assign(act, &name, lost);
            }
        }
    }
}

fn nodes(value: &Value) -> HashSet<NodeId> {
    let mut all = Vec::new();
    value.tensors(&mut all);
    all.into_iter().collect()
}

/// A cache that holds nothing while training.
fn absent(value: &Value) -> bool {
    match value {
        Value::Option(Presence::None, _) => true,
        Value::List { any, .. } => absent(any),
        _ => false,
    }
}

/// The variables that a piece of code writes to, in any way.
struct Written(Vec<String>);

impl<'a> Visit<'a> for Written {
    fn visit_expr(&mut self, e: &'a syn::Expr) {
        match e {
            syn::Expr::Assign(a) => targets(&a.left, &mut self.0),
            syn::Expr::Binary(b) if is_assignment(&b.op) => self.0.extend(root(&b.left)),
            syn::Expr::Reference(r) if r.mutability.is_some() => self.0.extend(root(&r.expr)),
            syn::Expr::MethodCall(m) if writes(&m.method.to_string()) => {
                self.0.extend(root(&m.receiver));
            }
            _ => {}
        }
        visit::visit_expr(self, e);
    }
}

/// The variables that the left side of an assignment writes to.
pub(super) fn targets(left: &syn::Expr, out: &mut Vec<String>) {
    match left {
        syn::Expr::Tuple(t) => t.elems.iter().for_each(|e| targets(e, out)),
        syn::Expr::Array(a) => a.elems.iter().for_each(|e| targets(e, out)),
        syn::Expr::Call(c) => c.args.iter().for_each(|e| targets(e, out)),
        syn::Expr::Struct(s) => s.fields.iter().for_each(|f| targets(&f.expr, out)),
        other => out.extend(root(other)),
    }
}

struct Breaks(String, bool);

impl<'a> Visit<'a> for Breaks {
    fn visit_expr_break(&mut self, b: &'a syn::ExprBreak) {
        self.1 |= b.label.as_ref().is_some_and(|l| l.ident == self.0);
        visit::visit_expr_break(self, b);
    }
}

/// The names that patterns bind.
struct Params(HashSet<String>);

impl<'a> Visit<'a> for Params {
    fn visit_pat_ident(&mut self, i: &'a syn::PatIdent) {
        self.0.insert(i.ident.to_string());
        visit::visit_pat_ident(self, i);
    }
}
