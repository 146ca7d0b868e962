//! The values of the abstract program.

use std::rc::Rc;

use super::graph::{NodeId, Reason};
use super::size::{AtomId, Poly};
use crate::syntax::types::Ty;

/// A symbolic integer with the tensors whose sizes it was read from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Size {
    pub(crate) poly: Poly,
    pub(crate) origins: Rc<[NodeId]>,
}

impl Size {
    pub(crate) fn constant(value: i64) -> Self {
        Self {
            poly: Poly::constant(value),
            origins: Rc::from([]),
        }
    }

    pub(crate) fn of(poly: Poly) -> Self {
        Self {
            poly,
            origins: Rc::from([]),
        }
    }

    pub(crate) fn with(&self, other: &Self, poly: Poly) -> Self {
        if other.origins.is_empty() {
            return Self {
                poly,
                origins: self.origins.clone(),
            };
        }
        let mut origins = self.origins.to_vec();
        origins.extend(other.origins.iter().filter(|o| !self.origins.contains(o)));
        Self {
            poly,
            origins: origins.into(),
        }
    }
}

/// How two integers compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cmp {
    Lt,
    Le,
    Gt,
    Ge,
    Eq,
    Ne,
}

/// A condition.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Cond {
    Known(bool),
    Compare(Poly, Cmp, Poly),
    And(Box<Cond>, Box<Cond>),
    Or(Box<Cond>, Box<Cond>),
    Not(Box<Cond>),
    Unknown,
}

impl Cond {
    /// Whether this condition has at most so many parts, which are counted down.
    fn fits(&self, left: &mut usize) -> bool {
        let Some(rest) = left.checked_sub(1) else {
            return false;
        };
        *left = rest;
        match self {
            Self::And(a, b) | Self::Or(a, b) => a.fits(left) && b.fits(left),
            Self::Not(c) => c.fits(left),
            Self::Known(_) | Self::Compare(..) | Self::Unknown => true,
        }
    }
}

/// A host array over index ranges: what `(0..t).flat_map(|i| (0..t).map(move |j| ..)).collect()` makes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Host {
    /// One index per range, outermost first.
    pub(crate) axes: Vec<Axis>,
    /// The element as a function of the indices.
    pub(crate) elem: Value,
    /// The expression of the whole array in its function, if it is one expression.
    pub(crate) expr: Option<u32>,
    /// Where a condition decides between arrays: all of them, and nothing above is of use.
    pub(crate) among: Vec<Rc<Host>>,
}

impl Host {
    /// The arrays that this may be.
    pub(crate) fn all(self: &Rc<Self>) -> Vec<Rc<Self>> {
        if self.among.is_empty() {
            vec![self.clone()]
        } else {
            self.among.clone()
        }
    }
}

/// One index of a [`Host`] array.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    pub(crate) index: AtomId,
    pub(crate) end: Size,
    /// Expressions of the range's end and of the closure over the index.
    pub(crate) end_expr: u32,
    pub(crate) closure: u32,
}

/// Whether an `Option` holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    None,
    Some,
    Maybe,
}

/// A closure: its expression number and the variables it was made with.
#[derive(Debug, Clone)]
pub(crate) struct Closure {
    pub(crate) expr: u32,
    pub(crate) env: Rc<Vec<std::collections::HashMap<String, Binding>>>,
}

impl PartialEq for Closure {
    fn eq(&self, other: &Self) -> bool {
        self.expr == other.expr
    }
}

/// A variable.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Binding {
    pub(crate) value: Value,
    /// Bound as a reference (a `&T` parameter, the variable of a loop over `.iter()`).
    pub(crate) by_ref: bool,
}

