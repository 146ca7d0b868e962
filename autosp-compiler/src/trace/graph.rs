//! The dataflow graph that a trace writes: one node for each tensor the global program makes.

use proc_macro2::Span;

use super::shape::Shape;
use super::value::Host;
use crate::ops::Row;
use std::rc::Rc;

pub(crate) type NodeId = usize;
/// One evaluation of one function: the same function called from two places has two activations.
pub(crate) type ActId = usize;

/// Where a node was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At {
    pub(crate) act: ActId,
    /// Preorder number of the expression in its function.
    pub(crate) expr: u32,
    pub(crate) span: Span,
}

/// What made a node.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// A tensor parameter of the root function.
    Param(String),
    /// A tensor held by the model or by a struct passed along: weights, tables.
    Field,
    /// A row of the operation table.
    Row(&'static Row),
    /// A tensor made from a host array that ranges over (query, key).
    Mask(Rc<Host>),
    /// Meets at the end of an `if` or `match`, or is carried round a loop.
    Phi { carried: bool },
    /// The pick of one token along the sequence dimension `dim`.
    Pick { dim: usize },
    /// One row of dimension `dim` in each round of a loop over them: all of them, one after another.
    Each {
        dim: usize,
        counter: super::size::AtomId,
    },
    /// What a loop over rows on the host listed; their numbers, or values.
    Rows { index: bool },
    /// Something that could not be followed.
    Unknown(Rc<Reason>),
}

/// Why a value cannot be followed.
#[derive(Debug, Clone)]
pub(crate) struct Reason {
    pub(crate) code: autosp_plan::codes::Code,
    pub(crate) message: String,
    pub(crate) help: String,
    /// The expression that was lost first.
    pub(crate) span: Option<Span>,
}

impl PartialEq for Reason {
    fn eq(&self, other: &Self) -> bool {
        (self.code.id, &self.message) == (other.code.id, &other.message)
    }
}

/// One tensor operand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input {
    pub(crate) node: NodeId,
    /// The expression (of the consumer's activation) that gives it, for inserting a conversion.
    pub(crate) expr: Option<u32>,
}

/// One tensor of the global program.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) op: Op,
    pub(crate) inputs: Vec<Input>,
    pub(crate) shape: Shape,
    pub(crate) at: At,
    /// Dimensions of inputs along which the operation computes (reduces, contracts, normalises, indexes): `(input, dim)`.
    pub(crate) touches: Vec<(usize, usize)>,
    /// The source text of the operation, for messages.
    pub(crate) text: String,
    /// The program reads this tensor's sizes.
    pub(crate) sizes_read: bool,
    /// The innermost branch that it is made in and that may be left untaken.
    pub(crate) branch: Option<super::branch::Branch>,
    /// Which call of a closure it is made in, 0 outside of closures.
    pub(crate) call: u32,
}

impl Node {
    pub(crate) fn row(&self) -> Option<&'static Row> {
        if let Op::Row(row) = &self.op {
            Some(row)
        } else {
            None
        }
    }
}
