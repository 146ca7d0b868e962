//! The optimizers' arithmetic: `AdamW` of variables on a GPU there, unless its state lies on the host; everything else on the host.

#[cfg(feature = "cuda")]
mod gpu;
mod host;

use candle_core::{DType, Device, Tensor, WithDType};
use rayon::prelude::*;

use autosp_plan::settings::Place;

use super::groups::Manner;
use super::settings::Optimizer;
use crate::Result;
use crate::ops::{Real, wide};
pub(super) use host::{Batch, Desk, Order};

/// Elements that one task updates.
const BLOCK: usize = 16 * 1024;

/// The state of the pieces of variables that this rank owns.
pub(super) struct Updater {
    rule: Optimizer,
    /// Where the state lies.
    place: Place,
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

impl Slot {
    /// Whether it has no state yet.
    fn is_new(&self) -> bool {
        match self {
            Self::Single(state) => state.len() == 0,
            Self::Double(state) => state.len() == 0,
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => false,
        }
    }
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
            place: Place::Device,
            slots: pieces.map(slot).collect(),
            steps: 0,
        }
    }

    /// Keeps the state on the host or on the device from the first step on; later nothing changes.
    pub(super) fn keep_on(&mut self, place: Place) {
        if self.slots.iter().all(Slot::is_new) {
            self.place = place;
        }
    }

    /// Where the state lies.
    pub(super) fn place(&self) -> Place {
        self.place
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
        self.make_room(step.rule, values.len());
        let rule = Rule::new(step, decay);
        let all = values.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
        let moments = blocks(&mut self.first).zip(blocks(&mut self.second));
        let all: Vec<_> = all.zip(moments).collect();
        all.into_par_iter()
            .for_each(|((values, grad), (first, second))| {
                rule.step(values, grad, first, second);
            });
        if has_master {
            self.master.clone_from(&values);
        }
        let count = values.len();
        let updated = Tensor::from_vec(values, count, &Device::Cpu)?;
        Ok(updated.to_dtype(var.dtype())?.to_device(var.device())?)
    }

    /// Makes the lists that the rule needs as long as the piece.
    fn make_room(&mut self, rule: Optimizer, len: usize) {
        let (first, second) = match rule {
            Optimizer::AdamW { .. } => (true, true),
            Optimizer::Sgd { momentum, .. } => (momentum > 0.0, false),
        };
        if first {
            self.first.resize(len, A::ZERO);
        }
        if second {
            self.second.resize(len, A::ZERO);
        }
    }
}

/// The numbers of a step, for elements of type `A`.
#[derive(Clone, Copy)]
enum Rule<A> {
    AdamW {
        scale: Option<A>,
        keep: A,
        blend1: A,
        keep2: A,
        blend2: A,
        size: A,
        root2: A,
        eps: A,
    },
    Sgd {
        scale: A,
        decay: A,
        momentum: A,
        rate: A,
    },
}

impl<A: Real> Rule<A> {
    fn new(step: Step, decay: f64) -> Self {
        match step.rule {
            Optimizer::AdamW {
                beta1, beta2, eps, ..
            } => {
                let scale = A::real(step.scale);
                Self::AdamW {
                    scale: (scale != A::real(1.0)).then_some(scale),
                    keep: A::real(1.0 - step.rate * decay),
                    blend1: A::real(1.0 - beta1),
                    keep2: A::real(beta2),
                    blend2: A::real(1.0 - beta2),
                    size: A::real(step.rate / (1.0 - beta1.powf(step.number))),
                    root2: A::real((1.0 - beta2.powf(step.number)).sqrt()),
                    eps: A::real(eps),
                }
            }
            Optimizer::Sgd { momentum, .. } => Self::Sgd {
                scale: A::real(step.scale),
                decay: A::real(decay),
                momentum: A::real(momentum),
                rate: A::real(step.rate),
            },
        }
    }

    /// Steps some values, with their parts of the lists; one that the rule does not need is empty.
    fn step(self, values: &mut [A], grad: &[A], first: &mut [A], second: &mut [A]) {
        match self {
            // `PyTorch`'s order of operations: decay, moments, bias corrections, update.
            Self::AdamW {
                scale,
                keep,
                blend1,
                keep2,
                blend2,
                size,
                root2,
                eps,
            } => {
                for (((value, &g), m), v) in values.iter_mut().zip(grad).zip(first).zip(second) {
                    let g = scale.map_or(g, |scale| g * scale);
                    *m = *m + (g - *m) * blend1;
                    *v = *v * keep2 + g * g * blend2;
                    let root = Real::sqrt(*v) / root2 + eps;
                    *value = *value * keep - size * (*m / root);
                }
            }
            Self::Sgd {
                scale, decay, rate, ..
            } if first.is_empty() => {
                for (value, &g) in values.iter_mut().zip(grad) {
                    *value = *value - rate * (g * scale + decay * *value);
                }
            }
            Self::Sgd {
                scale,
                decay,
                momentum,
                rate,
            } => {
                for ((value, &g), buffer) in values.iter_mut().zip(grad).zip(first) {
                    *buffer = *buffer * momentum + (g * scale + decay * *value);
                    *value = *value - rate * *buffer;
                }
            }
        }
    }
}

/// Blocks of a list, and empty ones where it is empty.
fn blocks<A>(list: &mut [A]) -> impl Iterator<Item = &mut [A]> {
    let none = std::iter::repeat_with(|| -> &mut [A] { &mut [] });
    list.chunks_mut(BLOCK).chain(none)
}

#[cfg(test)]
mod tests;
