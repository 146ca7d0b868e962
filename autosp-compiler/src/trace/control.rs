//! Control flow: blocks, branches, loops, patterns, and where their values meet.

use std::collections::HashMap;

use super::graph::{ActId, At, Input, NodeId, Op};
use super::shape::Shape;
use super::value::{Binding, Cond, Presence, Size, Value};
use super::writes::Round;
use super::{Fact, Loop, Role, Trace};
use crate::syntax::number;

type Vars = Vec<HashMap<String, Binding>>;

impl<'a> Trace<'_, 'a> {
    pub(super) fn block(&mut self, act: ActId, block: &'a syn::Block) -> Value {
        self.acts[act].scopes.push(HashMap::new());
        let mut value = Value::Unit;
        for stmt in &block.stmts {
            value = match stmt {
                syn::Stmt::Local(local) => self.local(act, local),
                syn::Stmt::Expr(e, semi) => {
                    let value = self.eval(act, e);
                    if semi.is_some() && value != Value::Never {
                        Value::Unit
                    } else {
                        value
                    }
                }
                syn::Stmt::Macro(m) if super::macros::never_returns(&m.mac) => Value::Never,
                syn::Stmt::Macro(m) => {
                    self.macro_statement(act, &m.mac);
                    Value::Unit
                }
                syn::Stmt::Item(item) => {
                    self.local_item(act, item);
                    Value::Unit
                }
            };
            if value == Value::Never {
                break;
            }
        }
        self.acts[act].scopes.pop();
        value
    }

    /// A macro as a statement may write to every variable that it names, unless it is one of those that only speak.
    fn macro_statement(&mut self, act: ActId, mac: &syn::Macro) {
        fn names(tokens: proc_macro2::TokenStream, out: &mut Vec<String>) {
            for token in tokens {
                match token {
                    proc_macro2::TokenTree::Ident(i) => out.push(i.to_string()),
                    proc_macro2::TokenTree::Group(g) => names(g.stream(), out),
                    _ => {}
                }
            }
        }
        let name = mac.path.segments.last().map(|s| s.ident.to_string());
        if name.is_some_and(|n| super::eval::SPEAKING.contains(&n.as_str())) {
            return;
        }
        let mut named = Vec::new();
        names(mac.tokens.clone(), &mut named);
        for name in named {
            let mut tensors = Vec::new();
            let mut rows = false;
            if let Some(binding) = self.lookup(act, &name) {
                binding.value.tensors(&mut tensors);
                rows = matches!(
                    binding.value,
                    Value::HostRows(_) | Value::Rows(_) | Value::List { .. }
                );
            }
            if !tensors.is_empty() || rows {
                self.assign(act, &name, Self::lost(&crate::syntax::text(mac)));
            }
        }
    }

    fn local(&mut self, act: ActId, local: &'a syn::Local) -> Value {
        let Some(init) = &local.init else {
            self.bind(act, &local.pat, Value::Opaque, false);
            return Value::Unit;
        };
        let value = self.eval(act, &init.expr);
        if value == Value::Never {
            return Value::Never;
        }
        if let Some((_, diverge)) = &init.diverge {
            self.eval(act, diverge);
        }
        self.bind(act, &local.pat, value, false);
        Value::Unit
    }

    /// The condition of an `if`; for `if let` whether the pattern matches. Names are bound by the caller's scope.
    fn condition(&mut self, act: ActId, cond: &'a syn::Expr) -> Cond {
        match cond {
            syn::Expr::Let(l) => {
                let value = self.eval(act, &l.expr);
                let matches = Self::matches(&l.pat, &value);
                self.bind(act, &l.pat, value, true);
                matches
            }
            syn::Expr::Binary(b) if matches!(b.op, syn::BinOp::And(_)) => {
                let left = self.condition(act, &b.left);
                let right = self.condition(act, &b.right);
                match (left, right) {
                    (Cond::Known(false), _) | (_, Cond::Known(false)) => Cond::Known(false),
                    (Cond::Known(true), other) | (other, Cond::Known(true)) => other,
                    (l, r) => Cond::And(Box::new(l), Box::new(r)),
                }
            }
            syn::Expr::Paren(p) => self.condition(act, &p.expr),
            other => match self.eval(act, other) {
                Value::Bool(c) => c,
                Value::Unknown(reason) => {
                    self.lost_condition(act, other, &reason);
                    Cond::Unknown
                }
                _ => Cond::Unknown,
            },
        }
    }

    /// A condition that comes from something lost could fall out differently on a shard: refused, whatever depends on it.
    fn lost_condition(&mut self, act: ActId, e: &syn::Expr, reason: &super::graph::Reason) {
        let at = self.at(act, e);
        self.refuse_all(at, &crate::syntax::text(e), reason);
    }

    /// Makes everything depend on something lost.
    pub(super) fn refuse_all(&mut self, at: At, text: &str, reason: &super::graph::Reason) {
        let given = |n: &super::graph::Node| matches!(n.op, Op::Param(_));
        let inputs = (0..self.nodes.len())
            .filter(|n| given(&self.nodes[*n]))
            .map(|node| Input { node, expr: None })
            .collect();
        let node = self.unknown(reason.clone(), inputs, at, text);
        self.reads.push(node);
    }

    pub(super) fn if_else(&mut self, act: ActId, i: &'a syn::ExprIf, at: At) -> Value {
        if self.skips_empty(act, i) {
            return Value::Unit;
        }
        let before = self.acts[act].scopes.clone();
        self.acts[act].scopes.push(HashMap::new());
        let cond = self.condition(act, &i.cond);
        match cond {
            Cond::Known(false) => {
                self.acts[act].scopes = before;
                self.acts[act].facts.push((at.expr, Fact::Else));
                return i
                    .else_branch
                    .as_ref()
                    .map_or(Value::Unit, |(_, e)| self.eval(act, e));
            }
            Cond::Known(true) => {
                self.acts[act].facts.push((at.expr, Fact::Then));
                let value = self.block(act, &i.then_branch);
                self.acts[act].scopes.pop();
                return value;
            }
            _ => self.acts[act].facts.push((at.expr, Fact::Open)),
        }
        let open = self.may_leave(act) && self.settled(act, &i.cond, &cond);
        if open {
            self.settled.insert((self.acts[act].function, at.expr));
        }
        let mut then = self.alternative(act, at, 0, open, |t| t.block(act, &i.then_branch));
        self.acts[act].scopes.pop();
        let after_then = std::mem::replace(&mut self.acts[act].scopes, before);
        let mut other = match &i.else_branch {
            Some((_, e)) => self.alternative(act, at, 1, open, |t| t.eval(act, e)),
            None => Value::Unit,
        };
        if open && i.else_branch.is_some() {
            self.leave_lost(act, at, [(0, &mut then), (1, &mut other)]);
        }
        self.meet(
            act,
            then == Value::Never,
            &after_then,
            other == Value::Never,
            &cond,
            at,
        );
        self.join(then, other, &cond, at)
    }

    /// Merges the variables of two branches into the current ones (which are the second branch's).
    fn meet(
        &mut self,
        act: ActId,
        first_left: bool,
        first: &Vars,
        second_left: bool,
        cond: &Cond,
        at: At,
    ) {
        if second_left && !first_left {
            self.acts[act].scopes.clone_from(first);
        }
        if first_left || second_left {
            return;
        }
        for (level, first) in first.iter().enumerate() {
            let Some(second) = self.acts[act].scopes.get(level) else {
                break;
            };
            let differ = second.iter().filter_map(|(name, b)| {
                let a = first.get(name).filter(|a| a.value != b.value)?;
                Some((name.clone(), a.value.clone(), b.value.clone()))
            });
            for (name, a, b) in differ.collect::<Vec<_>>() {
                let value = self.join(a, b, cond, at);
                if let Some(slot) = self.acts[act].scopes[level].get_mut(&name) {
                    slot.value = value;
                }
            }
        }
    }

    pub(super) fn match_arms(&mut self, act: ActId, m: &'a syn::ExprMatch, at: At) -> Value {
        let value = self.eval(act, &m.expr);
        let mut result: Option<Value> = None;
        let before = self.acts[act].scopes.clone();
        let mut merged: Option<Vars> = None;
        let open = self.may_leave(act) && self.settled_value(&value);
        let mut last = 0;
        for (k, arm) in m.arms.iter().enumerate() {
            let matches = Self::matches(&arm.pat, &value);
            if matches == Cond::Known(false) {
                continue;
            }
            let decided = matches == Cond::Known(true) && result.is_none();
            let fact = if decided { Fact::Arm(k) } else { Fact::Open };
            self.acts[act].facts.push((at.expr, fact));
            self.acts[act].scopes.clone_from(&before);
            self.acts[act].scopes.push(HashMap::new());
            self.bind(act, &arm.pat, value.clone(), true);
            let mut v = self.alternative(act, at, k, open && !decided, |t| t.eval(act, &arm.body));
            self.acts[act].scopes.pop();
            if let (true, Some(other)) = (open, &mut result) {
                self.leave_lost(act, at, [(last, other), (k, &mut v)]);
            }
            last = k;
            let left = v == Value::Never;
            if let Some(first) = merged.take() {
                let all_left = result == Some(Value::Never);
                self.meet(act, all_left, &first, left, &Cond::Unknown, at);
            }
            merged = Some(self.acts[act].scopes.clone());
            result = Some(match result.take() {
                None => v,
                Some(r) => self.join(r, v, &Cond::Unknown, at),
            });
            if decided || matches == Cond::Known(true) {
                break;
            }
        }
        if let Some(vars) = merged {
            self.acts[act].scopes = vars;
        }
        result.unwrap_or(Value::Opaque)
    }

    pub(super) fn for_loop(&mut self, act: ActId, f: &'a syn::ExprForLoop, at: At) -> Value {
        let iter = self.eval(act, &f.expr);
        if let Value::HostRows(rows) = &iter
            && self.row_loop(act, f, &rows.clone())
        {
            return Value::Unit;
        }
        if let Value::Range(_, end, end_expr) = &iter {
            let end_at = At {
                expr: *end_expr,
                ..at
            };
            self.use_size(end_at, &end.clone(), Role::Valid);
        }
        let tokens = match &iter {
            Value::Range(_, end, _) if self.atoms.anchored(&end.poly) => Some(true),
            Value::Range(_, end, _) if end.origins.is_empty() => Some(false),
            _ => None,
        };
        let over = match &iter {
            Value::Range(start, end, _) if start.poly == super::size::Poly::default() => {
                Some((**end).clone())
            }
            _ => None,
        };
        let elem = self.element(iter);
        let mut counter = None;
        if let (Some(true), Value::Size(round)) = (tokens, &elem)
            && let Some(atom) = round.poly.as_atom()
        {
            let end = over.as_ref().map(|end| end.poly.clone());
            self.counters.push(super::each::Counter { atom, end });
            counter = Some(atom);
        }
        let (first, returned) = (self.nodes.len(), self.acts[act].returns.len());
        let handed = self.handed_on(act, f, tokens);
        let over_parts = has_object(&elem);
        let before = self.carry_in(act, &f.body, at);
        self.skips.push(false);
        self.acts[act].scopes.push(HashMap::new());
        self.bind(act, &f.pat, elem, true);
        self.block(act, &f.body);
        self.acts[act].scopes.pop();
        let causes = self.causes.len();
        self.note_recurrence(act, f, &handed, at.span);
        let recurs = self.causes.len() > causes;
        if let Some(round) = self.rounds.last_mut() {
            round.over = over.filter(|_| super::each::straight(&f.body));
        }
        let carried = self.carry_out(act, &before);
        self.keep_rows_apart(act, (first, counter), (returned, recurs), at);
        self.end_round(act, f, &carried);
        if over_parts {
            self.acts[act].loops.push(Loop {
                expr: at.expr,
                carried,
                span: at.span,
            });
        }
        Value::Unit
    }

    pub(super) fn loop_body(&mut self, act: ActId, body: &'a syn::Block, at: At) {
        let before = self.carry_in(act, body, at);
        self.block(act, body);
        self.carry_out(act, &before);
    }

    /// Gives every tensor that the body assigns to a node that stands for all rounds.
    fn carry_in(&mut self, act: ActId, body: &syn::Block, at: At) -> Vec<(String, NodeId, NodeId)> {
        let mut carried = Vec::new();
        let (mut absent, mut others) = (Vec::new(), Vec::new());
        let mut filled: Vec<super::each::Filled> = Vec::new();
        for name in number::assigned_locals(body) {
            let known = |(n, _): &(String, Value)| *n == name;
            if carried.iter().any(|(n, _, _)| *n == name) || others.iter().any(known) {
                continue;
            }
            match self.lookup(act, &name).map(|b| b.value) {
                Some(Value::Tensor(before)) => {
                    let shape = self.nodes[before].shape.clone();
                    let inputs = vec![Input {
                        node: before,
                        expr: None,
                    }];
                    let phi = self.node(Op::Phi { carried: true }, inputs, shape, at, &name);
                    self.assign(act, &name, Value::Tensor(phi));
                    carried.push((name, before, phi));
                }
                // It may stay absent, which the end of the round shows.
                Some(Value::Option(Presence::None, _)) => absent.push(name),
                Some(Value::List { elems: Some(e), .. })
                    if e.is_empty() && super::each::only_pushed(body, &name) =>
                {
                    filled.push(super::each::Filled::new(name));
                }
                Some(other) => {
                    others.push((name.clone(), other.clone()));
                    let any = self.any_round(other, &name);
                    self.assign(act, &name, any);
                }
                None => {}
            }
        }
        let names = carried.iter().map(|(name, _, phi)| (name.clone(), *phi));
        absent.retain(|name| number::reads(body, name));
        let mut round = Round::new(act, names.collect(), absent, others, at);
        round.filled = filled;
        self.rounds.push(round);
        carried
    }

    /// What a variable that a loop writes to holds in any of its rounds.
    fn any_round(&mut self, value: Value, name: &str) -> Value {
        match value {
            Value::Size(s) if !self.atoms.anchored(&s.poly) => {
                Value::Size(Size::of(self.fresh_feature(name)))
            }
            Value::Num(_) | Value::Select(..) => Value::Num(None),
            Value::Bool(_) => Value::Bool(Cond::Unknown),
            Value::Object { ty, path } => Value::Object { ty, path },
            Value::Opaque | Value::Unit | Value::Never => Value::Opaque,
            // Numbers on the host that a loop writes one by one, as masks are.
            Value::Copies(of, _) | Value::List { any: of, .. }
                if matches!(*of, Value::Num(_) | Value::Size(_)) =>
            {
                let message =
                    format!("cannot follow `{name}`, which a loop fills number by number");
                let help = "let data: Vec<_> = (0..n).flat_map(|i| (0..n).map(move |j| if j > i { f32::NEG_INFINITY } else { 0. })).collect();";
                Value::Unknown(Self::reason(message, help).into())
            }
            _ => Self::lost(&format!(
                "{name}, which changes from round to round of a loop"
            )),
        }
    }

    fn carry_out(
        &mut self,
        act: ActId,
        before: &[(String, NodeId, NodeId)],
    ) -> Vec<(String, NodeId, NodeId)> {
        self.end_rounds(act);
        let mut carried = Vec::new();
        for (name, _, phi) in before {
            let Some(Value::Tensor(after)) = self.lookup(act, name).map(|b| b.value) else {
                continue;
            };
            if after == *phi {
                continue;
            }
            self.next_round(*phi, after, name);
            carried.push((name.clone(), *phi, after));
        }
        carried
    }

    /// What a round leaves to the next comes into it.
    pub(super) fn next_round(&mut self, phi: NodeId, after: NodeId, name: &str) {
        self.nodes[phi].inputs.push(Input {
            node: after,
            expr: None,
        });
        if let (Shape::Known(x), Shape::Known(y)) = (
            self.nodes[phi].shape.clone(),
            self.nodes[after].shape.clone(),
        ) {
            let same = x.len() == y.len()
                && x.iter().zip(&y).all(|(p, q)| {
                    let (p, q) = (p.size(&self.atoms), q.size(&self.atoms));
                    self.atoms.unify(&p, &q)
                });
            if !same {
                self.nodes[phi].shape = Shape::Unknown(format!(
                    "`{name}` changes its shape from round to round of a loop"
                ));
            }
        }
    }

    /// What a loop over a value binds in each round.
    pub(super) fn element(&mut self, iter: Value) -> Value {
        match iter {
            Value::List { any, .. } | Value::Copies(any, _) => *any,
            said @ Value::Asserted(_) => said,
            Value::Option(_, inner) => *inner,
            Value::Range(..) => Value::Size(Size::of(self.fresh_feature("round"))),
            other if has_tensor(&other) || matches!(other, Value::ShapeOf(_)) => {
                Self::lost("the elements of this")
            }
            other => other
                .lost()
                .map_or(Value::Opaque, |r| Value::Unknown(r.clone())),
        }
    }
}

pub(super) fn has_tensor(value: &Value) -> bool {
    let mut tensors = Vec::new();
    value.tensors(&mut tensors);
    !tensors.is_empty()
}

pub(super) fn has_object(value: &Value) -> bool {
    match value {
        Value::Object { .. } => true,
        Value::Tuple(v) => v.iter().any(has_object),
        _ => false,
    }
}

pub(super) fn select(cond: &Cond, a: Value, b: Value) -> Value {
    Value::Select(Box::new(cond.clone()), Box::new(a), Box::new(b))
}

/// `if c { a } else { b }` for conditions.
pub(super) fn join_conditions(cond: &Cond, a: Cond, b: Cond) -> Cond {
    match (a, b) {
        (a, Cond::Known(false)) if *cond != Cond::Unknown => {
            Cond::And(Box::new(cond.clone()), Box::new(a))
        }
        (Cond::Known(true), b) if *cond != Cond::Unknown => {
            Cond::Or(Box::new(cond.clone()), Box::new(b))
        }
        _ => Cond::Unknown,
    }
}
