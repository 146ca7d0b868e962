//! `fold` and `try_fold`: a loop whose body is a closure.

use super::graph::{ActId, At, Input, Op};
use super::value::Value;
use super::{Loop, Trace};

impl<'a> Trace<'_, 'a> {
    /// The tensor that is handed from element to element; `None` where something else is, or the closure is none.
    pub(super) fn fold(
        &mut self,
        act: ActId,
        list: &Value,
        m: &'a syn::ExprMethodCall,
        at: At,
    ) -> Option<Value> {
        let (2, Some(init), Some(syn::Expr::Closure(c))) =
            (m.args.len(), m.args.first(), m.args.last())
        else {
            return None;
        };
        let Value::Tensor(before) = self.eval(act, init) else {
            return None;
        };
        let Value::Closure(closure) = self.eval(act, &m.args[1]) else {
            return None;
        };
        let name = match c.inputs.first() {
            Some(syn::Pat::Ident(i)) => Some(i.ident.to_string()),
            _ => None,
        };
        let shape = self.nodes[before].shape.clone();
        let inputs = vec![Input {
            node: before,
            expr: None,
        }];
        let variable = name.clone().unwrap_or_default();
        let phi = self.node(Op::Phi { carried: true }, inputs, shape, at, &variable);
        let element = self.element(list.clone());
        let over_parts = super::control::has_object(&element);
        let value = self.call_closure(act, &closure, vec![Value::Tensor(phi), element])?;
        let Value::Tensor(after) = value else {
            return Some(match value.lost() {
                Some(reason) => Value::Unknown(reason.clone()),
                None => Self::lost(&crate::syntax::text(m)),
            });
        };
        self.next_round(phi, after, &variable);
        if let (true, Some(name)) = (over_parts, name) {
            self.acts[act].loops.push(Loop {
                expr: closure.expr,
                carried: vec![(name, phi, after)],
                span: at.span,
            });
        }
        Some(value)
    }
}
