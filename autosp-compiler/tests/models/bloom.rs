use candle_core::{Device, DType, IndexOp, Module, Result, Tensor, D};
use candle_nn::{Embedding, LayerNorm, Linear};
fn slopes(heads: usize) -> Vec<f32> {
    let p = heads.next_power_of_two();
    let base = 2f32.powf(-8. / p as f32);
    (1..=heads).map(|i| base.powi(i as i32)).collect()
}
fn alibi(heads: usize, len: usize, dev: &Device) -> Result<Tensor> {
    let slopes = Tensor::from_vec(slopes(heads), (1, heads, 1, 1), dev)?;
    let pos = Tensor::arange(0u32, len as u32, dev)?.to_dtype(DType::F32)?.reshape((1, 1, 1, len))?;
    slopes.broadcast_mul(&pos)
}
#[derive(Clone)]
pub struct Attention { qkv: Linear, dense: Linear, heads: usize, dim: usize }
impl Attention {
    fn forward(&self, x: &Tensor, alibi: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (b, s, _) = x.dims3()?;
        let fused = self.qkv.forward(x)?.reshape((b, s, self.heads, 3, self.dim))?;
        let q = fused.i((.., .., .., 0, ..))?.transpose(1, 2)?;
        let k = fused.i((.., .., .., 1, ..))?.transpose(1, 2)?;
        let v = fused.i((.., .., .., 2, ..))?.transpose(1, 2)?.contiguous()?;
        let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * (1. / (self.dim as f64).sqrt()))?;
        let scores = scores.broadcast_add(alibi)?;
        let scores = scores.broadcast_add(mask)?;
        let p = candle_nn::ops::softmax_last_dim(&scores.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?;
        let ctx = p.matmul(&v)?;
        ctx.permute((0, 2, 1, 3))?.flatten_from(2)?.apply(&self.dense)
    }
}
#[derive(Clone)]
pub struct Block { ln1: LayerNorm, ln2: LayerNorm, attn: Attention, up: Linear, down: Linear, post_ln_res: bool }
impl Block {
    fn forward(&self, x: &Tensor, alibi: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let n = self.ln1.forward(x)?;
        let r = if self.post_ln_res { &n } else { x };
        let x = (r + self.attn.forward(&n, alibi, mask)?)?;
        let n = self.ln2.forward(&x)?;
        let r = if self.post_ln_res { n.clone() } else { x };
        r + n.apply(&self.up)?.gelu()?.apply(&self.down)?
    }
}
pub struct Bloom { embed: Embedding, embed_ln: LayerNorm, blocks: Vec<Block>, ln: LayerNorm, heads: usize }
impl Bloom {
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_b, s) = ids.dims2()?;
        let alibi = alibi(self.heads, s, ids.device())?;
        let idx = Tensor::arange(0u32, s as u32, ids.device())?;
        let rows = idx.reshape((s, 1))?.broadcast_as((s, s))?;
        let cols = idx.reshape((1, s))?.broadcast_as((s, s))?;
        let keep = cols.le(&rows)?;
        let zero = Tensor::zeros((s, s), DType::F32, ids.device())?;
        let inf = Tensor::full(f32::NEG_INFINITY, (s, s), ids.device())?;
        let mask = keep.where_cond(&zero, &inf)?;
        let x = self.embed_ln.forward(&self.embed.forward(ids)?)?;
        let x = self.blocks.iter().try_fold(x, |x, b| b.forward(&x, &alibi, &mask))?;
        let x = self.ln.forward(&x)?;
        x.broadcast_matmul(&self.embed.embeddings().t()?)
    }
}
