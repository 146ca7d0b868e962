//! `AdamW` on a GPU: master weights and moments in `f32` beside the variable.

use candle_core::{DType, Tensor, Var};

use super::{Optimizer, Step};
use crate::Result;
use crate::cuda::ops::{AdamW, adamw, contiguous};

/// One variable's state.
pub(super) struct State {
    master: Tensor,
    first: Tensor,
    second: Tensor,
}

impl State {
    /// No steps taken yet.
    pub(super) fn new(var: &Var) -> Result<Self> {
        let master = var
            .as_detached_tensor()
            .to_dtype(DType::F32)?
            .force_contiguous()?;
        Ok(Self {
            first: master.zeros_like()?,
            second: master.zeros_like()?,
            master,
        })
    }

    pub(super) fn step(&self, step: Step, var: &Var, grad: &Tensor) -> Result<()> {
        let Optimizer::AdamW {
            beta1,
            beta2,
            eps,
            weight_decay,
        } = step.rule
        else {
            return Ok(());
        };
        let grad = contiguous(&grad.to_dtype(DType::F32)?)?;
        let numbers = AdamW {
            scale: step.scale as f32,
            keep: (1.0 - step.rate * weight_decay) as f32,
            blend1: (1.0 - beta1) as f32,
            keep2: beta2 as f32,
            blend2: (1.0 - beta2) as f32,
            step: (step.rate / (1.0 - beta1.powf(step.number))) as f32,
            root2: (1.0 - beta2.powf(step.number)).sqrt() as f32,
            eps: eps as f32,
        };
        adamw(
            numbers,
            [&self.master, &self.first, &self.second, &grad],
            var.as_tensor(),
        )
    }
}
