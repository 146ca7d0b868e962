// Llama ("LLaMA: Open and Efficient Foundation Language Models", https://arxiv.org/abs/2302.13971) with grouped-query
// attention, rotary positions and SwiGLU. Parameter names and layout are Hugging Face's, so that their files load as they are.

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_nn::{
    Embedding, Linear, Module, RmsNorm, VarBuilder, embedding, linear_no_bias, rms_norm,
};
use std::collections::HashMap;

/// The sizes of a Llama.
#[derive(Debug, Clone)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    /// Width of one head; `hidden_size / num_attention_heads` where it is not given.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rope_theta: f32,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    /// Whether `forward` computes the logits of the last position alone, which is all that generation needs.
    pub last_token_only: bool,
}

impl Config {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads)
    }
}

/// What does not change from one call to the next, and the keys and values of the tokens seen so far.
#[derive(Debug, Clone)]
pub struct Cache {
    masks: HashMap<usize, Tensor>,
    pub use_kv_cache: bool,
    kvs: Vec<Option<(Tensor, Tensor)>>,
    cos: Tensor,
    sin: Tensor,
    device: Device,
}

impl Cache {
    /// Computes the rotary tables, `[max_position_embeddings, head_dim / 2]` each.
    pub fn new(use_kv_cache: bool, dtype: DType, config: &Config, device: &Device) -> Result<Self> {
        let head_dim = config.head_dim();
        let theta: Vec<f32> = (0..head_dim)
            .step_by(2)
            .map(|i| 1.0 / config.rope_theta.powf(i as f32 / head_dim as f32))
            .collect();
        let theta = Tensor::new(theta.as_slice(), device)?;
        let angles = Tensor::arange(0, config.max_position_embeddings as u32, device)?
            .to_dtype(DType::F32)?
            .reshape((config.max_position_embeddings, 1))?
            .matmul(&theta.reshape((1, head_dim / 2))?)?;
        Ok(Self {
            masks: HashMap::new(),
            use_kv_cache,
            kvs: vec![None; config.num_hidden_layers],
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
            device: device.clone(),
        })
    }

    /// The causal mask for `t` tokens, `[t, t]`: 1 where a position lies in the future.
    fn mask(&mut self, t: usize) -> Result<Tensor> {
        if let Some(mask) = self.masks.get(&t) {
            Ok(mask.clone())
        } else {
            let mask: Vec<_> = (0..t)
                .flat_map(|i| (0..t).map(move |j| u8::from(j > i)))
                .collect();
            let mask = Tensor::from_slice(&mask, (t, t), &self.device)?;
            self.masks.insert(t, mask.clone());
            Ok(mask)
        }
    }
}

fn masked_fill(on_false: &Tensor, mask: &Tensor, on_true: f32) -> Result<Tensor> {
    let on_true = Tensor::new(on_true, on_false.device())?.broadcast_as(mask.shape())?;
    mask.where_cond(&on_true, on_false)
}

