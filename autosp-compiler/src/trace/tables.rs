//! Shapes of tensors that are made from data, and of tables of which only some sizes are known.

use super::apply::Given;
use super::call::Arg;
use super::graph::{At, NodeId};
use super::shape::{Dim, Shape, Target};
use super::size::Poly;
use super::value::{Size, Value};
use super::{Role, Trace};

impl<'a> Trace<'_, 'a> {
    /// `Tensor::new(data, device)`: a number is a scalar, a list or range has its length.
    pub(super) fn data_shape(&mut self, args: &[Arg<'a>], at: At) -> Shape {
        match args.first().map(|a| a.0.clone()) {
            Some(Value::Size(_) | Value::Num(_) | Value::Select(..) | Value::Bool(_)) => {
                Shape::Known(Vec::new())
            }
            Some(Value::Range(start, end, end_expr)) => {
                let end_at = At {
                    expr: end_expr,
                    ..at
                };
                self.use_size(end_at, &end, Role::Valid);
                let len = self.dimension(&end.with(&start, end.poly.sub(&start.poly)));
                Shape::Known(vec![Dim::of(len)])
            }
            Some(Value::Host(host)) => {
                let axes = host.axes.iter().map(|axis| axis.end.clone());
                let sizes: Vec<Size> = axes.collect();
                let dims = sizes.iter().map(|size| Dim::of(self.dimension(size)));
                let dims: Vec<Dim> = dims.collect();
                // A list of lists is as many dimensions; a flat one is their product.
                if dims.len() == 1 {
                    Shape::Known(dims)
                } else {
                    Shape::Partial(Vec::new())
                }
            }
            Some(Value::List {
                elems: Some(elems), ..
            }) if elems
                .iter()
                .all(|e| matches!(e, Value::Size(_) | Value::Num(_))) =>
            {
                for (i, elem) in elems.iter().enumerate() {
                    let expr = args[0].1.map(super::apply::list_elements);
                    let at = expr.and_then(|e| e.get(i).map(|e| self.at(at.act, e)));
                    if let (Value::Size(size), Some(at)) = (elem, at) {
                        self.use_size(at, size, Role::Valid);
                    }
                }
                Shape::Known(vec![Dim::of(Poly::constant(elems.len() as i64))])
            }
            _ => Shape::Partial(Vec::new()),
        }
    }

    /// `Tensor::full(number, sizes, device)`. A number that is a length is one of the whole sequence.
    pub(super) fn filled_with(&mut self, node: NodeId, args: &[Arg<'a>], at: At) -> Shape {
        if let Some((Value::Size(number), Some(e))) = args.first() {
            let at = self.at(at.act, e);
            self.use_size(at, &number.clone(), Role::Valid);
        }
        match args.get(1).and_then(|a| self.sizes(a, at)) {
            Some(given) => Shape::Known(self.filled(node, &given)),
            None => Shape::Partial(Vec::new()),
        }
    }

    /// `Tensor::tril2(n, dtype, device)`: rows and columns are all n, whatever part of them a rank has elsewhere.
    pub(super) fn square(&mut self, args: &[Arg<'a>], at: At) -> Shape {
        let Some((Value::Size(n), Some(e))) = args.first() else {
            return Shape::Partial(Vec::new());
        };
        let n = n.clone();
        let at = self.at(at.act, e);
        self.use_size(at, &n, Role::Valid);
        let side = Dim::of(self.dimension(&n));
        Shape::Known(vec![side.clone(), side])
    }

    /// Whether a reshape of a table, of which only the first dimensions are known, keeps these in front and regroups widths.
    pub(super) fn rows_stay(&self, table: NodeId, known: &[(usize, Dim)], given: &[Given]) -> bool {
        let tokens = |d: usize| {
            let dim = known.iter().find(|(k, _)| *k == d).map(|(_, dim)| dim)?;
            dim.anchored(&self.atoms).then(|| dim.size(&self.atoms))
        };
        let in_front = |(d, g): (usize, &Given)| match &g.target {
            Target::Size(p) if self.atoms.anchored(p) => {
                tokens(d).is_some_and(|size| self.atoms.equal(&size, p))
            }
            _ => tokens(d).is_none(),
        };
        let rows = known
            .iter()
            .filter(|(_, dim)| dim.anchored(&self.atoms))
            .count();
        self.is_table(table)
            && (0..rows).all(|d| tokens(d).is_some())
            && given.len() >= rows
            && given.iter().enumerate().all(in_front)
    }

    /// `x.broadcast_left(sizes)`: new dimensions in front, along which nothing changes.
    pub(super) fn broadcast_left(
        &mut self,
        node: NodeId,
        own: Shape,
        args: &[Arg<'a>],
        at: At,
    ) -> Shape {
        let given = args.get(1).and_then(|a| self.sizes(a, at));
        match (given, own) {
            (Some(given), Shape::Known(own))
                if given.iter().all(|g| matches!(g.target, Target::Size(_))) =>
            {
                let left = self.filled(node, &given);
                let left = left.into_iter().map(|d| Dim::repeated(d.size(&self.atoms)));
                Shape::Known(left.chain(own).collect())
            }
            _ => Shape::Partial(Vec::new()),
        }
    }
}
