//! Gradients against finite differences of the loss.

use autosp_plan::codes;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;

use super::report::{norm, unravel};
use super::{Cases, gradients};
use crate::random::Stream;
use crate::{Error, Parameters, Result, Sp, loss, run_on_threads};

/// One element of a variable whose derivative was measured.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Sample {
    /// The variable.
    pub name: String,
    /// The element.
    pub index: Vec<usize>,
    /// The gradient that the backward gave.
    pub gradient: f64,
    /// `(loss(x + h) - loss(x - h)) / 2h`.
    pub difference: f64,
    /// How far the two may be apart: rounding of the loss, and 1 % of the larger of the gradient and its variable's root mean square
    /// (1e-6 of them for `f64`).
    pub allowed: f64,
}

impl Sample {
    /// Whether the two are as close as they should be.
    pub fn is_close(&self) -> bool {
        (self.gradient - self.difference).abs() <= self.allowed
    }
}

/// Measures `samples` elements of every variable, on the first mesh of the cases. A model whose logits are `f64` (its parameters are,
/// and it casts to nothing less on the way) is measured sharply; with `f32` wrong gradients are found, not inexact ones.
///
/// # Errors
/// Those of the model; AS0512 if a variable gets no gradient.
pub fn finite_differences(
    cases: &Cases,
    samples: usize,
    model: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync,
) -> Result<Vec<Sample>> {
    let case = cases
        .all()
        .first()
        .copied()
        .ok_or_else(|| Error::new(codes::MESH, "expected at least one mesh, found none"))?;
    let (tokens, labels) = cases.batch()?;
    let mut ranks = run_on_threads(case.settings(), |sp: &Sp| {
        let batch = sp.shard_labelled(&tokens, &labels)?;
        let parameters = Parameters::init(cases.seed, cases.dtype, &Device::Cpu);
        let loss =
            &|| loss::cross_entropy(&model(parameters.builder(), &batch.tokens)?, &batch.labels);
        let (double, outcome) = sp.scope(|| -> Result<_> {
            let loss = loss()?;
            Ok((
                loss.dtype() == DType::F64,
                gradients(sp, &parameters, &loss)?,
            ))
        })?;
        let (step, relative, epsilon) = if double {
            (1e-5, 1e-6, f64::EPSILON)
        } else {
            (5e-3, 1e-2, f64::from(f32::EPSILON))
        };
        let value = |var: &Var, original: &Tensor, place: usize, delta: f64| -> Result<f64> {
            let mut data = original
                .flatten_all()?
                .to_dtype(DType::F64)?
                .to_vec1::<f64>()?;
            data[place] += delta;
            var.set(&Tensor::from_vec(data, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?)?;
            let value = sp.scope(loss)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            var.set(original)?;
            Ok(value)
        };
        let mut found = Vec::new();
        for (gradient, (name, var)) in outcome.gradients.iter().zip(parameters.named()) {
            let stream = Stream::new(cases.seed, &name);
            let original = var.as_detached_tensor().copy()?;
            let rms = norm(gradient.values.iter().copied())
                / (gradient.values.len().max(1) as f64).sqrt();
            for i in 0..samples.min(var.elem_count()) {
                let place = stream.below(i as u64, var.elem_count() as u64) as usize;
                let (above, below) = (
                    value(&var, &original, place, step)?,
                    value(&var, &original, place, -step)?,
                );
                let analytic = gradient.values[place];
                found.push(Sample {
                    name: name.clone(),
                    index: unravel(place, var.dims()),
                    gradient: analytic,
                    difference: (above - below) / (2.0 * step),
                    allowed: relative * analytic.abs().max(rms)
                        + 4.0 * epsilon * outcome.loss.abs() / step,
                });
            }
        }
        Ok(found)
    })?;
    Ok(ranks.swap_remove(0))
}

/// As [`finite_differences`], asserting that every sample is close.
///
/// # Panics
/// If a run fails, or a gradient is wrong: the message names the variable, the element and both numbers.
#[track_caller]
pub fn assert_gradients(
    cases: &Cases,
    samples: usize,
    model: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync,
) {
    match finite_differences(cases, samples, model) {
        Err(error) => panic!("{error}"),
        Ok(samples) => {
            if let Some(Sample {
                name,
                index,
                gradient,
                difference,
                allowed,
            }) = samples.iter().find(|sample| !sample.is_close())
            {
                panic!(
                    "the gradient of `{name}` at {index:?} is {gradient:e}, expected {difference:e} from finite differences \
                     (allowed {allowed:.1e})"
                );
            }
        }
    }
}
