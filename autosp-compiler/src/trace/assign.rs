//! Assignments to variables, fields and elements of lists.

use super::graph::{ActId, At};
use super::value::Value;
use super::{Fact, Trace};
use crate::syntax::number;

impl<'a> Trace<'_, 'a> {
    pub(super) fn assignment(&mut self, act: ActId, a: &'a syn::ExprAssign, at: At) -> Value {
        let value = self.eval(act, &a.right);
        if let syn::Expr::Path(p) = &*a.left
            && let Some(ident) = p.path.get_ident()
        {
            self.assign(act, &ident.to_string(), value);
            return Value::Unit;
        }
        if let syn::Expr::Index(i) = &*a.left
            && let syn::Expr::Path(p) = &*i.expr
            && let Some(ident) = p.path.get_ident()
        {
            self.assign_element(act, &ident.to_string(), &i.index, value);
            return Value::Unit;
        }
        if let Some(field) = number::place_field(&a.left) {
            let mut tensors = Vec::new();
            value.tensors(&mut tensors);
            if self.written.contains(&field)
                && (!tensors.is_empty() || matches!(value, Value::Option(..)))
            {
                self.acts[act].facts.push((at.expr, Fact::Write));
            }
        }
        Value::Unit
    }

    /// `list[2] = value`: a list whose elements are known one by one keeps the others, any other is lost.
    pub(super) fn assign_element(
        &mut self,
        act: ActId,
        name: &str,
        index: &'a syn::Expr,
        value: Value,
    ) {
        let index = self.eval(act, index);
        let index = index.size().and_then(|s| s.poly.as_constant());
        let known = self.lookup(act, name).map(|b| b.value);
        let changed = match (known, index.and_then(|i| usize::try_from(i).ok())) {
            (
                Some(Value::List {
                    elems: Some(mut elems),
                    any,
                }),
                Some(index),
            ) if index < elems.len() => {
                elems[index] = value;
                Value::List {
                    elems: Some(elems),
                    any,
                }
            }
            _ => Self::lost(&format!("an element of `{name}`")),
        };
        self.assign(act, name, changed);
    }
}
