//! A block's own record of what it computed, walked back without candle's graph.
//!
//! candle's backward makes a tensor of zeros for every operand of every operation and adds the gradient to it: four passes over
//! memory where none is needed. While [`record`] runs a block, the operations of [`crate::ops`] write themselves on a tape instead. The
//! first gradient of a tensor is taken as it is, the next is added in place, and what an operation has kept is freed as soon as its
//! backward has run.
//!
//! Results on the tape are variables to candle. Operations of candle that a block calls by itself therefore make small graphs between
//! such variables; where one of their results comes back to an operation of the tape, the graph behind it becomes one entry. So every
//! operation has its gradient, whoever records it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, TensorId};

use super::accumulate;

/// What happens to the gradients of what this thread computes.
enum Mode {
    /// There will be none. What a tape would know of results decides what they are, so that it is known here too.
    Values(HashMap<TensorId, Hint>),
    /// They are written down here.
    Tape(Tape),
}

thread_local! {
    /// `None`: candle's graph has them.
    static MODE: RefCell<Option<Mode>> = const { RefCell::new(None) };
}

/// Puts the previous mode back, also when unwinding.
struct Restore(Option<Mode>);

impl Drop for Restore {
    fn drop(&mut self) {
        let previous = self.0.take();
        // The thread-local is gone only while the thread itself ends.
        let _ = MODE.try_with(|mode| mode.replace(previous));
    }
}

/// The gradient of one result.
pub(crate) struct Gradient {
    pub(crate) tensor: Tensor,
    /// Nobody else reads this memory, so that it may be added to.
    pub(crate) fresh: bool,
}

impl Gradient {
    /// The same gradient seen in another way: another shape, other strides.
    pub(crate) fn viewed(self, view: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            tensor: view(&self.tensor)?,
            fresh: self.fresh,
        })
    }

    /// The same gradient for two operands.
    pub(crate) fn shared(&self) -> Self {
        Self {
            tensor: self.tensor.clone(),
            fresh: false,
        }
    }

    fn plus(self, other: Self) -> Result<Self> {
        let writable = |grad: &Self| grad.fresh && grad.tensor.is_contiguous();
        let (into, from) = if writable(&self) {
            (self, other)
        } else {
            (other, self)
        };
        let tensor = accumulate(into.tensor, into.fresh, &from.tensor)?;
        Ok(Self {
            tensor,
            fresh: true,
        })
    }
}

/// How a result can be had again from what the tape keeps anyway, for less than it costs to keep it.
pub(crate) struct Recipe {
    make: Box<dyn Fn() -> Result<Tensor> + Send + Sync>,
    /// While those who need it take turns.
    made: Mutex<Option<Tensor>>,
}

impl Recipe {
    pub(crate) fn new(make: impl Fn() -> Result<Tensor> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            make: Box::new(make),
            made: Mutex::new(None),
        })
    }

    pub(crate) fn get(&self) -> Result<Tensor> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &*made {
            return Ok(made.clone());
        }
        let tensor = (self.make)()?;
        *made = Some(tensor.clone());
        Ok(tensor)
    }
}

/// What is known of a result beyond its gradient.
#[derive(Clone)]
pub(crate) enum Hint {
    /// It is this tensor in a wider type.
    Cast(Tensor),
    /// It is `silu` of this tensor.
    Silu(Tensor),
    /// It need not be kept.
    Again(Arc<Recipe>),
}

/// What goes back from the gradient of a result to those of the operands.
type Backward = Box<dyn FnOnce(Gradient) -> Result<Vec<Option<Gradient>>> + Send>;

/// Where the gradient of an operand goes.
enum Slot {
    /// To the entry that made it.
    Made(usize),
    /// It is a variable of the model.
    Variable(Tensor),
}

struct Entry {
    slots: Vec<Option<Slot>>,
    backward: Backward,
}

struct Made {
    entry: usize,
    hint: Option<Hint>,
    /// Only this block has its memory: the operation made it, or it is a view of such.
    own: bool,
    /// Its memory is its own, and no operation has had it as an operand.
    last: bool,
}

#[derive(Default)]
struct Tape {
    entries: Vec<Entry>,
    made: HashMap<TensorId, Made>,
    /// What the operations keep for their backward of memory that only this block has, by its place.
    kept: HashMap<usize, Tensor>,
}

impl Tape {
    fn push(
        &mut self,
        result: &Tensor,
        slots: Vec<Option<Slot>>,
        made: (Option<Hint>, bool, bool),
        backward: Backward,
    ) {
        let (hint, last, own) = made;
        let entry = self.entries.len();
        self.entries.push(Entry { slots, backward });
        let made = Made {
            entry,
            hint,
            own,
            last,
        };
        self.made.insert(result.id(), made);
    }

