//! The models that the tests of training run, with the attribute and without.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::{encoder, gpt2, job, llama};

/// Entries of the vocabulary of all models.
pub const VOCABULARY: usize = 40;

/// A model over tokens [b, s]. Logits are [b, s, [`VOCABULARY`]], or [b, [`CLASSES`]] of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Model {
    Llama,
    Gpt2,
    Encoder,
}

impl Model {
    pub const ALL: [Self; 3] = [Self::Llama, Self::Gpt2, Self::Encoder];

    /// Those that predict the next token.
    pub const LANGUAGE: [Self; 2] = [Self::Llama, Self::Gpt2];
}

/// Classes of the encoder.
pub const CLASSES: usize = 3;

macro_rules! encoder_config {
    ($model:path) => {{
        use $model as model;
        model::Config {
            vocab_size: VOCABULARY,
            hidden_size: 32,
            num_hidden_layers: 2,
            num_attention_heads: 8,
            intermediate_size: 48,
            max_position_embeddings: 1024,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            num_labels: CLASSES,
            pooling: model::Pooling::Mean,
        }
    }};
}

macro_rules! gpt2_config {
    ($model:path) => {{
        use $model as model;
        model::Config {
            vocab_size: VOCABULARY,
            n_positions: 1024,
            n_embd: 32,
            n_layer: 2,
            n_head: 8,
            layer_norm_epsilon: 1e-5,
        }
    }};
}

/// A model that was built, as a function from tokens and a mask, which is 1 for tokens and 0 for padding, to logits. Language models
/// have no use for the mask.
pub type Forward = Box<dyn Fn(&Tensor, &Tensor) -> Result<Tensor>>;

/// The model with the attribute.
pub fn annotated(model: Model, vb: VarBuilder<'_>, dtype: DType) -> Result<Forward> {
    Ok(match model {
        Model::Llama => {
            let config = job::tiny(2);
            let model = llama::Llama::load(vb, &config)?;
            Box::new(move |tokens, _| {
                let mut cache = llama::Cache::new(false, dtype, &config, tokens.device())?;
                model.forward(tokens, 0, &mut cache)
            })
        }
        Model::Gpt2 => {
            let model = gpt2::Gpt2::load(vb, &gpt2_config!(gpt2))?;
            Box::new(move |tokens, _| model.forward(tokens))
        }
        Model::Encoder => {
            let model = encoder::Classifier::load(vb, &encoder_config!(encoder))?;
            Box::new(move |tokens, mask| model.forward(tokens, mask, None))
        }
    })
}

/// The model as its file has it, on candle's slow operations.
pub fn plain(model: Model, vb: VarBuilder<'_>, dtype: DType) -> Result<Forward> {
    use autosp_reference::{encoder, gpt2, llama};
    Ok(match model {
        Model::Llama => {
            let config = job::plain(&job::tiny(2));
            let model = llama::Llama::load(vb, &config)?;
            Box::new(move |tokens, _| {
                let mut cache = llama::Cache::new(false, dtype, &config, tokens.device())?;
                model.forward(tokens, 0, &mut cache)
            })
        }
        Model::Gpt2 => {
            let model = gpt2::Gpt2::load(vb, &gpt2_config!(gpt2))?;
            Box::new(move |tokens, _| model.forward(tokens))
        }
        Model::Encoder => {
            let model = encoder::Classifier::load(vb, &encoder_config!(encoder))?;
            Box::new(move |tokens, mask| model.forward(tokens, mask, None))
        }
    })
}
