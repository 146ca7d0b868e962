//! What keeps a model from being shared out along its tokens, whatever else was lost on the way: recurrences and convolutions. They are
//! noted where they are met, and said first where a module is refused.

use std::collections::{BTreeSet, HashSet};

use autosp_plan::codes;
use proc_macro2::Span;
use syn::visit::{self, Visit};

use super::Trace;
use super::control::has_tensor;
use super::graph::{ActId, Input, NodeId, Op};
use crate::error::Refusal;
use crate::ops::{PlaceRule, Row, ShapeRule};
use crate::syntax::text;

const RECURRENCE: &str = "a recurrence: a rank would have to wait for the ranks that hold the tokens before its own, so that they run one after another";
const INSTEAD: &str = "use attention in the place of the recurrence, or leave the attribute out and train with whole sequences on each rank";

impl Trace<'_, '_> {
    fn cause(&mut self, refusal: Refusal) {
        let known = |r: &Refusal| r.message == refusal.message;
        if !self.causes.iter().any(known) {
            self.causes.push(refusal);
        }
    }

    /// The variables that a loop hands from each token to the next: written and read in it, which takes one token in each round.
    /// `tokens` says whether it counts them, if that is known.
    pub(super) fn handed_on(
        &self,
        act: ActId,
        f: &syn::ExprForLoop,
        tokens: Option<bool>,
    ) -> Vec<String> {
        let counter = match &*f.pat {
            syn::Pat::Ident(i) => i.ident.to_string(),
            _ => return Vec::new(),
        };
        let mut body = Body::new(&counter);
        body.visit_block(&f.body);
        if !tokens.unwrap_or(body.takes_one) {
            return Vec::new();
        }
        let handed = |name: &String| body.read.contains(name) && self.lookup(act, name).is_some();
        body.assigned
            .iter()
            .filter(|n| handed(n))
            .cloned()
            .collect()
    }

    /// After the body: whether what is handed on is a tensor.
    pub(super) fn note_recurrence(
        &mut self,
        act: ActId,
        f: &syn::ExprForLoop,
        handed: &[String],
        span: Span,
    ) {
        for name in handed {
            let Some(after) = self.lookup(act, name).map(|b| b.value) else {
                continue;
            };
            if has_tensor(&after) || after.lost().is_some() {
                let message = format!(
                    "the loop over `{}` hands `{name}` from each token to the next",
                    text(&f.expr)
                );
                let refusal = Refusal::new(codes::SCAN, span, message);
                return self.cause(refusal.note(RECURRENCE).help(INSTEAD));
            }
        }
    }

    /// A tensor that one call leaves to the next, outside of an `Option`.
    pub(super) fn note_state(&mut self, path: &str, span: Span) {
        // A constructor writes to what it makes.
        let field = path
            .rsplit('.')
            .next()
            .unwrap_or(path)
            .trim_end_matches("[_]");
        if !self.scope.updates(field) {
            return;
        }
        let message = format!("`{path}` carries a tensor from each call to the next");
        self.cause(
            Refusal::new(codes::SCAN, span, message)
                .note(RECURRENCE)
                .note("what is a cache alone stands in an `Option`, which is `None` while training")
                .help(INSTEAD),
        );
    }

    /// Products of tokens with a learned table of positions, of which each pair of tokens takes its own.
    pub(super) fn note_relative(&mut self, row: &Row, inputs: &[Input], what: &str, span: Span) {
        let (true, Some(from)) = (row.name() == "gather", inputs.first()) else {
            return;
        };
        let mut product = from.node;
        let matmul = loop {
            match (
                self.nodes[product].row(),
                self.nodes[product].inputs.first(),
            ) {
                (Some(r), _) if r.shape == ShapeRule::Matmul => break product,
                (Some(_), Some(first)) => product = first.node,
                _ => return,
            }
        };
        let [a, b] = self.nodes[matmul].inputs.as_slice() else {
            return;
        };
        // A table that the model holds, or that it hands to the function.
        let table = |table: &Input, tokens: &Input| {
            let tokens = self.given(tokens.node);
            let own = self.given(table.node);
            self.learned(table.node).is_some()
                && !tokens.is_empty()
                && !own.iter().any(|name| tokens.contains(name))
        };
        if !table(a, b) && !table(b, a) {
            return;
        }
        let message = format!("`{what}` takes scores by relative position out of a learned table");
        self.cause(
            Refusal::new(codes::LEARNED_BIAS, span, message)
                .note("a bias between each two tokens, which no rank holds whole, would need a gradient of its own")
                .help("use rotary or absolute positions, or leave the attribute out"),
        );
    }

