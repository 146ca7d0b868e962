use candle_core::{DType, Device, Module, Result, Tensor, D, IndexOp};
use candle_nn::{Embedding, LayerNorm, Linear, Activation};
#[derive(Clone)]
pub struct Config { pub heads: usize, pub kv: usize, pub hidden: usize, pub clip: Option<f32>, pub top_k: usize, pub experts: usize }
#[derive(Clone)]
pub struct Attn<N: Module + Clone> { wqkv: Linear, out: Linear, norm: N, cfg: Config, cos: Tensor, sin: Tensor }
impl<N: Module + Clone> Attn<N> {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (b, s, _) = x.dims3()?;
        let Config { heads, kv, hidden, clip, .. } = &self.cfg;
        let d = hidden / heads;
        let x = self.norm.forward(x)?;
        let mut qkv = self.wqkv.forward(&x)?;
        if let Some(c) = clip { qkv = qkv.clamp(-*c, *c)?; }
        let q = qkv.narrow(2, 0, heads * d)?.reshape((b, s, *heads, d))?.transpose(1, 2)?.contiguous()?;
        let k = qkv.narrow(2, heads * d, kv * d)?.reshape((b, s, *kv, d))?.transpose(1, 2)?.contiguous()?;
        let v = qkv.narrow(2, (heads + kv) * d, kv * d)?.reshape((b, s, *kv, d))?.transpose(1, 2)?.contiguous()?;
        let cos = self.cos.i(..s)?;
        let sin = self.sin.i(..s)?;
        let q = candle_nn::rotary_emb::rope(&q, &cos, &sin)?;
        let k = candle_nn::rotary_emb::rope(&k, &cos, &sin)?;
        let k = repeat(k, heads / kv)?;
        let v = repeat(v, heads / kv)?;
        let att = (q.matmul(&k.transpose(D::Minus2, D::Minus1)?)? / (d as f64).sqrt())?;
        let att = match mask { Some(m) => att.broadcast_add(m)?, None => att };
        let att = candle_nn::ops::softmax_last_dim(&att)?;
        att.matmul(&v)?.transpose(1, 2)?.reshape((b, s, heads * d))?.apply(&self.out)
    }
}
fn repeat(x: Tensor, n: usize) -> Result<Tensor> {
    if n == 1 { return Ok(x); }
    let (b, h, s, d) = x.dims4()?;
    Tensor::cat(&vec![&x; n], 2)?.reshape((b, h * n, s, d))
}
#[derive(Clone)]
pub struct Expert { w1: Linear, v1: Linear, w2: Linear, act: Activation }
impl Expert { fn forward(&self, x: &Tensor) -> Result<Tensor> { (x.apply(&self.w1)?.apply(&self.act)? * x.apply(&self.v1)?)?.apply(&self.w2) } }
#[derive(Clone)]
pub struct Moe { router: Linear, experts: Vec<Expert>, top_k: usize }
impl Moe {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let w = candle_nn::ops::softmax_last_dim(&self.router.forward(x)?)?;
        let order = w.arg_sort_last_dim(false)?.contiguous()?;
        let top = order.narrow(D::Minus1, 0, self.top_k)?.contiguous()?;
        let tw = w.gather(&top, D::Minus1)?;
        let tw = tw.broadcast_div(&tw.sum_keepdim(D::Minus1)?)?;
        let mut out = x.zeros_like()?;
        for (e, expert) in self.experts.iter().enumerate() {
            let hit = top.eq(e as u32)?.to_dtype(tw.dtype())?;
            let g = (&tw * hit)?.sum_keepdim(D::Minus1)?;
            out = (out + expert.forward(x)?.broadcast_mul(&g)?)?;
        }
        Ok(out)
    }
}
#[derive(Clone)]
pub struct Block { attn: Attn<LayerNorm>, norm: LayerNorm, moe: Moe }
impl Block {
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let x = (self.attn.forward(x, mask)? + x)?;
        self.moe.forward(&self.norm.forward(&x)?)? + x
    }
}
pub struct Dbrx { embed: Embedding, blocks: Vec<Block>, norm: LayerNorm, head: Linear }
impl Dbrx {
    fn causal(&self, s: usize, dev: &Device) -> Result<Option<Tensor>> {
        if s <= 1 { return Ok(None); }
        let mut v = vec![0f32; s * s];
        for i in 0..s { for j in (i + 1)..s { v[i * s + j] = f32::NEG_INFINITY; } }
        Ok(Some(Tensor::from_vec(v, (1, 1, s, s), dev)?))
    }
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let s = ids.dim(1)?;
        let mask = self.causal(s, ids.device())?;
        let mut x = self.embed.forward(ids)?;
        for b in &self.blocks { x = b.forward(&x, mask.as_ref())?; }
        x.apply(&self.norm)?.apply(&self.head)
    }
}
