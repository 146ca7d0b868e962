//! What a forward keeps for its backward.
//!
//! A [`checkpoint`] is a block of the model. Under the policy `all` its tape (`ops/tape.rs`) keeps what the backward of each
//! operation needs. Under the others the input of the block is kept, and the block is computed again in the backward; of each
//! attention site in the block it keeps what the policy says, so that under `qkv` and `attention` attention itself never runs twice.
//! [`Ledger::held`](crate::Ledger::held) counts the bytes, and [`autosp_plan::cost`] has the formula. With `+offload` what a block keeps
//! lies on the host (`memory/shelf.rs`). Each block has its own policy, by its place in the forward.

pub(crate) mod limit;
pub(crate) mod link;
pub(crate) mod replay;
mod shelf;
mod tiles;

pub(crate) use link::{Extent, Link, Mark, Memory, link_to};
pub(crate) use shelf::{Shelf, Stash};
pub use tiles::tiled;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use autosp_plan::codes;
use autosp_plan::settings::{Keep, Policy};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, TensorId, Var};

use crate::ledger::Holding;
use crate::ops::{accumulate, cast, owned, record_gradient, taken, tape, tensor, tracked, wide};
use crate::scope::{self, Scope};
use crate::site;
use crate::{Error, Purpose, Sp};

thread_local! {
    /// Gradients of variables that blocks have found on this thread, which is this rank, with the types of the variables.
    static SINK: RefCell<HashMap<TensorId, (Tensor, DType)>> = RefCell::new(HashMap::new());

    /// The scope in which they were found.
    static FOUND_IN: Cell<u64> = const { Cell::new(0) };

    /// The policy of the block in progress.
    static POLICY: Cell<Option<Policy>> = const { Cell::new(None) };

    /// The result of the last block.
    static LAST: Cell<Option<TensorId>> = const { Cell::new(None) };

    /// Whether there will be no backward.
    static FORWARD_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// Runs a block, `f(x)`, as one operation of candle's graph, with a tape of its own inside.
///
/// Under the policy `all` the tape of the forward is kept, and each operation's part of it freed in the backward. Under the others `x`
/// and what the policy says of the attention sites inside are kept in place of all that happens there: in the backward, `f` runs
/// again on the same `x`, in the scope of the forward, collectives included, and gives the same bits; a site whose result was kept
/// runs its `replay` in place of its forward. So it does also where a backward is asked for a second time.
///
/// The gradients of the variables that `f` captures do not pass through candle's gradient store: a trainer collects them, and
/// [`Sp::reduce_gradients`](crate::Sp::reduce_gradients) does for own loops. Outside a sharded scope and inside another checkpoint,
/// this is `f(x)`.
///
/// # Errors
/// Those of `f`.
pub fn checkpoint<F>(x: &Tensor, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    entered(x, false, f)
}

/// As [`checkpoint`], where nobody reads `x` afterwards: if it is the result of another block, its memory is taken, and no copy is
/// made of it.
///
/// # Errors
/// As [`checkpoint`]; AS0351 if a backward is asked for a second time.
pub fn checkpoint_last<F>(x: &Tensor, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    entered(x, LAST.get() == Some(x.id()), f)
}

/// What comes in with the call of a model is its caller's, though a block made it.
pub(crate) fn entered_model() {
    LAST.set(None);
}

fn entered<F>(x: &Tensor, own: bool, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    let nested = replay::is_running() || tape::is_recording() || tape::is_for_values();
    match scope::current() {
        Some(scope) if !nested => {
            let keep = keep_of_next(&scope)?;
            if FORWARD_ONLY.get() {
                return during(
                    keep.policy,
                    || Ok(tape::values(|| f(&x.detach()))?.detach()),
                );
            }
            let sp = scope.sp().clone();
            let result = during(keep.policy, || block(x, own, keep, scope, f))?;
            limit::expect_within(&sp)?;
            LAST.set(Some(result.id()));
            Ok(result)
        }
        _ => f(x),
    }
}

/// What the block keeps that begins now.
///
/// # Errors
/// AS0352 if the setting ends before it.
fn keep_of_next(scope: &Scope) -> Result<Keep> {
    let (policies, at) = (scope.sp().settings().policies(), scope.next_block());
    let keep = policies.of(at);
    keep.ok_or_else(|| of_other_blocks(scope, &format!("{} or more", at + 1)).into())
}

/// Makes sure that the setting has no more blocks than have run by the time of a backward.
///
/// # Errors
/// AS0352 if it does.
fn expect_all_blocks(scope: &Scope) -> Result<()> {
    let (least, _) = scope.sp().settings().policies().blocks();
    match scope.blocks() {
        blocks if blocks < least => Err(of_other_blocks(scope, &blocks.to_string()).into()),
        _ => Ok(()),
    }
}

fn of_other_blocks(scope: &Scope, blocks: &str) -> Error {
    let policies = scope.sp().settings().policies();
    let (expected, more) = policies.blocks();
    let least = if more { "at least " } else { "" };
    let text = format!(
        "`policy`: expected {least}{expected} blocks for `{policies}`, found {blocks} in the forward"
    );
    Error::new(codes::POLICIES, text)
        .with_help("AUTOSP_POLICY=\"all*2, attention\", whose last word is for all other blocks")
}

/// Runs `f` in a block of that policy.
fn during<R>(policy: Policy, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Policy>);

    impl Drop for Restore {
        fn drop(&mut self) {
            POLICY.set(self.0);
        }
    }

    let _restore = Restore(POLICY.replace(Some(policy)));
    f()
}

