//! Qwen and its like.

use autosp_zoo::{config, decoder, with, zoo, Kind, Zoo};
use serde_json::json;

autosp_zoo::models!["qwen2", "qwen3"];

fn qwen2() -> Zoo {
    Zoo {
        config: with(
            decoder(),
            json!({"sliding_window": 5, "max_window_layers": 2, "use_sliding_window": true}),
        ),
        off: vec![json!({"sliding_window": 64}), json!({"rope_theta": 100.0})],
        ..Zoo::default()
    }
}

zoo!(qwen2_tokens: qwen2, qwen2(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0, None)
});

zoo!(qwen2_last: qwen2, Zoo { kind: Kind::Last, ..qwen2() }, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::ModelForCausalLM::new(&config, vb)?.forward(tokens, 0)
});

zoo!(qwen3: qwen3, Zoo {
    config: with(qwen2().config, json!({"head_dim": 6, "use_sliding_window": false})),
    off: vec![json!({"rope_theta": 100.0}), json!({"attention_bias": false})],
    ..Zoo::default()
}, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});