    /// Whether the memory of `x` is only this block's.
    fn owns(&self, x: &Tensor) -> bool {
        self.made.get(&x.id()).is_some_and(|made| made.own)
    }

    fn slot(&mut self, x: &Tensor) -> Option<Slot> {
        if let Some(made) = self.made.get_mut(&x.id()) {
            made.last = false;
            return Some(Slot::Made(made.entry));
        }
        if !x.track_op() {
            return None;
        }
        if x.is_variable() {
            return Some(Slot::Variable(x.clone()));
        }
        Some(Slot::Made(self.adopt(x)))
    }

    /// Makes the graph of candle's that leads to `x` one entry.
    fn adopt(&mut self, x: &Tensor) -> usize {
        let leaves: Vec<Tensor> = x
            .sorted_nodes()
            .into_iter()
            .filter(|node| node.is_variable())
            .cloned()
            .collect();
        let slots = leaves.iter().map(|leaf| self.slot(leaf)).collect();
        let (end, variables) = (x.clone(), leaves);
        let backward = Box::new(move |grad: Gradient| {
            let seed = end.apply_op1(Seed(grad.tensor))?;
            drop(end);
            let mut grads = seed.backward()?;
            let of = |leaf: &Tensor| {
                grads.remove(leaf).map(|tensor| Gradient {
                    tensor: tensor.detach(),
                    fresh: true,
                })
            };
            Ok(variables.iter().map(of).collect())
        });
        self.push(x, slots, (None, false, false), backward);
        self.entries.len() - 1
    }
}

/// What a block has recorded, from its input to its result.
pub(crate) struct Block {
    entries: Vec<Entry>,
    output: Option<Slot>,
    /// The result's memory is its own and nothing on the tape reads it.
    pub(crate) movable: bool,
    /// What the operations keep of memory that only this block has, each memory once.
    kept: Vec<Tensor>,
}

/// What a block begins with: a copy of `x` on the tape if a gradient is `wanted` for it, else its values.
pub(crate) fn input(x: &Tensor, wanted: bool) -> Result<Tensor> {
    if wanted {
        Ok(variable(super::owned(x)?))
    } else {
        Ok(x.detach())
    }
}

/// Runs `f` on `input` and records it. The input is a [`variable`] if a gradient is wanted for it. The result is `f`'s, and belongs to
/// no graph of candle's that anybody should follow.
///
/// # Errors
/// Those of `f`.
pub(crate) fn record(
    input: &Tensor,
    f: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<(Tensor, Block)> {
    let mut tape = Tape::default();
    // The first entry is the input's, which nothing has made.
    tape.entries.push(Entry {
        slots: Vec::new(),
        backward: Box::new(|_| Ok(Vec::new())),
    });
    if input.track_op() {
        let made = Made {
            entry: 0,
            hint: None,
            own: true,
            last: false,
        };
        tape.made.insert(input.id(), made);
    }
    let restore = Restore(MODE.replace(Some(Mode::Tape(tape))));
    let result = f(input)?;
    let tape = MODE.take();
    drop(restore);
    let Some(Mode::Tape(mut tape)) = tape else {
        candle_core::bail!("the tape of a block is gone")
    };
    let movable = tape.made.get(&result.id()).is_some_and(|made| made.last);
    let output = tape.slot(&result);
    let block = Block {
        entries: tape.entries,
        output,
        movable,
        kept: tape.kept.into_values().collect(),
    };
    Ok((result, block))
}

impl Block {
    /// What the operations keep of memory that only this block has, each memory once. Where it is moved away, it has to be back before
    /// [`backward`](Self::backward). What else they keep is the model's own, or in graphs of candle's.
    pub(crate) fn take_kept(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.kept)
    }

    /// Walks back from the gradient of the result to that of the input, which is returned if there is one; `variable` takes those of
    /// the model's variables, each as often as an operation has one.
    ///
    /// # Errors
    /// Those of the operations.
    pub(crate) fn backward(
        mut self,
        grad: &Tensor,
        variable: &mut dyn FnMut(&Tensor, Tensor) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        // Operations free what they have kept one by one.
        self.kept.clear();
        let mut sums: Vec<Option<Gradient>> = Vec::new();
        sums.resize_with(self.entries.len(), || None);
        let grad = Gradient {
            tensor: grad.clone(),
            fresh: false,
        };
        give(&mut sums, self.output.as_ref(), grad, variable)?;
        while self.entries.len() > 1 {
            let (Some(entry), Some(grad)) = (self.entries.pop(), sums.pop()) else {
                break;
            };
            let Some(grad) = grad else { continue };
            let grads = (entry.backward)(grad)?;
            for (slot, grad) in entry.slots.iter().zip(grads) {
                if let Some(grad) = grad {
                    give(&mut sums, slot.as_ref(), grad, variable)?;
                }
            }
        }
        Ok(sums.pop().flatten().map(|grad| grad.tensor))
    }
}

