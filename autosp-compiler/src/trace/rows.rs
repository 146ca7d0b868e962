//! Rows on the host: what a router reads, the lists that it makes of them, and the tensors that are made from those.

use std::rc::Rc;

use super::Trace;
use super::call::Arg;
use super::graph::{ActId, At, Input, NodeId, Op, Reason};
use super::shape::{Dim, Shape};
use super::size::{AtomKind, Poly};
use super::value::Value;
use crate::ops::ShapeRule;
use crate::syntax::number;
use crate::syntax::rows::{Pushed, row_loop};

/// The rows of tensors, read to the host; only a loop over them can be followed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HostRows {
    /// The nodes that read.
    pub(crate) reads: Vec<NodeId>,
    /// Each row comes with its number.
    pub(crate) counted: bool,
    pub(crate) reason: Rc<Reason>,
}

/// A list that a loop over rows made.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RowList {
    pub(crate) reads: Vec<NodeId>,
    pub(crate) signature: String,
    /// The elements are numbers of rows.
    pub(crate) index: bool,
    /// Which list of several it is.
    pub(crate) key: String,
    pub(crate) reason: Rc<Reason>,
}

impl<'a> Trace<'_, 'a> {
    /// `x.to_vec2()`: one row for each of the first dimension.
    pub(super) fn read_rows(node: NodeId, what: &str) -> Value {
        let reason = Self::reason(
            format!("cannot follow what becomes of `{what}` on the host"),
            "loop over the rows and append what is found to lists, row by row",
        );
        Value::HostRows(Rc::new(HostRows {
            reads: vec![node],
            counted: false,
            reason: reason.into(),
        }))
    }

    /// Methods of rows and of lists of them; anything else is lost.
    pub(super) fn rows_method(
        &mut self,
        act: ActId,
        receiver: &Value,
        m: &'a syn::ExprMethodCall,
    ) -> Option<Value> {
        let name = m.method.to_string();
        match receiver {
            Value::HostRows(rows) => Some(match name.as_str() {
                "iter" | "into_iter" | "as_slice" | "clone" if !rows.counted => receiver.clone(),
                "enumerate" if !rows.counted => {
                    let counted = HostRows {
                        counted: true,
                        ..(**rows).clone()
                    };
                    Value::HostRows(Rc::new(counted))
                }
                "zip" if !rows.counted => match m.args.first().map(|e| self.eval(act, e)) {
                    Some(Value::HostRows(other))
                        if !other.counted && self.same_rows(rows.reads[0], other.reads[0]) =>
                    {
                        let reads = [rows.reads.clone(), other.reads.clone()].concat();
                        Value::HostRows(Rc::new(HostRows {
                            reads,
                            ..(**rows).clone()
                        }))
                    }
                    _ => Value::Unknown(rows.reason.clone()),
                },
                _ => Value::Unknown(rows.reason.clone()),
            }),
            Value::Rows(list) => Some(match name.as_str() {
                "as_slice" | "clone" | "as_ref" | "to_vec" => receiver.clone(),
                _ => Value::Unknown(list.reason.clone()),
            }),
            _ => None,
        }
    }

    /// Whether two reads have the same first dimension.
    fn same_rows(&self, a: NodeId, b: NodeId) -> bool {
        let first = |n: NodeId| {
            let source = self.nodes[n].inputs.first()?.node;
            self.nodes[source].shape.known()?.first().cloned()
        };
        first(a).is_some() && first(a) == first(b)
    }

    /// `list[i]`: one of several lists.
    pub(super) fn rows_index(list: &RowList, index: &Value) -> Value {
        match index {
            Value::Size(s) if list.key.is_empty() => Value::Rows(Rc::new(RowList {
                key: format!("{:?}", s.poly),
                ..list.clone()
            })),
            _ => Value::Unknown(list.reason.clone()),
        }
    }

    /// A `for` over rows. True if it could be followed, by what it says alone.
    pub(super) fn row_loop(
        &mut self,
        act: ActId,
        f: &'a syn::ExprForLoop,
        rows: &HostRows,
    ) -> bool {
        let plain = |name: &str| {
            self.lookup(act, name).is_none_or(|b| {
                matches!(b.value, Value::Num(_) | Value::Bool(_))
                    || matches!(&b.value, Value::Size(s) if !self.atoms.anchored(&s.poly))
            })
        };
        let Ok(lists) = row_loop(f, rows.counted, &plain) else {
            return false;
        };
        // Each list is empty before.
        let empty = |list: &Pushed| {
            fn empty(v: &Value) -> bool {
                match v {
                    Value::List { elems: Some(e), .. } if e.is_empty() => true,
                    Value::List { elems: None, any } => empty(any),
                    _ => false,
                }
            }
            self.lookup(act, &list.list)
                .is_some_and(|b| empty(&b.value))
        };
        if !lists.iter().all(empty) {
            return false;
        }
        self.row_reads.extend(&rows.reads);
        for list in lists {
            let value = Value::Rows(Rc::new(RowList {
                reads: rows.reads.clone(),
                signature: format!("{}@{}", list.signature, rows.reads[0]),
                index: list.index,
                key: String::new(),
                reason: rows.reason.clone(),
            }));
            self.assign(act, &list.list, value);
        }
        true
    }

    /// `Tensor::new(list)`.
    pub(super) fn rows_tensor(&mut self, list: &RowList, at: At, what: &str) -> Value {
        let kind = AtomKind::Rows(format!("{} {}", list.signature, list.key));
        let rows = Poly::atom(self.atoms.intern(kind));
        let inputs = list.reads.iter().map(|node| Input {
            node: *node,
            expr: None,
        });
        let shape = Shape::Known(vec![Dim::of(rows)]);
        let op = Op::Rows { index: list.index };
        Value::Tensor(self.node(op, inputs.collect(), shape, at, what))
    }

    /// `if list.is_empty() { continue; }`: nothing is done for rows that are not there. What the loop does besides is checked at
    /// its end.
    pub(super) fn skips_empty(&mut self, act: ActId, i: &'a syn::ExprIf) -> bool {
        let syn::Expr::MethodCall(m) = &*i.cond else {
            return false;
        };
        let leaves = matches!(i.then_branch.stmts.as_slice(), [syn::Stmt::Expr(syn::Expr::Continue(c), _)] if c.label.is_none());
        if m.method != "is_empty" || !leaves || i.else_branch.is_some() {
            return false;
        }
        let skips = matches!(self.eval(act, &m.receiver), Value::Rows(_));
        if skips && let Some(seen) = self.skips.last_mut() {
            *seen = true;
        }
        skips && !self.skips.is_empty()
    }

    /// The end of a loop: rounds that are passed over where a rank has no rows may do nothing but add rows.
    pub(super) fn end_round(
        &mut self,
        act: ActId,
        f: &'a syn::ExprForLoop,
        carried: &[(String, NodeId, NodeId)],
    ) {
        if self.skips.pop() != Some(true) {
            return;
        }
        let others: Vec<String> = number::assigned_locals(&f.body)
            .into_iter()
            .filter(|n| self.lookup(act, n).is_some() && carried.iter().all(|(c, _, _)| c != n))
            .collect();
        if others.is_empty() && self.only_adds_rows(carried) {
            return;
        }
        let written = carried.iter().map(|(n, _, _)| n.clone());
        for name in others.into_iter().chain(written) {
            self.assign(act, &name, Self::lost(&crate::syntax::text(&f.expr)));
        }
    }

    /// Whether a loop that skips empty lists changes its tensors in the rows of the lists alone.
    pub(super) fn only_adds_rows(&self, carried: &[(String, NodeId, NodeId)]) -> bool {
        carried.iter().all(|(_, phi, after)| {
            let n = &self.nodes[*after];
            n.row().is_some_and(|r| r.name() == "index_add")
                && n.inputs.first().is_some_and(|i| i.node == *phi)
                && n.touches.is_empty()
        })
    }

    /// `x.index_select(rows, dim)`, `x.index_add(rows, y, dim)`, `x.gather(index, dim)`: shape and what is mixed.
    pub(super) fn by_index(
        &mut self,
        rule: ShapeRule,
        inputs: &[NodeId],
        args: &[Arg<'a>],
    ) -> Option<(Shape, Vec<(usize, usize)>)> {
        let adds = rule == ShapeRule::IndexAdd;
        let (x, index) = (*inputs.first()?, *inputs.get(1)?);
        let Shape::Known(mut dims) = self.nodes[x].shape.clone() else {
            return None;
        };
        let d = args
            .get(if adds { 3 } else { 2 })
            .and_then(|a| super::builtin::dim_argument(&a.0))
            .and_then(|d| super::apply::resolve(d, dims.len()))?;
        if rule == ShapeRule::Gather {
            let index = self.nodes[index].shape.known()?.to_vec();
            let same = |k: usize| k == d || dims.get(k) == index.get(k);
            let touches = if (0..dims.len()).all(same) {
                vec![(0, d), (1, d)]
            } else {
                (0..dims.len()).flat_map(|k| [(0, k), (1, k)]).collect()
            };
            return (index.len() == dims.len()).then_some((Shape::Known(index), touches));
        }
        let rows = match self.nodes[index].shape.known() {
            Some([one]) => one.clone(),
            _ => return None,
        };
        let source = match &self.nodes[index].op {
            Op::Rows { index: true } => self.nodes[index].inputs.first().map(|i| i.node),
            _ => None,
        };
        // The rows of the tensor that the loop was over, in the order of its first dimension.
        let own = source
            .and_then(|read| self.nodes[read].inputs.first())
            .and_then(|i| self.nodes[i.node].shape.known())
            .and_then(|source| source.first())
            .is_some_and(|first| d == 0 && dims.first() == Some(first));
        if adds {
            let y = self.nodes[*inputs.get(2)?].shape.known()?.first().cloned();
            let matched = own && y == Some(rows);
            let touches = if matched {
                Vec::new()
            } else {
                vec![(0, d), (1, 0), (2, d)]
            };
            return Some((Shape::Known(dims), touches));
        }
        dims[d] = rows;
        let touches = if own { Vec::new() } else { vec![(0, d)] };
        Some((Shape::Known(dims), touches))
    }
}
