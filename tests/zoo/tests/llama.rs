//! The Llama family: rotary positions, grouped queries, gated feed-forward layers.

use autosp_zoo::{config, decoder, with, zoo, zoo_loss, Kind, Zoo};
use candle::DType;
use serde_json::json;

autosp_zoo::models![
    "llama", "mistral", "granite", "yi", "helium", "olmo", "olmo2", "llama2_c", "mixtral"
];

fn last(config: serde_json::Value, off: Vec<serde_json::Value>) -> Zoo {
    Zoo {
        config,
        off,
        kind: Kind::Last,
        ..Zoo::default()
    }
}

zoo!(llama: llama, last(decoder(), vec![json!({"rope_theta": 100.0}), json!({"num_key_value_heads": 4})]), |m, json, vb, tokens| {
    let config = config::<m::LlamaConfig>(json)?.into_config(false);
    let mut cache = m::Cache::new(false, DType::F32, &config, vb.device())?;
    m::Llama::load(vb, &config)?.forward(tokens, 0, &mut cache)
});

zoo!(mistral: mistral, last(with(decoder(), json!({"sliding_window": 5})), vec![json!({"sliding_window": null}), json!({"rope_theta": 100.0})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo!(granite: granite, last(decoder(), vec![json!({"rope_theta": 100.0})]), |m, json, vb, tokens| {
    let config = config::<m::GraniteConfig>(json)?.into_config(false);
    let mut cache = m::Cache::new(false, DType::F32, &config, vb.device())?;
    m::Granite::load(vb, &config)?.forward(tokens, 0, &mut cache)
});

zoo!(yi: yi, last(decoder(), vec![json!({"num_key_value_heads": 4})]), |m, json, vb, tokens| {
    let config = m::Config {
        vocab_size: 24,
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: json["num_key_value_heads"].as_u64().unwrap_or(2) as usize,
        hidden_act: candle_nn::Activation::Silu,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
    };
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo!(helium: helium, last(with(decoder(), json!({"bos_token_id": 0, "eos_token_id": 1})), vec![json!({"rope_theta": 100.0})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo!(olmo: olmo, last(with(decoder(), json!({"clip_qkv": 0.5})), vec![json!({"clip_qkv": null}), json!({"attention_bias": false})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo!(olmo2: olmo2, last(decoder(), vec![json!({"rope_theta": 100.0}), json!({"attention_bias": false})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo_loss!(llama_loss: llama, last(decoder(), vec![]), |m, json, vb, tokens, labels| {
    let config = config::<m::LlamaConfig>(json)?.into_config(false);
    let mut cache = m::Cache::new(false, DType::F32, &config, vb.device())?;
    m::Llama::load(vb, &config)?.forward_loss(tokens, 0, &mut cache, labels)
}, {
    let config = config::<m::LlamaConfig>(json)?.into_config(false);
    let mut cache = m::Cache::new(false, DType::F32, &config, vb.device())?;
    m::Llama::load(vb, &config)?.forward(tokens, 0, &mut cache)
});

zoo_loss!(mistral_loss: mistral, last(with(decoder(), json!({"sliding_window": 5})), vec![]), |m, json, vb, tokens, labels| {
    m::Model::new(&config(json)?, vb)?.forward_loss(tokens, 0, labels)
}, {
    m::Model::new(&config(json)?, vb)?.forward(tokens, 0)
});

// candle-transformers keeps this in the file that reads llama2.c's own format.
impl models::llama2_c::Config {
    pub fn head_size(&self) -> usize {
        self.dim / self.n_heads
    }
}

impl slow::models::llama2_c::Config {
    pub fn head_size(&self) -> usize {
        self.dim / self.n_heads
    }
}

zoo!(llama2_c: llama2_c, Zoo { off: vec![json!({"n_kv_heads": 4})], ..Zoo::default() }, |m, json, vb, tokens| {
    let n_kv_heads = json["n_kv_heads"].as_u64().unwrap_or(2) as usize;
    let config = m::Config {
        dim: 32,
        hidden_dim: 40,
        n_layers: 2,
        n_heads: 8,
        n_kv_heads,
        vocab_size: 24,
        seq_len: 64,
        norm_eps: 1e-5,
    };
    let table = |i: i32, f: fn(f32) -> f32| (0..64).map(|t| f(t as f32 / 10f32.powi(i))).collect::<Vec<_>>();
    let rows = |f: fn(f32) -> f32| candle::Tensor::new(vec![table(0, f), table(1, f)], vb.device())?.t()?.contiguous();
    let tables = std::collections::HashMap::from([("freq_cis_real".to_string(), rows(f32::cos)?), ("freq_cis_imag".to_string(), rows(f32::sin)?)]);
    let mut cache = m::Cache::new(false, &config, candle_nn::VarBuilder::from_tensors(tables, DType::F32, vb.device()))?;
    m::Llama::load(vb, config)?.forward(tokens, 0, &mut cache)
});

// The router's weights are read to the host, and with them goes its gradient.
zoo!(mixtral: mixtral, Zoo {
    detached: vec!["gate.weight"],
    sparse: vec!["experts"],
    ..last(
        with(decoder(), json!({"sliding_window": 5, "num_experts_per_tok": 2, "num_local_experts": 4, "use_flash_attn": false})),
        vec![json!({"sliding_window": 64}), json!({"num_experts_per_tok": 1})],
    )
}, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo_loss!(mixtral_loss: mixtral, last(
    with(decoder(), json!({"sliding_window": 5, "num_experts_per_tok": 2, "num_local_experts": 4, "use_flash_attn": false})),
    vec![],
), |m, json, vb, tokens, labels| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward_loss(tokens, 0, labels)
}, {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});
