//! Phi, StarCoder and small models.

use autosp_zoo::{config, decoder, with, zoo, Kind, Zoo};
use serde_json::json;

autosp_zoo::models!["phi3", "starcoder2", "smollm3"];

fn last(config: serde_json::Value, off: Vec<serde_json::Value>) -> Zoo {
    Zoo {
        config,
        off,
        kind: Kind::Last,
        ..Zoo::default()
    }
}

zoo!(phi3: phi3, last(with(decoder(), json!({"partial_rotary_factor": 0.5})), vec![json!({"partial_rotary_factor": 1.0})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo!(starcoder2: starcoder2, last(with(decoder(), json!({"norm_epsilon": 1e-5, "use_bias": true, "sliding_window": 5})), vec![json!({"sliding_window": null}), json!({"use_bias": false})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

zoo!(smollm3: smollm3, last(with(decoder(), json!({"no_rope_layer_interval": 2})), vec![json!({"no_rope_layer_interval": 3})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::ModelForCausalLM::new(&config, vb)?.forward(tokens, 0)
});