#[derive(Debug, Clone)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let hidden = config.hidden_size;
        let q_size = config.head_dim() * config.num_attention_heads;
        let kv_size = config.head_dim() * config.num_key_value_heads;
        Ok(Self {
            q_proj: linear_no_bias(hidden, q_size, vb.pp("q_proj"))?,
            k_proj: linear_no_bias(hidden, kv_size, vb.pp("k_proj"))?,
            v_proj: linear_no_bias(hidden, kv_size, vb.pp("v_proj"))?,
            o_proj: linear_no_bias(q_size, hidden, vb.pp("o_proj"))?,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim(),
        })
    }

    fn rotate(&self, x: &Tensor, index_pos: usize, cache: &Cache) -> Result<Tensor> {
        let (_b, _heads, seq_len, _head_dim) = x.dims4()?;
        let cos = cache.cos.narrow(0, index_pos, seq_len)?;
        let sin = cache.sin.narrow(0, index_pos, seq_len)?;
        candle_nn::rotary_emb::rope(x, &cos, &sin)
    }

    fn repeat_kv(&self, x: Tensor) -> Result<Tensor> {
        let repeats = self.num_heads / self.num_kv_heads;
        if repeats == 1 {
            Ok(x)
        } else {
            let (b, kv_heads, seq_len, head_dim) = x.dims4()?;
            x.unsqueeze(2)?
                .expand((b, kv_heads, repeats, seq_len, head_dim))?
                .reshape((b, kv_heads * repeats, seq_len, head_dim))
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        index_pos: usize,
        layer: usize,
        cache: &mut Cache,
    ) -> Result<Tensor> {
        let (b, seq_len, _hidden) = x.dims3()?;
        let q = self.q_proj.forward(x)?;
        let k = self.k_proj.forward(x)?;
        let v = self.v_proj.forward(x)?;

        let q = q
            .reshape((b, seq_len, self.num_heads, self.head_dim))?
            .transpose(1, 2)?
            .contiguous()?;
        let k = k
            .reshape((b, seq_len, self.num_kv_heads, self.head_dim))?
            .transpose(1, 2)?
            .contiguous()?;
        let mut v = v
            .reshape((b, seq_len, self.num_kv_heads, self.head_dim))?
            .transpose(1, 2)?
            .contiguous()?;

        let q = self.rotate(&q, index_pos, cache)?;
        let mut k = self.rotate(&k, index_pos, cache)?;

        if cache.use_kv_cache {
            if let Some((past_k, past_v)) = &cache.kvs[layer] {
                k = Tensor::cat(&[past_k, &k], 2)?.contiguous()?;
                v = Tensor::cat(&[past_v, &v], 2)?.contiguous()?;
            }
            cache.kvs[layer] = Some((k.clone(), v.clone()));
        }

        let k = self.repeat_kv(k)?;
        let v = self.repeat_kv(v)?;

        let dtype = q.dtype();
        let q = q.to_dtype(DType::F32)?;
        let k = k.to_dtype(DType::F32)?;
        let v = v.to_dtype(DType::F32)?;
        let scores = (q.matmul(&k.t()?)? / (self.head_dim as f64).sqrt())?;
        let scores = if seq_len == 1 {
            scores
        } else {
            let mask = cache.mask(seq_len)?.broadcast_as(scores.shape())?;
            masked_fill(&scores, &mask, f32::NEG_INFINITY)?
        };
        let weights = candle_nn::ops::softmax_last_dim(&scores)?;
        let y = weights.matmul(&v.contiguous()?)?.to_dtype(dtype)?;

        let y = y
            .transpose(1, 2)?
            .reshape((b, seq_len, self.num_heads * self.head_dim))?;
        self.o_proj.forward(&y)
    }
}

#[derive(Debug, Clone)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: linear_no_bias(hidden, intermediate, vb.pp("gate_proj"))?,
            up_proj: linear_no_bias(hidden, intermediate, vb.pp("up_proj"))?,
            down_proj: linear_no_bias(intermediate, hidden, vb.pp("down_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (candle_nn::ops::silu(&self.gate_proj.forward(x)?)? * self.up_proj.forward(x)?)?;
        self.down_proj.forward(&x)
    }
}

#[derive(Debug, Clone)]
struct Block {
    input_norm: RmsNorm,
    attention: Attention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

impl Block {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_norm: rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
            attention: Attention::load(vb.pp("self_attn"), config)?,
            post_attention_norm: rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
            mlp: Mlp::load(vb.pp("mlp"), config)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        index_pos: usize,
        layer: usize,
        cache: &mut Cache,
    ) -> Result<Tensor> {
        let residual = x;
        let x = self.input_norm.forward(x)?;
        let x = (self.attention.forward(&x, index_pos, layer, cache)? + residual)?;
        let residual = &x;
        let x = self.mlp.forward(&self.post_attention_norm.forward(&x)?)?;
        x + residual
    }
}

/// A Llama with its language-model head.
#[derive(Debug, Clone)]
pub struct Llama {
    embed_tokens: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    lm_head: Linear,
    last_token_only: bool,
}

impl Llama {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let embed_tokens = embedding(
            config.vocab_size,
            config.hidden_size,
            vb.pp("model.embed_tokens"),
        )?;
        let lm_head = if config.tie_word_embeddings {
            Linear::new(embed_tokens.embeddings().clone(), None)
        } else {
            linear_no_bias(config.hidden_size, config.vocab_size, vb.pp("lm_head"))?
        };
        let blocks = (0..config.num_hidden_layers)
            .map(|i| Block::load(vb.pp(format!("model.layers.{i}")), config))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            embed_tokens,
            blocks,
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("model.norm"))?,
            lm_head,
            last_token_only: config.last_token_only,
        })
    }

    /// Logits in f32: `[b, s, vocab]` for tokens `[b, s]`, or `[b, vocab]` where only the last position is asked for.
    /// `index_pos` is the number of tokens that the cache has seen already.
    pub fn forward(&self, x: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        let (_b, seq_len) = x.dims2()?;
        let mut x = self.embed_tokens.forward(x)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, index_pos, layer, cache)?;
        }
        let x = self.norm.forward(&x)?;
        let x = if self.last_token_only {
            x.i((.., seq_len - 1, ..))?.contiguous()?
        } else {
            x
        };
        self.lm_head.forward(&x)?.to_dtype(DType::F32)
    }
}