/// An abstract value. `Result<T>` is `T`: `?` and `Ok(..)` are transparent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unit,
    /// Control does not come here.
    Never,
    Tensor(NodeId),
    Size(Size),
    /// A floating-point number, known or not.
    Num(Option<f64>),
    Bool(Cond),
    /// One of two constants, by a condition over indices.
    Select(Box<Cond>, Box<Value>, Box<Value>),
    Tuple(Vec<Value>),
    /// A list: its elements one by one if they are known, else one that stands for all.
    List {
        elems: Option<Vec<Value>>,
        any: Box<Value>,
    },
    /// `vec![x; n]`: one value, n times.
    Copies(Box<Value>, Box<Size>),
    /// A list of one tensor for each round of a loop, and the number of rounds.
    Each(Box<Value>, Box<Size>),
    /// `(index, element)` pairs and other adapters keep the element only.
    Option(Presence, Box<Value>),
    /// An instance of a struct: its type and the path to it.
    Object {
        ty: Ty,
        path: String,
    },
    Range(Box<Size>, Box<Size>, u32),
    /// `start..`
    From(Box<Size>),
    Closure(Closure),
    Host(Rc<Host>),
    /// `tensor.shape()` or `tensor.dims()`.
    ShapeOf(NodeId),
    /// `D::Minus1` is -1, a literal dimension is itself.
    FromEnd(i64),
    /// Rows of tensors on the host.
    HostRows(Rc<super::rows::HostRows>),
    /// A list that a loop over them made.
    Rows(Rc<super::rows::RowList>),
    /// A dictionary or other store that the program writes to between calls: empty while training.
    EmptyStore,
    /// A layer that the analysis does not see into, by what is said of it.
    Asserted(crate::syntax::asserts::Kind),
    /// Data without tensors that nothing depends on: dtypes, devices, flags, spans, strings.
    Opaque,
    Unknown(Rc<Reason>),
}

impl Value {
    /// `u8::from(condition)`.
    pub(crate) fn from_bool(cond: Cond) -> Self {
        let number = |v| Box::new(Self::Size(Size::constant(v)));
        Self::Select(Box::new(cond), number(1), number(0))
    }

    pub(crate) fn size(&self) -> Option<&Size> {
        if let Self::Size(s) = self {
            Some(s)
        } else {
            None
        }
    }

    pub(crate) fn tensor(&self) -> Option<NodeId> {
        match self {
            Self::Tensor(n) | Self::ShapeOf(n) => Some(*n),
            _ => None,
        }
    }

    /// Whether this value has at most so many parts, which are counted down.
    pub(crate) fn fits(&self, left: &mut usize) -> bool {
        let Some(rest) = left.checked_sub(1) else {
            return false;
        };
        *left = rest;
        match self {
            Self::Tuple(v) => v.iter().all(|v| v.fits(left)),
            Self::List { elems, any } => {
                any.fits(left) && elems.iter().flatten().all(|v| v.fits(left))
            }
            Self::Option(_, v) | Self::Copies(v, _) => v.fits(left),
            Self::Bool(c) => c.fits(left),
            Self::Select(c, a, b) => c.fits(left) && a.fits(left) && b.fits(left),
            Self::Host(host) => host.elem.fits(left),
            _ => true,
        }
    }

    /// The reason in this value or in a part of it, if something could not be followed.
    pub(crate) fn lost(&self) -> Option<&Rc<Reason>> {
        match self {
            Self::Unknown(r) => Some(r),
            Self::HostRows(rows) => Some(&rows.reason),
            Self::Rows(list) => Some(&list.reason),
            Self::Tuple(v) => v.iter().find_map(Self::lost),
            Self::List {
                elems: Some(elems), ..
            } => elems.iter().find_map(Self::lost),
            Self::List { any, .. } => any.lost(),
            Self::Option(Presence::None, _) => None,
            Self::Option(_, v) | Self::Copies(v, _) | Self::Each(v, _) => v.lost(),
            _ => None,
        }
    }

    /// All sizes in this value.
    pub(crate) fn sizes<'v>(&'v self, out: &mut Vec<&'v Size>) {
        match self {
            Self::Size(s) => out.push(s),
            Self::Tuple(v) => v.iter().for_each(|v| v.sizes(out)),
            Self::List { elems, any } => match elems {
                Some(elems) => elems.iter().for_each(|v| v.sizes(out)),
                None => any.sizes(out),
            },
            Self::Option(Presence::None, _) => {}
            Self::Option(_, v) | Self::Copies(v, _) => v.sizes(out),
            _ => {}
        }
    }

    /// All tensors in this value.
    pub(crate) fn tensors(&self, out: &mut Vec<NodeId>) {
        match self {
            Self::Tensor(n) => out.push(*n),
            Self::Tuple(v) => v.iter().for_each(|v| v.tensors(out)),
            Self::List { elems, any } => match elems {
                Some(elems) => elems.iter().for_each(|v| v.tensors(out)),
                None => any.tensors(out),
            },
            Self::Option(Presence::None, _) => {}
            Self::Option(_, v) | Self::Copies(v, _) | Self::Each(v, _) => v.tensors(out),
            _ => {}
        }
    }
}
