//! The shape rules: one function for each [`ShapeRule`].

use super::Role;
use super::Trace;
use super::apply::resolve;
use super::builtin::dim_argument;
use super::call::Arg;
use super::graph::{At, NodeId, Reason};
use super::shape::{self, Dim, Shape, Target};
use super::size::Poly;
use super::value::Value;
use crate::ops::{Row, ShapeRule};

/// A shape and the `(input, dimension)` pairs along which the operation computes.
pub(super) type Ruled = Result<(Shape, Vec<(usize, usize)>), Reason>;

impl<'a> Trace<'_, 'a> {
    /// The shape of a node from its row, its inputs and the arguments as they were given.
    #[allow(clippy::too_many_lines, reason = "one arm for each rule")]
    pub(super) fn shape_rule(
        &mut self,
        row: &'static Row,
        node: NodeId,
        args: &[Arg<'a>],
        at: At,
    ) -> Ruled {
        let inputs: Vec<NodeId> = self.nodes[node].inputs.iter().map(|i| i.node).collect();
        let what = self.nodes[node].text.clone();
        if let Some(first) = inputs.first() {
            let named = match row.shape {
                ShapeRule::Reduce | ShapeRule::ReduceKeep | ShapeRule::Along => {
                    let dims = Self::along(row, args).unwrap_or_default();
                    Some(dims.into_iter().max())
                }
                ShapeRule::Unsqueeze
                | ShapeRule::Expand
                | ShapeRule::Reshape
                | ShapeRule::Transpose
                | ShapeRule::Narrow
                | ShapeRule::Flatten => Some(None),
                _ => None,
            };
            if let Some(named) = named {
                self.needs_rank(*first, named);
            }
        }
        let first = inputs.first().map(|n| self.nodes[*n].shape.clone());
        let plain = |shape: Shape| Ok((shape, Vec::new()));
        match (row.shape, first) {
            (ShapeRule::Scalar, _) => plain(self.data_shape(args, at)),
            (ShapeRule::Filled, _) => match args.first().and_then(|a| self.sizes(a, at)) {
                Some(given) => {
                    let dims = self.filled(node, &given);
                    plain(Shape::Known(dims))
                }
                None => plain(Shape::Partial(Vec::new())),
            },
            (ShapeRule::FromHost, _) => match args.get(1).and_then(|a| self.sizes(a, at)) {
                Some(given) => {
                    let dims = self.filled(node, &given);
                    plain(Shape::Known(dims))
                }
                None => plain(Shape::Partial(Vec::new())),
            },
            (ShapeRule::FilledWith, _) => plain(self.filled_with(node, args, at)),
            (ShapeRule::Square, _) => plain(self.square(args, at)),
            (ShapeRule::Arange, _) => plain(self.arange(args, at)),
            (ShapeRule::BroadcastLeft, Some(first)) => {
                plain(self.broadcast_left(node, first, args, at))
            }
            (ShapeRule::Opaque, _) | (_, None) => plain(Shape::Partial(Vec::new())),
            (ShapeRule::Broadcast, Some(first)) => self.broadcast_rule(&inputs, first, &what),
            (ShapeRule::Select, Some(_)) => {
                // The condition, then the two alternatives.
                let mut shape = self.nodes[inputs[0]].shape.clone();
                for other in &inputs[1..] {
                    let pair = [inputs[0], *other];
                    shape = self.broadcast_rule(&pair, shape, &what)?.0;
                }
                plain(shape)
            }
            (ShapeRule::Matmul, Some(first)) => self.matmul(&inputs, first, &what),
            (
                ShapeRule::IndexSelect | ShapeRule::IndexAdd | ShapeRule::Gather,
                Some(Shape::Known(_)),
            ) => self.by_index(row.shape, &inputs, args).ok_or_else(|| {
                Self::reason(
                    format!("cannot follow the index in `{what}`"),
                    "index along a literal dimension with a tensor whose shape is known",
                )
            }),
            (rule, Some(Shape::Either(all))) => {
                self.each_alternative(rule, &inputs, all, args, at, &what)
            }
            (_, Some(Shape::Unknown(r))) => plain(Shape::Unknown(r)),
            (ShapeRule::Same, Some(shape)) => plain(shape),
            (ShapeRule::Linear | ShapeRule::Embedding, Some(Shape::Partial(_))) => {
                plain(Shape::Partial(Vec::new()))
            }
            (ShapeRule::Narrow, Some(Shape::Partial(known))) => {
                let (d, len) = (
                    args.get(1).and_then(|a| dim_argument(&a.0)),
                    args.get(3).map(|a| a.0.clone()),
                );
                let mut known: Vec<(usize, Dim)> = known;
                if let (Some(Ok(d)), Some(Value::Size(len))) = (d.map(usize::try_from), len) {
                    if let Some(e) = args[3].1 {
                        let at = self.at(at.act, e);
                        self.use_size(at, &len, Role::SizeOf(node));
                    }
                    if let Some((Value::Size(start), _)) = args.get(2) {
                        self.starts_at_zero(&start.clone(), &len);
                    }
                    let poly = self.dimension(&len);
                    known.retain(|(k, _)| *k != d);
                    known.push((d, Dim::of(poly)));
                }
                plain(Shape::Partial(known))
            }
            (ShapeRule::Reshape | ShapeRule::Expand, Some(Shape::Partial(known))) => {
                match args.get(1).and_then(|a| self.sizes(a, at)) {
                    Some(given) if given.iter().all(|g| matches!(g.target, Target::Size(_))) => {
                        let dims = self.filled(node, &given);
                        plain(Shape::Known(dims))
                    }
                    Some(given) if self.rows_stay(inputs[0], &known, &given) => {
                        for g in &given {
                            self.use_given(g, node);
                        }
                        let dims = given.into_iter().map(|g| match g.target {
                            Target::Size(size) => Dim::of(size),
                            Target::Hole => {
                                let rest = self.fresh_feature("rest");
                                self.atoms.unseen(&rest);
                                Dim::of(rest)
                            }
                        });
                        plain(Shape::Known(dims.collect()))
                    }
                    _ => plain(Shape::Partial(Vec::new())),
                }
            }
            (
                rule @ (ShapeRule::Unsqueeze | ShapeRule::Squeeze | ShapeRule::Transpose),
                Some(Shape::Partial(known)),
            ) => plain(Shape::Partial(Self::partial(rule, known, args))),
            (_, Some(Shape::Partial(_))) => plain(Shape::Partial(Vec::new())),
            (rule, Some(Shape::Known(dims))) => {
                self.known(rule, node, &inputs, dims, args, at, &what)
            }
        }
    }

    /// Rules that work on the last dimension alone hold for either of two shapes.
    fn each_alternative(
        &mut self,
        rule: ShapeRule,
        inputs: &[NodeId],
        all: Vec<Vec<Dim>>,
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Ruled {
        match rule {
            ShapeRule::Same => Ok((Shape::Either(all), Vec::new())),
            ShapeRule::Linear | ShapeRule::AlongLast => {
                let mut out = Vec::new();
                for dims in all {
                    let (shape, _) = self.known(rule, inputs[0], inputs, dims, args, at, what)?;
                    if let Shape::Known(dims) = shape {
                        out.push(dims);
                    }
                }
                Ok((Shape::Either(out), Vec::new()))
            }
            _ => Ok((
                Shape::Unknown(format!(
                    "the shape of the operand of `{what}` depends on a condition"
                )),
                Vec::new(),
            )),
        }
    }

    fn arange(&mut self, args: &[Arg<'a>], at: At) -> Shape {
        let (Some((Value::Size(start), _)), Some((Value::Size(end), e))) =
            (args.first(), args.get(1))
        else {
            return Shape::Partial(Vec::new());
        };
        let (start, end) = (start.clone(), end.clone());
        if let Some(e) = e {
            let at = self.at(at.act, e);
            self.use_size(at, &end, Role::Valid);
        }
        let len = self.dimension(&end.with(&start, end.poly.sub(&start.poly)));
        Shape::Known(vec![Dim::of(len)])
    }

    fn broadcast_rule(&mut self, inputs: &[NodeId], first: Shape, what: &str) -> Ruled {
        let Some(second) = inputs.get(1) else {
            return Ok((first, Vec::new()));
        };
        let second = self.nodes[*second].shape.clone();
        let shape = match (first, second) {
            (Shape::Known(a), Shape::Known(b)) => match shape::broadcast(&mut self.atoms, &a, &b) {
                Ok(dims) => Shape::Known(dims),
                Err(why) => {
                    let shapes = format!(
                        "{} and {}",
                        shape::show(&self.atoms, &a),
                        shape::show(&self.atoms, &b)
                    );
                    return Err(Self::misfit(
                        format!("the operands of `{what}` do not fit: {why} ({shapes})"),
                        "check the transposes before it",
                    ));
                }
            },
            (Shape::Unknown(r), _) | (_, Shape::Unknown(r)) => Shape::Unknown(r),
            (Shape::Known(a), _) | (_, Shape::Known(a)) => Shape::Known(a),
            (Shape::Either(a), _) | (_, Shape::Either(a)) => Shape::Either(a),
            (a, _) => a,
        };
        Ok((shape, Vec::new()))
    }

    fn matmul(&mut self, inputs: &[NodeId], first: Shape, what: &str) -> Ruled {
        let second = inputs
            .get(1)
            .map_or(Shape::Partial(Vec::new()), |n| self.nodes[*n].shape.clone());
        let (a, b) = match (first, second) {
            (Shape::Known(a), Shape::Known(b)) => (a, b),
            (Shape::Unknown(r), _) | (_, Shape::Unknown(r)) => {
                return Ok((Shape::Unknown(r), Vec::new()));
            }
            // What a table of unknown shape is multiplied with is contracted along its rows.
            (Shape::Partial(_), Shape::Known(b)) if b.len() >= 2 => {
                return Ok((Shape::Partial(Vec::new()), vec![(1, b.len() - 2)]));
            }
            (Shape::Known(mut a), Shape::Partial(_)) if !a.is_empty() => {
                // A weight whose sizes nobody reads
                let last = a.len() - 1;
                a[last] = Dim::of(self.feature(format!("({what}).out")));
                return Ok((Shape::Known(a), vec![(0, last)]));
            }
            _ => return Ok((Shape::Partial(Vec::new()), Vec::new())),
        };
        if a.len() < 2 || b.len() < 2 {
            return Err(Self::misfit(
                format!(
                    "expected matrices in `{what}`, found {}",
                    shape::show(&self.atoms, &a)
                ),
                "add the missing dimension",
            ));
        }
        let (ra, rb) = (a.len(), b.len());
        let (k, l) = (a[ra - 1].size(&self.atoms), b[rb - 2].size(&self.atoms));
        if !self.atoms.unify(&k, &l) {
            let (sa, sb) = (shape::show(&self.atoms, &a), shape::show(&self.atoms, &b));
            return Err(Self::misfit(
                format!("the operands of `{what}` do not fit: {sa} and {sb}"),
                "check the transposes before it",
            ));
        }
        let batch =
            shape::broadcast(&mut self.atoms, &a[..ra - 2], &b[..rb - 2]).map_err(|why| {
                Self::misfit(
                    format!("the operands of `{what}` do not fit: {why}"),
                    "check the transposes before it",
                )
            })?;
        let dims: Vec<Dim> = batch
            .into_iter()
            .chain([a[ra - 2].clone(), b[rb - 1].clone()])
            .collect();
        Ok((Shape::Known(dims), vec![(0, ra - 1), (1, rb - 2)]))
    }

    /// The dimensions that an operation runs along, from its arguments.
    fn along(row: &Row, args: &[Arg<'a>]) -> Option<Vec<i64>> {
        // `roll(shift, dim)`, and `flip(&[dim, ..])`
        let at = if row.name() == "roll" { 2 } else { 1 };
        match &args.get(at)?.0 {
            Value::List {
                elems: Some(dims), ..
            }
            | Value::Tuple(dims) => dims.iter().map(dim_argument).collect(),
            one => dim_argument(one).map(|d| vec![d]),
        }
    }

    #[allow(clippy::too_many_arguments, clippy::too_many_lines)]
    fn known(
        &mut self,
        rule: ShapeRule,
        node: NodeId,
        inputs: &[NodeId],
        mut dims: Vec<Dim>,
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Ruled {
        let rank = dims.len();
        // The first argument after the tensor; for functions the tensor is an argument itself.
        let arg = |i: usize| args.get(i);
        let d = |i: usize| {
            arg(i)
                .and_then(|a| dim_argument(&a.0))
                .and_then(|d| resolve(d, rank))
        };
        let lost = |what: &str| {
            Self::reason(
                format!("cannot follow the dimension in `{what}`"),
                "give the dimension as a literal or `D::Minus1`",
            )
        };
        let plain = |dims: Vec<Dim>| Ok((Shape::Known(dims), Vec::new()));
        match rule {
            ShapeRule::Linear => {
                let last = rank.checked_sub(1).ok_or_else(|| lost(what))?;
                let width = dims[last].size(&self.atoms);
                self.atoms.is_width(&width);
                dims[last] = Dim::of(self.feature(format!("{what}.out")));
                Ok((Shape::Known(dims), vec![(0, last)]))
            }
            ShapeRule::Embedding => {
                dims.push(Dim::of(self.feature(format!("{what}.width"))));
                plain(dims)
            }
            ShapeRule::AlongLast => {
                let last = rank.checked_sub(1).ok_or_else(|| lost(what))?;
                let layer = self.nodes[node]
                    .row()
                    .is_some_and(|r| r.name() == "forward");
                if layer {
                    let width = dims[last].size(&self.atoms);
                    self.atoms.is_width(&width);
                }
                Ok((Shape::Known(dims), vec![(0, last)]))
            }
            ShapeRule::Along => {
                let row = self.nodes[node].row().ok_or_else(|| lost(what))?;
                let along = Self::along(row, args).ok_or_else(|| lost(what))?;
                let along: Option<Vec<usize>> =
                    along.into_iter().map(|d| resolve(d, rank)).collect();
                let along = along.ok_or_else(|| lost(what))?;
                let touches = along.into_iter().map(|d| (0, d)).collect();
                Ok((Shape::Known(dims), touches))
            }
            ShapeRule::Reduce | ShapeRule::ReduceKeep => {
                let along = d(1).ok_or_else(|| lost(what))?;
                if rule == ShapeRule::Reduce {
                    dims.remove(along);
                } else {
                    dims[along] = Dim::default();
                }
                Ok((Shape::Known(dims), vec![(0, along)]))
            }
            ShapeRule::ReduceAll => Ok((
                Shape::Known(Vec::new()),
                (0..rank).map(|d| (0, d)).collect(),
            )),
            ShapeRule::GetOnDim => {
                let along = d(1).ok_or_else(|| lost(what))?;
                if let Some((Value::Size(index), Some(e))) = arg(2) {
                    let (index, at) = (index.clone(), self.at(at.act, e));
                    self.use_size(at, &index, Role::Valid);
                }
                if dims[along].anchored(&self.atoms) {
                    self.nodes[node].op = super::graph::Op::Pick { dim: along };
                }
                dims.remove(along);
                Ok((Shape::Known(dims), vec![(0, along)]))
            }
            ShapeRule::Transpose => {
                let (Some(i), Some(j)) = (d(1), d(2)) else {
                    return Err(lost(what));
                };
                dims.swap(i, j);
                plain(dims)
            }
            ShapeRule::T => {
                if rank < 2 {
                    return Err(lost(what));
                }
                dims.swap(rank - 1, rank - 2);
                plain(dims)
            }
            ShapeRule::Permute => {
                let order: Option<Vec<usize>> = match arg(1).map(|a| &a.0) {
                    Some(Value::Tuple(v) | Value::List { elems: Some(v), .. }) => v
                        .iter()
                        .map(|v| dim_argument(v).and_then(|d| resolve(d, rank)))
                        .collect(),
                    _ => None,
                };
                let order = order
                    .filter(|o| o.len() == rank)
                    .ok_or_else(|| lost(what))?;
                plain(order.into_iter().map(|i| dims[i].clone()).collect())
            }
            ShapeRule::Unsqueeze => {
                let at = arg(1)
                    .and_then(|a| dim_argument(&a.0))
                    .and_then(|d| resolve(d, rank + 1))
                    .ok_or_else(|| lost(what))?;
                dims.insert(at, Dim::default());
                plain(dims)
            }
            ShapeRule::Squeeze => {
                let at = d(1).ok_or_else(|| lost(what))?;
                if dims[at].is_one() {
                    dims.remove(at);
                }
                plain(dims)
            }
            ShapeRule::Flatten => {
                let name = self.nodes[node].row().map_or("", Row::name);
                let (from, to) = match (name, d(1), d(2)) {
                    ("flatten_from", Some(from), _) => (from, rank - 1),
                    ("flatten_to", Some(to), _) => (0, to),
                    ("flatten_all", _, _) => (0, rank.saturating_sub(1)),
                    (_, Some(from), Some(to)) => (from, to),
                    _ => return Err(lost(what)),
                };
                if from > to || to >= rank {
                    return Err(lost(what));
                }
                let merged = Dim(dims[from..=to]
                    .iter()
                    .flat_map(|d| d.0.iter().cloned())
                    .collect());
                dims.splice(from..=to, [merged]);
                plain(dims)
            }
            ShapeRule::Reshape => self.reshape(node, &dims, args, at, what),
            ShapeRule::Expand => self.expand(node, &dims, args, at, what),
            ShapeRule::Narrow => self.narrow(node, dims, args, at, what),
            ShapeRule::Cat => self.cat(inputs, dims, args, what),
            ShapeRule::Stack => {
                let at = arg(1)
                    .and_then(|a| dim_argument(&a.0))
                    .and_then(|d| resolve(d, rank + 1))
                    .ok_or_else(|| lost(what))?;
                let count = match args.first().map(|a| &a.0) {
                    Some(Value::Copies(_, count)) => Dim::repeated(count.poly.clone()),
                    Some(Value::Each(_, count)) => Dim::of(count.poly.clone()),
                    Some(Value::List { elems: None, .. }) => Dim::of(self.fresh_feature("count")),
                    _ => Dim::of(Poly::constant(inputs.len() as i64)),
                };
                dims.insert(at, count);
                plain(dims)
            }
            _ => plain(dims),
        }
    }

    fn reshape(
        &mut self,
        node: NodeId,
        dims: &[Dim],
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Ruled {
        let Some(given) = args.get(1).and_then(|a| self.sizes(a, at)) else {
            return Err(Self::reason(
                format!("cannot follow the sizes in `{what}`"),
                "give the sizes as a tuple, an array or another tensor's shape",
            ));
        };
        for g in &given {
            self.use_given(g, node);
        }
        let targets: Vec<Target> = given.into_iter().map(|g| g.target).collect();
        let rest = self.fresh_feature("rest");
        match shape::reshape(&self.atoms, dims, &targets, &rest) {
            Ok(dims) => Ok((Shape::Known(dims), Vec::new())),
            Err(why) => {
                let from = shape::show(&self.atoms, dims);
                let anchored = dims.iter().any(|d| d.anchored(&self.atoms));
                let message = format!("`{what}` does not keep the order of {from}: {why}");
                Err(if anchored {
                    Self::mixing(
                        message,
                        "transpose before the reshape, so that every token keeps its own elements",
                    )
                } else {
                    Self::misfit(message, "check the sizes")
                })
            }
        }
    }

    fn expand(
        &mut self,
        node: NodeId,
        dims: &[Dim],
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Ruled {
        let Some(given) = args.get(1).and_then(|a| self.sizes(a, at)) else {
            return Ok((Shape::Partial(Vec::new()), Vec::new()));
        };
        for g in &given {
            self.use_given(g, node);
        }
        let rank = given.len();
        let Some(offset) = rank.checked_sub(dims.len()) else {
            return Err(Self::misfit(
                format!(
                    "expected at least {} sizes in `{what}`, found {rank}",
                    dims.len()
                ),
                "check the sizes",
            ));
        };
        let mut out = Vec::with_capacity(rank);
        for (i, g) in given.iter().enumerate() {
            let Target::Size(target) = &g.target else {
                return Err(Self::misfit(format!("`()` in `{what}`"), "give all sizes"));
            };
            let own = i
                .checked_sub(offset)
                .map(|k| dims[k].clone())
                .unwrap_or_default();
            let size = own.size(&self.atoms);
            if own.is_one() {
                out.push(Dim::repeated(target.clone()));
            } else if self.atoms.unify(&size, target) {
                out.push(own);
            } else if let Some(times) = self.atoms.ratio(target, &size) {
                // Only a size of one can be repeated, which is checked when the program runs.
                let mut dim = own;
                dim.0.extend(Dim::repeated(times).0);
                out.push(dim);
            } else {
                let (a, b) = (self.atoms.show(&size), self.atoms.show(target));
                return Err(Self::misfit(
                    format!("expected size `{a}` in `{what}`, found `{b}`"),
                    "check the sizes",
                ));
            }
        }
        Ok((Shape::Known(out), Vec::new()))
    }
}
