use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A file as transformers 4 writes it.
fn old() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "silu",
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008], "pretraining_tp": 1, "head_dim": null,
    })
}

fn read(json: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json("config.json", &json.to_string())
}

/// `json` without the old fields of rotary positions and types, and with the new ones.
fn renewed(mut json: Value) -> Value {
    let map = json.as_object_mut().unwrap();
    let mut rope = map.remove("rope_scaling").unwrap();
    rope["rope_theta"] = map.remove("rope_theta").unwrap();
    map.insert("rope_parameters".to_owned(), rope);
    let dtype = map.remove("torch_dtype").unwrap();
    map.insert("dtype".to_owned(), dtype);
    json
}

#[test]
fn old_and_new_files_say_the_same() {
    let config = read(&old()).unwrap();
    assert_eq!(config, read(&renewed(old())).unwrap());
    assert_eq!((config.head_dim, config.num_key_value_heads), (128, 8));
    assert_eq!(
        (config.dtype, config.tie_word_embeddings),
        (Some(Float::BF16), Some(false))
    );
    assert_eq!(config.eos_token_ids, [128_001, 128_008]);
    let rope = config.rope.unwrap();
    assert_eq!(
        (rope.theta, rope.kind.as_str(), rope.partial_rotary_factor),
        (5e5, "llama3", 1.0)
    );
    assert_eq!(rope.scaling["factor"], 8.0);
    assert_eq!(rope.scaling.len(), 4);
    assert_eq!(Value::Object(config.other), json!({"pretraining_tp": 1}));
}

#[test]
fn the_golden_model_is_read() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama-tiny");
    // A packaged crate has no such folder.
    let Ok(config) = ModelConfig::open(folder) else {
        assert!(!Path::new(folder).exists());
        return;
    };
    assert_eq!(
        (
            config.model_type.as_str(),
            config.hidden_size,
            config.num_hidden_layers
        ),
        ("llama", 64, 2)
    );
    assert_eq!(
        (config.rope.unwrap(), config.dtype),
        (Rope::default(), Some(Float::F32))
    );
    assert_eq!(config.other["transformers_version"], "5.17.0");
}

#[test]
fn other_families_and_spellings() {
    let gpt2 = json!({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "n_inner": null, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"});
    let config = read(&gpt2).unwrap();
    assert_eq!(
        (
            config.hidden_size,
            config.intermediate_size,
            config.head_dim
        ),
        (768, 3072, 64)
    );
    assert_eq!((config.rope, config.tie_word_embeddings), (None, None));
    let mut gemma = renewed(old());
    let map = gemma.as_object_mut().unwrap();
    map.insert(
        "rope_parameters".to_owned(),
        json!({"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4}}),
    );
    map.insert(
        "layer_types".to_owned(),
        json!(["sliding_attention", "full_attention"]),
    );
    map.insert("sliding_window".to_owned(), json!(512));
    let config = read(&gemma).unwrap();
    assert_eq!((config.rope, config.sliding_window), (None, Some(512)));
    assert_eq!(
        config.layer_ropes["full_attention"].theta.to_bits(),
        1e6_f64.to_bits()
    );
    assert_eq!(config.layer_ropes["sliding_attention"], Rope::default());
    gemma["use_sliding_window"] = json!(false);
    assert_eq!(read(&gemma).unwrap().sliding_window, None);
    let several = json!({"model_type": "gemma3", "text_config": old(), "vision_config": {"hidden_size": 1152}});
    let config = read(&several).unwrap();
    assert_eq!(
        (config.model_type.as_str(), config.hidden_size),
        ("llama", 4096)
    );
    assert!(config.other.contains_key("vision_config"));
}

#[test]
fn what_cannot_be_used_names_its_field() {
    let with = |field: &str, value: Value| {
        let mut json = old();
        json[field] = value;
        json
    };
    for (json, part) in [
        (
            with("hidden_size", json!("large")),
            "whole number of at least 1 for `hidden_size`, found \"large\"",
        ),
        (
            with("hidden_size", Value::Null),
            "expected `hidden_size`, found none",
        ),
        (
            with("num_hidden_layers", json!(0)),
            "`num_hidden_layers`, found 0",
        ),
        (
            with("num_key_value_heads", json!(5)),
            "divide `num_attention_heads` = 32, found 5",
        ),
        (
            with("num_attention_heads", json!(24)),
            "expected `head_dim`",
        ),
        (
            with("rms_norm_eps", json!(-1.0)),
            "`rms_norm_eps`, found -1.0",
        ),
        (with("rope_theta", json!("x")), "`rope_theta`"),
        (
            with(
                "rope_parameters",
                json!({"rope_theta": 1e4, "rope_type": "default"}),
            ),
            "found a difference",
        ),
        (
            with(
                "rope_scaling",
                json!({"type": "linear", "rope_type": "yarn"}),
            ),
            "one kind",
        ),
        (
            with("rope_scaling", json!({"rope_theta": 3.0})),
            "one `rope_theta`",
        ),
        (
            with("rope_scaling", json!(3)),
            "an object for `rope_scaling`, found 3",
        ),
        (
            with("dtype", json!("float16")),
            "`torch_dtype` = `bfloat16`",
        ),
        (with("torch_dtype", json!("int8")), "found `int8`"),
        (
            with("layer_types", json!(["full_attention"])),
            "of `num_hidden_layers` = 2 words, found 1",
        ),
        (with("layer_types", json!([1, 2])), "a list of strings"),
        (with("eos_token_id", json!(-1)), "`eos_token_id`, found -1"),
    ] {
        let error = read(&json).unwrap_err();
        assert_eq!(error.code, codes::CONFIG);
        assert!(
            error.message.starts_with("`config.json`: ") && error.message.contains(part),
            "{error}"
        );
    }
    let error = ModelConfig::from_json("c.json", "{\n \"a\": }").unwrap_err();
    assert!(error.message.contains("line 2 column 7"), "{error}");
    assert_eq!(
        ModelConfig::from_json("c.json", "[]").unwrap_err().code,
        codes::CONFIG
    );
    let error = ModelConfig::open("no/such/config.json").unwrap_err();
    assert_eq!(error.code, codes::FILE_UNREADABLE);
}

proptest! {
    /// No field is lost: what is not read is kept.
    #[test]
    fn unknown_fields_are_kept(extra in proptest::collection::btree_map("x_[a-z]{1,8}", any::<i32>(), 0..6)) {
        let mut json = old();
        for (name, value) in &extra {
            json[name] = json!(value);
        }
        let config = read(&json).unwrap();
        prop_assert_eq!(config.other.len(), extra.len() + 1);
        for (name, value) in extra {
            prop_assert_eq!(&config.other[&name], &json!(value));
        }
    }

    /// Damage never panics.
    #[test]
    fn damaged_files_are_refused_or_read(cut in 0usize..600, byte in any::<u8>()) {
        let mut text = old().to_string().into_bytes();
        let at = cut % text.len();
        text[at] = byte;
        let text = String::from_utf8_lossy(&text).into_owned();
        if let Err(error) = ModelConfig::from_json("config.json", &text) {
            prop_assert_eq!(error.code, codes::CONFIG);
        }
    }
}
