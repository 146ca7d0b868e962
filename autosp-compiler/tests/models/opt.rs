use candle_core::{DType, Result, Tensor, D, Module};
use candle_nn::{Embedding, LayerNorm, Linear};
pub struct PosEmbed { table: Embedding, offset: u32 }
impl PosEmbed {
    fn forward(&self, len: usize, dev: &candle_core::Device) -> Result<Tensor> {
        let pos = Tensor::arange(self.offset, self.offset + len as u32, dev)?;
        self.table.forward(&pos)
    }
}
pub struct Attn { q: Linear, k: Linear, v: Linear, o: Linear, heads: usize, scale: f64 }
impl Attn {
    fn shape(&self, x: &Tensor, b: usize, s: usize) -> Result<Tensor> {
        let d = x.dim(D::Minus1)? / self.heads;
        x.reshape((b, s, self.heads, d))?.transpose(1, 2)?.reshape((b * self.heads, s, d))
    }
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (b, s, h) = x.dims3()?;
        let q = self.shape(&(self.q.forward(x)? * self.scale)?, b, s)?;
        let k = self.shape(&self.k.forward(x)?, b, s)?;
        let v = self.shape(&self.v.forward(x)?, b, s)?;
        let w = q.matmul(&k.transpose(1, 2)?)?;
        let w = w.reshape((b, self.heads, s, s))?.broadcast_add(mask)?.reshape((b * self.heads, s, s))?;
        let w = candle_nn::ops::softmax_last_dim(&w)?;
        let o = w.matmul(&v)?.reshape((b, self.heads, s, h / self.heads))?.transpose(1, 2)?.reshape((b, s, h))?;
        self.o.forward(&o)
    }
}
pub struct Block { ln1: LayerNorm, attn: Attn, ln2: LayerNorm, fc1: Linear, fc2: Linear, pre: bool }
impl Block {
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let r = x;
        let h = if self.pre { self.ln1.forward(x)? } else { x.clone() };
        let h = (self.attn.forward(&h, mask)? + r)?;
        let h = if self.pre { h } else { self.ln1.forward(&h)? };
        let r = h.clone();
        let h = if self.pre { self.ln2.forward(&h)? } else { h };
        let h = self.fc2.forward(&self.fc1.forward(&h)?.relu()?)?;
        let h = (h + r)?;
        if self.pre { Ok(h) } else { self.ln2.forward(&h) }
    }
}
pub struct Opt { embed: Embedding, pos: PosEmbed, proj_in: Option<Linear>, blocks: Vec<Block>, norm: Option<LayerNorm>, proj_out: Option<Linear>, dtype: DType }
impl Opt {
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, s) = ids.dims2()?;
        let mut x = self.embed.forward(ids)?;
        if let Some(p) = &self.proj_in { x = p.forward(&x)?; }
        let pos = self.pos.forward(s, ids.device())?;
        let mut x = x.broadcast_add(&pos)?;
        let tril = Tensor::tril2(s, DType::U8, ids.device())?;
        let zero = Tensor::zeros((s, s), self.dtype, ids.device())?;
        let inf = Tensor::full(f32::MIN, (s, s), ids.device())?.to_dtype(self.dtype)?;
        let mask = tril.where_cond(&zero, &inf)?.broadcast_as((b, 1, s, s))?;
        for blk in self.blocks.iter() { x = blk.forward(&x, &mask)?; }
        if let Some(n) = self.norm.as_ref() { x = n.forward(&x)?; }
        if let Some(p) = self.proj_out.as_ref() { x = p.forward(&x)?; }
        x.matmul(&self.embed.embeddings().t()?.broadcast_left(b)?)
    }
}
