//! What a forward keeps for its backward.
//!
//! A [`checkpoint`] is a block of the model. Under the policy `all` its tape (`ops/tape.rs`) keeps what the backward of each
//! operation needs. Under the others the input of the block is kept, and the block is computed again in the backward; of each
//! attention site in the block it keeps what the policy says, so that under `qkv` and `attention` attention itself never runs twice.
//! [`Ledger::held`](crate::Ledger::held) counts the bytes, and [`autosp_plan::cost`] has the formula.

pub(crate) mod replay;
mod tiles;

pub use tiles::tiled;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use autosp_plan::codes;
use autosp_plan::settings::Policy;
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, TensorId, Var};

use crate::ops::{accumulate, cast, owned, record_gradient, taken, tape, tensor, tracked, wide};
use crate::scope::{self, Scope};
use crate::site;
use crate::{Error, Sp};

thread_local! {
    /// Gradients of variables that blocks have found on this thread, which is this rank, with the types of the variables.
    static SINK: RefCell<HashMap<TensorId, (Tensor, DType)>> = RefCell::new(HashMap::new());

    /// The scope in which they were found.
    static FOUND_IN: Cell<u64> = const { Cell::new(0) };

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
    match scope::current() {
        Some(_) if FORWARD_ONLY.get() => Ok(tape::values(|| f(&x.detach()))?.detach()),
        Some(scope) if !replay::is_running() && !tape::is_recording() => {
            let result = block(x, own, scope, f)?;
            LAST.set(Some(result.id()));
            Ok(result)
        }
        _ => f(x),
    }
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

/// Bytes that a scope holds, in the ledger of its rank while it does.
struct Held(Sp, u64);

impl Held {
    fn new(sp: &Sp, bytes: u64) -> Self {
        sp.ledger().hold(bytes);
        Self(sp.clone(), bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.ledger().release(self.1);
    }
}

/// Runs a block and makes one operation of it. Where the memory of `x` is its `own`, it is taken.
fn block<F>(x: &Tensor, own: bool, scope: Scope, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    expect_collected(&scope)?;
    let policy = scope.sp().settings().policy();
    let wanted = tracked(x);
    let taken_from = |x: &Tensor| Ok::<_, candle_core::Error>((taken(x)?, x.shape().clone()));
    let (result, tape, memos, kept) = if policy == Policy::All {
        let input = if own && wanted {
            tape::variable(taken_from(x)?)
        } else {
            tape::input(x, wanted)?
        };
        let (y, tape) = tape::record(&input, &f)?;
        let result = if tape.movable {
            taken_from(&y)?
        } else {
            owned(&y)?
        };
        let kept = (!own).then(|| x.detach());
        (result, Some(tape), replay::Memos::default(), kept)
    } else {
        let (y, memos) = replay::first(policy, || tape::values(|| f(&x.detach())));
        let result = owned(&y?)?;
        let kept = if own {
            tensor(taken_from(x)?)
        } else {
            x.detach()
        };
        (result, None, memos, Some(kept))
    };
    let bytes = match policy {
        Policy::All => 0,
        _ => site::bytes(x) + memos.iter().map(|memo| memo.bytes()).sum::<u64>(),
    };
    let held = Held::new(scope.sp(), bytes);
    // A block whose input is not tracked still has variables: one in the input's place makes candle call the backward.
    let input = if wanted {
        x.clone()
    } else {
        Var::zeros((), x.dtype(), x.device())?.into_inner()
    };
    let tape = Mutex::new(tape);
    record_gradient("block", [&input], result, move |grad| {
        let _held = &held;
        let tape = tape.lock().unwrap_or_else(PoisonError::into_inner).take();
        FOUND_IN.set(scope.step());
        scope.run(|| {
            let tape = match (tape, &kept) {
                (Some(tape), _) => tape,
                (None, Some(x)) => again(&f, x, wanted, &memos)?,
                (None, None) => {
                    let text = "a block: expected one backward, found a second one, for which nothing was kept";
                    return Err(Error::new(codes::REPLAY, text)
                        .with_help("AUTOSP_POLICY=input")
                        .into());
                }
            };
            let of_input = tape.backward(grad, &mut sink)?;
            crate::train::divide::block_done()?;
            Ok([of_input])
        })
    })
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
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    wanted: bool,
    memos: &replay::Memos,
) -> Result<tape::Block> {
    let _span = tracing::debug_span!("recomputation").entered();
    let input = tape::input(x, wanted)?;
    let (_, tape) = replay::again(memos, || tape::record(&input, f))?;
    Ok(tape)
}

/// Takes one gradient of a variable. Several of half precision are added in `f32`.
fn sink(variable: &Tensor, grad: Tensor) -> Result<()> {
    SINK.with_borrow_mut(|sink| {
        let grad = match sink.remove(&variable.id()) {
            None => grad,
            Some((earlier, _)) => {
                let sum = wide(variable.dtype());
                // What was cast, now or for an earlier sum, is nobody else's.
                let own = sum != variable.dtype();
                accumulate(cast(&earlier, sum)?, own, &cast(&grad, sum)?)?
            }
        };
        sink.insert(variable.id(), (grad.detach(), variable.dtype()));
        Ok(())
    })
}

/// Takes what the sink has of the variables that `wanted` knows.
pub(crate) fn take(wanted: impl Fn(TensorId) -> bool) -> Result<Vec<(TensorId, Tensor)>> {
    SINK.with_borrow_mut(|sink| {
        let taken = sink.extract_if(|id, _| wanted(*id));
        taken
            .map(|(id, (grad, dtype))| Ok((id, cast(&grad, dtype)?)))
            .collect()
    })
}

/// Moves the gradients that recomputed blocks found on this thread into candle's store.
pub(crate) fn collect(grads: &mut GradStore) -> Result<()> {
    for (id, (grad, dtype)) in SINK.take() {
        let grad = cast(&grad, dtype)?;
        let sum = match grads.get_id(id) {
            None => grad,
            Some(earlier) => (earlier + grad)?.detach(),
        };
        grads.insert_id(id, sum);
    }
    Ok(())
}

/// Forgets what an abandoned backward has left.
pub(crate) fn forget() {
    SINK.take();
}

#[cfg(test)]
mod tests;
