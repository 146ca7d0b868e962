//! Tokens, variables and configs.

use std::collections::BTreeMap;

use candle::{Device, Tensor};
use serde_json::Value;

/// `SplitMix64` at a counter.
fn draw(seed: u64, counter: u64) -> u64 {
    let z = seed
        .wrapping_mul(0xd134_2543_de82_ef95)
        .wrapping_add((counter + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number of mean 0 and variance 1, as a sum of twelve even ones.
fn normal(seed: u64, i: u64) -> f32 {
    let even = |k| (draw(seed, 12 * i + k) >> 40) as f32 / (1u64 << 24) as f32;
    (0..12).map(even).sum::<f32>() - 6.0
}

fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Tokens `[b, s]` below `vocabulary`.
pub fn tokens(b: usize, s: usize, vocabulary: usize, seed: u64) -> Tensor {
    let all: Vec<u32> = (0..(b * s) as u64)
        .map(|i| (draw(seed, i) % vocabulary as u64) as u32)
        .collect();
    Tensor::from_vec(all, (b, s), &Device::Cpu).expect("b * s tokens")
}

/// A random tensor for every variable: matrices with variance 1.5 / width, vectors (norms, biases) of mean 0.7.
pub fn variables(shapes: &BTreeMap<String, Vec<usize>>) -> BTreeMap<String, Tensor> {
    let one = |name: &String, shape: &Vec<usize>| {
        let (seed, count) = (hash(name), shape.iter().product::<usize>());
        let values: Vec<f32> = match shape.as_slice() {
            [] | [_] => (0..count as u64)
                .map(|i| 0.7 + 0.4 * normal(seed, i))
                .collect(),
            [.., width] => {
                let scale = (1.5 / *width as f32).sqrt();
                (0..count as u64).map(|i| scale * normal(seed, i)).collect()
            }
        };
        Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).expect("values of that shape")
    };
    shapes
        .iter()
        .map(|(name, shape)| (name.clone(), one(name, shape)))
        .collect()
}

/// A model's config from JSON.
///
/// # Errors
/// When a key is missing or of another type.
pub fn config<T: serde::de::DeserializeOwned>(json: &Value) -> candle::Result<T> {
    serde_json::from_value(json.clone()).map_err(candle::Error::wrap)
}

/// The keys that most decoders share: two layers, eight query heads over two key heads.
pub fn decoder() -> Value {
    serde_json::json!({
        "vocab_size": 24, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "tie_word_embeddings": false,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": true, "mlp_bias": true,
    })
}

/// A config with further keys, or with other values.
pub fn with(mut config: Value, more: Value) -> Value {
    if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
        config.extend(more);
    }
    config
}
