//! Loops that do the same with each row of the batch, and lists that a loop fills.

use std::collections::HashSet;

use syn::visit::{self, Visit};

use super::Trace;
use super::graph::{ActId, At, Input, NodeId, Op};
use super::shape::Dim;
use super::size::{AtomId, Poly};
use super::value::{Cond, Size, Value};

/// The counter of a loop over a dimension of the input, and its end.
pub(super) struct Counter {
    pub(super) atom: AtomId,
    /// Where it begins at zero.
    pub(super) end: Option<Poly>,
}

/// A list that was empty before a loop, and what the loop has put into it.
pub(super) struct Filled {
    name: String,
    pushed: Vec<Value>,
}

impl Filled {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            pushed: Vec::new(),
        }
    }
}

impl Trace<'_, '_> {
    /// The counter of a loop over exactly this dimension, where the index is it: one of its rows in each round.
    pub(super) fn counts_rows_of(&self, dim: &Dim, index: &Size) -> Option<AtomId> {
        let size = dim.size(&self.atoms);
        let counter = self.counters.iter().find(|c| {
            let all = c
                .end
                .as_ref()
                .is_some_and(|end| self.atoms.equal(end, &size));
            all && index.poly == Poly::atom(c.atom)
        });
        counter.map(|c| c.atom)
    }

    /// `list.push(value)` in a loop that fills the list.
    pub(super) fn fills(&mut self, act: ActId, list: &syn::Expr, value: &Value, at: At) -> bool {
        let syn::Expr::Path(p) = list else {
            return false;
        };
        let name = p.path.get_ident().map(ToString::to_string);
        let name = name.unwrap_or_default();
        let known = |r: &super::writes::Round| r.act == act;
        let Some(round) = self.rounds.iter().rposition(known) else {
            return false;
        };
        if !self.rounds[round].filled.iter().any(|f| f.name == name) {
            return false;
        }
        // The list has the tensor from now on, whatever becomes of it.
        let value = match value {
            Value::Tensor(node) => {
                let (shape, input) = (self.nodes[*node].shape.clone(), *node);
                let inputs = vec![Input {
                    node: input,
                    expr: None,
                }];
                let text = self.nodes[input].text.clone();
                Value::Tensor(self.node(Op::Phi { carried: false }, inputs, shape, at, &text))
            }
            other => other.clone(),
        };
        let filled = &mut self.rounds[round].filled;
        if let Some(list) = filled.iter_mut().find(|f| f.name == name) {
            list.pushed.push(value);
        }
        true
    }

    /// The end of a loop: what its lists hold. `over` is the length of the loop where every round puts in one value.
    pub(super) fn end_filling(
        &mut self,
        act: ActId,
        filled: Vec<Filled>,
        over: Option<&Size>,
        at: At,
    ) {
        for list in filled {
            let now = self.lookup(act, &list.name).map(|b| b.value);
            let untouched =
                matches!(&now, Some(Value::List { elems: Some(e), .. }) if e.is_empty());
            let mut all = list.pushed.into_iter();
            let Some(first) = all.next() else { continue };
            if !untouched {
                let lost = Self::lost(&format!("what is put into `{}`", list.name));
                self.assign(act, &list.name, lost);
                continue;
            }
            // One for each row of the input, in their order.
            let rows = over.filter(|n| all.len() == 0 && self.atoms.anchored(&n.poly));
            let value = if let (Some(count), Value::Tensor(_)) = (rows, &first) {
                Value::Each(Box::new(first), Box::new(count.clone()))
            } else {
                let any = all.fold(first, |any, v| self.join(any, v, &Cond::Unknown, at));
                match any.lost() {
                    Some(reason) => Value::Unknown(reason.clone()),
                    None => Value::List {
                        elems: None,
                        any: Box::new(any),
                    },
                }
            };
            self.assign(act, &list.name, value);
        }
    }

