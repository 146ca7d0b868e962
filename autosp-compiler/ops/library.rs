// Helpers that models share, in candle's own operations: what `candle_transformers::utils` computes. A call of one of them is
// followed through the definition here, and its twin is made from it. When the program runs, the helper that is really called
// is compared with this definition first (`autosp_runtime::library`).

/// Each key or value head serves `n_rep` query heads in a row.
pub fn repeat_kv(xs: candle_core::Tensor, n_rep: usize) -> candle_core::Result<candle_core::Tensor> {
    if n_rep == 1 {
        Ok(xs)
    } else {
        let (b, kv_heads, s, d) = xs.dims4()?;
        xs.unsqueeze(2)?
            .expand((b, kv_heads, n_rep, s, d))?
            .reshape((b, kv_heads * n_rep, s, d))
    }
}

/// 1 where a query may not see a key: `[seq_len, index_pos + seq_len]`.
pub fn build_causal_mask(
    seq_len: usize,
    index_pos: usize,
    device: &candle_core::Device,
) -> candle_core::Result<candle_core::Tensor> {
    let mask: Vec<u8> = (0..seq_len)
        .flat_map(|i| (0..index_pos + seq_len).map(move |j| u8::from(j > index_pos + i)))
        .collect();
    candle_core::Tensor::from_slice(&mask, (seq_len, index_pos + seq_len), device)
}

/// 0 where a query sees a key, else minus infinity: `[1, 1, tgt, tgt + offset]`. With a window, at most `sw` keys back.
pub fn build_additive_causal_mask(
    tgt: usize,
    offset: usize,
    sw: Option<usize>,
    device: &candle_core::Device,
    dtype: candle_core::DType,
) -> candle_core::Result<candle_core::Tensor> {
    let hidden = f32::NEG_INFINITY;
    match sw {
        Some(w) => {
            let mask: Vec<f32> = (0..tgt)
                .flat_map(|i| {
                    (0..tgt + offset).map(move |j| {
                        if j <= i + offset && j + w >= i + offset {
                            0.0
                        } else {
                            hidden
                        }
                    })
                })
                .collect();
            candle_core::Tensor::from_slice(&mask, (1, 1, tgt, tgt + offset), device)?.to_dtype(dtype)
        }
        None => {
            let mask: Vec<f32> = (0..tgt)
                .flat_map(|i| {
                    (0..tgt + offset).map(move |j| if j <= i + offset { 0.0 } else { hidden })
                })
                .collect();
            candle_core::Tensor::from_slice(&mask, (1, 1, tgt, tgt + offset), device)?.to_dtype(dtype)
        }
    }
}

/// Attention of `[b, s, h, d]` queries on `[b, s, g, d]` keys and values, to `[b, h, s, d]`.
pub fn flash_attn(
    q: &candle_core::Tensor,
    k: &candle_core::Tensor,
    v: &candle_core::Tensor,
    softmax_scale: f32,
    attn_mask: candle_nn::attention::AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> candle_core::Result<candle_core::Tensor> {
    if max_bias.is_some() {
        candle_core::bail!("expected no ALiBi bias inside a sharded scope");
    }
    if attn_mask.kv_offset() != 0 {
        candle_core::bail!("expected an offset of 0 inside a sharded scope");
    }
    let (b, s, kv_heads, d) = k.dims4()?;
    let (heads, v_d) = (q.dim(2)?, v.dim(3)?);
    let repeats = heads / kv_heads;
    let q = q.transpose(1, 2)?;
    let k = k
        .transpose(1, 2)?
        .unsqueeze(2)?
        .expand((b, kv_heads, repeats, s, d))?
        .reshape((b, heads, s, d))?;
    let v = v
        .transpose(1, 2)?
        .unsqueeze(2)?
        .expand((b, kv_heads, repeats, s, v_d))?
        .reshape((b, heads, s, v_d))?;
    let scores = (q.matmul(&k.t()?)? * softmax_scale as f64)?;
    let scores = match softcap {
        Some(cap) => ((scores / cap as f64)?.tanh()? * cap as f64)?,
        None => scores,
    };
    let scores = if attn_mask.is_causal() {
        let mask: Vec<f32> = (0..s)
            .flat_map(|i| (0..s).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let mask = candle_core::Tensor::from_slice(&mask, (s, s), q.device())?.to_dtype(q.dtype())?;
        scores.broadcast_add(&mask)?
    } else {
        scores
    };
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)
}
