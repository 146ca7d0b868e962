//! The rows of the operation table for candle-transformers' shared layers, and the definitions of its helpers.

use autosp::rt::{library, ops};
use candle::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::VarBuilder;
use candle_transformers::models::with_tracing::{layer_norm, linear, Embedding, RmsNorm};
use candle_transformers::utils;

fn builder() -> VarBuilder<'static> {
    let map = candle_nn::VarMap::new();
    let builder = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    // The variables outlive the map.
    builder
}

/// Each token by itself, and a gradient for the operand.
fn tokenwise(layer: &dyn Module, twin: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let x = Var::randn(0f32, 1.0, (2, 6, 8), &Device::Cpu)?;
    let (whole, found) = (layer.forward(&x)?, twin(&x)?);
    let apart = (&whole - &found)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(apart < 1e-5, "the twin differs by {apart}");
    for t in 0..6 {
        let one = layer.forward(&x.narrow(1, t, 1)?.contiguous()?)?;
        let apart = (&one - &whole.narrow(1, t, 1)?)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(apart < 1e-5, "token {t} differs by {apart}");
    }
    let gradients = found.sqr()?.sum_all()?.backward()?;
    assert!(gradients.get(&x).is_some());
    Ok(())
}

#[test]
fn layers_compute_each_token_by_itself() -> Result<()> {
    let linear = linear(8, 5, builder())?;
    tokenwise(&linear, &|x| ops::layer(&linear, x))?;
    let rms = RmsNorm::new(8, 1e-5, builder())?;
    tokenwise(&rms, &|x| ops::norm_layer(&rms, x))?;
    tokenwise(&rms, &|x| rms.forward_diff(x))?;
    let norm = layer_norm(8, 1e-5, builder())?;
    tokenwise(&norm, &|x| ops::norm_layer(&norm, x))?;
    let embedding = Embedding::new(10, 8, builder())?;
    let tokens = Tensor::new(&[[1u32, 2, 3], [4, 5, 6]], &Device::Cpu)?;
    let (whole, found) = (
        embedding.forward(&tokens)?,
        ops::layer(&embedding, &tokens)?,
    );
    assert_eq!(whole.to_vec3::<f32>()?, found.to_vec3::<f32>()?);
    Ok(())
}

#[test]
fn helpers_are_what_their_definitions_say() -> Result<()> {
    library::repeat_kv(utils::repeat_kv)?;
    library::build_causal_mask(utils::build_causal_mask)?;
    library::build_additive_causal_mask(utils::build_additive_causal_mask)
}

/// A layer that is no such thing.
struct Mixing;

impl Module for Mixing {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.broadcast_sub(&x.mean_keepdim(1)?)
    }
}

#[test]
fn a_layer_that_mixes_tokens_is_found() -> Result<()> {
    let x = Tensor::randn(0f32, 1.0, (2, 6, 8), &Device::Cpu)?;
    let error = ops::layer(&Mixing, &x).err().map(|e| e.to_string());
    assert!(error.is_some_and(|e| e.contains("AS0331")));
    Ok(())
}
