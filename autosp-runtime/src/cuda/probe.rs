//! Each of our kernels on sizes that fill a GPU, for `benches/kernels`: what it has to move at least, and a way to run it.

use candle_core::{DType, Device, Result, Tensor};

use super::ops::{self, AdamW, Norm, Rope};

/// A kernel on tensors of its own.
pub struct Probe {
    /// Its name in the sources.
    pub name: &'static str,
    /// What it runs on.
    pub shape: Vec<usize>,
    /// Bytes that it reads and writes at least, each once.
    pub bytes: usize,
    run: Box<dyn Fn() -> Result<()>>,
}

impl Probe {
    /// Puts the kernel on the device's stream once.
    ///
    /// # Errors
    /// The kernel's own.
    pub fn run(&self) -> Result<()> {
        (self.run)()
    }
}

fn probe<T>(
    name: &'static str,
    shape: &[usize],
    bytes: usize,
    run: impl Fn() -> Result<T> + 'static,
) -> Probe {
    Probe {
        name,
        shape: shape.to_vec(),
        bytes,
        run: Box::new(move || run().map(drop)),
    }
}

/// The kernels for tensors of a type: rows of `hidden`, `tokens` of them, and logits over `vocabulary`.
///
/// # Errors
/// Candle's, such as for memory that there is not.
pub fn probes(
    device: &Device,
    dtype: DType,
    [tokens, hidden, vocabulary]: [usize; 3],
) -> Result<Vec<Probe>> {
    let random = |shape: &[usize], dtype: DType| -> Result<Tensor> {
        Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype)
    };
    let element = dtype.size_in_bytes();
    let rows = [tokens, hidden];
    let one = tokens * hidden * element;
    let (x, dy) = (random(&rows, dtype)?, random(&rows, dtype)?);
    let alpha = random(&[hidden], dtype)?;
    let mut all = Vec::new();
    for (forward, backward, remove_mean) in [
        ("norm_forward (RMSNorm)", "norm_backward (RMSNorm)", false),
        (
            "norm_forward (LayerNorm)",
            "norm_backward (LayerNorm)",
            true,
        ),
    ] {
        let norm = Norm {
            eps: 1e-5,
            remove_mean,
        };
        let (a, w) = (x.clone(), alpha.clone());
        all.push(probe(forward, &rows, 2 * one, move || {
            Ok(ops::norm_forward(norm, &a, &w, remove_mean.then_some(&w))?)
        }));
        let (a, w, g) = (x.clone(), alpha.clone(), dy.clone());
        all.push(probe(backward, &rows, 3 * one, move || {
            Ok(ops::norm_backward(norm, &a, &w, &g)?)
        }));
    }
    let a = x.clone();
    all.push(probe("silu_forward", &rows, 2 * one, move || {
        Ok(ops::silu_forward(&a)?)
    }));
    let (a, g) = (x.clone(), dy.clone());
    all.push(probe("silu_backward", &rows, 3 * one, move || {
        Ok(ops::silu_backward(&a, &g)?)
    }));
    all.push(rope(&x, 128.min(hidden))?);
    let turned = x
        .reshape((tokens, hidden / 128.min(hidden), ()))?
        .transpose(0, 1)?;
    all.push(probe(
        "copy (heads before tokens)",
        &rows,
        2 * one,
        move || Ok(ops::contiguous(&turned)?),
    ));
    let index = Tensor::rand(0f32, vocabulary as f32, tokens, device)?.to_dtype(DType::U32)?;
    let (g, i) = (dy.clone(), index.clone());
    let sums = vocabulary * hidden * (4 + element);
    all.push(probe("embedding_backward", &rows, one + sums, move || {
        Ok(ops::embedding_backward(&i, &g, vocabulary)?)
    }));
    let a = x.clone();
    all.push(probe("sum_squares", &rows, one, move || {
        Ok(ops::squares(&a)?)
    }));
    all.extend(losses(device, dtype, (tokens / 4).max(1), vocabulary)?);
    all.push(adamw(&random, &rows, dtype)?);
    Ok(all)
}

fn rope(x: &Tensor, width: usize) -> Result<Probe> {
    let (tokens, hidden) = x.dims2()?;
    let shape = [1, tokens, hidden / width, width];
    let x = x.reshape(&shape[..])?.transpose(1, 2)?;
    let table = Tensor::randn(0f32, 1.0, (tokens, width / 2), x.device())?.to_dtype(x.dtype())?;
    let how = Rope {
        interleaved: false,
        sequence_first: false,
        inverse: false,
    };
    let bytes = 2 * x.elem_count() * x.dtype().size_in_bytes();
    Ok(probe("rope", &shape, bytes, move || {
        Ok(ops::rope(how, &x, &table, &table)?)
    }))
}

fn losses(device: &Device, dtype: DType, rows: usize, vocabulary: usize) -> Result<Vec<Probe>> {
    let shape = [rows, vocabulary];
    let one = rows * vocabulary * dtype.size_in_bytes();
    let logits = Tensor::randn(0f32, 1.0, &shape, device)?.to_dtype(dtype)?;
    let classes = Tensor::rand(0f32, vocabulary as f32, rows, device)?.to_dtype(DType::U32)?;
    let lse = Tensor::full((vocabulary as f32).ln(), rows, device)?;
    let (x, c) = (logits.clone(), classes.clone());
    let forward = probe("loss_forward", &shape, one, move || {
        Ok(ops::loss_forward(&x, &c)?)
    });
    let (x, c) = (logits.clone(), classes.clone());
    let backward = probe("loss_backward", &shape, 2 * one, move || {
        Ok(ops::loss_backward(&x, &c, &lse, 1.0)?)
    });
    // It overwrites what it reads: the numbers change from run to run, the work does not.
    let tile = probe("loss_tile", &shape, 2 * one, move || {
        Ok(ops::loss_tile(&logits, &classes, Some(1.0))?)
    });
    Ok(vec![forward, backward, tile])
}

fn adamw(
    random: &dyn Fn(&[usize], DType) -> Result<Tensor>,
    shape: &[usize],
    dtype: DType,
) -> Result<Probe> {
    let wide =
        |scale: f64| -> Result<Tensor> { random(shape, DType::F32)?.sqr()?.affine(scale, 0.0) };
    let state = [wide(1.0)?, wide(1e-3)?, wide(1e-6)?, wide(1e-3)?];
    let out = random(shape, dtype)?;
    let step = AdamW {
        scale: 1.0,
        keep: 1.0,
        blend1: 0.1,
        keep2: 0.95,
        blend2: 0.05,
        step: 1e-6,
        root2: 1.0,
        eps: 1e-8,
    };
    // Master weight and two moments both ways, the gradient and the parameter one way.
    let bytes = shape.iter().product::<usize>() * (7 * 4 + dtype.size_in_bytes());
    Ok(probe("adamw", shape, bytes, move || {
        Ok(ops::adamw(step, state.each_ref(), &out)?)
    }))
}
