//! Qwen and its like.

use autosp_zoo::{config, decoder, with, zoo, zoo_loss, Kind, Zoo};
use serde_json::json;

autosp_zoo::models!["qwen2", "qwen3", "qwen2_moe"];

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

zoo!(qwen2_last: qwen2, Zoo { kind: Kind::Last, ..qwen2() }, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::ModelForCausalLM::new(&config, vb)?.forward(tokens, 0)
});

// The model without its head, which is a public function on the way to the attention.
zoo!(qwen2_base: qwen2, qwen2(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0, None)
});

// The head is a layer of candle-transformers, whose weights are not seen.
zoo_loss!(qwen2_loss: qwen2, Zoo { kind: Kind::Last, ..qwen2() }, |m, json, vb, tokens, labels| {
    m::ModelForCausalLM::new(&config(json)?, vb)?.forward_loss(tokens, 0, labels)
}, {
    m::ModelForCausalLM::new(&config(json)?, vb)?.forward(tokens, 0)
});

zoo!(qwen3: qwen3, Zoo {
    config: with(qwen2().config, json!({"head_dim": 6, "use_sliding_window": false})),
    off: vec![json!({"rope_theta": 100.0}), json!({"attention_bias": false})],
    ..Zoo::default()
}, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});

// The router's weights are read to the host, and with them goes its gradient.
zoo!(qwen2_moe: qwen2_moe, Zoo {
    config: with(qwen2().config, json!({
        "decoder_sparse_step": 1, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2,
        "num_experts": 4, "norm_topk_prob": true,
    })),
    off: vec![json!({"sliding_window": 64}), json!({"num_experts_per_tok": 1}), json!({"norm_topk_prob": false})],
    detached: vec!["mlp.gate.weight"],
    sparse: vec![".experts."],
    kind: Kind::Last,
    ..Zoo::default()
}, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});
