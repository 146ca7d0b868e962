//! Attention in both directions, with a mask from the caller.

use autosp_zoo::{config, decoder, with, zoo, Zoo};
use serde_json::{json, Value};

autosp_zoo::models![
    "bert",
    "distilbert",
    "nomic_bert",
    "z_image_text",
    "xlm_roberta",
    "jina_bert"
];

fn tokens_of(config: Value, off: Vec<Value>) -> Zoo {
    Zoo {
        config,
        off,
        ..Zoo::default()
    }
}

fn bert_config() -> Value {
    json!({
        "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "max_position_embeddings": 64, "type_vocab_size": 2,
        "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0, "padding": true,
    })
}

zoo!(bert: bert, tokens_of(bert_config(), vec![json!({"padding": false}), json!({"hidden_act": "relu"})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    let (types, mask) = (tokens.zeros_like()?, tokens.gt(3u32)?);
    m::BertModel::load(vb, &config)?.forward(tokens, &types, (json["padding"] == true).then_some(&mask))
});

fn distilbert_config() -> Value {
    json!({
        "vocab_size": 24, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "activation": "gelu",
        "max_position_embeddings": 64, "initializer_range": 0.02, "pad_token_id": 0, "hidden": 3,
    })
}

zoo!(distilbert: distilbert, tokens_of(distilbert_config(), vec![json!({"hidden": 0}), json!({"activation": "relu"})]), |m, json, vb, tokens| {
    let hidden = json["hidden"].as_u64().unwrap_or_default() as u32;
    let mask = tokens.lt(hidden)?.unsqueeze(1)?.unsqueeze(1)?;
    let config: m::Config = config(json)?;
    m::DistilBertModel::load(vb, &config)?.forward(tokens, &mask)
});

fn nomic_config() -> Value {
    json!({
        "vocab_size": 24, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 40, "n_positions": 64, "type_vocab_size": 2,
        "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": false, "qkv_proj_bias": true, "padding": true,
    })
}

zoo!(nomic_bert: nomic_bert, tokens_of(nomic_config(), vec![json!({"padding": false}), json!({"rotary_emb_interleaved": true})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    let (types, mask) = (tokens.zeros_like()?, tokens.gt(3u32)?);
    m::NomicBertModel::load(vb, &config)?.forward(tokens, Some(&types), (json["padding"] == true).then_some(&mask))
});

/// The last layer but one gives the result.
fn z_image() -> Zoo {
    let config = with(decoder(), json!({"num_hidden_layers": 3}));
    Zoo {
        detached: vec!["layers.2.", "model.norm."],
        ..tokens_of(
            config,
            vec![
                json!({"num_key_value_heads": 4}),
                json!({"rope_theta": 100.0}),
            ],
        )
    }
}

zoo!(z_image_text: z_image_text, z_image(), |m, json, vb, tokens| {
    let config: m::TextEncoderConfig = config(json)?;
    m::ZImageTextEncoder::new(&config, vb)?.forward(tokens)
});

fn roberta_config() -> Value {
    json!({
        "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "hidden_act": "gelu", "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "max_position_embeddings": 64,
        "type_vocab_size": 2, "layer_norm_eps": 1e-5, "pad_token_id": 1, "position_embedding_type": "absolute", "padding": 3,
    })
}

zoo!(xlm_roberta: xlm_roberta, tokens_of(roberta_config(), vec![json!({"padding": 0}), json!({"hidden_act": "relu"})]), |m, json, vb, tokens| {
    let config: m::Config = config(json)?;
    let padding = json["padding"].as_u64().unwrap_or_default() as u32;
    let (types, mask) = (tokens.zeros_like()?, tokens.ge(padding)?);
    m::XLMRobertaModel::new(&config, vb)?.forward(tokens, &mask, &types, None, None, None)
});

zoo!(jina_bert: jina_bert, tokens_of(with(bert_config(), json!({"position_embedding_type": "alibi"})), vec![json!({"num_attention_heads": 8})]), |m, json, vb, tokens| {
    use candle::Module;
    let config: m::Config = config(json)?;
    m::BertModel::new(vb, &config)?.forward(tokens)
});
