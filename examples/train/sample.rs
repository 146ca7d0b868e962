//! Text from the trained model, by the original function with its cache: no scope, no ranks.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::llama::{Cache, Config, Llama};

/// Continues `prompt` by at most `n` tokens.
///
/// # Errors
/// When the model fails.
pub fn generate(vb: VarBuilder, config: &Config, prompt: &[u32], n: usize) -> Result<Vec<u32>> {
    let config = Config {
        last_token_only: true,
        ..config.clone()
    };
    let model = Llama::load(vb, &config)?;
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu)?;
    let mut next = prompt.to_vec();
    let (mut text, mut seen) = (Vec::with_capacity(n), 0);
    for i in 0..n.min(config.max_position_embeddings.saturating_sub(prompt.len())) {
        let tokens = Tensor::new(next.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = model
            .forward(&tokens, seen, &mut cache)?
            .squeeze(0)?
            .to_vec1::<f32>()?;
        seen += next.len();
        let token = pick(&logits, 0.7, random(i as u64));
        text.push(token);
        next = vec![token];
    }
    Ok(text)
}

/// A number in [0, 1) from a counter: the upper 53 bits of `SplitMix64` (Steele, Lea and Flood, 2014).
fn random(counter: u64) -> f64 {
    let z = (counter + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws from the distribution of the logits at a temperature; `draw` is uniform in [0, 1).
fn pick(logits: &[f32], temperature: f64, draw: f64) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits
        .iter()
        .map(|&logit| (f64::from(logit - largest) / temperature).exp())
        .collect();
    let mut left = draw * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    (weights.len() - 1) as u32
}
