//! One operation whose result has been computed already and whose backward is a closure.
//!
//! Inside a block the operation goes on the block's [`tape`]. Elsewhere it becomes a node of candle's graph, which can only be extended
//! by its custom operations, and these compute in `cpu_fwd` or `cuda_fwd`. Here the result is computed first, on detached tensors
//! and by any means; the custom operation then moves that storage into the graph, on any device, without a copy.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, MetalStorage,
    Result, Shape, Storage, Tensor, bail, op::BackpropOp,
};

use super::tape::{self, Gradient, Hint, Recipe};

/// Whether a gradient has to be given to this tensor.
pub(crate) fn tracked(x: &Tensor) -> bool {
    x.track_op()
}

/// The gradients of the operands, in memory of their own; `None` is zero.
type Grads<const N: usize> = Result<[Option<Tensor>; N]>;
type FromOperands<const N: usize> = Box<dyn Fn([&Tensor; N], &Tensor) -> Grads<N> + Send + Sync>;
type FromResult<const N: usize> = Box<dyn Fn(&Tensor, &Tensor) -> Grads<N> + Send + Sync>;
type FromGradient<const N: usize> = Box<dyn Fn(&Tensor) -> Grads<N> + Send + Sync>;

/// A backward, by what has to be kept for it.
enum Backward<const N: usize> {
    Operands(FromOperands<N>),
    Result(FromResult<N>),
    Gradient(FromGradient<N>),
}

/// Records `result` as a function of the operands; `backward(operands, gradient)`, all detached.
pub(crate) fn record<const N: usize>(
    name: &'static str,
    operands: [&Tensor; N],
    result: (Storage, Shape),
    backward: impl Fn([&Tensor; N], &Tensor) -> Grads<N> + Send + Sync + 'static,
) -> Result<Tensor>
where
    Node<N>: Graph<N>,
{
    record_hinted(name, operands, result, None, backward)
}

/// As [`record`], with what a tape may know of the result.
pub(crate) fn record_hinted<const N: usize>(
    name: &'static str,
    operands: [&Tensor; N],
    result: (Storage, Shape),
    hint: Option<Hint>,
    backward: impl Fn([&Tensor; N], &Tensor) -> Grads<N> + Send + Sync + 'static,
) -> Result<Tensor>
where
    Node<N>: Graph<N>,
{
    let backward = Backward::Operands(Box::new(backward));
    recorded(name, operands, result, hint, backward)
}

/// As [`record`], where `backward(result, gradient)` needs no operand.
pub(crate) fn record_result<const N: usize>(
    name: &'static str,
    operands: [&Tensor; N],
    result: (Storage, Shape),
    backward: impl Fn(&Tensor, &Tensor) -> Grads<N> + Send + Sync + 'static,
) -> Result<Tensor>
where
    Node<N>: Graph<N>,
{
    let backward = Backward::Result(Box::new(backward));
    recorded(name, operands, result, None, backward)
}

/// As [`record`], where `backward(gradient)` needs neither operands nor result.
pub(crate) fn record_gradient<const N: usize>(
    name: &'static str,
    operands: [&Tensor; N],
    result: (Storage, Shape),
    backward: impl Fn(&Tensor) -> Grads<N> + Send + Sync + 'static,
) -> Result<Tensor>
where
    Node<N>: Graph<N>,
{
    let backward = Backward::Gradient(Box::new(backward));
    recorded(name, operands, result, None, backward)
}

fn recorded<const N: usize>(
    name: &'static str,
    operands: [&Tensor; N],
    result: (Storage, Shape),
    hint: Option<Hint>,
    backward: Backward<N>,
) -> Result<Tensor>
where
    Node<N>: Graph<N>,
{
    if tape::is_for_values() {
        return Ok(tape::result(result, hint));
    }
    if !operands.iter().any(|x| tracked(x)) {
        return Ok(tensor(result));
    }
    if !tape::is_recording() {
        return Node::new(name, result, backward).apply(operands);
    }
    let result = tape::variable(result);
    let keeps_result = matches!(backward, Backward::Result(_));
    let back: Box<dyn FnOnce(&Tensor) -> Grads<N> + Send> = match backward {
        Backward::Gradient(backward) => Box::new(move |grad| backward(grad)),
        Backward::Result(backward) => {
            let result = result.detach();
            Box::new(move |grad| backward(&result, grad))
        }
        Backward::Operands(backward) => {
            let kept = operands.map(Kept::new);
            Box::new(move |grad| {
                let mut tensors = Vec::with_capacity(N);
                for kept in &kept {
                    tensors.push(kept.get()?);
                }
                match <[&Tensor; N]>::try_from(tensors.iter().collect::<Vec<_>>()) {
                    Ok(operands) => backward(operands, grad),
                    Err(_) => bail!("{name}: wrong number of operands"),
                }
            })
        }
    };
    tape::push(&operands, &result, (hint, true), move |grad| {
        let own = |tensor: Tensor| Gradient {
            tensor: tensor.detach(),
            fresh: true,
        };
        Ok(back(&grad.tensor)?.map(|grad| grad.map(own)).into())
    });
    if keeps_result {
        tape::keep(&result);
    }
    Ok(result)
}

/// An operand that a backward needs.
pub(crate) enum Kept {
    Tensor(Tensor),
    Again(Arc<Recipe>),
}

impl Kept {
    pub(crate) fn new(x: &Tensor) -> Self {
        if let Some(Hint::Again(recipe)) = tape::hint(x) {
            return Self::Again(recipe);
        }
        tape::keep(x);
        Self::Tensor(x.detach())
    }

    pub(crate) fn get(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(x) => Ok(x.clone()),
            Self::Again(recipe) => recipe.get(),
        }
    }
}