/// Runs `f` for its values alone: checkpoints keep nothing, so that no more than one block's activations are held.
pub(crate) fn forward_only<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);

    impl Drop for Restore {
        fn drop(&mut self) {
            FORWARD_ONLY.set(self.0);
        }
    }

    let _restore = Restore(FORWARD_ONLY.replace(true));
    f()
}

/// Whether there will be no backward.
pub(crate) fn is_forward_only() -> bool {
    FORWARD_ONLY.get()
}

/// What a block has for its backward.
#[derive(Default)]
struct Left {
    /// Under `all`, for the first backward.
    tape: Mutex<Option<tape::Block>>,
    /// Its input, where nobody has taken its memory and it is not on the host.
    input: Option<Tensor>,
    /// What the policy keeps of its sites; without memory where that is on the host.
    memos: replay::Memos,
    /// What is on the host: what the tape keeps, or the input and the memos' tensors.
    stash: Option<Stash>,
    held: Mutex<Option<Holding>>,
}

/// Runs a block and makes one operation of it. Where the memory of `x` is its `own`, it is taken.
fn block<F>(x: &Tensor, own: bool, keep: Keep, scope: Scope, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    expect_collected(&scope)?;
    let wanted = tracked(x);
    let shelf = if keep.offload {
        Some(scope.sp().shelf()?)
    } else {
        None
    };
    if let Some(shelf) = shelf {
        shelf.make_room()?;
    }
    let taken_from = |x: &Tensor| Ok::<_, candle_core::Error>((taken(x)?, x.shape().clone()));
    let (result, left) = if keep.policy == Policy::All {
        let input = if own && wanted {
            tape::variable(taken_from(x)?)
        } else {
            tape::input(x, wanted)?
        };
        let (y, mut tape) = tape::record(&input, &f)?;
        drop(input);
        let result = if tape.movable {
            taken_from(&y)?
        } else {
            owned(&y)?
        };
        drop(y);
        let kept = tape.take_kept();
        let (stash, held) = if let Some(shelf) = shelf {
            (Some(shelf.leave(kept, &[])?), None)
        } else {
            let extents = kept.iter().filter_map(Extent::of);
            let bytes = extents.map(|extent| extent.bytes() as u64).sum();
            let ledger = scope.sp().shared_ledger();
            (None, Some(ledger.holding(Purpose::Kept, bytes)))
        };
        let left = Left {
            tape: Mutex::new(Some(tape)),
            input: (!own).then(|| x.detach()),
            stash,
            held: Mutex::new(held),
            ..Left::default()
        };
        (result, left)
    } else {
        let (y, memos) = replay::first(keep.policy, || tape::values(|| f(&x.detach())));
        let result = owned(&y?)?;
        let input = if own {
            tensor(taken_from(x)?)
        } else {
            x.detach()
        };
        let left = if let Some(shelf) = shelf {
            let mut all = vec![input];
            all.extend(memos.iter().flat_map(|memo| memo.tensors()));
            Left {
                stash: Some(shelf.leave(Vec::new(), &all)?),
                memos: replay::emptied(&memos)?,
                ..Left::default()
            }
        } else {
            let sites = memos.iter().map(|memo| memo.bytes()).sum::<u64>();
            let ledger = scope.sp().shared_ledger();
            let held = ledger.holding(Purpose::Kept, site::bytes(&input) + sites);
            Left {
                held: Mutex::new(Some(held)),
                input: Some(input),
                memos,
                ..Left::default()
            }
        };
        (result, left)
    };
    // A block whose input is not tracked still has variables: one in the input's place makes candle call the backward.
    let input = if wanted {
        x.clone()
    } else {
        Var::zeros((), x.dtype(), x.device())?.into_inner()
    };
    record_gradient("block", [&input], result, move |grad| {
        FOUND_IN.set(scope.step());
        expect_all_blocks(&scope)?;
        scope.run(|| {
            during(keep.policy, || {
                let of_input = left.backward(scope.sp(), &f, wanted, grad)?;
                crate::train::divide::block_done()?;
                limit::expect_within(scope.sp())?;
                Ok([of_input])
            })
        })
    })
}

