// A small decoder that is told which token belongs to which document: attention stays within a document. It knows no positions, so
// that a document is the same wherever it stands.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};
use std::sync::Arc;

/// The sizes of the model.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub width: usize,
}

/// 0 where a key is of its query's document and not after it, else -inf.
fn document_mask(t: usize, documents: Arc<[u32]>, device: &Device) -> Result<Tensor> {
    let minf = f32::NEG_INFINITY;
    let mask: Vec<_> = (0..t)
        .flat_map(|i| {
            let documents = documents.clone();
            (0..t).map(move |j| {
                if j > i || documents[j] != documents[i] {
                    minf
                } else {
                    0.
                }
            })
        })
        .collect();
    Tensor::from_slice(&mask, (t, t), device)?
        .unsqueeze(0)?
        .unsqueeze(0)
}

#[derive(Debug, Clone)]
struct Layer {
    norm: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    config: Config,
}

impl Layer {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let Config {
            hidden,
            heads,
            width,
            ..
        } = *config;
        Ok(Self {
            norm: layer_norm(hidden, 1e-5, vb.pp("norm"))?,
            query: linear(hidden, heads * width, vb.pp("query"))?,
            key: linear(hidden, heads * width, vb.pp("key"))?,
            value: linear(hidden, heads * width, vb.pp("value"))?,
            out: linear(heads * width, hidden, vb.pp("out"))?,
            config: config.clone(),
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (b, t, _) = x.dims3()?;
        let h = self.norm.forward(x)?;
        let q = self.query.forward(&h)?.reshape((b, t, c.heads, c.width))?;
        let k = self.key.forward(&h)?.reshape((b, t, c.heads, c.width))?;
        let v = self.value.forward(&h)?.reshape((b, t, c.heads, c.width))?;
        let (q, k, v) = (q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?);
        let scores = q
            .contiguous()?
            .matmul(&k.transpose(D::Minus2, D::Minus1)?.contiguous()?)?;
        let scores = (scores * (1.0 / (c.width as f64).sqrt()))?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
        let y = weights
            .matmul(&v.contiguous()?)?
            .transpose(1, 2)?
            .flatten_from(D::Minus2)?;
        x + self.out.forward(&y)?
    }
}

/// The model: logits for every token.
#[derive(Debug, Clone)]
pub struct Model {
    tokens: Embedding,
    layers: Vec<Layer>,
    head: Linear,
}

impl Model {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let layers = (0..config.layers).map(|i| Layer::load(vb.pp(format!("layers.{i}")), config));
        Ok(Self {
            tokens: embedding(config.vocab, config.hidden, vb.pp("tokens"))?,
            layers: layers.collect::<Result<Vec<_>>>()?,
            head: linear(config.hidden, config.vocab, vb.pp("head"))?,
        })
    }

    pub fn forward(&self, tokens: &Tensor, documents: Arc<[u32]>) -> Result<Tensor> {
        let (_, t) = tokens.dims2()?;
        let mask = document_mask(t, documents, tokens.device())?;
        let mut x = self.tokens.forward(tokens)?;
        for layer in self.layers.iter() {
            x = layer.forward(&x, &mask)?;
        }
        self.head.forward(&x)
    }
}
