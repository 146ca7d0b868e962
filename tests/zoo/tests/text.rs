//! Forms that one model alone has: blocks in a fold, sizes that are read late, a mask that is made row by row.

use autosp_zoo::{config, decoder, with, zoo, zoo_loss, Kind, Zoo};
use candle::DType;
use serde_json::json;

autosp_zoo::models!["mistral", "granitemoehybrid", "nvembed", "stella"];

/// Scales that are one would be left out.
fn granite() -> Zoo {
    Zoo {
        config: with(
            decoder(),
            json!({
                "shared_intermediate_size": 24, "attention_multiplier": 0.4, "embedding_multiplier": 1.5,
                "residual_multiplier": 0.6, "logits_scaling": 0.7,
            }),
        ),
        off: vec![
            json!({"rope_theta": 100.0}),
            json!({"attention_multiplier": 1.0}),
            json!({"residual_multiplier": 1.0}),
            json!({"num_key_value_heads": 4}),
        ],
        kind: Kind::Last,
        ..Zoo::default()
    }
}

zoo!(granitemoehybrid: granitemoehybrid, granite(), |m, json, vb, tokens| {
    let config = config::<m::GraniteMoeHybridConfig>(json)?.into_config(false);
    let mut cache = m::GraniteMoeHybridCache::new(false, DType::F32, &config, vb.device())?;
    m::GraniteMoeHybrid::load(vb, &config)?.forward(tokens, 0, &mut cache)
});

zoo_loss!(granitemoehybrid_loss: granitemoehybrid, Zoo { off: vec![], ..granite() }, |m, json, vb, tokens, labels| {
    let config = config::<m::GraniteMoeHybridConfig>(json)?.into_config(false);
    let mut cache = m::GraniteMoeHybridCache::new(false, DType::F32, &config, vb.device())?;
    m::GraniteMoeHybrid::load(vb, &config)?.forward_loss(tokens, 0, &mut cache, labels)
}, {
    let config = config::<m::GraniteMoeHybridConfig>(json)?.into_config(false);
    let mut cache = m::GraniteMoeHybridCache::new(false, DType::F32, &config, vb.device())?;
    m::GraniteMoeHybrid::load(vb, &config)?.forward(tokens, 0, &mut cache)
});

zoo!(nvembed: nvembed, Zoo {
    config: with(decoder(), json!({"padding": 3})),
    off: vec![json!({"padding": 0}), json!({"rope_theta": 100.0}), json!({"num_key_value_heads": 4})],
    ..Zoo::default()
}, |m, json, vb, tokens| {
    let padding = json["padding"].as_u64().unwrap_or_default() as u32;
    let mask = tokens.ge(padding)?.to_dtype(DType::F32)?;
    m::Model::new(&config(json)?, vb)?.forward(&mask, tokens, DType::F32)
});

fn stella(variant: &str) -> Zoo {
    let config = json!({
        "variant": variant, "vocab_size": 24, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1e4,
        "embed_head": {"in_features": 32, "out_features": 28}, "norm_eps": 1e-6, "activation_fn": "silu",
        "type_vocab_size": 2, "scaling_factor": 0.0, "padding": 3,
    });
    Zoo {
        config,
        off: vec![json!({"padding": 0}), json!({"rope_theta": 100.0})],
        kind: Kind::Last,
        ..Zoo::default()
    }
}

// A row for each text: the mean over its tokens.
zoo!(stella_large: stella, stella("Large"), |m, json, vb, tokens| {
    let padding = json["padding"].as_u64().unwrap_or_default() as u32;
    let config: m::Config = config(json)?;
    m::EmbeddingModel::new(&config, vb.pp("base"), vb.pp("head"))?.forward(tokens, &tokens.ge(padding)?)
});

// The other norm, the other order and one token type.
zoo!(stella_small: stella, Zoo { sparse: vec!["token_type_embeddings"], ..stella("Small") }, |m, json, vb, tokens| {
    let padding = json["padding"].as_u64().unwrap_or_default() as u32;
    let config: m::Config = config(json)?;
    m::EmbeddingModel::new(&config, vb.pp("base"), vb.pp("head"))?.forward_norm(tokens, &tokens.ge(padding)?)
});
