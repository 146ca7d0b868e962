//! Iterator adapters and methods of `Option` that take a closure; host arrays built from ranges.

use std::rc::Rc;

use super::graph::{ActId, At};
use super::value::{Axis, Closure, Cond, Host, Presence, Size, Value};
use super::{Role, Trace};

impl<'a> Trace<'_, 'a> {
    /// The closure that a method call has as its first argument.
    fn closure(&mut self, act: ActId, m: &'a syn::ExprMethodCall) -> Option<Closure> {
        let e = m
            .args
            .first()
            .filter(|e| matches!(e, syn::Expr::Closure(_)))?;
        if let Value::Closure(c) = self.eval(act, e) {
            Some(c)
        } else {
            None
        }
    }

    /// Methods that take a closure or a second list: iterator adapters and those of `Option`.
    pub(super) fn adapter(
        &mut self,
        act: ActId,
        receiver: &Value,
        name: &str,
        m: &'a syn::ExprMethodCall,
        at: At,
    ) -> Option<Value> {
        match (receiver, name) {
            (Value::Range(start, end, end_expr), "map" | "flat_map")
                if start.poly.as_constant() == Some(0) =>
            {
                let closure = self.closure(act, m)?;
                let index = self.fresh_feature("index");
                let atom = index.as_atom()?;
                let end = (**end).clone();
                let use_at = At {
                    expr: *end_expr,
                    ..at
                };
                self.use_size(use_at, &end, Role::Valid);
                let elem = self.call_closure(act, &closure, vec![Value::Size(Size::of(index))])?;
                let axis = Axis {
                    index: atom,
                    end,
                    end_expr: *end_expr,
                    closure: closure.expr,
                };
                Some(match elem {
                    Value::Host(inner) => {
                        let axes = std::iter::once(axis)
                            .chain(inner.axes.iter().cloned())
                            .collect();
                        Value::Host(Rc::new(Host {
                            axes,
                            elem: inner.elem.clone(),
                            expr: Some(at.expr),
                            among: Vec::new(),
                        }))
                    }
                    Value::Num(_)
                    | Value::Select(..)
                    | Value::Size(_)
                    | Value::Bool(_)
                    | Value::Opaque => Value::Host(Rc::new(Host {
                        axes: vec![axis],
                        elem,
                        expr: Some(at.expr),
                        among: Vec::new(),
                    })),
                    other => Value::List {
                        elems: None,
                        any: Box::new(other),
                    },
                })
            }
            (
                Value::Host(host),
                "collect" | "into_iter" | "flatten" | "as_slice" | "iter" | "concat",
            ) => {
                let host = Host {
                    expr: Some(at.expr),
                    ..(**host).clone()
                };
                Some(Value::Host(Rc::new(host)))
            }
            _ => self.list_adapter(act, receiver, name, m, at),
        }
    }

    /// A field of a type that is not among the annotated items.
    pub(super) fn outside(ty: &str, name: &str) -> Value {
        Value::Unknown(
            super::graph::Reason {
                code: autosp_plan::codes::ITEM,
                message: format!("the field `{name}` of `{ty}` is declared outside of the annotated item"),
                help: format!("put `{ty}` and its `impl`s into `mod model {{ .. }}` and the attribute on the module"),
                span: None,
            }
            .into(),
        )
    }

    /// Adapters of lists, and `map` and its like of `Option`.
    fn list_adapter(
        &mut self,
        act: ActId,
        receiver: &Value,
        name: &str,
        m: &'a syn::ExprMethodCall,
        at: At,
    ) -> Option<Value> {
        match (receiver, name) {
            (Value::List { any, .. }, "enumerate") => {
                let round = self.fresh_feature("round");
                Some(Value::List {
                    elems: None,
                    any: Box::new(Value::Tuple(vec![
                        Value::Size(Size::of(round)),
                        (**any).clone(),
                    ])),
                })
            }
            (Value::List { any, .. }, "zip") => {
                let other = m.args.first().map_or(Value::Opaque, |e| self.eval(act, e));
                let other = self.element(other);
                Some(Value::List {
                    elems: None,
                    any: Box::new(Value::Tuple(vec![(**any).clone(), other])),
                })
            }
            (Value::List { .. } | Value::Range(..), "fold" | "try_fold") => {
                self.fold(act, receiver, m, at)
            }
            (Value::List { any, .. }, "map" | "flat_map" | "filter_map") => {
                let closure = self.closure(act, m)?;
                let value = self.call_closure(act, &closure, vec![(**any).clone()])?;
                Some(Value::List {
                    elems: None,
                    any: Box::new(value),
                })
            }
            (
                Value::List { .. },
                "rev" | "skip" | "take" | "iter" | "iter_mut" | "into_iter" | "collect"
                | "as_slice",
            ) => Some(receiver.clone()),
            (Value::Option(presence, inner), "map" | "and_then") => {
                if *presence == Presence::None {
                    return Some(receiver.clone());
                }
                let closure = self.closure(act, m)?;
                let value = self.call_closure(act, &closure, vec![(**inner).clone()])?;
                Some(match value {
                    value @ Value::Option(..) if name == "and_then" => value,
                    value => Value::Option(*presence, Box::new(value)),
                })
            }
            (Value::Option(presence, inner), "unwrap_or" | "unwrap_or_else") => {
                let other = match self.closure(act, m) {
                    Some(c) => self
                        .call_closure(act, &c, Vec::new())
                        .unwrap_or(Value::Opaque),
                    None => m.args.first().map_or(Value::Opaque, |e| self.eval(act, e)),
                };
                // One of two numbers, of which the second is a length: a number of the whole sequence.
                if let (Presence::Maybe, Value::Size(s), Value::Size(_), Some(e)) =
                    (presence, &other, &**inner, m.args.first())
                    && self.atoms.anchored(&s.poly)
                    && !matches!(e, syn::Expr::Closure(_))
                {
                    let at = self.at(act, e);
                    self.use_size(at, &s.clone(), Role::Valid);
                    return Some(Value::Size(Size::of(self.fresh_feature(name))));
                }
                Some(match presence {
                    Presence::None => other,
                    Presence::Some => (**inner).clone(),
                    Presence::Maybe => self.join((**inner).clone(), other, &Cond::Unknown, at),
                })
            }
            _ => None,
        }
    }
}
