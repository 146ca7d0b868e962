//! The models that the tests of training run, with the attribute and without.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::{gpt2, job, llama};

/// Entries of the vocabulary of all models.
pub const VOCABULARY: usize = 40;

/// A model over tokens [b, s] whose logits are [b, s, [`VOCABULARY`]].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Model {
    Llama,
    Gpt2,
}

impl Model {
    pub const ALL: [Self; 2] = [Self::Llama, Self::Gpt2];
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

/// A model that was built, as a function from tokens to logits.
pub type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// The model with the attribute.
pub fn annotated(model: Model, vb: VarBuilder<'_>, dtype: DType) -> Result<Forward> {
    Ok(match model {
        Model::Llama => {
            let config = job::tiny(2);
            let model = llama::Llama::load(vb, &config)?;
            Box::new(move |tokens| {
                let mut cache = llama::Cache::new(false, dtype, &config, tokens.device())?;
                model.forward(tokens, 0, &mut cache)
            })
        }
        Model::Gpt2 => {
            let model = gpt2::Gpt2::load(vb, &gpt2_config!(gpt2))?;
            Box::new(move |tokens| model.forward(tokens))
        }
    })
}

/// The model as its file has it, on candle's slow operations.
pub fn plain(model: Model, vb: VarBuilder<'_>, dtype: DType) -> Result<Forward> {
    use autosp_reference::{gpt2, llama};
    Ok(match model {
        Model::Llama => {
            let config = job::plain(&job::tiny(2));
            let model = llama::Llama::load(vb, &config)?;
            Box::new(move |tokens| {
                let mut cache = llama::Cache::new(false, dtype, &config, tokens.device())?;
                model.forward(tokens, 0, &mut cache)
            })
        }
        Model::Gpt2 => {
            let model = gpt2::Gpt2::load(vb, &gpt2_config!(gpt2))?;
            Box::new(move |tokens| model.forward(tokens))
        }
    })
}