/// A node of candle's graph.
pub(crate) struct Node<const N: usize> {
    name: &'static str,
    result: Mutex<Option<(Storage, Shape)>>,
    backward: Backward<N>,
}

/// Nodes of as many operands as candle's custom operations can have.
pub(crate) trait Graph<const N: usize> {
    /// The node's result, in the graph.
    fn apply(self, operands: [&Tensor; N]) -> Result<Tensor>;
}

impl<const N: usize> Node<N> {
    fn new(name: &'static str, result: (Storage, Shape), backward: Backward<N>) -> Self {
        Self {
            name,
            result: Mutex::new(Some(result)),
            backward,
        }
    }

    fn take(&self) -> Result<(Storage, Shape)> {
        match self
            .result
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            Some(result) => Ok(result),
            None => bail!(
                "{}: the result of this operation was taken twice",
                self.name
            ),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: expected a result on the cpu", self.name),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: expected a result on a cuda device", self.name),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: expected a result on a metal device", self.name),
        }
    }

    /// A gradient for every tracked operand, as candle expects; work for the others would be lost.
    fn back(&self, operands: [&Tensor; N], result: &Tensor, grad: &Tensor) -> Grads<N> {
        let detached = operands.map(Tensor::detach);
        let grad = grad.detach();
        let mut grads = match &self.backward {
            Backward::Operands(backward) => backward(detached.each_ref(), &grad)?,
            Backward::Result(backward) => backward(&result.detach(), &grad)?,
            Backward::Gradient(backward) => backward(&grad)?,
        };
        for (grad, operand) in grads.iter_mut().zip(operands) {
            *grad = match grad.take() {
                _ if !tracked(operand) => None,
                Some(found) => Some(found.detach()),
                None => Some(operand.zeros_like()?.detach()),
            };
        }
        Ok(grads)
    }
}

macro_rules! graph {
    ($op:ident, $apply:ident, $n:literal, [$first:ident $(, $more:ident)*], [$($storage:ident),*], $grads:ty) => {
        impl $op for Node<$n> {
            fn name(&self) -> &'static str {
                self.name
            }
            fn cpu_fwd(&self, $($storage: &CpuStorage, _: &Layout),*) -> Result<(CpuStorage, Shape)> {
                self.cpu()
            }
            fn cuda_fwd(&self, $($storage: &CudaStorage, _: &Layout),*) -> Result<(CudaStorage, Shape)> {
                self.cuda()
            }
            fn metal_fwd(&self, $($storage: &MetalStorage, _: &Layout),*) -> Result<(MetalStorage, Shape)> {
                self.metal()
            }
            fn bwd(&self, $first: &Tensor $(, $more: &Tensor)*, result: &Tensor, grad: &Tensor) -> Result<$grads> {
                let [$first $(, $more)*] = self.back([$first $(, $more)*], result, grad)?;
                Ok(graph!(@grads $first $(, $more)*))
            }
        }

        impl Graph<$n> for Node<$n> {
            fn apply(self, [$first $(, $more)*]: [&Tensor; $n]) -> Result<Tensor> {
                $first.$apply($($more,)* self)
            }
        }
    };
    (@grads $only:ident) => { $only };
    (@grads $($all:ident),*) => { ($($all),*) };
}

graph!(CustomOp1, apply_op1, 1, [a], [_s1], Option<Tensor>);
graph!(
    CustomOp2,
    apply_op2,
    2,
    [a, b],
    [_s1, _s2],
    (Option<Tensor>, Option<Tensor>)
);
graph!(
    CustomOp3,
    apply_op3,
    3,
    [a, b, c],
    [_s1, _s2, _s3],
    (Option<Tensor>, Option<Tensor>, Option<Tensor>)
);
/// The values of `x` in a storage of their own, contiguous, ready to be recorded. One copy.
pub(crate) fn owned(x: &Tensor) -> Result<(Storage, Shape)> {
    let copy = x.detach().force_contiguous()?;
    let shape = copy.shape().clone();
    Ok((taken(&copy)?, shape))
}

/// Moves the memory out of a tensor that nobody else reads any more and that is dropped next.
pub(crate) fn taken(x: &Tensor) -> Result<Storage> {
    let take = Take(Mutex::new(None));
    x.inplace_op1(&take)?;
    match take.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(storage) => Ok(storage),
        None => bail!("the storage of a tensor was not given"),
    }
}

struct Take(Mutex<Option<Storage>>);

impl Take {
    fn keep(&self, storage: Storage) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(storage);
    }
}

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let taken = std::mem::replace(storage, CpuStorage::U8(Vec::new()));
        self.keep(Storage::Cpu(taken));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        let device = storage.device.clone();
        let empty = device.alloc_zeros::<u8>(1)?;
        let taken = std::mem::replace(storage, CudaStorage::wrap_cuda_slice(empty, device));
        self.keep(Storage::Cuda(taken));
        Ok(())
    }
}

/// Moves memory into a tensor whose own was [`taken`].
pub(crate) fn put(x: &Tensor, storage: Storage) -> Result<()> {
    x.inplace_op1(&Put(Mutex::new(Some(storage))))
}

struct Put(Mutex<Option<Storage>>);

impl Put {
    fn storage(&self) -> Option<Storage> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl InplaceOp1 for Put {
    fn name(&self) -> &'static str {
        "put"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        match self.storage() {
            Some(Storage::Cpu(given)) => *storage = given,
            _ => bail!("put: expected memory of the cpu"),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        match self.storage() {
            Some(Storage::Cuda(given)) => *storage = given,
            _ => bail!("put: expected memory of a GPU"),
        }
        Ok(())
    }
}

/// A detached tensor around a finished storage.
pub(crate) fn tensor((storage, shape): (Storage, Shape)) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
