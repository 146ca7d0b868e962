//! Branches that cannot be sharded and that a model's configuration decides: they are left untaken, and are an error if a run
//! takes them after all.

use super::graph::{ActId, At, NodeId, Op};
use super::value::{Cond, Value};
use super::{Fact, Trace};

/// One alternative of an `if` (0 and 1) or of a `match`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Branch {
    pub(crate) function: usize,
    pub(crate) expr: u32,
    pub(crate) arm: usize,
}

impl<'a> Trace<'_, 'a> {
    /// Evaluates one alternative, or leaves it untaken. `open` says that it may be.
    pub(super) fn alternative(
        &mut self,
        act: ActId,
        at: At,
        arm: usize,
        open: bool,
        f: impl FnOnce(&mut Self) -> Value,
    ) -> Value {
        if !open {
            return f(self);
        }
        let branch = Branch {
            function: self.acts[act].function,
            expr: at.expr,
            arm,
        };
        if let Some((_, why)) = self.untaken.iter().find(|(b, _)| *b == branch) {
            let fact = Fact::Untaken(arm, why.clone());
            self.acts[act].facts.push((at.expr, fact));
            return Value::Never;
        }
        self.branches.push(branch);
        let value = f(self);
        self.branches.pop();
        value
    }

    /// Of two alternatives of which one could not be followed, that one is left untaken.
    pub(super) fn leave_lost(&mut self, act: ActId, at: At, arms: [(usize, &mut Value); 2]) {
        let [(i, a), (j, b)] = arms;
        let (arm, lost, other) = match (a.lost().is_some(), b.lost().is_some()) {
            (true, false) => (i, a, b),
            (false, true) => (j, b, a),
            _ => return,
        };
        if *other == Value::Never {
            return;
        }
        if let Some(reason) = lost.lost() {
            let fact = Fact::Untaken(arm, reason.message.clone());
            self.acts[act].facts.push((at.expr, fact));
        }
        *lost = Value::Never;
    }

    /// Whether what an `if` or `match` asks is settled by the configuration, and its function can return an error.
    pub(super) fn may_leave(&self, act: ActId) -> bool {
        self.may_fail(self.acts[act].function) && self.closures == 0
    }

    /// Whether a tensor is made of what callers give and of constants alone, through no weight: it needs no gradient.
    pub(crate) fn data_only(&self, node: NodeId) -> bool {
        let mut stack = vec![node];
        let mut seen = std::collections::HashSet::new();
        while let Some(n) = stack.pop() {
            if !seen.insert(n) {
                continue;
            }
            let node = &self.nodes[n];
            let fine = match &node.op {
                Op::Param(_) | Op::Mask(_) | Op::Phi { .. } | Op::Pick { .. } | Op::Each { .. } => {
                    true
                }
                Op::Row(row) => {
                    row.path.starts_with("candle_core::Tensor::")
                        || row.path.starts_with("candle_nn::ops::")
                }
                Op::Field | Op::Unknown(_) | Op::Rows { .. } => false,
            };
            if !fine {
                return false;
            }
            stack.extend(node.inputs.iter().map(|i| i.node));
        }
        true
    }

    /// Whether a function returns a `Result`.
    pub(crate) fn may_fail(&self, function: usize) -> bool {
        match &self.scope.functions[function].sig.output {
            syn::ReturnType::Type(_, ty) => match &**ty {
                syn::Type::Path(p) => p.path.segments.last().is_some_and(|s| s.ident == "Result"),
                _ => false,
            },
            syn::ReturnType::Default => false,
        }
    }

    /// Whether a condition is one of the configuration: no size of the input is part of it.
    pub(super) fn settled(&self, act: ActId, e: &'a syn::Expr, cond: &Cond) -> bool {
        match e {
            syn::Expr::Let(l) => {
                let id = self.at(act, &l.expr).expr;
                self.acts[act]
                    .values
                    .get(&id)
                    .is_none_or(|v| self.settled_value(v))
            }
            syn::Expr::Paren(p) => self.settled(act, &p.expr, cond),
            syn::Expr::Binary(b) if matches!(b.op, syn::BinOp::And(_)) => {
                self.settled(act, &b.left, cond) && self.settled(act, &b.right, cond)
            }
            _ => self.free_of_input(cond),
        }
    }

    fn free_of_input(&self, cond: &Cond) -> bool {
        match cond {
            Cond::Compare(l, _, r) => !self.atoms.anchored(l) && !self.atoms.anchored(r),
            Cond::And(a, b) | Cond::Or(a, b) => self.free_of_input(a) && self.free_of_input(b),
            Cond::Not(c) => self.free_of_input(c),
            Cond::Known(_) | Cond::Unknown => true,
        }
    }

    /// Whether what a pattern is held against comes from a field or a parameter as it is.
    pub(super) fn settled_value(&self, value: &Value) -> bool {
        let mut tensors = Vec::new();
        value.tensors(&mut tensors);
        let given = |n: &usize| matches!(self.nodes[*n].op, Op::Field | Op::Param(_));
        let size = matches!(value, Value::Size(s) if self.atoms.anchored(&s.poly));
        !size && value.lost().is_none() && tensors.iter().all(given)
    }
}
