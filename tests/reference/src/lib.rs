//! What AutoSP's numbers are compared with: the example models, unannotated, on one device, with candle's own slow
//! operations, and the loss and the optimizers in their plainest form.
//!
//! Nothing here knows AutoSP. Every function works on whole tensors and favours being obviously right over being fast.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;

mod golden;
mod optimizers;

pub use golden::{Case, Golden, Norms};
pub use optimizers::{Adam, clip, global_norm, sgd};

/// The example Llama, as the file stands.
#[allow(missing_docs, clippy::pedantic)]
pub mod llama {
    include!("../../../examples/models/llama.rs");
}

/// The example GPT-2, as the file stands.
#[allow(missing_docs, clippy::pedantic)]
pub mod gpt2 {
    include!("../../../examples/models/gpt2.rs");
}

/// The example encoder, as the file stands.
#[allow(missing_docs, clippy::pedantic)]
pub mod encoder {
    include!("../../../examples/models/encoder.rs");
}

/// Other masks from the caller and other ways to pool, as the file stands.
#[allow(missing_docs, clippy::pedantic)]
pub mod masked {
    include!("../../models/masked.rs");
}

/// A decoder with a window, a soft cap and interleaved heads, as the file stands.
#[allow(missing_docs, clippy::pedantic)]
pub mod window {
    include!("../../models/window.rs");
}

/// A label that asks for no prediction.
pub const IGNORED: i64 = -100;

/// Variables by name.
pub type Variables = BTreeMap<String, Var>;

/// Gradients (or any tensors) by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Makes a fresh variable of every tensor.
///
/// # Errors
/// When a tensor cannot be copied.
pub fn variables(tensors: &Tensors) -> Result<Variables> {
    tensors
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(tensor)?)))
        .collect()
}

/// A builder that hands the variables to a model as they are.
pub fn builder(variables: &Variables, dtype: DType, device: &Device) -> VarBuilder<'static> {
    let tensors = variables
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    VarBuilder::from_tensors(tensors, dtype, device)
}

/// The labels of tokens `[b, s]`, same shape: the next token, and [`IGNORED`] at the last position and where the target's
/// index within the row (0 predicts token 1) is below `ignore`.
///
/// # Errors
/// When the tokens are not a matrix of integers.
pub fn labels(tokens: &Tensor, ignore: usize) -> Result<Tensor> {
    let rows = tokens.to_dtype(DType::I64)?.to_vec2::<i64>()?;
    let s = tokens.dim(1)?;
    let labels = rows
        .iter()
        .flat_map(|row| {
            (0..s).map(move |i| {
                if i < ignore || i + 1 == s {
                    IGNORED
                } else {
                    row[i + 1]
                }
            })
        })
        .collect::<Vec<_>>();
    Tensor::from_vec(labels, tokens.dims2()?, tokens.device())
}

/// The mean of the token losses over the labels that are not ignored: a scalar. Logits are `[b, s, vocab]`, labels `[b, s]`
/// of i64; without a valid label the loss is 0.
///
/// # Errors
/// When the shapes do not fit.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let vocab = logits.dim(D::Minus1)?;
    let logits = logits.reshape(((), vocab))?;
    let labels = labels.flatten_all()?;
    let valid = labels.ge(0i64)?;
    let count = valid.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    let index = valid.where_cond(&labels, &labels.zeros_like()?)?;
    let picked = candle_nn::ops::log_softmax(&logits, D::Minus1)?
        .gather(&index.unsqueeze(1)?, 1)?
        .squeeze(1)?;
    (picked * valid.to_dtype(logits.dtype())?)?
        .sum_all()?
        .affine(-1.0 / f64::from(count.max(1.0)), 0.0)
}

/// Loss and gradients of every variable; one that the loss does not reach has a gradient of zeros.
///
/// # Errors
/// When the model fails.
pub fn gradients(variables: &Variables, loss: &Tensor) -> Result<(f32, Tensors)> {
    let store = loss.backward()?;
    let gradients = variables
        .iter()
        .map(|(name, var)| {
            let gradient = store
                .get(var)
                .map_or_else(|| var.zeros_like(), |gradient| Ok(gradient.detach()));
            Ok((name.clone(), gradient?))
        })
        .collect::<Result<_>>()?;
    Ok((loss.to_dtype(DType::F32)?.to_scalar()?, gradients))
}

/// Writes a `Config` of one model module from Hugging Face's `config.json`; the modules that include `llama.rs` have one type
/// each.
#[macro_export]
macro_rules! llama_config {
    ($module:path, $json:expr) => {{
        use $module as model;
        let json: &$crate::Json = $json;
        let size = |key: &str| json[key].as_u64().unwrap_or_default() as usize;
        model::Config {
            vocab_size: size("vocab_size"),
            hidden_size: size("hidden_size"),
            intermediate_size: size("intermediate_size"),
            num_hidden_layers: size("num_hidden_layers"),
            num_attention_heads: size("num_attention_heads"),
            num_key_value_heads: size("num_key_value_heads"),
            head_dim: json["head_dim"].as_u64().map(|width| width as usize),
            max_position_embeddings: size("max_position_embeddings"),
            rope_theta: json["rope_parameters"]["rope_theta"]
                .as_f64()
                .unwrap_or(10_000.0) as f32,
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            last_token_only: false,
        }
    }};
}

/// Parsed JSON, as [`llama_config!`] takes it.
pub type Json = serde_json::Value;

/// One forward and backward of the reference Llama: loss and every gradient.
///
/// # Errors
/// When the model fails.
pub fn llama_step(
    variables: &Variables,
    config: &llama::Config,
    tokens: &Tensor,
    labels: &Tensor,
    dtype: DType,
) -> Result<(f32, Tensors)> {
    let device = tokens.device();
    let model = llama::Llama::load(builder(variables, dtype, device), config)?;
    let mut cache = llama::Cache::new(false, dtype, config, device)?;
    gradients(
        variables,
        &cross_entropy(&model.forward(tokens, 0, &mut cache)?, labels)?,
    )
}