fn give(
    sums: &mut [Option<Gradient>],
    slot: Option<&Slot>,
    grad: Gradient,
    variable: &mut dyn FnMut(&Tensor, Tensor) -> Result<()>,
) -> Result<()> {
    match slot {
        None => Ok(()),
        Some(Slot::Variable(x)) => variable(x, grad.tensor),
        Some(Slot::Made(entry)) => {
            let sum = &mut sums[*entry];
            *sum = Some(match sum.take() {
                None => grad,
                Some(sum) => sum.plus(grad)?,
            });
            Ok(())
        }
    }
}

/// Runs `f` for its values alone: nothing is recorded, and nothing kept.
pub(crate) fn values<R>(f: impl FnOnce() -> R) -> R {
    let _restore = Restore(MODE.replace(Some(Mode::Values(HashMap::new()))));
    f()
}

/// Whether operations of this thread are written on a tape.
pub(crate) fn is_recording() -> bool {
    MODE.with_borrow(|mode| matches!(mode, Some(Mode::Tape(_))))
}

/// Whether this thread wants no gradients.
pub(crate) fn is_for_values() -> bool {
    MODE.with_borrow(|mode| matches!(mode, Some(Mode::Values(_))))
}

/// Whether this thread runs a block and `x` has a place on its tape, or would have one.
pub(crate) fn holds(x: &Tensor) -> bool {
    MODE.with_borrow(|mode| match mode {
        Some(Mode::Tape(_)) => x.track_op(),
        Some(Mode::Values(_)) => true,
        None => false,
    })
}

/// What the tape knows of `x`.
pub(crate) fn hint(x: &Tensor) -> Option<Hint> {
    MODE.with_borrow(|mode| match mode {
        Some(Mode::Tape(tape)) => tape.made.get(&x.id())?.hint.clone(),
        Some(Mode::Values(hints)) => hints.get(&x.id()).cloned(),
        None => None,
    })
}

/// Writes down that `result` was made from `operands`. `own` says that its memory is its own. Without a tape the hint alone is noted.
pub(crate) fn push(
    operands: &[&Tensor],
    result: &Tensor,
    (hint, own): (Option<Hint>, bool),
    backward: impl FnOnce(Gradient) -> Result<Vec<Option<Gradient>>> + Send + 'static,
) {
    MODE.with_borrow_mut(|mode| match mode {
        Some(Mode::Tape(tape)) => {
            let slots = operands.iter().map(|x| tape.slot(x)).collect();
            let view = |x: &&Tensor| tape.owns(x) && place(x) == place(result);
            let only = own || operands.iter().any(view);
            tape.push(result, slots, (hint, own, only), Box::new(backward));
        }
        Some(Mode::Values(_)) | None => note(mode, result, hint),
    });
}

/// Notes that a backward on the tape keeps `x`, if its memory is only the block's.
pub(crate) fn keep(x: &Tensor) {
    MODE.with_borrow_mut(|mode| {
        if let Some(Mode::Tape(tape)) = mode
            && tape.owns(x)
        {
            tape.kept.entry(place(x)).or_insert_with(|| x.detach());
        }
    });
}

/// Notes that a backward on the tape keeps `x`, whose memory is nobody else's.
pub(crate) fn keep_own(x: &Tensor) {
    MODE.with_borrow_mut(|mode| {
        if let Some(Mode::Tape(tape)) = mode
            && x.elem_count() > 0
        {
            tape.kept.entry(place(x)).or_insert_with(|| x.detach());
        }
    });
}

/// Where the memory of a tensor is held: the same for all tensors that see it, for as long as one does.
fn place(x: &Tensor) -> usize {
    let (storage, _) = x.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// Notes what decides about other results.
fn note(mode: &mut Option<Mode>, result: &Tensor, hint: Option<Hint>) {
    if let (Some(Mode::Values(hints)), Some(hint @ (Hint::Cast(_) | Hint::Silu(_)))) = (mode, hint)
    {
        hints.insert(result.id(), hint);
    }
}

/// A result in the block that this thread runs: a [`variable`] on a tape, else values alone.
pub(crate) fn result(result: (Storage, Shape), hint: Option<Hint>) -> Tensor {
    if is_recording() {
        return variable(result);
    }
    let result = super::tensor(result);
    MODE.with_borrow_mut(|mode| note(mode, &result, hint));
    result
}

/// A result on the tape.
pub(crate) fn variable((storage, shape): (Storage, Shape)) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), true)
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
