//! The optimizers' arithmetic: `AdamW` of variables on a GPU there, everything else on the host.

#[cfg(feature = "cuda")]
mod gpu;

use candle_core::{DType, Device, Tensor, Var, WithDType};
use rayon::prelude::*;

use super::settings::Optimizer;
use crate::Result;
use crate::ops::Real;

/// Elements that one task updates.
const BLOCK: usize = 16 * 1024;

/// The state of all variables.
pub(super) struct Updater {
    rule: Optimizer,
    slots: Vec<Slot>,
    /// Steps taken.
    steps: u64,
}

enum Slot {
    Single(State<f32>),
    Double(State<f64>),
    /// `AdamW` of a variable on a GPU, which stays there.
    #[cfg(feature = "cuda")]
    Gpu(Box<gpu::State>),
}

/// One variable's state; each list is empty until it is needed.
#[derive(Default)]
struct State<A> {
    /// The variable in full precision, where the variable itself has less.
    master: Vec<A>,
    /// First moment, or the momentum buffer.
    first: Vec<A>,
    /// Second moment.
    second: Vec<A>,
}

impl Updater {
    pub(super) fn new(rule: Optimizer, vars: impl Iterator<Item = DType>) -> Self {
        let slot = |dtype| match dtype {
            DType::F64 => Slot::Double(State::default()),
            _ => Slot::Single(State::default()),
        };
        Self {
            rule,
            slots: vars.map(slot).collect(),
            steps: 0,
        }
    }

    /// Takes one step: `grads[i]`, multiplied by `scale`, is the gradient of `vars[i]`.
    pub(super) fn step<'a>(
        &mut self,
        rate: f64,
        scale: f64,
        updates: impl Iterator<Item = (&'a Var, &'a Tensor)>,
    ) -> Result<()> {
        self.steps += 1;
        let step = Step {
            rule: self.rule,
            rate,
            scale,
            number: self.steps as f64,
        };
        for (slot, (var, grad)) in self.slots.iter_mut().zip(updates) {
            #[cfg(feature = "cuda")]
            if let (Slot::Single(_), Optimizer::AdamW { .. }, true) =
                (&*slot, self.rule, var.device().is_cuda())
            {
                *slot = Slot::Gpu(Box::new(gpu::State::new(var)?));
            }
            match slot {
                #[cfg(feature = "cuda")]
                Slot::Gpu(state) => state.step(step, var, grad)?,
                Slot::Single(state) => state.step(step, var, grad)?,
                Slot::Double(state) => state.step(step, var, grad)?,
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Step {
    rule: Optimizer,
    rate: f64,
    scale: f64,
    /// Counted from 1.
    number: f64,
}

fn read<A: WithDType>(x: &Tensor) -> Result<Vec<A>> {
    Ok(x.detach()
        .flatten_all()?
        .to_dtype(A::DTYPE)?
        .to_device(&Device::Cpu)?
        .to_vec1::<A>()?)
}

impl<A: Real + WithDType> State<A> {
    fn step(&mut self, step: Step, var: &Var, grad: &Tensor) -> Result<()> {
        let grad = read::<A>(grad)?;
        let has_master = var.dtype() != A::DTYPE;
        let mut values = if self.master.is_empty() {
            read::<A>(var)?
        } else {
            std::mem::take(&mut self.master)
        };
        match step.rule {
            Optimizer::AdamW { .. } => {
                self.first.resize(values.len(), A::ZERO);
                self.second.resize(values.len(), A::ZERO);
                self.adamw(step, &mut values, &grad);
            }
            Optimizer::Sgd { momentum, .. } => {
                if momentum > 0.0 {
                    self.first.resize(values.len(), A::ZERO);
                }
                self.sgd(step, &mut values, &grad);
            }
        }
        if has_master {
            self.master.clone_from(&values);
        }
        let updated = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
        Ok(var.set(&updated.to_dtype(var.dtype())?.to_device(var.device())?)?)
    }

    /// `PyTorch`'s order of operations: decay, moments, bias corrections, update.
    fn adamw(&mut self, step: Step, values: &mut [A], grad: &[A]) {
        let Optimizer::AdamW {
            beta1,
            beta2,
            eps,
            weight_decay,
        } = step.rule
        else {
            return;
        };
        let one = A::real(1.0);
        let scale = A::real(step.scale);
        let keep = A::real(1.0 - step.rate * weight_decay);
        let (blend1, keep2, blend2) = (A::real(1.0 - beta1), A::real(beta2), A::real(1.0 - beta2));
        let step_size = A::real(step.rate / (1.0 - beta1.powf(step.number)));
        let root2 = A::real((1.0 - beta2.powf(step.number)).sqrt());
        let eps = A::real(eps);
        let blocks = values.par_chunks_mut(BLOCK).zip(grad.par_chunks(BLOCK));
        let moments = self
            .first
            .par_chunks_mut(BLOCK)
            .zip(self.second.par_chunks_mut(BLOCK));
        blocks
            .zip(moments)
            .for_each(|((values, grad), (first, second))| {
                for (((value, &g), m), v) in values.iter_mut().zip(grad).zip(first).zip(second) {
                    let g = if scale == one { g } else { g * scale };
                    *m = *m + (g - *m) * blend1;
                    *v = *v * keep2 + g * g * blend2;
                    let root = Real::sqrt(*v) / root2 + eps;
                    *value = *value * keep - step_size * (*m / root);
                }
            });
    }

    fn sgd(&mut self, step: Step, values: &mut [A], grad: &[A]) {
        let Optimizer::Sgd {
            momentum,
            weight_decay,
        } = step.rule
        else {
            return;
        };
        let (rate, scale, decay) = (
            A::real(step.rate),
            A::real(step.scale),
            A::real(weight_decay),
        );
        let momentum = A::real(momentum);
        if self.first.is_empty() {
            values
                .par_chunks_mut(BLOCK)
                .zip(grad.par_chunks(BLOCK))
                .for_each(|(values, grad)| {
                    for (value, &g) in values.iter_mut().zip(grad) {
                        *value = *value - rate * (g * scale + decay * *value);
                    }
                });
            return;
        }
        let blocks = values.par_chunks_mut(BLOCK).zip(grad.par_chunks(BLOCK));
        blocks
            .zip(self.first.par_chunks_mut(BLOCK))
            .for_each(|((values, grad), buffer)| {
                for ((value, &g), buffer) in values.iter_mut().zip(grad).zip(buffer) {
                    *buffer = *buffer * momentum + (g * scale + decay * *value);
                    *value -= rate * *buffer;
                }
            });
    }
}

#[cfg(test)]
mod tests;
