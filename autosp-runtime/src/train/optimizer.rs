//! The optimizers' arithmetic: `AdamW` of variables on a GPU there, everything else on the host.

#[cfg(feature = "cuda")]
mod gpu;

use candle_core::{DType, Device, Tensor, WithDType};
use rayon::prelude::*;

use super::groups::Manner;
use super::settings::Optimizer;
use crate::Result;
use crate::ops::{Real, wide};

/// Elements that one task updates.
const BLOCK: usize = 16 * 1024;

/// The state of the pieces of variables that this rank owns.
pub(super) struct Updater {
    rule: Optimizer,
    slots: Vec<Slot>,
    /// Steps taken.
    pub(super) steps: u64,
}

/// The state of one piece.
enum Slot {
    Single(State<f32>),
    Double(State<f64>),
    /// `AdamW` of a piece on a GPU, which stays there.
    #[cfg(feature = "cuda")]
    Gpu(gpu::State),
}

/// One piece's state; each list is empty until it is needed.
#[derive(Default)]
struct State<A> {
    /// The piece in full precision, where the variable itself has less.
    master: Vec<A>,
    /// First moment, or the momentum buffer.
    first: Vec<A>,
    /// Second moment.
    second: Vec<A>,
}

/// One list of a [`State`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Master,
    First,
    Second,
}

impl Part {
    pub(super) const ALL: [Self; 3] = [Self::Master, Self::First, Self::Second];

    /// Its name in files.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Master => "master",
            Self::First => "first",
            Self::Second => "second",
        }
    }
}

impl Updater {
    /// Without history, for pieces of variables of these types.
    pub(super) fn new(rule: Optimizer, pieces: impl Iterator<Item = DType>) -> Self {
        let slot = |dtype| match wide(dtype) {
            DType::F64 => Slot::Double(State::default()),
            _ => Slot::Single(State::default()),
        };
        Self {
            rule,
            slots: pieces.map(slot).collect(),
            steps: 0,
        }
    }

    /// Begins a step: learning rate, and the factor of all gradients.
    pub(super) fn begin(&mut self, rate: f64, scale: f64) -> Step {
        self.steps += 1;
        Step {
            rule: self.rule,
            rate,
            scale,
            number: self.steps as f64,
        }
    }

    /// The values of a piece after a step, flat, in the type of the variable; `var` is the piece of the variable before it.
    pub(super) fn update(
        &mut self,
        slot: usize,
        step: Step,
        manner: Manner,
        var: &Tensor,
        grad: &Tensor,
    ) -> Result<Tensor> {
        let step = Step {
            rate: step.rate * manner.rate,
            ..step
        };
        #[cfg(feature = "cuda")]
        gpu::State::take_over(&mut self.slots[slot], step.rule, var)?;
        match &mut self.slots[slot] {
            #[cfg(feature = "cuda")]
            Slot::Gpu(state) => state.step(step, manner.weight_decay, var, grad),
            Slot::Single(state) => state.step(step, manner.weight_decay, var, grad),
            Slot::Double(state) => state.step(step, manner.weight_decay, var, grad),
        }
    }

    /// A part of the state of a piece, flat; `None` if there is none yet.
    pub(super) fn part(&self, slot: usize, part: Part) -> Result<Option<Tensor>> {
        match &self.slots[slot] {
            Slot::Single(state) => state.part(part),
            Slot::Double(state) => state.part(part),
            #[cfg(feature = "cuda")]
            Slot::Gpu(state) => state.part(part),
        }
    }

    /// Takes over a part of the state of a piece, or its absence.
    pub(super) fn set_part(&mut self, slot: usize, part: Part, x: Option<&Tensor>) -> Result<()> {
        match &mut self.slots[slot] {
            Slot::Single(state) => state.set_part(part, x),
            Slot::Double(state) => state.set_part(part, x),
            #[cfg(feature = "cuda")]
            Slot::Gpu(state) => state.set_part(part, x),
        }
    }

    /// Bytes of all states.
    pub(super) fn bytes(&self) -> u64 {
        let of = |slot: &Slot| match slot {
            Slot::Single(state) => state.len() * size_of::<f32>(),
            Slot::Double(state) => state.len() * size_of::<f64>(),
            #[cfg(feature = "cuda")]
            Slot::Gpu(state) => state.bytes(),
        };
        self.slots.iter().map(of).sum::<usize>() as u64
    }
}

/// What all pieces of a step share.
#[derive(Clone, Copy)]
pub(super) struct Step {
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
    fn len(&self) -> usize {
        self.master.len() + self.first.len() + self.second.len()
    }

    fn list(&self, part: Part) -> &Vec<A> {
        match part {
            Part::Master => &self.master,
            Part::First => &self.first,
            Part::Second => &self.second,
        }
    }

    fn part(&self, part: Part) -> Result<Option<Tensor>> {
        let list = self.list(part);
        if list.is_empty() {
            return Ok(None);
        }
        Ok(Some(Tensor::from_slice(list, list.len(), &Device::Cpu)?))
    }

    fn set_part(&mut self, part: Part, x: Option<&Tensor>) -> Result<()> {
        let list = x.map_or_else(|| Ok(Vec::new()), read::<A>)?;
        match part {
            Part::Master => self.master = list,
            Part::First => self.first = list,
            Part::Second => self.second = list,
        }
        Ok(())
    }

    fn step(&mut self, step: Step, decay: f64, var: &Tensor, grad: &Tensor) -> Result<Tensor> {
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
                self.adamw(step, decay, &mut values, &grad);
            }
            Optimizer::Sgd { momentum, .. } => {
                if momentum > 0.0 {
                    self.first.resize(values.len(), A::ZERO);
                }
                self.sgd(step, decay, &mut values, &grad);
            }
        }
        if has_master {
            self.master.clone_from(&values);
        }
        let count = values.len();
        let updated = Tensor::from_vec(values, count, &Device::Cpu)?;
        Ok(updated.to_dtype(var.dtype())?.to_device(var.device())?)
    }

    /// `PyTorch`'s order of operations: decay, moments, bias corrections, update.
    fn adamw(&mut self, step: Step, decay: f64, values: &mut [A], grad: &[A]) {
        let Optimizer::AdamW {
            beta1, beta2, eps, ..
        } = step.rule
        else {
            return;
        };
        let one = A::real(1.0);
        let scale = A::real(step.scale);
        let keep = A::real(1.0 - step.rate * decay);
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

    fn sgd(&mut self, step: Step, decay: f64, values: &mut [A], grad: &[A]) {
        let Optimizer::Sgd { momentum, .. } = step.rule else {
            return;
        };
        let (rate, scale, decay) = (A::real(step.rate), A::real(step.scale), A::real(decay));
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
