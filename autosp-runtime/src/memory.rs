//! What a forward keeps for its backward.
//!
//! Under the policy `all` candle's graph keeps every activation. Under the others a [`checkpoint`] keeps the input of a block and
//! computes the block again in the backward; of each attention site in the block it keeps what the policy says, so that under `qkv`
//! and `attention` attention itself never runs twice. [`Ledger::held`](crate::Ledger::held) counts the bytes, and
//! [`autosp_plan::cost`] has the formula.

pub(crate) mod tape;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use autosp_plan::settings::Policy;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, TensorId, Var};

use crate::Sp;
use crate::ops::{owned, record1, tracked};
use crate::scope::{self, Scope};
use crate::site;

thread_local! {
    /// Gradients of variables that recomputed blocks have found on this thread, which is this rank.
    static SINK: RefCell<HashMap<TensorId, Tensor>> = RefCell::new(HashMap::new());

    /// Whether there will be no backward.
    static FORWARD_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f(x)` and, under other policies than `all`, keeps `x` and what the policy says of the attention sites inside, in place of all
/// that happens there.
///
/// In the backward, `f` runs again on the same `x`, in the scope of the forward, collectives included, and gives the same bits; a site
/// whose result was kept runs its `replay` in place of its forward. The gradients of the variables that `f` captures do not pass
/// through candle's gradient store: a trainer collects them, and [`Sp::reduce_gradients`](crate::Sp::reduce_gradients) does for own
/// loops. Outside a sharded scope, under the policy `all`, and inside another checkpoint, this is `f(x)`.
///
/// # Errors
/// Those of `f`.
pub fn checkpoint<F>(x: &Tensor, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    match scope::current() {
        Some(_) if FORWARD_ONLY.get() => Ok(f(&x.detach())?.detach()),
        Some(scope) if !tape::is_running() => match scope.sp().settings().policy() {
            Policy::All => f(x),
            policy => recomputed(x, scope, policy, f),
        },
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

fn recomputed<F>(x: &Tensor, scope: Scope, policy: Policy, f: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    // The graph of the block dies with this statement, except where nothing in it is tracked.
    let (y, memos) = tape::first(policy, || f(&x.detach()));
    let y = y?.detach();
    // A block whose input is not tracked still has variables: a variable in the input's place makes candle call the backward.
    let x = if tracked(x) {
        x.clone()
    } else {
        Var::from_tensor(&x.detach())?.into_inner()
    };
    let bytes = site::bytes(&x) + memos.iter().map(|memo| memo.bytes()).sum::<u64>();
    let held = Held::new(scope.sp(), bytes);
    record1("checkpoint", &x, owned(&y)?, move |[x], _, grad| {
        let _held = &held;
        scope.run(|| backward(&f, x, &memos, grad))
    })
}

/// Computes the block again and walks it back from `grad`: the gradient of x is returned, those of variables go to the sink.
fn backward(
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    memos: &tape::Memos,
    grad: &Tensor,
) -> Result<[Option<Tensor>; 1]> {
    let _span = tracing::debug_span!("recomputation").entered();
    let x = Var::from_tensor(x)?;
    let y = tape::again(memos, || f(x.as_tensor()))?;
    if !tracked(&y) {
        return Ok([None]);
    }
    let seed = y.apply_op1(Seed(grad.clone()))?;
    drop(y);
    let variables: Vec<Tensor> = seed
        .sorted_nodes()
        .into_iter()
        .filter(|node| node.is_variable() && node.id() != x.id())
        .cloned()
        .collect();
    let mut grads = seed.backward()?;
    SINK.with_borrow_mut(|sink| -> Result<()> {
        for variable in &variables {
            if let Some(grad) = grads.remove(variable) {
                let grad = match sink.remove(&variable.id()) {
                    None => grad,
                    Some(earlier) => (earlier + grad)?,
                };
                sink.insert(variable.id(), grad.detach());
            }
        }
        Ok(())
    })?;
    crate::train::divide::block_done()?;
    Ok([grads.remove(&x)])
}

/// Takes what the sink has of the variables that `wanted` knows.
pub(crate) fn take(wanted: impl Fn(TensorId) -> bool) -> Vec<(TensorId, Tensor)> {
    SINK.with_borrow_mut(|sink| sink.extract_if(|id, _| wanted(*id)).collect())
}

/// Moves the gradients that recomputed blocks found on this thread into candle's store.
pub(crate) fn collect(grads: &mut GradStore) -> Result<()> {
    for (id, grad) in SINK.take() {
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

/// A scalar zero whose backward hands its operand a given gradient, where candle's `backward` would begin with ones.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        like: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let device = like.device.clone();
        let zero = device.alloc_zeros::<f32>(1)?;
        let zero = candle_core::CudaStorage::wrap_cuda_slice(zero, device);
        Ok((zero, Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

#[cfg(test)]
mod tests;
