//! Every variable gets a gradient, and it is the slope of the loss.

use autosp::{Settings, Sp, loss::cross_entropy};
use autosp_reference::{Tensors, global_norm};
use candle_core::{DType, Tensor};

use crate::{
    job::{Job, tiny},
    llama,
};

/// The length of a step along a direction: long against f32's rounding of the loss, short against its curvature.
const STEP: f64 = 2e-2;

#[test]
fn slopes_along_every_variable() {
    let job = Job::random(tiny(2), 2, 30, 9, |_| true);
    let checked = autosp::run_with(Settings::default().with_sp(2), |sp| slopes(&job, sp)).unwrap();
    // Embedding, head, last norm, and nine of each of the two blocks.
    assert_eq!(checked, [21, 21]);
}

fn slopes(job: &Job, sp: &Sp) -> autosp::Result<usize> {
    let gradients = job.on_rank(sp)?.gradients;
    let parameters = job.parameters(sp.device())?;
    let model = llama::Llama::load(parameters.builder(), &job.config)?;
    let batch = sp.shard_targets(&job.tokens, &job.labels)?;
    let loss = || -> autosp::Result<f64> {
        sp.scope(|| {
            let mut cache = llama::Cache::new(false, DType::F32, &job.config, sp.device())?;
            let loss = cross_entropy(&model.forward(&batch.tokens, 0, &mut cache)?, &batch.labels)?;
            Ok(f64::from(loss.to_scalar::<f32>()?))
        })
    };
    for (name, var) in parameters.named() {
        let start = var.as_detached_tensor().copy()?;
        // One direction along the even elements of the gradient and one along the odd: every element is in one of them.
        for parity in [0, 1] {
            let gradient = gradients[&name].flatten_all()?;
            let chosen: Vec<f32> = (0..gradient.elem_count())
                .map(|i| if i % 2 == parity { 1.0 } else { 0.0 })
                .collect();
            let direction =
                (&gradient * Tensor::from_vec(chosen, gradient.dims1()?, sp.device())?)?;
            let slope = global_norm(&Tensors::from([(name.clone(), direction.clone())]))?;
            assert!(slope > 0.0, "{name} has no gradient");
            let step = direction
                .affine(STEP / slope, 0.0)?
                .reshape(start.shape())?;
            var.set(&(&start + &step)?)?;
            let above = loss()?;
            var.set(&(&start - &step)?)?;
            let below = loss()?;
            let found = (above - below) / (2.0 * STEP);
            assert!(
                (found - slope).abs() <= 0.02 * slope + 5e-5,
                "{name}: gradient {slope}, slope {found}"
            );
        }
        var.set(&start)?;
    }
    Ok(parameters.named().len())
}
