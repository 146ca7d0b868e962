// A small encoder whose masks and pools are written in the other ways that models have: filled scores, masks [b, 1, 1, s] and
// [b, 1, s, s] that a helper expands, a causal rule beside a padding mask, positions counted from the tokens, sums that keep
// their dimension, and a narrowed first token.

use candle_core::{D, DType, Device, IndexOp, Result, Tensor};
use candle_nn::{Dropout, Embedding, Linear, Module, VarBuilder, embedding, linear};

/// How scores are masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masking {
    /// `masked_fill` with the mask repeated to the scores.
    Fill,
    /// A bias [b, 1, s, s] that a helper expands.
    Expanded,
    /// A causal rule and then the padding.
    Causal,
    /// The bias is subtracted.
    Subtracted,
}

/// How tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The sum, divided by the number of tokens in the mask.
    KeptSum,
    /// The mean over all tokens, with padding of the mask.
    PlainMean,
    /// The first token by `narrow`.
    Narrowed,
    /// The last token by `narrow`, and the distance of every token to the mean.
    Centred,
}

/// The sizes of the model.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocab: usize,
    pub hidden: usize,
    pub heads: usize,
    pub layers: usize,
    pub classes: usize,
    pub masking: Masking,
    pub pooling: Pooling,
    /// Of tokens after each layer, and of the vector of a row.
    pub dropout: f32,
}

fn masked_fill(on_false: &Tensor, mask: &Tensor, on_true: f32) -> Result<Tensor> {
    let shape = mask.shape();
    let on_true = Tensor::new(on_true, on_false.device())?.broadcast_as(shape.dims())?;
    mask.where_cond(&on_true, on_false)
}

fn expanded(mask: &Tensor, target: Option<usize>) -> Result<Tensor> {
    let b = mask.dim(0)?;
    let s = mask.dim(1)?;
    let target = target.unwrap_or(s);
    let mask = mask
        .unsqueeze(1)?
        .unsqueeze(2)?
        .expand((b, 1, target, s))?
        .to_dtype(DType::F32)?;
    let inverted = (1.0 - mask)?;
    (inverted * -1e9)?.to_dtype(DType::F32)
}

fn extended(mask: &Tensor) -> Result<Tensor> {
    let mask = match mask.rank() {
        3 => mask.unsqueeze(1)?,
        2 => mask.unsqueeze(1)?.unsqueeze(1)?,
        _ => candle_core::bail!("expected a mask of two or three dimensions"),
    };
    let mask = mask.to_dtype(DType::F32)?;
    (mask.ones_like()? - &mask)?
        .broadcast_mul(&Tensor::new(f32::MIN, mask.device())?.to_dtype(DType::F32)?)
}

fn causal(s: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..s)
        .flat_map(|i| (0..s).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
        .collect();
    Tensor::from_vec(mask, (s, s), device)
}

#[derive(Debug, Clone)]
struct Layer {
    qkv: Linear,
    out: Linear,
    heads: usize,
    masking: Masking,
    dropout: Dropout,
}

impl Layer {
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (b, s, h) = x.dims3()?;
        let qkv = self
            .qkv
            .forward(x)?
            .reshape((b, s, 3, self.heads, h / self.heads))?;
        let part = |i: usize| -> Result<Tensor> { qkv.i((.., .., i))?.transpose(1, 2)?.contiguous() };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.t()?)? * (1.0 / ((h / self.heads) as f64).sqrt()))?;
        let scores = match self.masking {
            Masking::Fill => {
                let hidden = mask.eq(0u32)?.unsqueeze(1)?.unsqueeze(1)?;
                masked_fill(&scores, &hidden.broadcast_as(scores.shape())?, f32::NEG_INFINITY)?
            }
            Masking::Expanded => scores.broadcast_add(&expanded(mask, None)?)?,
            Masking::Causal => scores
                .broadcast_add(&causal(s, x.device())?)?
                .broadcast_add(&extended(mask)?)?,
            Masking::Subtracted => {
                let hidden = mask.to_dtype(DType::F32)?.affine(-1e4, 1e4)?;
                scores.broadcast_sub(&hidden.reshape((b, 1, 1, s))?)?
            }
        };
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, s, h))?;
        x + self.dropout.forward(&self.out.forward(&y)?.gelu()?, true)?
    }
}

/// The model: one vector of logits for each row.
#[derive(Debug, Clone)]
pub struct Model {
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    head: Linear,
    pooling: Pooling,
    dropout: f32,
}

impl Model {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let h = config.hidden;
        let mut layers = Vec::new();
        for i in 0..config.layers {
            let vb = vb.pp(format!("layers.{i}"));
            layers.push(Layer {
                qkv: linear(h, 3 * h, vb.pp("qkv"))?,
                out: linear(h, h, vb.pp("out"))?,
                heads: config.heads,
                masking: config.masking,
                dropout: Dropout::new(config.dropout),
            });
        }
        Ok(Self {
            tokens: embedding(config.vocab, h, vb.pp("tokens"))?,
            positions: embedding(200, h, vb.pp("positions"))?,
            layers,
            head: linear(h, config.classes, vb.pp("head"))?,
            pooling: config.pooling,
            dropout: config.dropout,
        })
    }

    pub fn forward(&self, tokens: &Tensor, given: Option<&Tensor>) -> Result<Tensor> {
        let (_b, s) = tokens.dims2()?;
        let mask = match given {
            Some(mask) => mask.clone(),
            None => tokens.ones_like()?,
        };
        // Positions count the tokens that the mask leaves.
        let counted = mask.to_dtype(DType::F32)?;
        let positions = (counted.cumsum(1)? * &counted)?.to_dtype(DType::U32)?;
        let mut x = (self.tokens.forward(tokens)? + self.positions.forward(&positions)?)?;
        for layer in self.layers.iter() {
            x = layer.forward(&x, &mask)?;
        }
        let pooled = match self.pooling {
            Pooling::KeptSum => {
                let weights = mask.to_dtype(DType::F32)?;
                let sum = x.broadcast_mul(&weights.unsqueeze(D::Minus1)?)?.sum_keepdim(1)?;
                sum.squeeze(1)?.broadcast_div(&weights.sum_keepdim(1)?)?
            }
            Pooling::PlainMean => x.mean(1)?,
            Pooling::Narrowed => x.narrow(1, 0, 1)?.squeeze(1)?,
            Pooling::Centred => {
                let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
                let last = centred.narrow(1, s - 1, 1)?.squeeze(1)?;
                (last + centred.sqr()?.sum(D::Minus2)? * 0.1)?
            }
        };
        self.head
            .forward(&candle_nn::ops::dropout(&pooled, self.dropout)?)
    }
}
