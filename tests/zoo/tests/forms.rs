//! Rows merged with heads, the sequence first, keys transposed early, biases by head.

use autosp_zoo::{config, decoder, with, zoo, Kind, Zoo};
use serde_json::{json, Value};

autosp_zoo::models!["chatglm", "codegeex4", "glm4", "falcon", "mpt", "stable_lm"];

fn last(config: Value, off: Vec<Value>) -> Zoo {
    Zoo {
        config,
        off,
        kind: Kind::Last,
        ..Zoo::default()
    }
}

/// ChatGLM's names.
fn glm() -> Zoo {
    let config = json!({
        "num_layers": 2, "padded_vocab_size": 24, "hidden_size": 32, "ffn_hidden_size": 40, "kv_channels": 8,
        "num_attention_heads": 4, "seq_length": 64, "layernorm_epsilon": 1e-5, "rmsnorm": true,
        "apply_residual_connection_post_layernorm": false, "post_layer_norm": true, "add_bias_linear": true,
        "add_qkv_bias": true, "bias_dropout_fusion": true, "multi_query_attention": true, "multi_query_group_num": 2,
        "apply_query_key_layer_scaling": true, "attention_softmax_in_fp32": true, "fp32_residual_connection": false,
        "rope_ratio": 1,
    });
    let off = vec![
        json!({"multi_query_group_num": 4}),
        json!({"apply_residual_connection_post_layernorm": true}),
        json!({"rmsnorm": false}),
    ];
    last(config, off)
}

zoo!(chatglm: chatglm, glm(), |m, json, vb, tokens| {
    let n = |key: &str| json[key].as_u64().unwrap_or_default() as usize;
    let is = |key: &str| json[key] == true;
    let config = m::Config {
        num_layers: n("num_layers"),
        padded_vocab_size: n("padded_vocab_size"),
        hidden_size: n("hidden_size"),
        ffn_hidden_size: n("ffn_hidden_size"),
        kv_channels: n("kv_channels"),
        num_attention_heads: n("num_attention_heads"),
        seq_length: n("seq_length"),
        rmsnorm: is("rmsnorm"),
        apply_residual_connection_post_layernorm: is("apply_residual_connection_post_layernorm"),
        add_bias_linear: true,
        multi_query_group_num: n("multi_query_group_num"),
        ..m::Config::glm3_6b()
    };
    m::Model::new(&config, vb)?.forward(tokens)
});

zoo!(codegeex4: codegeex4, glm(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens)
});

zoo!(glm4: glm4, glm(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens)
});

/// One row: on one device the file gives its only key head to all query heads of one row alone.
fn falcon_zoo() -> Zoo {
    let config = json!({
        "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02, "use_cache": true, "bos_token_id": 0, "eos_token_id": 1, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "n_head_kv": null, "alibi": false, "new_decoder_architecture": false,
        "multi_query": true, "parallel_attn": false, "bias": true,
    });
    Zoo {
        rows: 1,
        ..last(
            config,
            vec![json!({"parallel_attn": true}), json!({"alibi": true})],
        )
    }
}

zoo!(falcon: falcon, falcon_zoo(), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Falcon::load(vb, config)?.forward(tokens)
});

fn mpt_zoo() -> Zoo {
    let config = json!({"kv_n_heads": 2, "bias_max": 8});
    last(
        config,
        vec![json!({"kv_n_heads": 4}), json!({"bias_max": 2})],
    )
}

zoo!(mpt: mpt, mpt_zoo(), |m, json, vb, tokens| {
    let n = |key: &str| json[key].as_u64().unwrap_or_default() as usize;
    let config = m::Config {
        d_model: 32,
        n_heads: 8,
        n_layers: 2,
        expansion_ratio: 2,
        max_seq_len: 64,
        vocab_size: 24,
        kv_n_heads: n("kv_n_heads"),
        attn_prefix_lm: false,
        attn_alibi: true,
        attn_alibi_bias_max: n("bias_max"),
    };
    m::Model::new(&config, vb)?.forward(tokens)
});

fn partial(config: Value) -> Value {
    with(
        decoder(),
        with(
            json!({"num_attention_heads": 4, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5}),
            config,
        ),
    )
}

zoo!(stable_lm: stable_lm, last(partial(json!({"use_cache": true, "use_qkv_bias": true})), vec![json!({"partial_rotary_factor": 0.25}), json!({"use_qkv_bias": false})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    m::Model::new(&config, vb)?.forward(tokens, 0)
});
