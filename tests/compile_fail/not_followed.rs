//! A list that is filled from the front.

#[autosp::sequence_parallel]
mod model {
    use candle_core::{Module, Result, Tensor};
    use candle_nn::Linear;

    pub struct Attention {
        qkv: [Linear; 3],
        out: Linear,
        heads: usize,
    }

    impl Attention {
        fn split(&self, x: &Tensor, which: usize) -> Result<Tensor> {
            let (b, s, h) = x.dims3()?;
            let x = self.qkv[which].forward(x)?;
            x.reshape((b, s, self.heads, h / self.heads))?.transpose(1, 2)?.contiguous()
        }

        pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
            let (b, s, h) = x.dims3()?;
            let (q, k, v) = (self.split(x, 0)?, self.split(x, 1)?, self.split(x, 2)?);
            let scores = (q.matmul(&k.t()?)? / ((h / self.heads) as f64).sqrt())?;
            let weights = candle_nn::ops::softmax_last_dim(&scores)?;
            let y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, s, h))?;
            let mut parts = Vec::new();
            parts.insert(0, y.clone());
            self.out.forward(&Tensor::cat(&parts, 2)?)
        }
    }
}

fn main() {}
