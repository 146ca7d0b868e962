// GPT-2 ("Language Models are Unsupervised Multitask Learners"): learned positions, LayerNorm before each half of a block,
// one projection for queries, keys and values, GELU, and logits through the token embedding. Parameter names are Hugging
// Face's; their projections (`Conv1D`) store weights as [in, out], the transpose of a `Linear`.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{
    Embedding, Init, LayerNorm, LayerNormConfig, Module, VarBuilder, embedding, layer_norm,
};

/// The sizes of a GPT-2.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub layer_norm_epsilon: f64,
}

/// A projection with its weight as [in, out].
#[derive(Debug, Clone)]
struct Conv1d {
    weight: Tensor,
    bias: Tensor,
}

impl Conv1d {
    fn load(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn {
            mean: 0.0,
            stdev: 0.02,
        };
        Ok(Self {
            weight: vb.get_with_hints((inputs, outputs), "weight", init)?,
            bias: vb.get_with_hints(outputs, "bias", Init::Const(0.0))?,
        })
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let y = x.reshape((b * t, c))?.matmul(&self.weight)?;
        y.broadcast_add(&self.bias)?.reshape((b, t, ()))
    }
}

/// -inf where a key lies in the future of its query, else 0: [1, 1, t, t].
fn causal_mask(t: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..t)
        .flat_map(|i| (0..t).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(mask, (1, 1, t, t), device)
}

#[derive(Debug, Clone)]
struct Attention {
    c_attn: Conv1d,
    c_proj: Conv1d,
    n_head: usize,
    n_embd: usize,
}

impl Attention {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let n = config.n_embd;
        Ok(Self {
            c_attn: Conv1d::load(n, 3 * n, vb.pp("c_attn"))?,
            c_proj: Conv1d::load(n, n, vb.pp("c_proj"))?,
            n_head: config.n_head,
            n_embd: n,
        })
    }

    fn heads(&self, qkv: &Tensor, which: usize) -> Result<Tensor> {
        let (b, t, _) = qkv.dims3()?;
        qkv.narrow(2, which * self.n_embd, self.n_embd)?
            .reshape((b, t, self.n_head, self.n_embd / self.n_head))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let qkv = self.c_attn.forward(x)?;
        let (q, k, v) = (
            self.heads(&qkv, 0)?,
            self.heads(&qkv, 1)?,
            self.heads(&qkv, 2)?,
        );
        let scale = 1.0 / ((self.n_embd / self.n_head) as f64).sqrt();
        let mut scores = (q.matmul(&k.transpose(2, 3)?)? * scale)?;
        if let Some(mask) = mask {
            scores = scores.broadcast_add(mask)?;
        }
        let weights = candle_nn::ops::softmax(&scores, 3)?;
        let y = weights.matmul(&v)?.transpose(1, 2)?.flatten_from(2)?;
        self.c_proj.forward(&y)
    }
}

#[derive(Debug, Clone)]
struct Mlp {
    c_fc: Conv1d,
    c_proj: Conv1d,
}

impl Mlp {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let n = config.n_embd;
        Ok(Self {
            c_fc: Conv1d::load(n, 4 * n, vb.pp("c_fc"))?,
            c_proj: Conv1d::load(4 * n, n, vb.pp("c_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply(&self.c_fc)?.gelu()?.apply(&self.c_proj)
    }
}

#[derive(Debug, Clone)]
struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let norm = LayerNormConfig::from(config.layer_norm_epsilon);
        Ok(Self {
            ln_1: layer_norm(config.n_embd, norm, vb.pp("ln_1"))?,
            attn: Attention::load(vb.pp("attn"), config)?,
            ln_2: layer_norm(config.n_embd, norm, vb.pp("ln_2"))?,
            mlp: Mlp::load(vb.pp("mlp"), config)?,
        })
    }

    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let x = (x + self.attn.forward(&self.ln_1.forward(x)?, mask)?)?;
        &x + self.mlp.forward(&x.apply(&self.ln_2)?)?
    }
}

/// A GPT-2 whose logits go through the token embedding.
#[derive(Debug, Clone)]
pub struct Gpt2 {
    wte: Embedding,
    wpe: Embedding,
    h: Vec<Block>,
    ln_f: LayerNorm,
}

impl Gpt2 {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let h = (0..config.n_layer).map(|i| Block::load(vb.pp(format!("h.{i}")), config));
        let norm = LayerNormConfig::from(config.layer_norm_epsilon);
        Ok(Self {
            wte: embedding(config.vocab_size, config.n_embd, vb.pp("wte"))?,
            wpe: embedding(config.n_positions, config.n_embd, vb.pp("wpe"))?,
            h: h.collect::<Result<Vec<_>>>()?,
            ln_f: layer_norm(config.n_embd, norm, vb.pp("ln_f"))?,
        })
    }

    /// Logits [b, t, vocab] in f32 for tokens [b, t].
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (_b, t) = tokens.dims2()?;
        let device = tokens.device();
        let positions = Tensor::arange(0u32, t as u32, device)?;
        let mut x = self
            .wte
            .forward(tokens)?
            .broadcast_add(&self.wpe.forward(&positions)?)?;
        let mask = if t > 1 {
            Some(causal_mask(t, device)?)
        } else {
            None
        };
        for block in &self.h {
            x = block.forward(&x, mask.as_ref())?;
        }
        let x = self.ln_f.forward(&x)?;
        let head = self.wte.embeddings().t()?;
        x.broadcast_matmul(&head)?.to_dtype(DType::F32)
    }
}
