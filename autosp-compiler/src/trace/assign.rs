//! Assignments to variables, fields and elements of lists.

use super::graph::{ActId, At};
use super::value::Value;
use super::{Fact, Trace, writes};
use crate::syntax::{number, text};

impl<'a> Trace<'_, 'a> {
    pub(super) fn assignment(&mut self, act: ActId, a: &'a syn::ExprAssign, at: At) -> Value {
        let value = self.eval(act, &a.right);
        self.assign_to(act, &a.left, value, at);
        Value::Unit
    }

    fn assign_to(&mut self, act: ActId, left: &'a syn::Expr, value: Value, at: At) {
        if let syn::Expr::Path(p) = left
            && let Some(ident) = p.path.get_ident()
        {
            self.assign(act, &ident.to_string(), value);
            return;
        }
        if let syn::Expr::Index(i) = left
            && let syn::Expr::Path(p) = &*i.expr
            && let Some(ident) = p.path.get_ident()
        {
            self.assign_element(act, &ident.to_string(), &i.index, value);
            return;
        }
        match left {
            syn::Expr::Paren(p) => return self.assign_to(act, &p.expr, value, at),
            syn::Expr::Infer(_) => return,
            // `(a, b) = (b, a)`
            syn::Expr::Tuple(t) => {
                let values = match value {
                    Value::Tuple(values) if values.len() == t.elems.len() => values,
                    other => {
                        let lost = other.lost().cloned();
                        let lost = lost.map_or_else(|| Self::lost(&text(left)), Value::Unknown);
                        vec![lost; t.elems.len()]
                    }
                };
                for (left, value) in t.elems.iter().zip(values) {
                    self.assign_to(act, left, value, at);
                }
                return;
            }
            syn::Expr::Array(_) | syn::Expr::Call(_) | syn::Expr::Struct(_) => {
                let mut names = Vec::new();
                writes::targets(left, &mut names);
                for name in names {
                    self.assign(act, &name, Self::lost(&text(left)));
                }
                return;
            }
            syn::Expr::Unary(_) => return self.assign_through(act, left, value),
            _ => {}
        }
        self.lose_place(act, left, &text(left));
        // What a field holds is not followed: nobody knows later that it is a rank's own length.
        let mut sizes = Vec::new();
        value.sizes(&mut sizes);
        for size in sizes {
            self.use_size(at, size, super::Role::Unclassified(text(left)));
        }
        if let Some(field) = number::place_field(left) {
            let mut tensors = Vec::new();
            value.tensors(&mut tensors);
            if self.written.contains(&field)
                && (!tensors.is_empty() || matches!(value, Value::Option(..)))
            {
                self.acts[act].facts.push((at.expr, Fact::Write));
            }
        }
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
