//! Forms that one model alone has: blocks in a fold, sizes that are read late.

use autosp_zoo::{config, decoder, with, zoo, zoo_loss, Kind, Zoo};
use candle::DType;
use serde_json::json;

autosp_zoo::models!["mistral", "granitemoehybrid", "nvembed"];

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
