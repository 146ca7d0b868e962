//! Which site of a checkpoint scope is whose: sites are counted in the order in which the block runs them.
//!
//! While a scope runs its block for the first time, each site leaves a [`Memo`] here; when the block is computed again, the n-th site
//! gets the n-th memo. A scope inside a scope is part of the outer one.

use std::cell::RefCell;
use std::sync::Arc;

use autosp_plan::codes;
use autosp_plan::settings::Policy;
use candle_core::Tensor;

use crate::site::Memo;
use crate::{Error, Result};

/// The memos of a scope, in the order of its sites.
pub(crate) type Memos = Arc<[Arc<Memo>]>;

enum Tape {
    /// The block runs for its result alone; sites leave what the policy keeps.
    First(Policy, Vec<Arc<Memo>>),
    /// The block runs again, for its graph.
    Again(Memos, usize),
}

thread_local! {
    static TAPE: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// What a site has to do.
pub(crate) enum Turn {
    /// Run and be recorded in candle's graph.
    Record,
    /// Run, leave what the policy keeps (see [`keep`]), and give the result without a graph.
    Keep(Policy),
    /// Take up what was kept.
    Replay(Arc<Memo>),
}

/// Puts the previous tape back, also when unwinding.
struct Restore(Option<Tape>);

impl Drop for Restore {
    fn drop(&mut self) {
        let previous = self.0.take();
        // The thread-local is gone only while the thread itself ends.
        let _ = TAPE.try_with(|tape| tape.replace(previous));
    }
}

/// Whether this thread is in a scope that keeps less than everything.
pub(crate) fn is_running() -> bool {
    TAPE.with_borrow(Option::is_some)
}

/// Runs a block for the first time.
pub(crate) fn first<R>(policy: Policy, f: impl FnOnce() -> R) -> (R, Memos) {
    let restore = Restore(TAPE.replace(Some(Tape::First(policy, Vec::new()))));
    let result = f();
    let memos = match TAPE.take() {
        Some(Tape::First(_, memos)) => memos,
        _ => Vec::new(),
    };
    drop(restore);
    (result, memos.into())
}

/// Runs a block again.
///
/// # Errors
/// AS0351 if a memo was left over; those of `f`.
pub(crate) fn again<R>(
    memos: &Memos,
    f: impl FnOnce() -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let _restore = Restore(TAPE.replace(Some(Tape::Again(Arc::clone(memos), 0))));
    let result = f()?;
    match TAPE.take() {
        Some(Tape::Again(_, used)) if used < memos.len() => Err(differs(memos.len(), used).into()),
        _ => Ok(result),
    }
}

/// What the site has to do that comes next.
///
/// # Errors
/// AS0351 if the block had fewer sites in the forward.
pub(crate) fn turn() -> Result<Turn> {
    TAPE.with_borrow_mut(|tape| match tape {
        None => Ok(Turn::Record),
        Some(Tape::First(policy, _)) => Ok(Turn::Keep(*policy)),
        Some(Tape::Again(memos, _)) if memos.is_empty() => Ok(Turn::Record),
        Some(Tape::Again(memos, next)) => {
            let memo = memos
                .get(*next)
                .ok_or_else(|| differs(memos.len(), *next + 1))?;
            *next += 1;
            Ok(Turn::Replay(Arc::clone(memo)))
        }
    })
}

/// Leaves what the policy keeps of the site in progress.
pub(crate) fn keep(memo: Memo) {
    TAPE.with_borrow_mut(|tape| {
        if let Some(Tape::First(_, memos)) = tape {
            memos.push(Arc::new(memo));
        }
    });
}

/// The memos without the memory of their tensors.
///
/// # Errors
/// Those of the device.
pub(crate) fn emptied(memos: &Memos) -> Result<Memos> {
    let empty = |memo: &Arc<Memo>| Ok(Arc::new(memo.emptied()?));
    memos.iter().map(empty).collect()
}

/// The memos with the tensors of them all, in order.
///
/// # Errors
/// AS0351 if there are too few.
pub(crate) fn filled(memos: &Memos, tensors: &mut impl Iterator<Item = Tensor>) -> Result<Memos> {
    let mut fill = |memo: &Arc<Memo>| Ok(Arc::new(memo.of(tensors)?));
    memos.iter().map(&mut fill).collect()
}

fn differs(expected: usize, found: usize) -> Error {
    let text = format!(
        "a block that is computed again: expected {expected} attention sites, as in the forward, found {found}"
    );
    Error::new(codes::REPLAY, text)
}
