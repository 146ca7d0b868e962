//! Mutated models against themselves on one device. What means the same keeps its plan and its numbers; what means something else is
//! refused, or gives what it gives on one device.

use autosp_zoo::{config, decoder, with, Kind, Zoo};
use candle::{DType, Tensor};
use candle_nn::VarBuilder;
use serde_json::{json, Value};
use std::fmt::Write as _;

/// A model made from its config and called, as `m` names it.
macro_rules! call {
    (llama, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {{
        let config = config::<$m::LlamaConfig>($json)?.into_config(false);
        let mut cache = $m::Cache::new(false, DType::F32, &config, $vb.device())?;
        $m::Llama::load($vb, &config)?.forward($tokens, 0, &mut cache)
    }};
    (qwen2, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {
        $m::ModelForCausalLM::new(&config($json)?, $vb)?.forward($tokens, 0)
    };
    (gemma, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {
        $m::Model::new(false, &config($json)?, $vb)?.forward($tokens, 0)
    };
    (falcon, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {
        $m::Falcon::load($vb, config($json)?)?.forward($tokens)
    };
    (mpt, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {{
        let n_heads = $json["num_attention_heads"].as_u64();
        let config = $m::Config {
            d_model: 32,
            n_heads: n_heads.unwrap_or_default() as usize,
            n_layers: 2,
            expansion_ratio: 2,
            max_seq_len: 64,
            vocab_size: 24,
            kv_n_heads: 2,
            attn_prefix_lm: false,
            attn_alibi: true,
            attn_alibi_bias_max: 8,
        };
        $m::Model::new(&config, $vb)?.forward($tokens)
    }};
    (chatglm, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {{
        let heads = $json["num_attention_heads"].as_u64().unwrap_or_default() as usize;
        let config = $m::Config {
            num_layers: 2,
            padded_vocab_size: 24,
            hidden_size: 32,
            ffn_hidden_size: 40,
            kv_channels: 32 / heads,
            num_attention_heads: heads,
            seq_length: 64,
            multi_query_group_num: 2,
            ..$m::Config::glm3_6b()
        };
        $m::Model::new(&config, $vb)?.forward($tokens)
    }};
    (bert, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {{
        let (types, mask) = ($tokens.zeros_like()?, $tokens.gt(3u32)?);
        $m::BertModel::load($vb, &config($json)?)?.forward($tokens, &types, Some(&mask))
    }};
    (distilbert, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {{
        let mask = $tokens.lt(3u32)?.unsqueeze(1)?.unsqueeze(1)?;
        $m::DistilBertModel::load($vb, &config($json)?)?.forward($tokens, &mask)
    }};
    // phi3, stable_lm
    ($model:ident, $m:ident, $json:ident, $vb:ident, $tokens:ident) => {
        $m::Model::new(&config($json)?, $vb)?.forward($tokens, 0)
    };
}

fn zoo_of(model: &str) -> Zoo {
    let last = |config| Zoo {
        config,
        kind: Kind::Last,
        ..Zoo::default()
    };
    let tokens = |config| Zoo {
        config,
        ..Zoo::default()
    };
    match model {
        "qwen2" => last(with(
            decoder(),
            json!({"sliding_window": 5, "max_window_layers": 2, "use_sliding_window": true}),
        )),
        "gemma" => last(with(
            decoder(),
            json!({"hidden_activation": "gelu_pytorch_tanh", "hidden_act": null}),
        )),
        "phi3" => last(with(decoder(), json!({"partial_rotary_factor": 0.5}))),
        "stable_lm" => last(with(
            decoder(),
            json!({
                "num_attention_heads": 4, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "use_cache": true,
                "use_qkv_bias": true,
            }),
        )),
        // On one device the file gives its only key head to all query heads of one row alone.
        "falcon" => Zoo {
            rows: 1,
            ..last(json!({
                "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "layer_norm_epsilon": 1e-5,
                "initializer_range": 0.02, "use_cache": true, "bos_token_id": 0, "eos_token_id": 1, "hidden_dropout": 0.0,
                "attention_dropout": 0.0, "n_head_kv": null, "alibi": false, "new_decoder_architecture": false,
                "multi_query": true, "parallel_attn": false, "bias": true,
            }))
        },
        "bert" => tokens(json!({
            "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "max_position_embeddings": 64, "type_vocab_size": 2,
            "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        })),
        "distilbert" => tokens(json!({
            "vocab_size": 24, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "activation": "gelu",
            "max_position_embeddings": 64, "initializer_range": 0.02, "pad_token_id": 0,
        })),
        _ => last(decoder()),
    }
}

/// A function that calls the model of a module.
macro_rules! caller {
    ($function:ident, $model:ident, $($module:tt)+) => {
        fn $function(json: &Value, vb: VarBuilder, tokens: &Tensor) -> candle::Result<Tensor> {
            use $($module)+ as m;
            call!($model, m, json, vb, tokens)
        }
    };
}

/// The same model, written otherwise, against the model as it was.
macro_rules! kept {
    ($name:ident, $model:ident) => {
        #[test]
        fn $name() {
            caller!(annotated, $model, crate::models::$name);
            caller!(plain, $model, crate::slow::models::$model);
            zoo_of(stringify!($model)).check_mutant(stringify!($name), annotated, plain, None);
        }
    };
}

/// Another model, against itself on one device.
macro_rules! changed {
    ($name:ident, $model:ident) => {
        #[test]
        fn $name() {
            caller!(annotated, $model, crate::models::$name);
            caller!(plain, $model, crate::slow::models::$name);
            caller!(original, $model, crate::slow::models::$model);
            let (name, zoo) = (stringify!($name), zoo_of(stringify!($model)));
            zoo.check_mutant(name, annotated, plain, Some(original));
        }
    };
}

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));

/// What a plan says, without lines and with the names that the original has.
fn plan(text: &str) -> String {
    let analysis = autosp_compiler::analyse(text).expect("Rust");
    if let Some(refusal) = analysis.refusals.first() {
        return refusal.text(None);
    }
    let mut said = String::new();
    for site in &analysis.plan.sites {
        let (layout, heads, strategies) = (&site.layout, &site.heads, &site.strategies);
        let _ = write!(
            said,
            "q {}, k {}, v {}; {heads} {}; mask {}; {strategies:?} {}; ",
            layout.q, layout.k, layout.v, site.unrepeated, site.mask, site.bytes
        );
    }
    for root in &analysis.plan.roots {
        let _ = write!(
            said,
            "{} {:?} {:?} {:?} loss {}; ",
            root.function,
            root.inputs,
            root.beside,
            root.offsets,
            root.loss.is_some()
        );
    }
    let scopes = analysis.plan.blocks.iter();
    let scopes = scopes.filter(|block| block.scope.is_some()).count();
    let _ = write!(said, "{scopes} of {} scopes", analysis.plan.blocks.len());
    said.replace("renamed_", "")
}

#[test]
fn names_order_and_helpers_keep_the_plan() {
    assert_eq!(PAIRS.len(), 10 * 5);
    for (way, original, mutant) in PAIRS {
        let expected = plan(original);
        assert!(expected.starts_with("q "), "{way}: {expected}");
        assert_eq!(plan(mutant), expected, "{way}");
    }
}

#[test]
fn what_cannot_be_sharded_is_refused() {
    for (name, code, mutant) in REFUSED {
        let found = plan(mutant);
        assert!(found.ends_with(&format!("[{code}]")), "{name}: {found}");
    }
}
