//! The value where two ways meet.

use super::Trace;
use super::control::{has_tensor, join_conditions, select};
use super::graph::{At, Input, NodeId, Op};
use super::shape::{Dim, Shape};
use super::value::{Cmp, Cond, Presence, Value};

impl Trace<'_, '_> {
    /// The value where two ways meet. `cond` holds on the way of `a`.
    pub(super) fn join(&mut self, a: Value, b: Value, cond: &Cond, at: At) -> Value {
        match (a, b) {
            (a, b) if a == b => a,
            (Value::Never, x) | (x, Value::Never) => x,
            (Value::Tensor(a), Value::Tensor(b)) => {
                Value::Tensor(self.join_tensors(a, b, cond, at))
            }
            (Value::Size(a), Value::Size(b)) => {
                if *cond != Cond::Unknown
                    && a.poly.as_constant().is_some()
                    && b.poly.as_constant().is_some()
                {
                    return select(cond, Value::Size(a), Value::Size(b));
                }
                if self.atoms.anchored(&a.poly) || self.atoms.anchored(&b.poly) {
                    return Self::conditional_size();
                }
                let poly = self.fresh_feature("size");
                Value::Size(a.with(&b, poly))
            }
            (Value::Num(Some(a)), Value::Num(Some(b))) => {
                if *cond == Cond::Unknown {
                    Value::Num(None)
                } else {
                    select(cond, Value::Num(Some(a)), Value::Num(Some(b)))
                }
            }
            (a @ (Value::Num(_) | Value::Select(..)), b @ (Value::Num(_) | Value::Select(..)))
                if *cond != Cond::Unknown =>
            {
                select(cond, a, b)
            }
            (Value::Num(_) | Value::Select(..), Value::Num(_) | Value::Select(..)) => {
                Value::Num(None)
            }
            (Value::Bool(a), Value::Bool(b)) => Value::Bool(join_conditions(cond, a, b)),
            (Value::Tuple(a), Value::Tuple(b)) if a.len() == b.len() => Value::Tuple(
                a.into_iter()
                    .zip(b)
                    .map(|(a, b)| self.join(a, b, cond, at))
                    .collect(),
            ),
            (Value::Option(p, a), Value::Option(q, b)) => match (p, q) {
                (Presence::None, Presence::None) => Value::Option(Presence::None, a),
                (Presence::None, _) => Value::Option(Presence::Maybe, b),
                (_, Presence::None) => Value::Option(Presence::Maybe, a),
                _ => {
                    let presence = if p == q { p } else { Presence::Maybe };
                    Value::Option(presence, Box::new(self.join(*a, *b, cond, at)))
                }
            },
            (Value::Host(a), Value::Host(b)) if a.axes.len() == b.axes.len() => {
                let among = [a.all(), b.all()].concat();
                Value::Host(std::rc::Rc::new(super::value::Host {
                    among,
                    ..(*a).clone()
                }))
            }
            (Value::Unknown(r), _) | (_, Value::Unknown(r)) => Value::Unknown(r),
            (a @ (Value::HostRows(_) | Value::Rows(_)), _)
            | (_, a @ (Value::HostRows(_) | Value::Rows(_))) => a
                .lost()
                .map_or(Value::Opaque, |r| Value::Unknown(r.clone())),
            (
                Value::List {
                    elems: Some(a),
                    any: x,
                },
                Value::List {
                    elems: Some(b),
                    any: y,
                },
            ) if a.len() == b.len() => {
                let each = a.into_iter().zip(b);
                let elems = each.map(|(a, b)| self.join(a, b, cond, at)).collect();
                let any = Box::new(self.join(*x, *y, cond, at));
                Value::List {
                    elems: Some(elems),
                    any,
                }
            }
            (a, b) if has_tensor(&a) || has_tensor(&b) => {
                Self::lost("one of two branches, which gives a tensor in the other")
            }
            (a, b) if self.sized(&a) || self.sized(&b) => Self::conditional_size(),
            _ => Value::Opaque,
        }
    }

    /// A size of the input on one way, and something else on another.
    fn conditional_size() -> Value {
        let reason = Self::reason(
            "a size depends on a condition",
            "write the two cases as two functions",
        );
        Value::Unknown(reason.into())
    }