    /// One row in each round may go into a list of them, and nowhere else: a sum over the rounds, or the row of the last one, would mix
    /// the rows of the batch, which replicas share out. `first` is the first tensor that the loop made, with its counter.
    pub(super) fn keep_rows_apart(
        &mut self,
        act: ActId,
        (first, counter): (NodeId, Option<AtomId>),
        (returned, recurs): (usize, bool),
        at: At,
    ) {
        let mut rows: HashSet<NodeId> = HashSet::new();
        for node in first..self.nodes.len() {
            let n = &self.nodes[node];
            let row = matches!(n.op, Op::Each { counter: c, .. } if Some(c) == counter);
            if row || n.inputs.iter().any(|i| rows.contains(&i.node)) {
                rows.insert(node);
            }
        }
        if rows.is_empty() {
            return;
        }
        let has_row = |value: &Value| {
            let mut tensors = Vec::new();
            value.tensors(&mut tensors);
            !matches!(value, Value::Each(..)) && tensors.iter().any(|n| rows.contains(n))
        };
        let outside = self.acts[act].scopes.iter().flatten();
        let kept: Vec<String> = outside
            .filter(|(_, b)| has_row(&b.value))
            .map(|(name, _)| name.clone())
            .collect();
        let left = self.acts[act].returns[returned..].iter().any(has_row);
        if kept.is_empty() && !left {
            return;
        }
        let name = kept.first().map_or("what is returned", String::as_str);
        let reason = super::graph::Reason {
            // What goes from token to token has been said by then.
            code: if recurs {
                autosp_plan::codes::SCAN
            } else {
                autosp_plan::codes::MIXES_TOKENS
            },
            message: format!("`{name}` has something of one row of the batch after a loop over them, which the dp replicas share out"),
            help: "put each round's result into a list, and the list together with `Tensor::cat` or `Tensor::stack`".to_string(),
            span: Some(at.span),
        };
        self.refuse_all(at, name, &reason);
    }
}

/// Whether a loop's body does nothing with a list but to push to it.
pub(super) fn only_pushed(body: &syn::Block, name: &str) -> bool {
    struct Find<'n> {
        name: &'n str,
        pushed: usize,
        named: usize,
        in_macro: bool,
    }
    impl<'a> Visit<'a> for Find<'_> {
        fn visit_expr_method_call(&mut self, m: &'a syn::ExprMethodCall) {
            let own = matches!(&*m.receiver, syn::Expr::Path(p) if p.path.is_ident(self.name));
            self.pushed += usize::from(own && m.method == "push");
            visit::visit_expr_method_call(self, m);
        }
        fn visit_expr_path(&mut self, p: &'a syn::ExprPath) {
            self.named += usize::from(p.path.is_ident(self.name));
        }
        fn visit_pat_ident(&mut self, p: &'a syn::PatIdent) {
            self.named += usize::from(p.ident == self.name);
        }
        fn visit_macro(&mut self, m: &'a syn::Macro) {
            self.in_macro |= m.tokens.to_string().contains(self.name);
        }
    }
    let mut find = Find {
        name,
        pushed: 0,
        named: 0,
        in_macro: false,
    };
    find.visit_block(body);
    !find.in_macro && find.pushed == find.named
}

/// Whether every round runs to its end and has its pushes as statements of the body itself.
pub(super) fn straight(body: &syn::Block) -> bool {
    struct Find {
        depth: usize,
        bent: bool,
    }
    impl<'a> Visit<'a> for Find {
        fn visit_expr(&mut self, e: &'a syn::Expr) {
            use syn::Expr;
            self.bent |= matches!(e, Expr::Break(_) | Expr::Continue(_) | Expr::Return(_));
            let inner = matches!(
                e,
                Expr::If(_)
                    | Expr::Match(_)
                    | Expr::ForLoop(_)
                    | Expr::While(_)
                    | Expr::Loop(_)
                    | Expr::Closure(_)
            );
            self.bent |= self.depth > 0 && matches!(e, Expr::MethodCall(m) if m.method == "push");
            self.depth += usize::from(inner);
            visit::visit_expr(self, e);
            self.depth -= usize::from(inner);
        }
    }
    let mut find = Find {
        depth: 0,
        bent: false,
    };
    find.visit_block(body);
    !find.bent
}
