use candle_core::{Device, DType, Module, Result, Tensor, D};
use candle_nn::{Embedding, Linear};
#[derive(Debug, Clone)]
pub struct Norm { weight: Tensor, eps: f64 }
impl Module for Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dt = x.dtype();
        let x = x.to_dtype(DType::F32)?;
        let mean = x.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_sub(&mean)?;
        let var = x.sqr()?.mean_keepdim(D::Minus1)?;
        let x = x.broadcast_div(&(var + self.eps)?.sqrt()?)?;
        x.to_dtype(dt)?.broadcast_mul(&self.weight)
    }
}
#[derive(Debug, Clone)]
pub enum Kind { Sliding { window: usize }, Full }
#[derive(Debug, Clone)]
pub struct Rope { cos: Tensor, sin: Tensor }
impl Rope {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, s, _) = x.dims4()?;
        candle_nn::rotary_emb::rope_i(&x.contiguous()?, &self.cos.narrow(0, 0, s)?, &self.sin.narrow(0, 0, s)?)
    }
}
#[derive(Debug, Clone)]
pub struct Attention { q: Linear, k: Linear, v: Linear, o: Linear, qn: Option<Norm>, kn: Option<Norm>, heads: usize, kv: usize, dim: usize, kind: Kind, rope: Rope }
impl Attention {
    fn mask(&self, s: usize, dev: &Device) -> Result<Tensor> {
        let data: Vec<f32> = match self.kind {
            Kind::Sliding { window } => (0..s).flat_map(|i| (0..s).map(move |j| if j > i || i - j >= window { f32::NEG_INFINITY } else { 0f32 })).collect(),
            Kind::Full => (0..s).flat_map(|i| (0..s).map(move |j| if j > i { f32::NEG_INFINITY } else { 0f32 })).collect(),
        };
        Tensor::from_vec(data, (s, s), dev)
    }
    fn heads(&self, x: &Tensor, l: &Linear, n: usize, norm: Option<&Norm>) -> Result<Tensor> {
        let (b, s, _) = x.dims3()?;
        let y = l.forward(x)?.reshape((b, s, n, self.dim))?;
        let y = match norm { Some(norm) => norm.forward(&y)?, None => y };
        y.transpose(1, 2)
    }
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, s, _) = x.dims3()?;
        let mut q = self.heads(x, &self.q, self.heads, self.qn.as_ref())?;
        let mut k = self.heads(x, &self.k, self.kv, self.kn.as_ref())?;
        let v = self.heads(x, &self.v, self.kv, None)?;
        if matches!(self.kind, Kind::Sliding { .. }) {
            q = self.rope.apply(&q)?;
            k = self.rope.apply(&k)?;
        }
        let g = self.heads / self.kv;
        let k = k.unsqueeze(2)?.expand((b, self.kv, g, s, self.dim))?.reshape((b, self.heads, s, self.dim))?;
        let v = v.unsqueeze(2)?.expand((b, self.kv, g, s, self.dim))?.reshape((b, self.heads, s, self.dim))?;
        let att = (q.matmul(&k.t()?)? * (self.dim as f64).powf(-0.5))?;
        let att = att.broadcast_add(&self.mask(s, x.device())?)?;
        let att = candle_nn::ops::softmax_last_dim(&att)?;
        self.o.forward(&att.matmul(&v)?.transpose(1, 2)?.reshape((b, s, ()))?)
    }
}
#[derive(Debug, Clone)]
pub struct Block { norm: Norm, att: Attention, gate: Linear, up: Linear, down: Linear }
impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.norm.forward(x)?;
        let a = self.att.forward(&h)?;
        let m = self.down.forward(&(self.gate.forward(&h)?.silu()? * self.up.forward(&h)?)?)?;
        x + (a + m)?
    }
}
pub struct Cohere { embed: Embedding, blocks: Vec<Block>, norm: Norm, logit_scale: f64 }
impl Cohere {
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut x = self.embed.forward(ids)?;
        for b in self.blocks.iter() { x = b.forward(&x)?; }
        let x = self.norm.forward(&x)?;
        let logits = x.broadcast_matmul(&self.embed.embeddings().t()?)?;
        logits * self.logit_scale
    }
}