    pub(super) fn join_tensors(&mut self, a: NodeId, b: NodeId, cond: &Cond, at: At) -> NodeId {
        // `if n == 1 { x } else { repeat(x, n) }` is the second, of which the first is the case n = 1.
        if let Some(repeated) = self.one_is_repeat(a, b, cond) {
            return repeated;
        }
        let shape = self.join_shapes(a, b);
        let inputs = vec![
            Input {
                node: a,
                expr: None,
            },
            Input {
                node: b,
                expr: None,
            },
        ];
        self.node(Op::Phi { carried: false }, inputs, shape, at, "if")
    }

    pub(super) fn one_is_repeat(&self, a: NodeId, b: NodeId, cond: &Cond) -> Option<NodeId> {
        let (factor, a, b) = match cond {
            Cond::Compare(l, Cmp::Eq, r) if r.is_one() && !self.repeats(a) => (l, a, b),
            Cond::Compare(l, Cmp::Ne | Cmp::Gt, r) if r.is_one() && !self.repeats(b) => (l, b, a),
            // Repeated in one branch and taken as it is in the other, where the heads have to be enough by themselves.
            _ => match (self.repeats(a), self.repeats(b)) {
                (true, false) => return self.repeats_heads(b, a).then_some(a),
                (false, true) => return self.repeats_heads(a, b).then_some(b),
                _ => return None,
            },
        };
        let (x, y) = (self.nodes[a].shape.known()?, self.nodes[b].shape.known()?);
        let without: Vec<Dim> = y.iter().map(Dim::unrepeated).collect();
        let repeats: Vec<_> = y.iter().flat_map(|d| &d.0).filter(|f| f.repeat).collect();
        let only = repeats.len() == 1 && self.atoms.equal(&repeats[0].size, factor);
        let base: Vec<Dim> = x.iter().map(Dim::unrepeated).collect();
        (only && base == without && self.moves_only(b, a)).then_some(b)
    }

    pub(super) fn repeats(&self, node: NodeId) -> bool {
        let dims = self.nodes[node].shape.known();
        dims.is_some_and(|dims| dims.iter().any(Dim::has_repeat))
    }

    /// Whether `to` is `from` with each head repeated: the operand of a product, whose other operand has that many heads.
    pub(super) fn repeats_heads(&self, from: NodeId, to: NodeId) -> bool {
        let (Some(x), Some(y)) = (self.nodes[from].shape.known(), self.nodes[to].shape.known())
        else {
            return false;
        };
        let without: Vec<Dim> = y.iter().map(Dim::unrepeated).collect();
        let last_two = y.len().saturating_sub(2);
        x == without
            && !y[last_two..].iter().any(Dim::has_repeat)
            && y[..last_two].iter().filter(|d| d.has_repeat()).count() == 1
            && self.moves_only(to, from)
    }

    /// Whether `to` is `from` moved about: reshaped, repeated, transposed.
    pub(super) fn moves_only(&self, mut to: NodeId, from: NodeId) -> bool {
        while to != from {
            let node = &self.nodes[to];
            let moves = node
                .row()
                .is_some_and(|r| r.place == crate::ops::PlaceRule::Move);
            match node.inputs.first() {
                Some(input) if moves => to = input.node,
                _ => return false,
            }
        }
        true
    }

    pub(super) fn join_shapes(&mut self, a: NodeId, b: NodeId) -> Shape {
        // An input that nobody has read the sizes of is like what stands for it where it is not given.
        for (x, y) in [(a, b), (b, a)] {
            if let Some(rank) = self.nodes[y].shape.known().map(<[Dim]>::len) {
                self.assume_rank(x, rank);
            }
        }
        match (self.nodes[a].shape.clone(), self.nodes[b].shape.clone()) {
            (Shape::Known(x), Shape::Known(y)) if x.len() == y.len() => {
                let same = x.iter().zip(&y).all(|(p, q)| {
                    let (p, q) = (p.size(&self.atoms), q.size(&self.atoms));
                    self.atoms.unify(&p, &q)
                });
                if same {
                    Shape::Known(x)
                } else {
                    Shape::Either(vec![x, y])
                }
            }
            (Shape::Known(x), Shape::Known(y)) => Shape::Either(vec![x, y]),
            (Shape::Either(mut all), Shape::Known(x))
            | (Shape::Known(x), Shape::Either(mut all)) => {
                if !all.contains(&x) {
                    all.push(x);
                }
                Shape::Either(all)
            }
            (Shape::Partial(_), Shape::Known(x)) | (Shape::Known(x), Shape::Partial(_)) => {
                Shape::Known(x)
            }
            (Shape::Unknown(r), _) | (_, Shape::Unknown(r)) => Shape::Unknown(r),
            (x, _) => x,
        }
    }
}
