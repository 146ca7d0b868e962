//! `AdamW` on a GPU: master weights and moments in `f32` beside the variable.

use candle_core::{DType, Device, Tensor};

use super::{Optimizer, Part, Slot, Step};
use crate::Result;
use crate::cuda::ops::{AdamW, adamw, contiguous};
use crate::cuda::{device_of, unwritten};

/// One piece's state; each tensor is missing until it is needed.
#[derive(Default)]
pub(super) struct State {
    /// The piece in `f32`, where the variable itself has less.
    master: Option<Tensor>,
    first: Option<Tensor>,
    second: Option<Tensor>,
}

impl State {
    /// Moves the state of a piece on a GPU there, if kernels step it.
    pub(super) fn take_over(slot: &mut Slot, rule: Optimizer, var: &Tensor) -> Result<()> {
        let Slot::Single(host) = slot else {
            return Ok(());
        };
        let stepped = matches!(var.dtype(), DType::F32 | DType::BF16 | DType::F16);
        if !(var.device().is_cuda() && stepped && matches!(rule, Optimizer::AdamW { .. })) {
            return Ok(());
        }
        let mut state = Self::default();
        for part in Part::ALL {
            if let Some(list) = host.part(part)? {
                *state.slot(part) = Some(list.to_device(var.device())?);
            }
        }
        *slot = Slot::Gpu(state);
        Ok(())
    }

    fn slot(&mut self, part: Part) -> &mut Option<Tensor> {
        match part {
            Part::Master => &mut self.master,
            Part::First => &mut self.first,
            Part::Second => &mut self.second,
        }
    }

    /// The values of the piece after a step, flat, in the type of the variable.
    pub(super) fn step(
        &mut self,
        step: Step,
        decay: f64,
        var: &Tensor,
        grad: &Tensor,
    ) -> Result<Tensor> {
        let Optimizer::AdamW {
            beta1, beta2, eps, ..
        } = step.rule
        else {
            return Ok(var.flatten_all()?);
        };
        let grad = contiguous(&grad.flatten_all()?.to_dtype(DType::F32)?)?;
        let master = match self.master.take() {
            Some(master) => master,
            None => var
                .detach()
                .flatten_all()?
                .to_dtype(DType::F32)?
                .force_contiguous()?,
        };
        for part in [Part::First, Part::Second] {
            if self.slot(part).is_none() {
                *self.slot(part) = Some(master.zeros_like()?);
            }
        }
        let (Some(first), Some(second)) = (&self.first, &self.second) else {
            return Ok(master.to_dtype(var.dtype())?);
        };
        let numbers = AdamW {
            scale: step.scale as f32,
            keep: (1.0 - step.rate * decay) as f32,
            blend1: (1.0 - beta1) as f32,
            keep2: beta2 as f32,
            blend2: (1.0 - beta2) as f32,
            step: (step.rate / (1.0 - beta1.powf(step.number))) as f32,
            root2: (1.0 - beta2.powf(step.number)).sqrt() as f32,
            eps: eps as f32,
        };
        let out = unwritten(&device_of(var)?, var.elem_count(), var.dtype())?;
        adamw(numbers, [&master, first, second, &grad], &out)?;
        if var.dtype() != DType::F32 {
            self.master = Some(master);
        }
        Ok(out)
    }

    /// A part of the state on the host; `None` if there is none yet.
    pub(super) fn part(&self, part: Part) -> Result<Option<Tensor>> {
        let found = match part {
            Part::Master => &self.master,
            Part::First => &self.first,
            Part::Second => &self.second,
        };
        Ok(found
            .as_ref()
            .map(|x| x.to_device(&Device::Cpu))
            .transpose()?)
    }

    /// Takes over a part of the state, or its absence.
    pub(super) fn set_part(&mut self, part: Part, x: Option<&Tensor>) -> Result<()> {
        let like = [&self.master, &self.first, &self.second]
            .into_iter()
            .flatten()
            .next();
        let device = like.map_or(Device::Cpu, |like| like.device().clone());
        let given = x.map(|x| x.flatten_all()?.to_dtype(DType::F32)?.to_device(&device));
        *self.slot(part) = given.transpose()?;
        Ok(())
    }

    pub(super) fn bytes(&self) -> usize {
        let parts = [&self.master, &self.first, &self.second];
        parts
            .into_iter()
            .flatten()
            .map(|x| x.elem_count() * size_of::<f32>())
            .sum()
    }
}
