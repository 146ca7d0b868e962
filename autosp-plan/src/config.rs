//! `config.json`: what a Hugging Face model folder says about its model.
//!
//! Models in candle have configurations of their own; [`ModelConfig`] reads the fields that those of Llama, Qwen, Mistral and their
//! relatives need, whichever version of transformers wrote the file, and keeps the rest.

mod fields;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::codes::{self, Code};
use fields::Fields;

/// Why a `config.json` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigError {
    /// AS0501 or AS0544.
    pub code: Code,
    /// What is wrong, with the name of the file.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code.id)
    }
}

impl std::error::Error for ConfigError {}

/// A type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "the types that are trained")]
pub enum Float {
    /// Eight bytes.
    F64,
    /// Four bytes.
    F32,
    /// Two bytes, with the exponent of `f32`.
    BF16,
    /// Two bytes, with five bits of exponent.
    F16,
}

impl Float {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F64, Self::F32, Self::BF16, Self::F16];

    /// As a command line writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
        }
    }
}

/// The fields of a `config.json`.
///
/// ```
/// use autosp_plan::config::ModelConfig;
///
/// # fn main() -> Result<(), autosp_plan::config::ConfigError> {
/// let text = r#"{"model_type": "qwen2", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
///     "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
///     "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16", "max_window_layers": 28}"#;
/// let config = ModelConfig::from_json("config.json", text)?;
/// assert_eq!((config.num_key_value_heads, config.head_dim), (2, 8));
/// assert_eq!(config.rope.unwrap_or_default().theta, 1e6);
/// assert_eq!(config.other["max_window_layers"], 28);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family, such as `llama`; empty if the file does not say.
    pub model_type: String,
    /// Class names, such as `LlamaForCausalLM`.
    pub architectures: Vec<String>,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width of the activations between blocks.
    pub hidden_size: usize,
    /// Width inside the feed-forward; four times `hidden_size` where GPT-2 leaves it out.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, which divide the query heads; as many as those if the file does not say.
    pub num_key_value_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` if the file does not say.
    pub head_dim: usize,
    /// The longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the variance in the norms (`rms_norm_eps`, or `layer_norm_eps` and its spellings).
    pub norm_eps: f64,
    /// Activation of the feed-forward, such as `silu`.
    pub hidden_act: Option<String>,
    /// Whether the output projection is the embedding. `None` if the file does not say: its class decides (Gemma and GPT-2 tie,
    /// Llama, Mistral and Qwen do not).
    pub tie_word_embeddings: Option<bool>,
    /// Whether the attention's projections have a bias; Qwen2's queries, keys and values have one whatever this says.
    pub attention_bias: bool,
    /// Whether the feed-forward's projections have a bias.
    pub mlp_bias: bool,
    /// Rotary positions of all layers; `None` if the file does not speak of them or has them by layer type.
    pub rope: Option<Rope>,
    /// Rotary positions by layer type, such as `sliding_attention`.
    pub layer_ropes: BTreeMap<String, Rope>,
    /// The type of each layer, such as `full_attention`; empty if the file does not say.
    pub layer_types: Vec<String>,
    /// Keys that a query sees, itself included; `None` for all, also where `use_sliding_window` is off.
    pub sliding_window: Option<usize>,
    /// The first token of a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The token of padding.
    pub pad_token_id: Option<u32>,
    /// The type that the weights were saved in (`dtype`, `torch_dtype` before transformers 5).
    pub dtype: Option<Float>,
    /// Every field that is not listed here, as the file has it.
    pub other: Map<String, Value>,
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rope {
    /// Base of the frequencies, `theta^(-2i / d)`. Source: Su et al., arXiv:2104.09864.
    pub theta: f64,
    /// How frequencies are scaled for longer contexts: `default` (not at all), `linear`, `dynamic`, `yarn`, `llama3` ..
    pub kind: String,
    /// The part of a head's width that is rotated.
    pub partial_rotary_factor: f64,
    /// What the kind needs, such as `factor`.
    pub scaling: Map<String, Value>,
}

impl Default for Rope {
    /// Base 10000, which models have whose file does not name one; all of the width, no scaling.
    fn default() -> Self {
        Self {
            theta: 10_000.0,
            kind: "default".to_owned(),
            partial_rotary_factor: 1.0,
            scaling: Map::new(),
        }
    }
}

impl ModelConfig {
    /// Reads a `config.json`, or the one in a folder.
    ///
    /// # Errors
    /// AS0501 if it cannot be read; else as [`from_json`](Self::from_json).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let path = if path.is_dir() {
            path.join("config.json")
        } else {
            path.to_owned()
        };
        let name = path.display().to_string();
        let text = fs::read_to_string(&path).map_err(|error| {
            let message = format!("cannot read `{name}`: {}", crate::io_reason(&error));
            ConfigError {
                code: codes::FILE_UNREADABLE,
                message,
            }
        })?;
        Self::from_json(&name, &text)
    }

    /// Reads the text of a `config.json`; `name` is what messages call it. Of a model with several parts, the one under
    /// `text_config` is taken.
    ///
    /// # Errors
    /// AS0544 with line and column if it is not JSON, or with the field that is missing, of the wrong kind, or contradicts another.
    pub fn from_json(name: &str, text: &str) -> Result<Self, ConfigError> {
        let refuse = |text: String| ConfigError {
            code: codes::CONFIG,
            message: format!("`{name}`: {text}"),
        };
        let json = serde_json::from_str(text).map_err(|error| refuse(error.to_string()))?;
        let Value::Object(mut all) = json else {
            return Err(refuse("expected an object, found another value".to_owned()));
        };
        if !all.contains_key("hidden_size")
            && let Some(Value::Object(part)) = all.remove("text_config")
        {
            let model_type = part.get("model_type").cloned();
            all.extend(part);
            all.extend(model_type.map(|found| ("model_type".to_owned(), found)));
        }
        Self::from_fields(Fields::new(all)).map_err(refuse)
    }

    fn from_fields(mut fields: Fields) -> Result<Self, String> {
        let hidden_size = fields.count(&["hidden_size", "n_embd"])?;
        let num_attention_heads = fields.count(&["num_attention_heads", "n_head"])?;
        let num_key_value_heads = fields
            .optional_count(&["num_key_value_heads"])?
            .unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(format!(
                "expected `num_key_value_heads` to divide `num_attention_heads` = {num_attention_heads}, found {num_key_value_heads}"
            ));
        }
        let head_dim = match fields.optional_count(&["head_dim"])? {
            Some(width) => width,
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                return Err(format!(
                    "expected `head_dim`, or a `hidden_size` that `num_attention_heads` = {num_attention_heads} divides, found {hidden_size}"
                ));
            }
        };
        let model_type = fields.word(&["model_type"])?.unwrap_or_default();
        let intermediate_size =
            match fields.optional_count(&["intermediate_size", "n_inner", "ffn_dim"])? {
                Some(width) => width,
                None if model_type == "gpt2" => 4 * hidden_size,
                None => return Err("expected `intermediate_size`, found none".to_owned()),
            };
        let (rope, layer_ropes) = ropes(&mut fields)?;
        let num_hidden_layers = fields.count(&["num_hidden_layers", "n_layer"])?;
        let layer_types = fields.words("layer_types")?;
        if !layer_types.is_empty() && layer_types.len() != num_hidden_layers {
            return Err(format!(
                "expected `layer_types` of `num_hidden_layers` = {num_hidden_layers} words, found {}",
                layer_types.len()
            ));
        }
        let sliding_window = fields.optional_count(&["sliding_window"])?;
        // Kept among the others too: a model may ask for it.
        let windowed = fields.peek("use_sliding_window") != Some(&Value::Bool(false));
        Ok(Self {
            model_type,
            architectures: fields.words("architectures")?,
            vocab_size: fields.count(&["vocab_size"])?,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: fields.count(&["max_position_embeddings", "n_positions"])?,
            norm_eps: fields.positive(&[
                "rms_norm_eps",
                "layer_norm_eps",
                "layer_norm_epsilon",
                "norm_eps",
                "norm_epsilon",
            ])?,
            hidden_act: fields.word(&["hidden_act", "hidden_activation", "activation_function"])?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
            rope,
            layer_ropes,
            layer_types,
            sliding_window: sliding_window.filter(|_| windowed),
            bos_token_id: fields.token("bos_token_id")?,
            eos_token_ids: fields.tokens("eos_token_id")?,
            pad_token_id: fields.token("pad_token_id")?,
            dtype: dtype(&mut fields)?,
            other: fields.rest(),
        })
    }
}

/// Rotary positions, of all layers or by layer type: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before.
fn ropes(fields: &mut Fields) -> Result<(Option<Rope>, BTreeMap<String, Rope>), String> {
    let theta = fields.optional_positive(&["rope_theta", "rotary_emb_base"])?;
    let part = fields.optional_positive(&["partial_rotary_factor", "rotary_pct"])?;
    let scaling = fields.object("rope_scaling")?;
    let Some(parameters) = fields.object("rope_parameters")? else {
        if theta.is_none() && part.is_none() && scaling.is_none() {
            return Ok((None, BTreeMap::new()));
        }
        let rope = Rope::read("rope_scaling", scaling.unwrap_or_default(), theta, part)?;
        return Ok((Some(rope), BTreeMap::new()));
    };
    if scaling.as_ref().is_some_and(|scaling| {
        scaling
            .iter()
            .any(|(key, value)| parameters.get(key) != Some(value))
    }) {
        return Err(
            "expected `rope_scaling` to say what `rope_parameters` says, found a difference"
                .to_owned(),
        );
    }
    if !parameters.is_empty() && parameters.values().all(Value::is_object) {
        let mut ropes = BTreeMap::new();
        for (layer, value) in parameters {
            let Value::Object(object) = value else {
                continue;
            };
            let name = format!("rope_parameters.{layer}");
            ropes.insert(layer, Rope::read(&name, object, None, part)?);
        }
        return Ok((None, ropes));
    }
    let rope = Rope::read("rope_parameters", parameters, theta, part)?;
    Ok((Some(rope), BTreeMap::new()))
}

impl Rope {
    /// Reads the object `name`; `theta` and `part` are what stands beside it.
    fn read(
        name: &str,
        object: Map<String, Value>,
        theta: Option<f64>,
        part: Option<f64>,
    ) -> Result<Self, String> {
        let mut fields = Fields::within(name, object);
        let agreed = |field: &str, inside: Option<f64>, beside: Option<f64>, default: f64| match (
            inside, beside,
        ) {
            #[allow(clippy::float_cmp, reason = "one number, written twice")]
            (Some(a), Some(b)) if a != b => Err(format!(
                "expected one `{field}`, found {a} in `{name}` and {b} beside it"
            )),
            (a, b) => Ok(a.or(b).unwrap_or(default)),
        };
        let inside = fields.optional_positive(&["rope_theta"])?;
        let theta = agreed("rope_theta", inside, theta, 10_000.0)?;
        let inside = fields.optional_positive(&["partial_rotary_factor"])?;
        let part = agreed("partial_rotary_factor", inside, part, 1.0)?;
        let (new, old) = (fields.word(&["rope_type"])?, fields.word(&["type"])?);
        let kind = match (new, old) {
            // `su` is what the first files called `longrope`.
            (Some(new), Some(old)) if new != old && old != "su" => {
                return Err(format!(
                    "expected one kind in `{name}`, found `rope_type` = `{new}` and `type` = `{old}`"
                ));
            }
            (new, old) => new.or(old).unwrap_or_else(|| "default".to_owned()),
        };
        Ok(Self {
            theta,
            kind,
            partial_rotary_factor: part,
            scaling: fields.rest(),
        })
    }
}

fn dtype(fields: &mut Fields) -> Result<Option<Float>, String> {
    let (new, old) = (fields.word(&["dtype"])?, fields.word(&["torch_dtype"])?);
    if let (Some(new), Some(old)) = (&new, &old)
        && new != old
    {
        return Err(format!(
            "expected one type, found `dtype` = `{new}` and `torch_dtype` = `{old}`"
        ));
    }
    let Some(word) = new.or(old) else {
        return Ok(None);
    };
    match word.trim_start_matches("torch.") {
        "float32" => Ok(Some(Float::F32)),
        "bfloat16" => Ok(Some(Float::BF16)),
        "float16" => Ok(Some(Float::F16)),
        "float64" => Ok(Some(Float::F64)),
        // The type of the files: nothing is said.
        "auto" => Ok(None),
        _ => Err(format!(
            "expected `dtype` to be float32, bfloat16, float16 or float64, found `{word}`"
        )),
    }
}

#[cfg(test)]
mod tests;
