//! Applies a row of the operation table: operands, shape, what it computes along.

use super::builtin::dim_argument;
use super::call::Arg;
use super::graph::{At, Input, NodeId, Op, Reason};
use super::shape::{Dim, Shape, Target};
use super::value::{Size, Value};
use super::{Role, Trace};
use crate::ops::{PlaceRule, Row, ShapeRule};
use autosp_plan::codes;

/// A size argument with the place where it is written.
pub(super) struct Given {
    pub(super) target: Target,
    pub(super) size: Option<Size>,
    pub(super) at: At,
    /// Which of how many sizes of a variable that holds a tuple.
    pub(super) part: Option<(usize, usize)>,
}

impl<'a> Trace<'_, 'a> {
    /// The value of an operation of the table. `object` is the path of the layer, where it is one.
    pub(super) fn apply(
        &mut self,
        row: &'static Row,
        args: &[Arg<'a>],
        at: At,
        what: &str,
        object: Option<&str>,
    ) -> Value {
        let mut inputs: Vec<Input> = Vec::new();
        if args.first().is_some_and(|a| a.0.lost().is_some()) {
            self.note_convolution(row, &[], what, at.span);
        }
        if let (ShapeRule::Scalar, Some((Value::Rows(list), _))) = (row.shape, args.first()) {
            return self.rows_tensor(&list.clone(), at, what);
        }
        for (value, e) in args {
            if let Some(r) = value.lost() {
                self.lost_softmax |= row.name().starts_with("softmax");
                return Value::Unknown(r.clone());
            }
            let mut tensors = Vec::new();
            value.tensors(&mut tensors);
            let own = e.map(|e| self.at(at.act, e).expr);
            let elements = e.map(list_elements).unwrap_or_default();
            for (i, node) in tensors.iter().enumerate() {
                if matches!(self.nodes[*node].shape, Shape::Partial(_))
                    && let Some(rank) = self.late_rank(*node)
                {
                    self.with_rank(*node, rank);
                }
                let expr = if tensors.len() > 1 {
                    elements.get(i).map(|e| self.at(at.act, e).expr)
                } else {
                    own
                };
                inputs.push(Input { node: *node, expr });
            }
        }
        self.note_convolution(row, &inputs, what, at.span);
        self.note_relative(row, &inputs, what, at.span);
        self.note_cross(row, &inputs);
        if let (PlaceRule::Make, Some((Value::Host(host), _))) = (row.place, args.first())
            && host.axes.len() == 2
        {
            let host = host.clone();
            return self.mask(host, args, at, what);
        }
        if inputs.is_empty() && !matches!(row.place, PlaceRule::Make | PlaceRule::Random) {
            return Self::lost(what);
        }
        // An operand that is missing here was lost, or is something that the analysis has no name for.
        let needed = match row.shape {
            ShapeRule::Matmul => 2,
            ShapeRule::Select | ShapeRule::Rope | ShapeRule::RopeThd => 3,
            ShapeRule::Broadcast if row.name().starts_with("broadcast_") => 2,
            _ => 0,
        };
        if inputs.len() < needed {
            return Self::lost(what);
        }
        if row.shape == ShapeRule::Chunk {
            return self.chunk(row, &inputs, args, at, what);
        }
        if row.shape == ShapeRule::Index {
            return self.index_op(row, &inputs, args, at, what);
        }
        if row.shape == ShapeRule::Each {
            let each = inputs.into_iter().map(|input| {
                let shape = self.nodes[input.node].shape.clone();
                Value::Tensor(self.node(Op::Row(row), vec![input], shape, at, what))
            });
            return Value::Tuple(each.collect());
        }
        let name = object.map_or(what, |o| o).to_string();
        let node = self.node(Op::Row(row), inputs, Shape::Partial(Vec::new()), at, what);
        if object.is_some() {
            // Widths are named after the layer.
            self.nodes[node].text.clone_from(&name);
        }
        let rank = self.shape_rule(row, node, args, at);
        self.nodes[node].text = what.to_string();
        match rank {
            Ok((shape, touches)) => {
                if object.is_some() && matches!(shape, Shape::Partial(_)) {
                    self.nodes[node].text = name;
                }
                self.nodes[node].shape = shape;
                self.nodes[node].touches = touches;
            }
            Err(reason) => {
                self.nodes[node].shape = Shape::Unknown(reason.message.clone());
                self.nodes[node].op = Op::Unknown(reason.into());
            }
        }
        if row.place == PlaceRule::Host {
            self.reads.push(node);
            return if row.name() == "to_vec2" {
                Self::read_rows(node, what)
            } else {
                Value::Opaque
            };
        }
        Value::Tensor(node)
    }

    fn mask(
        &mut self,
        host: std::rc::Rc<super::value::Host>,
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Value {
        let node = self.node(
            Op::Mask(host),
            Vec::new(),
            Shape::Partial(Vec::new()),
            at,
            what,
        );
        if let Some(given) = args.get(1).and_then(|a| self.sizes(a, at)) {
            let dims = self.filled(node, &given);
            self.nodes[node].shape = Shape::Known(dims);
        }
        Value::Tensor(node)
    }

    /// A size that a tensor gets.
    pub(super) fn use_given(&mut self, given: &Given, node: NodeId) {
        if let Some(size) = &given.size {
            let before = self.sizes.len();
            self.use_size(given.at, size, Role::SizeOf(node));
            if let Some(new) = self.sizes.get_mut(before) {
                new.part = given.part;
            }
        }
    }

    /// Dimensions of a tensor that is made with these sizes.
    pub(super) fn filled(&mut self, node: NodeId, given: &[Given]) -> Vec<Dim> {
        let mut dims = Vec::new();
        for g in given {
            if let (Target::Size(_), Some(size)) = (&g.target, &g.size) {
                self.use_given(g, node);
                let poly = self.dimension(size);
                dims.push(Dim::of(poly));
            }
        }
        dims
    }

    fn chunk(
        &mut self,
        row: &'static Row,
        inputs: &[Input],
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Value {
        let parts = args
            .get(1)
            .and_then(|a| a.0.size())
            .and_then(|s| s.poly.as_constant());
        let parts = parts.filter(|parts| *parts <= super::PARTS as i64);
        let (Some(parts), Some(input)) = (parts, inputs.first()) else {
            return Self::lost(what);
        };
        let mut elems = Vec::new();
        for _ in 0..parts {
            let node = self.node(
                Op::Row(row),
                inputs.to_vec(),
                Shape::Partial(Vec::new()),
                at,
                what,
            );
            let shape = match self.nodes[input.node].shape.clone() {
                Shape::Known(mut dims) => {
                    let Some(d) = args
                        .get(2)
                        .and_then(|a| dim_argument(&a.0))
                        .and_then(|d| resolve(d, dims.len()))
                    else {
                        return Self::lost(what);
                    };
                    let size = dims[d].size(&self.atoms);
                    let part = self.atoms.div(&size, &super::size::Poly::constant(parts));
                    dims[d] = Dim::of(part);
                    self.nodes[node].touches = vec![(0, d)];
                    Shape::Known(dims)
                }
                other => other,
            };
            self.nodes[node].shape = shape;
            elems.push(Value::Tensor(node));
        }
        let any = elems.first().cloned().unwrap_or(Value::Opaque);
        Value::List {
            elems: Some(elems),
            any: Box::new(any),
        }
    }

    /// `x.i((.., s - 1, ..))`: whole dimensions, one index, or a range in each place.
    fn index_op(
        &mut self,
        row: &'static Row,
        inputs: &[Input],
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Value {
        let Some(input) = inputs.first().copied() else {
            return Self::lost(what);
        };
        let places: Vec<(Value, Option<&'a syn::Expr>)> = match args.get(1) {
            Some((Value::Tuple(values), Some(syn::Expr::Tuple(t)))) if !values.is_empty() => values
                .iter()
                .cloned()
                .zip(t.elems.iter().map(Some))
                .collect(),
            Some((value, e)) => vec![(value.clone(), *e)],
            None => return Self::lost(what),
        };
        if let (Shape::Partial(known), false) = (
            self.nodes[input.node].shape.clone(),
            matches!(self.nodes[input.node].op, Op::Param(_)),
        ) {
            let shape = self.index_partial(known, &places, at);
            return Value::Tensor(self.node(Op::Row(row), inputs.to_vec(), shape, at, what));
        }
        let Some(dims) = self.with_rank_at_least(input.node, places.len()) else {
            let reason = Self::reason(
                format!("cannot follow the index in `{what}`"),
                "index with `..`, a number or a range in each place",
            );
            return Value::Tensor(self.unknown(reason, inputs.to_vec(), at, what));
        };
        let mut out = Vec::new();
        let mut touches = Vec::new();
        let (mut pick, mut each) = (None, None);
        for (d, dim) in dims.iter().enumerate() {
            match places.get(d) {
                None => out.push(dim.clone()),
                Some((Value::Tuple(v), _)) if v.is_empty() => out.push(dim.clone()),
                Some((Value::Range(start, end, end_expr), _)) => {
                    let at = At {
                        expr: *end_expr,
                        ..at
                    };
                    self.use_size(at, &end.clone(), Role::Valid);
                    let len = end.poly.sub(&start.poly);
                    if self.atoms.equal(&len, &dim.size(&self.atoms)) {
                        out.push(dim.clone());
                    } else {
                        touches.push((0, d));
                        out.push(Dim::of(len));
                    }
                }
                Some((Value::From(start), e)) => {
                    if let Some(e) = e {
                        let at = self.at(at.act, e);
                        self.use_size(at, &start.clone(), Role::Valid);
                    }
                    if start.poly == super::size::Poly::default() {
                        out.push(dim.clone());
                    } else {
                        touches.push((0, d));
                        let part = self.fresh_feature("part");
                        if !dim.anchored(&self.atoms) {
                            self.atoms.unseen(&part);
                        }
                        out.push(Dim::of(part));
                    }
                }
                Some((Value::Size(s), Some(e))) => {
                    let at = self.at(at.act, e);
                    self.use_size(at, &s.clone(), Role::Valid);
                    if dim.anchored(&self.atoms) {
                        if let (Some(counter), None) = (self.counts_rows_of(dim, s), each) {
                            each = Some((d, counter));
                            continue;
                        }
                        if self.counts_tokens(s) {
                            let reason = Self::scan(what);
                            return Value::Tensor(self.unknown(reason, inputs.to_vec(), at, what));
                        }
                        pick = Some(d);
                    }
                    touches.push((0, d));
                }
                Some(_) => {
                    touches.push((0, d));
                    let part = self.fresh_feature("part");
                    out.push(Dim::of(part));
                }
            }
        }
        // One token out of many: a rule of its own, if nothing else is cut.
        let op = match (pick, each) {
            (Some(dim), None) if touches.len() == 1 => Op::Pick { dim },
            (None, Some((dim, counter))) if touches.is_empty() => Op::Each { dim, counter },
            (_, Some(_)) => {
                let reason = Self::scan(what);
                return Value::Tensor(self.unknown(reason, inputs.to_vec(), at, what));
            }
            _ => Op::Row(row),
        };
        let node = self.node(op, inputs.to_vec(), Shape::Known(out), at, what);
        self.nodes[node].touches = touches;
        Value::Tensor(node)
    }

    fn with_rank_at_least(&mut self, node: NodeId, rank: usize) -> Option<Vec<Dim>> {
        if let Shape::Known(dims) = &self.nodes[node].shape {
            return (dims.len() >= rank).then(|| dims.clone());
        }
        self.assume_rank(node, rank);
        self.with_rank(node, rank)
    }

    /// The sizes that an argument gives: a tuple, an array, one number, another tensor's shape.
    pub(super) fn sizes(&mut self, arg: &Arg<'a>, at: At) -> Option<Vec<Given>> {
        let exprs = arg.1.map(list_elements).unwrap_or_default();
        let own = arg.1.map_or(at, |e| self.at(at.act, e));
        let values: Vec<Value> = match &arg.0 {
            Value::Tuple(values)
            | Value::List {
                elems: Some(values),
                ..
            } => values.clone(),
            Value::ShapeOf(node) => {
                let node = *node;
                self.nodes[node].sizes_read = true;
                let rank = self.nodes[node].shape.known()?.len();
                (0..rank as i64)
                    .map(|d| self.dim_with_rank(node, d, rank, at))
                    .collect()
            }
            single @ (Value::Size(_) | Value::FromEnd(_)) => vec![single.clone()],
            _ => return None,
        };
        let mut out = Vec::new();
        let written = exprs.len() == values.len() && values.len() > 1;
        for (i, value) in values.iter().enumerate() {
            let at = match exprs.get(i) {
                Some(e) if written || values.len() == 1 => self.at(at.act, e),
                _ => own,
            };
            let part = (!written && values.len() > 1 && matches!(arg.0, Value::Tuple(_)))
                .then_some((i, values.len()));
            match value {
                Value::Size(size) => out.push(Given {
                    target: Target::Size(self.dimension(size)),
                    size: Some(size.clone()),
                    at,
                    part,
                }),
                Value::Tuple(v) if v.is_empty() => out.push(Given {
                    target: Target::Hole,
                    size: None,
                    at,
                    part,
                }),
                _ => return None,
            }
        }
        Some(out)
    }

    /// What could not be followed, as a value.
    pub(super) fn lost(what: &str) -> Value {
        let help = "write it with tensors, tuples, options and functions of the module";
        Value::Unknown(Self::reason(format!("cannot follow `{what}`"), help).into())
    }

    /// A shape problem, with the code for it.
    pub(super) fn misfit(message: String, help: &str) -> Reason {
        Reason {
            code: codes::SHAPES,
            message,
            help: help.to_string(),
            span: None,
        }
    }

    pub(super) fn mixing(message: String, help: &str) -> Reason {
        Reason {
            code: codes::MIXES_TOKENS,
            message,
            help: help.to_string(),
            span: None,
        }
    }
}

/// A dimension counted from either end.
pub(super) fn resolve(d: i64, rank: usize) -> Option<usize> {
    let d = if d < 0 { d + rank as i64 } else { d };
    usize::try_from(d).ok().filter(|d| *d < rank)
}

/// The expressions of the elements of a tuple or array, through `&` and parentheses.
pub(super) fn list_elements(e: &syn::Expr) -> Vec<&syn::Expr> {
    match e {
        syn::Expr::Tuple(t) => t.elems.iter().collect(),
        syn::Expr::Array(a) => a.elems.iter().collect(),
        syn::Expr::Reference(r) => list_elements(&r.expr),
        syn::Expr::Paren(p) => list_elements(&p.expr),
        syn::Expr::Group(g) => list_elements(&g.expr),
        other => vec![other],
    }
}
