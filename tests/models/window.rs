// A small decoder with what the example models lack: a sliding window as an additive mask, a soft cap on the scores, key and
// value heads that are interleaved among the query heads, values of another width than keys, and heads of [b, s, h, d] that
// are transposed late.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};

/// The sizes of the model.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub key_width: usize,
    pub value_width: usize,
    pub window: usize,
    pub cap: f64,
}

/// 0 where a key is at most `window` before its query, else -inf.
fn window_mask(t: usize, window: usize, device: &Device) -> Result<Tensor> {
    let minf = f32::NEG_INFINITY;
    let mask: Vec<_> = (0..t)
        .flat_map(|i| (0..t).map(move |j| if j > i || j + window < i { minf } else { 0. }))
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
            kv_heads,
            key_width,
            value_width,
            ..
        } = *config;
        Ok(Self {
            norm: layer_norm(hidden, 1e-5, vb.pp("norm"))?,
            query: linear(hidden, heads * key_width, vb.pp("query"))?,
            key: linear(hidden, kv_heads * key_width, vb.pp("key"))?,
            value: linear(hidden, kv_heads * value_width, vb.pp("value"))?,
            out: linear(heads * value_width, hidden, vb.pp("out"))?,
            config: config.clone(),
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (b, t, _) = x.dims3()?;
        let h = self.norm.forward(x)?;
        let q = self
            .query
            .forward(&h)?
            .reshape((b, t, c.heads, c.key_width))?;
        let k = self
            .key
            .forward(&h)?
            .reshape((b, t, c.kv_heads, c.key_width))?;
        let v = self
            .value
            .forward(&h)?
            .reshape((b, t, c.kv_heads, c.value_width))?;
        let repeats = c.heads / c.kv_heads;
        // Query head h uses key head h mod kv_heads.
        let k = k
            .unsqueeze(2)?
            .expand((b, t, repeats, c.kv_heads, c.key_width))?
            .reshape((b, t, c.heads, c.key_width))?;
        let v = v
            .unsqueeze(2)?
            .expand((b, t, repeats, c.kv_heads, c.value_width))?
            .reshape((b, t, c.heads, c.value_width))?;
        let (q, k, v) = (q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?);
        let scores = q
            .contiguous()?
            .matmul(&k.transpose(D::Minus2, D::Minus1)?.contiguous()?)?;
        let scores = (scores * (1.0 / (c.key_width as f64).sqrt()))?;
        let scores = ((scores / c.cap)?.tanh()? * c.cap)?;
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
    window: usize,
}

impl Model {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let layers = (0..config.layers).map(|i| Layer::load(vb.pp(format!("layers.{i}")), config));
        Ok(Self {
            tokens: embedding(config.vocab, config.hidden, vb.pp("tokens"))?,
            layers: layers.collect::<Result<Vec<_>>>()?,
            head: linear(config.hidden, config.vocab, vb.pp("head"))?,
            window: config.window,
        })
    }

    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (_, t) = tokens.dims2()?;
        let mask = window_mask(t, self.window, tokens.device())?;
        let mut x = self.tokens.forward(tokens)?;
        for layer in self.layers.iter() {
            x = layer.forward(&x, &mask)?;
        }
        self.head.forward(&x)
    }
}
