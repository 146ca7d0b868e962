// A bidirectional encoder with a classifier, in the manner of BERT (Devlin et al., "BERT: Pre-training of Deep Bidirectional
// Transformers for Language Understanding", 2018): token, position and type embeddings, LayerNorm after each half of a layer,
// GELU, and a padding mask that the caller gives. Tokens are pooled by their mean or by the first one. Parameter names are
// Hugging Face's.

use candle_core::{DType, IndexOp, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};

/// How the tokens of a row become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over the tokens that the mask leaves.
    Mean,
    /// The first token, through a dense layer and tanh.
    First,
}

/// The sizes of an encoder.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    pub num_labels: usize,
    pub pooling: Pooling,
}

#[derive(Debug, Clone)]
struct Embeddings {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Embedding,
    layer_norm: LayerNorm,
}

impl Embeddings {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let size = config.hidden_size;
        Ok(Self {
            word_embeddings: embedding(config.vocab_size, size, vb.pp("word_embeddings"))?,
            position_embeddings: embedding(
                config.max_position_embeddings,
                size,
                vb.pp("position_embeddings"),
            )?,
            token_type_embeddings: embedding(
                config.type_vocab_size,
                size,
                vb.pp("token_type_embeddings"),
            )?,
            layer_norm: layer_norm(size, config.layer_norm_eps, vb.pp("LayerNorm"))?,
        })
    }

    fn forward(&self, tokens: &Tensor, types: Option<&Tensor>) -> Result<Tensor> {
        let (_b, s) = tokens.dims2()?;
        let types = match types {
            Some(types) => types.clone(),
            None => tokens.zeros_like()?,
        };
        let positions = Tensor::arange(0u32, s as u32, tokens.device())?;
        let x = (self.word_embeddings.forward(tokens)?
            + self.token_type_embeddings.forward(&types)?)?;
        let x = x.broadcast_add(&self.position_embeddings.forward(&positions)?)?;
        self.layer_norm.forward(&x)
    }
}

#[derive(Debug, Clone)]
struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    layer_norm: LayerNorm,
    heads: usize,
    head_size: usize,
}

impl SelfAttention {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let n = config.hidden_size;
        let (own, output) = (vb.pp("self"), vb.pp("output"));
        Ok(Self {
            query: linear(n, n, own.pp("query"))?,
            key: linear(n, n, own.pp("key"))?,
            value: linear(n, n, own.pp("value"))?,
            dense: linear(n, n, output.pp("dense"))?,
            layer_norm: layer_norm(n, config.layer_norm_eps, output.pp("LayerNorm"))?,
            heads: config.num_attention_heads,
            head_size: n / config.num_attention_heads,
        })
    }

    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (b, s, _) = x.dims3()?;
        x.reshape((b, s, self.heads, self.head_size))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let q = self.split(&self.query.forward(x)?)?;
        let k = self.split(&self.key.forward(x)?)?;
        let v = self.split(&self.value.forward(x)?)?;
        let scores = (q.matmul(&k.t()?)? / (self.head_size as f64).sqrt())?;
        let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(bias)?)?;
        let y = weights.matmul(&v)?.transpose(1, 2)?.flatten_from(2)?;
        self.layer_norm.forward(&(self.dense.forward(&y)? + x)?)
    }
}

#[derive(Debug, Clone)]
struct Layer {
    attention: SelfAttention,
    intermediate: Linear,
    output: Linear,
    layer_norm: LayerNorm,
}

impl Layer {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (n, wide) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            attention: SelfAttention::load(vb.pp("attention"), config)?,
            intermediate: linear(n, wide, vb.pp("intermediate.dense"))?,
            output: linear(wide, n, vb.pp("output.dense"))?,
            layer_norm: layer_norm(n, config.layer_norm_eps, vb.pp("output.LayerNorm"))?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let x = self.attention.forward(x, bias)?;
        let y = self.intermediate.forward(&x)?.gelu_erf()?;
        self.layer_norm.forward(&(self.output.forward(&y)? + &x)?)
    }
}

/// What is added to the scores: 0 for a key to attend to, about -inf for padding; [b, 1, 1, s] for a mask [b, s].
fn key_bias(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    let mask = mask.unsqueeze(1)?.unsqueeze(2)?.to_dtype(dtype)?;
    (1.0 - mask)? * f64::from(f32::MIN)
}

/// The mean [b, h] of the tokens [b, s, h] that the mask [b, s] leaves.
fn masked_mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let weights = mask.to_dtype(x.dtype())?.unsqueeze(2)?;
    let count = weights.sum(1)?.clamp(1e-9, f64::INFINITY)?;
    x.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&count)
}

/// An encoder that says of each row which class it is.
#[derive(Debug, Clone)]
pub struct Classifier {
    embeddings: Embeddings,
    layers: Vec<Layer>,
    pooler: Option<Linear>,
    classifier: Linear,
}

impl Classifier {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let n = config.hidden_size;
        let bert = vb.pp("bert");
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::load(bert.pp(format!("encoder.layer.{i}")), config));
        let pooler = match config.pooling {
            Pooling::Mean => None,
            Pooling::First => Some(linear(n, n, bert.pp("pooler.dense"))?),
        };
        Ok(Self {
            embeddings: Embeddings::load(bert.pp("embeddings"), config)?,
            layers: layers.collect::<Result<Vec<_>>>()?,
            pooler,
            classifier: linear(n, config.num_labels, vb.pp("classifier"))?,
        })
    }

    /// Logits [b, num_labels] for tokens [b, s]; the mask [b, s] is 1 for tokens and 0 for padding, `types` says which of two
    /// texts a token belongs to.
    pub fn forward(
        &self,
        tokens: &Tensor,
        mask: &Tensor,
        types: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (_b, _s) = mask.dims2()?;
        let mut x = self.embeddings.forward(tokens, types)?;
        let bias = key_bias(mask, x.dtype())?;
        for layer in &self.layers {
            x = layer.forward(&x, &bias)?;
        }
        let pooled = match &self.pooler {
            Some(pooler) => pooler.forward(&x.i((.., 0))?)?.tanh()?,
            None => masked_mean(&x, mask)?,
        };
        self.classifier.forward(&pooled)
    }
}
