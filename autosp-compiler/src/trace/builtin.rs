//! Methods of numbers, lists, ranges and options, the sizes of tensors, and host arrays built from ranges.

use std::rc::Rc;

use super::call::Arg;
use super::graph::{ActId, At, NodeId};
use super::shape::{Dim, Shape};
use super::size::Poly;
use super::value::{Cond, Presence, Size, Value};
use super::{Role, Trace};
use crate::syntax::number::{WRITERS, place_field};

impl<'a> Trace<'_, 'a> {
    /// Other methods of values that are no tensors and no objects.
    pub(super) fn builtin(
        &mut self,
        act: ActId,
        receiver: Value,
        name: &str,
        args: Vec<Arg<'a>>,
        m: &'a syn::ExprMethodCall,
        at: At,
    ) -> Value {
        if let Some(value) = Self::presence(&receiver, name) {
            return value;
        }
        match (&receiver, name) {
            (Value::EmptyStore, "get" | "get_mut" | "remove") => {
                Value::Option(Presence::None, Box::new(Value::Opaque))
            }
            (Value::EmptyStore, "contains_key" | "contains") => Value::Bool(Cond::Known(false)),
            (Value::EmptyStore, "is_empty") => Value::Bool(Cond::Known(true)),
            (Value::EmptyStore | Value::Option(Presence::None, _), _)
                if WRITERS.contains(&name) && place_field(&m.receiver).is_some() =>
            {
                self.acts[act].facts.push((at.expr, super::Fact::Write));
                if name == "take" {
                    receiver
                } else {
                    Value::Unit
                }
            }
            // A list whose elements are known one by one, in a variable of this function.
            (
                Value::List {
                    elems: Some(elems), ..
                },
                "push" | "pop",
            ) if matches!(&*m.receiver, syn::Expr::Path(p) if p.path.get_ident().is_some()) => {
                let elems = elems.clone();
                self.list_step(act, elems, name, args, m, at)
            }
            // An option or a list in a variable of this function.
            (Value::Option(..) | Value::List { .. }, _) if WRITERS.contains(&name) => {
                if let syn::Expr::Path(p) = &*m.receiver
                    && let Some(ident) = p.path.get_ident()
                {
                    self.assign(act, &ident.to_string(), Self::lost(&crate::syntax::text(m)));
                }
                if name == "take" {
                    receiver
                } else {
                    Value::Unit
                }
            }
            (
                Value::Option(presence, inner),
                "as_ref" | "as_mut" | "clone" | "cloned" | "copied" | "as_deref",
            ) => Value::Option(*presence, inner.clone()),
            (Value::Option(Presence::None, _), "unwrap" | "expect") => Value::Never,
            (Value::Option(_, inner), "unwrap" | "expect" | "context" | "ok_or" | "ok_or_else") => {
                (**inner).clone()
            }
            (
                Value::List {
                    elems: Some(elems), ..
                },
                "len",
            ) => Value::Size(Size::constant(elems.len() as i64)),
            (Value::List { .. }, "len") => Value::Size(Size::of(self.fresh_feature("len"))),
            (Value::List { any, .. }, "first" | "last" | "get" | "next") => {
                Value::Option(Presence::Some, any.clone())
            }
            (
                Value::Size(_),
                "max" | "min" | "pow" | "div_ceil" | "saturating_sub" | "next_multiple_of"
                | "abs_diff",
            ) => self.size_method(act, &receiver, m),
            (
                Value::Size(_) | Value::Num(_),
                "sqrt" | "powf" | "powi" | "recip" | "exp" | "ln" | "log2" | "floor" | "ceil",
            ) => match (&receiver, name) {
                (Value::Num(Some(v)), "sqrt") => Value::Num(Some(v.sqrt())),
                _ => Value::Num(None),
            },
            (Value::Bool(c), "then" | "then_some") => {
                let inner = args.into_iter().next().map_or(Value::Opaque, |a| a.0);
                let presence = match c {
                    Cond::Known(true) => Presence::Some,
                    Cond::Known(false) => Presence::None,
                    _ => Presence::Maybe,
                };
                let inner = match inner {
                    Value::Closure(c) => self
                        .call_closure(act, &c, Vec::new())
                        .unwrap_or(Value::Opaque),
                    other => other,
                };
                Value::Option(presence, Box::new(inner))
            }
            _ if Self::is_transparent(name) => receiver,
            _ => {
                let mut all: Vec<Arg<'a>> = vec![(receiver, Some(&*m.receiver))];
                all.extend(args);
                let value = self.unknown_call(&crate::syntax::text(m), &all, at);
                // A list that is filled step by step is lost as a whole.
                if let (true, Value::Tensor(_), syn::Expr::Path(p)) =
                    (WRITERS.contains(&name), &value, &*m.receiver)
                    && let Some(ident) = p.path.get_ident()
                {
                    self.assign(act, &ident.to_string(), Self::lost(&crate::syntax::text(m)));
                    return Value::Unit;
                }
                value
            }
        }
    }

    /// `push` and `pop` of a list in a variable, whose elements are known one by one.
    fn list_step(
        &mut self,
        act: ActId,
        mut elems: Vec<Value>,
        name: &str,
        args: Vec<Arg<'a>>,
        m: &'a syn::ExprMethodCall,
        at: At,
    ) -> Value {
        let out = if name == "push" {
            elems.extend(args.into_iter().map(|a| a.0));
            Value::Unit
        } else {
            match elems.pop() {
                Some(last) => Value::Option(Presence::Some, Box::new(last)),
                None => Value::Option(Presence::None, Box::new(Value::Opaque)),
            }
        };
        let mut any: Option<Value> = None;
        for v in &elems {
            any = Some(match any {
                Some(any) => self.join(any, v.clone(), &Cond::Unknown, at),
                None => v.clone(),
            });
        }
        if let syn::Expr::Path(p) = &*m.receiver
            && let Some(ident) = p.path.get_ident()
        {
            let any = Box::new(any.unwrap_or(Value::Opaque));
            let elems = Some(elems);
            self.assign(act, &ident.to_string(), Value::List { elems, any });
        }
        out
    }

    /// Integer methods other than the four operations: the result has no name, so the operands must be valid sizes.
    fn size_method(&mut self, act: ActId, receiver: &Value, m: &'a syn::ExprMethodCall) -> Value {
        let all: Vec<&'a syn::Expr> = std::iter::once(&*m.receiver).chain(m.args.iter()).collect();
        for (i, e) in all.into_iter().enumerate() {
            let value = if i == 0 {
                receiver.clone()
            } else {
                self.acts[act]
                    .values
                    .get(&self.at(act, e).expr)
                    .cloned()
                    .unwrap_or(Value::Opaque)
            };
            if let Value::Size(s) = value {
                let at = self.at(act, e);
                self.use_size(at, &s, Role::Valid);
            }
        }
        Value::Size(Size::of(self.fresh_feature("size")))
    }

    /// Reads of a tensor's sizes, and methods that give the tensor itself.
    pub(super) fn tensor_builtin(
        &mut self,
        receiver: &Value,
        name: &str,
        args: &[Arg<'a>],
        at: At,
    ) -> Option<Value> {
        let node = receiver.tensor()?;
        let dims = |rank: usize| Some((0..rank as i64).collect::<Vec<_>>());
        let ranks = match name {
            "dims0" => dims(0),
            "dims1" => dims(1),
            "dims2" => dims(2),
            "dims3" => dims(3),
            "dims4" => dims(4),
            "dims5" => dims(5),
            _ => None,
        };
        if let Some(ranks) = ranks {
            let rank = ranks.len();
            let mut sizes: Vec<Value> = ranks
                .into_iter()
                .map(|d| self.dim_with_rank(node, d, rank, at))
                .collect();
            return Some(if rank == 1 {
                sizes.remove(0)
            } else {
                Value::Tuple(sizes)
            });
        }
        match name {
            "dim" => {
                let d = args.first().and_then(|a| dim_argument(&a.0));
                Some(d.map_or(Value::Opaque, |d| self.dim_of(node, d, at)))
            }
            "to_vec" if matches!(receiver, Value::ShapeOf(_)) => {
                let rank = self.nodes[node].shape.known().map(<[Dim]>::len);
                let Some(rank) = rank else {
                    return Some(receiver.clone());
                };
                let elems: Vec<Value> = (0..rank as i64)
                    .map(|d| self.dim_with_rank(node, d, rank, at))
                    .collect();
                let any = Box::new(elems.first().cloned().unwrap_or(Value::Opaque));
                Some(Value::List {
                    elems: Some(elems),
                    any,
                })
            }
            "dims" | "shape" => Some(Value::ShapeOf(node)),
            "rank" | "len" => Some(match self.nodes[node].shape.known() {
                Some(dims) => Value::Size(Size::constant(dims.len() as i64)),
                None => Value::Opaque,
            }),
            "first" | "last" if matches!(receiver, Value::ShapeOf(_)) => {
                let d = if name == "first" { 0 } else { -1 };
                let dim = self.dim_of(node, d, at);
                Some(Value::Option(Presence::Some, Box::new(dim)))
            }
            "elem_count" | "product" => Some(match self.nodes[node].shape.known() {
                Some(dims) => {
                    let poly = dims.to_vec().iter().fold(Poly::one(), |acc, d| {
                        self.atoms.mul(&acc, &d.size(&self.atoms))
                    });
                    self.nodes[node].sizes_read = true;
                    Value::Size(Size {
                        poly,
                        origins: Rc::from([node]),
                    })
                }
                None => Value::Opaque,
            }),
            "dtype" | "device" | "layout" | "id" | "is_contiguous" | "stride" | "as_tensor"
                if name != "as_tensor" =>
            {
                Some(Value::Opaque)
            }
            "as_tensor" => Some(Value::Tensor(node)),
            "clone" | "as_ref" | "to_owned" | "into" | "borrow" | "unwrap" | "to_vec" | "iter" => {
                Some(receiver.clone())
            }
            _ => None,
        }
    }

    /// Size `d` (negative from the end) of a tensor.
    pub(super) fn dim_of(&mut self, node: NodeId, d: i64, at: At) -> Value {
        match &self.nodes[node].shape {
            Shape::Known(dims) => {
                let rank = dims.len();
                let d = if d < 0 { d + rank as i64 } else { d };
                self.dim_with_rank(node, d, rank, at)
            }
            Shape::Partial(known) if d >= 0 && known.iter().any(|(k, _)| *k as i64 == d) => {
                let poly = known
                    .iter()
                    .find(|(k, _)| *k as i64 == d)
                    .map_or(Poly::one(), |(_, dim)| dim.size(&self.atoms));
                self.nodes[node].sizes_read = true;
                Value::Size(Size {
                    poly,
                    origins: Rc::from([node]),
                })
            }
            _ => {
                let input = self.unread_input(node).map(|(_, name)| name.to_string());
                let poly = if let Some(input) = input {
                    let poly = self.atoms.dim(&input, d);
                    self.note_dim(node, d, &poly);
                    poly
                } else {
                    let text = self.nodes[node].text.clone();
                    self.feature(format!("{text}.dim({d})"))
                };
                Value::Size(Size {
                    poly,
                    origins: Rc::from([node]),
                })
            }
        }
    }

    /// Remembers a dimension, counted from the left, of an input whose rank is not known, and of what was made of it.
    fn note_dim(&mut self, mut node: NodeId, d: i64, poly: &Poly) {
        let Ok(d) = usize::try_from(d) else { return };
        loop {
            self.nodes[node].sizes_read = true;
            if let Shape::Partial(known) = &mut self.nodes[node].shape
                && known.iter().all(|(k, _)| *k != d)
            {
                known.push((d, Dim::of(poly.clone())));
            }
            match (&self.nodes[node].op, self.nodes[node].inputs.first()) {
                (super::graph::Op::Row(_), Some(input)) => node = input.node,
                _ => return,
            }
        }
    }

    pub(super) fn dim_with_rank(&mut self, node: NodeId, d: i64, rank: usize, _at: At) -> Value {
        self.nodes[node].sizes_read = true;
        let dims: Option<Vec<Dim>> = self.with_rank(node, rank);
        if let Some(dim) = dims
            .as_ref()
            .and_then(|dims| dims.get(usize::try_from(d).ok()?))
        {
            Value::Size(Size {
                poly: dim.size(&self.atoms),
                origins: Rc::from([node]),
            })
        } else {
            let text = self.nodes[node].text.clone();
            Value::Size(Size {
                poly: self.feature(format!("{text}.dim({d})#{rank}")),
                origins: Rc::from([node]),
            })
        }
    }
}

/// A dimension given as an argument: a literal, or `D::Minus1`.
pub(super) fn dim_argument(value: &Value) -> Option<i64> {
    match value {
        Value::FromEnd(d) => Some(*d),
        Value::Size(s) => s.poly.as_constant(),
        _ => None,
    }
}
