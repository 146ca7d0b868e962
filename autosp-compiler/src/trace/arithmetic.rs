//! Operators on tensors, sizes and numbers.

use super::graph::{ActId, At};
use super::size::Poly;
use super::value::{Cmp, Cond, Value};
use super::{Role, Trace};
use crate::syntax::text;

impl<'a> Trace<'_, 'a> {
    pub(super) fn arithmetic(
        &mut self,
        act: ActId,
        b: &'a syn::ExprBinary,
        left: Value,
        right: Value,
        at: At,
    ) -> Value {
        use syn::BinOp::{
            Add, AddAssign, Div, DivAssign, Eq, Ge, Gt, Le, Lt, Mul, MulAssign, Ne, Rem, Sub,
            SubAssign,
        };
        if let Some(r) = left.lost().or(right.lost()) {
            return Value::Unknown(r.clone());
        }
        if left.tensor().is_some() || matches!(right, Value::Tensor(_)) {
            let name = match b.op {
                Add(_) | AddAssign(_) => "add",
                Sub(_) | SubAssign(_) => "sub",
                Mul(_) | MulAssign(_) => "mul",
                Div(_) | DivAssign(_) => "div",
                // Comparing shapes
                _ => return Value::Bool(Cond::Unknown),
            };
            if let Value::Size(s) = &right {
                let at = self.at(act, &b.right);
                self.use_size(at, s, Role::Valid);
            }
            return self.operator(
                name,
                &[(left, Some(&b.left)), (right, Some(&b.right))],
                at,
                &text(b),
            );
        }
        let compare = match b.op {
            Eq(_) => Some(Cmp::Eq),
            Ne(_) => Some(Cmp::Ne),
            Lt(_) => Some(Cmp::Lt),
            Le(_) => Some(Cmp::Le),
            Gt(_) => Some(Cmp::Gt),
            Ge(_) => Some(Cmp::Ge),
            _ => None,
        };
        if let Some(cmp) = compare {
            for (e, value) in [(&b.left, &left), (&b.right, &right)] {
                if let Value::Size(size) = value {
                    let at = self.at(act, e);
                    self.use_size(at, size, Role::Valid);
                }
            }
            let (Value::Size(l), Value::Size(r)) = (&left, &right) else {
                return Value::Bool(Cond::Unknown);
            };
            return Value::Bool(self.compare(&l.poly, cmp, &r.poly));
        }
        match (left, right) {
            (Value::Size(l), Value::Size(r)) => {
                let poly = match b.op {
                    Add(_) | AddAssign(_) => l.poly.add(&r.poly),
                    Sub(_) | SubAssign(_) => l.poly.sub(&r.poly),
                    Mul(_) | MulAssign(_) => self.atoms.mul(&l.poly, &r.poly),
                    Div(_) | DivAssign(_) => self.atoms.div(&l.poly, &r.poly),
                    Rem(_) if self.atoms.anchored(&l.poly) || self.atoms.anchored(&r.poly) => {
                        self.use_size(at, &l, Role::Unclassified(text(b)));
                        self.fresh_feature("remainder")
                    }
                    _ => self.fresh_feature("size"),
                };
                if poly.is_large() {
                    return Self::lost(&text(b));
                }
                Value::Size(l.with(&r, poly))
            }
            (Value::Num(l), Value::Num(r)) => Value::Num(l.zip(r).and_then(|(l, r)| match b.op {
                Add(_) => Some(l + r),
                Sub(_) => Some(l - r),
                Mul(_) => Some(l * r),
                Div(_) => Some(l / r),
                _ => None,
            })),
            (Value::Num(_), _) | (_, Value::Num(_)) => Value::Num(None),
            (Value::Size(size), _) | (_, Value::Size(size)) => {
                self.use_size(at, &size, Role::Unclassified(text(b)));
                Value::Opaque
            }
            _ => Value::Opaque,
        }
    }

    fn compare(&mut self, l: &Poly, cmp: Cmp, r: &Poly) -> Cond {
        let (mut l, mut r) = (self.atoms.normal(l), self.atoms.normal(r));
        // An offset into a cache that is held against nothing: zero while training, which the twin checks.
        let zero = Poly::default();
        if r == zero && self.atoms.without_offsets(&l, &mut Vec::new()) == zero {
            l = self.atoms.without_offsets(&l, &mut self.offsets);
        } else if l == zero && self.atoms.without_offsets(&r, &mut Vec::new()) == zero {
            r = self.atoms.without_offsets(&r, &mut self.offsets);
        }
        // What one element of a list says of itself, another need not say.
        let element = |a: &super::size::AtomId| self.atoms.show(&Poly::atom(*a)).contains("[_]");
        let of_elements = l.atoms().any(|a| r.contains(a) && element(&a));
        if let Some(d) = l.sub(&r).as_constant().filter(|_| !of_elements) {
            return Cond::Known(match cmp {
                Cmp::Lt => d < 0,
                Cmp::Le => d <= 0,
                Cmp::Gt => d > 0,
                Cmp::Ge => d >= 0,
                Cmp::Eq => d == 0,
                Cmp::Ne => d != 0,
            });
        }
        Cond::Compare(l, cmp, r)
    }
}
