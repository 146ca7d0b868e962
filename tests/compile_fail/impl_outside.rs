//! An `impl` whose fields are declared outside of it.

use candle_core::{Module, Result, Tensor};
use candle_nn::Linear;

pub struct Attention {
    qkv: Linear,
}

#[autosp::sequence_parallel]
impl Attention {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, s, h) = x.dims3()?;
        let x = self.qkv.forward(x)?.reshape((b, s, 3, h))?.transpose(1, 2)?;
        let (q, k, v) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?, x.narrow(1, 2, 1)?);
        let weights = candle_nn::ops::softmax_last_dim(&q.matmul(&k.t()?)?)?;
        weights.matmul(&v)?.squeeze(1)
    }
}

fn main() {}