    /// A softmax over the products of one input's tokens with another's.
    pub(super) fn note_cross(&mut self, row: &Row, inputs: &[Input]) {
        let (true, Some(scores)) = (row.name().starts_with("softmax"), inputs.first()) else {
            return;
        };
        let mut stack = vec![scores.node];
        let mut seen = HashSet::new();
        while let Some(n) = stack.pop() {
            let node = &self.nodes[n];
            let product = node.row().is_some_and(|r| r.shape == ShapeRule::Matmul);
            // Scores are scaled, masked and moved about.
            let passes = node
                .row()
                .is_none_or(|r| matches!(r.place, PlaceRule::Each | PlaceRule::Move));
            if !seen.insert(n) || !(passes || product) {
                continue;
            }
            let (true, [q, k]) = (product, node.inputs.as_slice()) else {
                stack.extend(node.inputs.iter().map(|i| i.node));
                continue;
            };
            let (queries, keys) = (self.given(q.node), self.given(k.node));
            let (Some(of), Some(with)) = (queries.first(), keys.first()) else {
                continue;
            };
            // A function that is given queries and keys may have them from the same tokens; one that projects them itself has not.
            let projected = |i: &Input| self.learned(i.node).is_some();
            let same = queries.iter().any(|name| keys.contains(name));
            if same || !projected(q) || !projected(k) {
                continue;
            }
            let message = format!(
                "`{}` pairs the tokens of `{of}` with those of `{with}`",
                node.text
            );
            let refusal = Refusal::new(codes::CROSS_ATTENTION, node.at.span, message)
                .note("an attention between two sequences, each of which would have shards of its own")
                .help("only self-attention is sharded: queries and keys of the same tokens");
            return self.cause(refusal);
        }
    }

    /// The names of what callers give that a tensor comes from, in the order of the parameters.
    fn given(&self, node: NodeId) -> Vec<String> {
        let mut stack = vec![node];
        let mut seen = BTreeSet::new();
        while let Some(n) = stack.pop() {
            if seen.insert(n) {
                stack.extend(self.nodes[n].inputs.iter().map(|i| i.node));
            }
        }
        let name = |n: NodeId| match &self.nodes[n].op {
            Op::Param(name) => Some(name.clone()),
            _ => None,
        };
        seen.into_iter().filter_map(name).collect()
    }

    /// A convolution along the last dimension, which is the sequence unless it is known to be another.
    pub(super) fn note_convolution(&mut self, row: &Row, inputs: &[Input], what: &str, span: Span) {
        let along = ["onv1d", "onv_transpose1d", "pool1d"];
        if row.place != PlaceRule::Window || !along.iter().any(|name| row.path.contains(name)) {
            return;
        }
        let dims = inputs
            .first()
            .and_then(|i| self.nodes[i.node].shape.known());
        let width = dims.and_then(<[_]>::last);
        if width.is_some_and(|d| !d.anchored(&self.atoms)) {
            return;
        }
        let message = format!("`{what}` slides over neighbouring tokens, which other ranks hold");
        self.cause(
            Refusal::new(codes::CONVOLUTION, span, message)
                .note("a convolution: the tokens at the ends of a shard need those of the shards beside it")
                .help("leave the convolution out, or compute it before the tokens are sharded"),
        );
    }
}

/// What a loop's body does with its counter and with variables.
struct Body<'c> {
    counter: &'c str,
    /// Tensors are indexed with the counter.
    takes_one: bool,
    assigned: Vec<String>,
    read: HashSet<String>,
}

impl<'c> Body<'c> {
    fn new(counter: &'c str) -> Self {
        Self {
            counter,
            takes_one: false,
            assigned: Vec::new(),
            read: HashSet::new(),
        }
    }

    fn names_counter(&self, e: &syn::Expr) -> bool {
        struct Find<'c>(&'c str, bool);
        impl<'a> Visit<'a> for Find<'_> {
            fn visit_expr_path(&mut self, p: &'a syn::ExprPath) {
                self.1 |= p.path.is_ident(self.0);
            }
        }
        let mut find = Find(self.counter, false);
        find.visit_expr(e);
        find.1
    }
}

impl<'a> Visit<'a> for Body<'_> {
    fn visit_expr(&mut self, e: &'a syn::Expr) {
        match e {
            syn::Expr::Assign(a) => {
                if let syn::Expr::Path(p) = &*a.left
                    && let Some(ident) = p.path.get_ident()
                {
                    self.assigned.push(ident.to_string());
                    return self.visit_expr(&a.right);
                }
            }
            syn::Expr::MethodCall(m) => {
                let method = m.method.to_string();
                let takes = ["i", "get", "narrow", "index_select"].contains(&method.as_str());
                self.takes_one |= takes && m.args.iter().any(|arg| self.names_counter(arg));
            }
            syn::Expr::Path(p) => self
                .read
                .extend(p.path.get_ident().map(ToString::to_string)),
            _ => {}
        }
        visit::visit_expr(self, e);
    }
}
