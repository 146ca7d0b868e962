//! Clipping, SGD and AdamW as their papers and `PyTorch` write them, on whole tensors.

use candle_core::{DType, Result, Tensor};

use crate::{Tensors, Variables};

/// The 2-norm over all tensors, summed in f64.
///
/// # Errors
/// When a tensor cannot be read.
pub fn global_norm(tensors: &Tensors) -> Result<f64> {
    let mut sum = 0.0;
    for tensor in tensors.values() {
        sum += norm(tensor)?.powi(2);
    }
    Ok(sum.sqrt())
}

/// The 2-norm of one tensor, summed in f64.
pub(crate) fn norm(tensor: &Tensor) -> Result<f64> {
    Ok(tensor
        .to_dtype(DType::F64)?
        .sqr()?
        .sum_all()?
        .to_scalar::<f64>()?
        .sqrt())
}

/// Scales all gradients so that their global norm is at most `max`; returns the norm before (as `clip_grad_norm_`, with its
/// 1e-6 in the denominator).
///
/// # Errors
/// When a tensor cannot be scaled.
pub fn clip(gradients: &mut Tensors, max: f64) -> Result<f64> {
    let total = global_norm(gradients)?;
    let scale = (max / (total + 1e-6)).min(1.0);
    for gradient in gradients.values_mut() {
        *gradient = (&*gradient * scale)?;
    }
    Ok(total)
}

/// One step of gradient descent.
///
/// # Errors
/// When shapes differ.
pub fn sgd(variables: &Variables, gradients: &Tensors, rate: f64) -> Result<()> {
    for (name, var) in variables {
        var.set(&(var.as_tensor() - (&gradients[name] * rate)?)?.detach())?;
    }
    Ok(())
}

/// AdamW (Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>), decay on every variable.
#[derive(Debug)]
pub struct Adam {
    rate: f64,
    betas: (f64, f64),
    eps: f64,
    decay: f64,
    moments: Option<(Tensors, Tensors)>,
    step: i32,
}

impl Adam {
    /// An optimizer without history.
    pub fn new(rate: f64, betas: (f64, f64), eps: f64, decay: f64) -> Self {
        Self {
            rate,
            betas,
            eps,
            decay,
            moments: None,
            step: 0,
        }
    }

    /// One step.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn step(&mut self, variables: &Variables, gradients: &Tensors) -> Result<()> {
        self.step += 1;
        if self.moments.is_none() {
            let zeros = || -> Result<Tensors> {
                gradients
                    .iter()
                    .map(|(name, gradient)| Ok((name.clone(), gradient.zeros_like()?)))
                    .collect()
            };
            self.moments = Some((zeros()?, zeros()?));
        }
        let Some((first, second)) = &mut self.moments else {
            return Ok(());
        };
        let (b1, b2) = self.betas;
        for (name, var) in variables {
            let gradient = &gradients[name];
            let m = ((&first[name] * b1)? + (gradient * (1.0 - b1))?)?;
            let v = ((&second[name] * b2)? + (gradient.sqr()? * (1.0 - b2))?)?;
            let m_hat = (&m / (1.0 - b1.powi(self.step)))?;
            let v_hat = (&v / (1.0 - b2.powi(self.step)))?;
            let update = (m_hat / (v_hat.sqrt()? + self.eps)?)?;
            let kept = (var.as_tensor() * (1.0 - self.rate * self.decay))?;
            var.set(&(kept - (update * self.rate)?)?.detach())?;
            first.insert(name.clone(), m);
            second.insert(name.clone(), v);
        }
        Ok(())
    }
}
