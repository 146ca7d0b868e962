//! Schedules: in which order a site's head groups are exchanged and attended.
//!
//! A schedule is code that the attribute emits, in the verbs of [`Forward`] and [`Backward`]; the runtime executes it and holds none of
//! its own. The same schedule runs on the ranks ([`site`](crate::site)) and on a [`Recorder`], which has no data: it checks that every
//! exchange that is started is waited for, that nothing is used before it has landed, and that each group is attended once.

mod check;
mod recorder;
pub mod timeline;

pub(crate) use check::{Check, Direction, Verb};
pub use recorder::Recorder;
pub use timeline::{Event, Timeline};

use candle_core::Result;

use crate::layout::Layout;

/// Exchange by head groups: sequence shards become head shards and back (Jacobs et al., DeepSpeed Ulysses, 2023).
#[derive(Debug, Clone, Copy)]
pub enum Ulysses {}

/// How a site is executed under a strategy.
pub trait Schedule<Strategy> {
    /// The function that the site is in.
    const NAME: &'static str;

    /// From q, k, v to the output.
    ///
    /// # Errors
    /// Those of the verbs.
    fn forward(io: &mut impl Forward) -> Result<()>;

    /// The forward once more, for a backward that has the attention's result and not what it was computed from: exchanges, and no
    /// [`attend`](Forward::attend).
    ///
    /// # Errors
    /// Those of the verbs.
    fn replay(io: &mut impl Forward) -> Result<()>;

    /// From the output's gradient to those of q, k, v.
    ///
    /// # Errors
    /// Those of the verbs.
    fn backward(io: &mut impl Backward) -> Result<()>;
}

/// The verbs of a forward and of its replay. All ranks of a group run them in the same order.
///
/// In a replay, verbs on tensors that the policy kept send nothing; the result is there from the beginning and may be sent at once.
pub trait Forward {
    /// Number of head groups.
    fn groups(&self) -> usize;

    /// Starts the exchange of the queries of group `g`, and of its kv heads that no earlier group has brought. Never blocks.
    ///
    /// # Errors
    /// `AS0328` out of order; an error of the collectives if the run has failed.
    fn send_qkv(&mut self, g: usize) -> Result<()>;

    /// Blocks until the exchange of group `g` has landed.
    ///
    /// # Errors
    /// `AS0328` out of order; an error of the collectives if a rank does not arrive.
    fn wait_qkv(&mut self, g: usize) -> Result<()>;

    /// Computes the attention of group `g` over the whole sequence.
    ///
    /// # Errors
    /// `AS0328` before its tensors have landed, a second time, or in a replay.
    fn attend(&mut self, g: usize) -> Result<()>;

    /// Starts the way back of group `g`'s output. Never blocks.
    ///
    /// # Errors
    /// `AS0328` out of order; an error of the collectives if the run has failed.
    fn send_out(&mut self, g: usize) -> Result<()>;

    /// Blocks until the outputs of all groups have landed.
    ///
    /// # Errors
    /// `AS0328` before a group was sent; an error of the collectives if a rank does not arrive.
    fn wait_out(&mut self) -> Result<()>;
}

/// The verbs of a backward. All ranks of a group run them in the same order.
pub trait Backward {
    /// Number of head groups.
    fn groups(&self) -> usize;

    /// Starts the exchange of the output's gradient for group `g`. Never blocks.
    ///
    /// # Errors
    /// `AS0328` out of order; an error of the collectives if the run has failed.
    fn send_grad_out(&mut self, g: usize) -> Result<()>;

    /// Blocks until the gradient for group `g` has landed.
    ///
    /// # Errors
    /// `AS0328` out of order; an error of the collectives if a rank does not arrive.
    fn wait_grad_out(&mut self, g: usize) -> Result<()>;

    /// Computes the gradients of group `g`.
    ///
    /// # Errors
    /// `AS0328` before its gradient has landed, or a second time.
    fn attend_backward(&mut self, g: usize) -> Result<()>;

    /// Starts the way back of group `g`'s gradients, and of those of kv heads that no later group adds to. Never blocks.
    ///
    /// # Errors
    /// `AS0328` out of order; an error of the collectives if the run has failed.
    fn send_grad_qkv(&mut self, g: usize) -> Result<()>;

    /// Blocks until all gradients have landed.
    ///
    /// # Errors
    /// `AS0328` before a group was sent; an error of the collectives if a rank does not arrive.
    fn wait_grad_qkv(&mut self) -> Result<()>;
}

/// Which kv head a query head uses, of G kv heads for H query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "emitted code names its variants")]
pub enum HeadMap {
    /// Query head h uses kv head h / (H / G): each kv head was repeated in place.
    Blocked,
    /// Query head h uses kv head h % G: all kv heads were repeated in turn.
    Interleaved,
}

impl HeadMap {
    /// The kv head of query head `head`, of `heads` over `kv_heads`.
    pub(crate) fn kv_of(self, head: usize, heads: usize, kv_heads: usize) -> usize {
        match self {
            Self::Blocked => head / (heads / kv_heads),
            Self::Interleaved => head % kv_heads,
        }
    }
}

/// One place of a model where attention happens: what the compiler found there, and its schedule.
pub trait Site: Schedule<Ulysses> + 'static {
    /// The line of q k^T in the model's source.
    const LINE: u32;
    /// The axes of its tensors.
    const LAYOUT: Layout;
    /// Its map from query heads to kv heads.
    const HEADS: HeadMap;
}

#[cfg(test)]
mod tests;
