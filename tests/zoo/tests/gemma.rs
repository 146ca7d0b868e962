//! Gemma: soft caps, windows in some layers, norms with `1 + w`.

use autosp_zoo::{config, decoder, with, zoo, zoo_loss, Kind, Zoo};
use serde_json::json;

autosp_zoo::models!["gemma", "gemma2", "gemma3"];

fn gemma_2b() -> Zoo {
    Zoo {
        config: with(
            decoder(),
            json!({
                "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0,
                "attn_logit_softcapping": 1.5, "rope_local_base_freq": 100.0, "sliding_window": 5, "sliding_window_pattern": 2,
            }),
        ),
        off: vec![
            json!({"rope_theta": 100.0}),
            json!({"attention_bias": false}),
        ],
        kind: Kind::Last,
        ..Zoo::default()
    }
}

zoo!(gemma: gemma, Zoo { config: with(gemma_2b().config, json!({"hidden_act": null})), ..gemma_2b() }, |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(false, &config, vb)?.forward(tokens, 0)
});

fn gemma3_1b() -> Zoo {
    Zoo {
        // Its cache for windows takes contiguous values alone, which the file does not give it.
        original: false,
        off: vec![
            json!({"sliding_window": 64}),
            json!({"attn_logit_softcapping": null}),
            json!({"final_logit_softcapping": null}),
            json!({"rope_local_base_freq": 10000.0}),
            json!({"sliding_window_pattern": 1}),
        ],
        ..gemma_2b()
    }
}

zoo!(gemma3: gemma3, gemma3_1b(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(false, &config, vb)?.forward(tokens, 0)
});

fn gemma2_2b() -> Zoo {
    Zoo {
        off: vec![
            json!({"sliding_window": null}),
            json!({"attn_logit_softcapping": null}),
            json!({"final_logit_softcapping": null}),
        ],
        ..gemma_2b()
    }
}

zoo!(gemma2: gemma2, gemma2_2b(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(false, &config, vb)?.forward(tokens, 0)
});

// The soft cap of the logits is in the tiles of the loss.
zoo_loss!(gemma2_loss: gemma2, gemma2_2b(), |m, json, vb, tokens, labels| {
    m::Model::new(false, &config(json)?, vb)?.forward_loss(tokens, 0, labels)
}, {
    m::Model::new(false, &config(json)?, vb)?.forward(tokens, 0)
});
