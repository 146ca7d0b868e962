//! One node of candle's graph whose result has been computed already and whose backward is a closure.
//!
//! candle's graph can only be extended by its custom operations, which compute in `cpu_fwd` or `cuda_fwd`. Here the result is
//! computed first, on detached tensors and by any means; the custom operation then moves that storage into the graph, on any
//! device, without a copy.

use std::sync::{Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, MetalStorage,
    Result, Shape, Storage, Tensor, bail, op::BackpropOp,
};

/// Whether a gradient has to be given to this tensor.
pub(crate) fn tracked(x: &Tensor) -> bool {
    x.track_op()
}

struct Node<B> {
    name: &'static str,
    result: Mutex<Option<(Storage, Shape)>>,
    backward: B,
}

impl<B> Node<B> {
    fn new(name: &'static str, result: (Storage, Shape), backward: B) -> Self {
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
}

fn plain((storage, shape): (Storage, Shape)) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

macro_rules! recorder {
    ($(#[$doc:meta])* $record:ident, $op:ident, $apply:ident, $n:literal, [$first:ident $(, $more:ident)*], [$($storage:ident),*], $grads:ty) => {
        impl<B> $op for Node<B>
        where
            B: Fn([&Tensor; $n], &Tensor, &Tensor) -> Result<[Option<Tensor>; $n]> + Send + Sync + 'static,
        {
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
                let operands = [$first.detach() $(, $more.detach())*];
                let wanted = [tracked($first) $(, tracked($more))*];
                let mut grads = (self.backward)(operands.each_ref(), &result.detach(), &grad.detach())?;
                // candle expects a gradient for every tracked operand, and work for the others would be lost.
                for ((grad, operand), wanted) in grads.iter_mut().zip(&operands).zip(wanted) {
                    match grad {
                        Some(found) if wanted => *found = found.detach(),
                        None if wanted => *grad = Some(operand.zeros_like()?),
                        _ => *grad = None,
                    }
                }
                let [$first $(, $more)*] = grads;
                Ok(recorder!(@grads $first $(, $more)*))
            }
        }

        $(#[$doc])*
        pub(crate) fn $record(
            name: &'static str,
            $first: &Tensor $(, $more: &Tensor)*,
            result: (Storage, Shape),
            backward: impl Fn([&Tensor; $n], &Tensor, &Tensor) -> Result<[Option<Tensor>; $n]> + Send + Sync + 'static,
        ) -> Result<Tensor> {
            if !tracked($first) $(&& !tracked($more))* {
                return Ok(plain(result));
            }
            $first.$apply($($more,)* Node::new(name, result, backward))
        }
    };
    (@grads $only:ident) => { $only };
    (@grads $($all:ident),*) => { ($($all),*) };
}

recorder!(
    /// Records `result` as a function of one operand; `backward(operands, result, gradient)`, all detached.
    record1, CustomOp1, apply_op1, 1, [a], [_s1], Option<Tensor>
);
recorder!(
    /// Records `result` as a function of two operands.
    record2, CustomOp2, apply_op2, 2, [a, b], [_s1, _s2], (Option<Tensor>, Option<Tensor>)
);
recorder!(
    /// Records `result` as a function of three operands.
    record3, CustomOp3, apply_op3, 3, [a, b, c], [_s1, _s2, _s3], (Option<Tensor>, Option<Tensor>, Option<Tensor>)
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

/// A detached tensor around a finished storage.
pub(crate) fn tensor(result: (Storage, Shape)) -> Tensor {
    plain(result)
}