impl Left {
    /// The gradient of the input, if it is `wanted`; those of variables go to the sink.
    fn backward(
        &self,
        sp: &Sp,
        f: &dyn Fn(&Tensor) -> Result<Tensor>,
        wanted: bool,
        grad: &Tensor,
    ) -> Result<Option<Tensor>> {
        let mut fetched = self.stash.as_ref().map(Stash::fetch).transpose()?;
        let tape = self
            .tape
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // What the tape keeps is freed while it walks back; what a policy keeps stays for as long as candle's graph.
        let mut used = None;
        let tape = match (tape, &self.input, &mut fetched) {
            (Some(tape), _, _) => {
                used = self
                    .held
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                tape
            }
            (None, Some(x), _) => again(sp, f, x, wanted, &self.memos, &mut used)?,
            (None, None, Some(fetched)) if !fetched.tensors.is_empty() => {
                let mut tensors = std::mem::take(&mut fetched.tensors).into_iter();
                let x = tensors.next();
                let memos = replay::filled(&self.memos, &mut tensors)?;
                match x {
                    Some(x) => again(sp, f, &x, wanted, &memos, &mut used)?,
                    None => return Err(second_backward()),
                }
            }
            (None, None, _) => return Err(second_backward()),
        };
        let of_input = tape.backward(grad, &mut sink);
        drop(used);
        of_input
    }
}

fn second_backward() -> candle_core::Error {
    let text = "a block: expected one backward, found a second one, for which nothing was kept";
    Error::new(codes::REPLAY, text)
        .with_help("AUTOSP_POLICY=input")
        .into()
}

/// Gradients of an earlier scope that nobody has collected would be taken for this one's, or were never used.
///
/// # Errors
/// AS0518, once, if there are such.
fn expect_collected(scope: &Scope) -> Result<()> {
    let left = SINK.with_borrow(HashMap::len);
    if left == 0 || FOUND_IN.get() == scope.step() {
        return Ok(());
    }
    forget();
    let text = format!(
        "expected the gradients of the last backward to be collected, found those of {left} variables of blocks left behind"
    );
    Err(Error::new(codes::UNCOLLECTED, text)
        .with_help("sp.reduce_gradients(&mut grads, &vars)? after `backward`")
        .into())
}

/// Computes a block again: one that kept less than all, or whose record a first backward has used up.
fn again(
    sp: &Sp,
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    wanted: bool,
    memos: &replay::Memos,
    working: &mut Option<Holding>,
) -> Result<tape::Block> {
    let _span = tracing::debug_span!("recomputation").entered();
    let input = tape::input(x, wanted)?;
    let (_, mut tape) = replay::again(memos, || tape::record(&input, f))?;
    let kept = tape.take_kept();
    let extents = kept.iter().filter_map(Extent::of);
    let bytes = extents.map(|extent| extent.bytes() as u64).sum();
    *working = Some(sp.shared_ledger().holding(Purpose::Working, bytes));
    Ok(tape)
}

/// Takes one gradient of a variable. Several of half precision are added in `f32`.
fn sink(variable: &Tensor, grad: Tensor) -> Result<()> {
    SINK.with_borrow_mut(|sink| {
        let grad = match sink.remove(&variable.id()) {
            None => grad,
            Some((earlier, _)) => added(&earlier, &grad, variable.dtype())?,
        };
        sink.insert(variable.id(), (grad.detach(), variable.dtype()));
        Ok(())
    })
}

/// The sum of two gradients of a variable of type `dtype`, in a type that is wide enough for many. Nobody else reads `earlier`.
pub(crate) fn added(earlier: &Tensor, grad: &Tensor, dtype: DType) -> Result<Tensor> {
    let sum = wide(dtype);
    // What was cast, now or for an earlier sum, is nobody else's.
    let own = sum != dtype;
    accumulate(cast(earlier, sum)?, own, &cast(grad, sum)?)
}

/// Takes what the sink has of the variables that `wanted` knows: sums in the type of [`added`], what was found once in that of its variable.
pub(crate) fn take(wanted: impl Fn(TensorId) -> bool) -> Vec<(TensorId, Tensor)> {
    SINK.with_borrow_mut(|sink| {
        let taken = sink.extract_if(|id, _| wanted(*id));
        taken.map(|(id, (grad, _))| (id, grad)).collect()
    })
}

/// Moves the gradients that recomputed blocks found on this thread into candle's store.
pub(crate) fn collect(grads: &mut GradStore) -> Result<()> {
    for (id, (grad, dtype)) in SINK.take() {
        let sum = match grads.get_id(id) {
            None => grad,
            Some(outside) => added(&grad, &outside.detach(), dtype)?,
        };
        // Rounded once, after everything was added.
        grads.insert_id(id, cast(&sum, dtype)?.detach());
    }
    Ok(())
}

/// Forgets what an abandoned backward has left.
pub(crate) fn forget() {
    SINK.take();
}

#[cfg(test)]
mod tests;
