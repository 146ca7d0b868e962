//! Attention of a GPU against `f64` on the CPU.

use autosp::Result;
use autosp::attention::{self, Kernel, Spec};
use autosp::mask::Band;
use candle_core::{DType, Device, Tensor};

use super::{Row, apart, noise};

pub(crate) struct Case {
    dtype: DType,
    heads: (usize, usize),
    length: usize,
    valid: usize,
    width: usize,
    band: Band,
    kernel: Kernel,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        let Self {
            dtype,
            heads: (h, g),
            length,
            valid,
            width,
            band: Band { lo, hi },
            kernel,
        } = self;
        format!(
            "{dtype:?} {h}/{g} heads of {width}, {valid} of {length}, {lo:?}..{hi:?} {kernel:?}"
        )
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let causal = Band {
        lo: None,
        hi: Some(0),
    };
    let base = |dtype, heads, width| Case {
        dtype,
        heads,
        length: 1024,
        valid: 1024,
        width,
        band: causal,
        kernel: Kernel::Tiled,
    };
    vec![
        base(DType::BF16, (8, 8), 128),
        base(DType::BF16, (8, 2), 128),
        base(DType::BF16, (8, 2), 64),
        base(DType::F16, (4, 1), 128),
        Case {
            band: Band { lo: None, hi: None },
            ..base(DType::BF16, (4, 4), 128)
        },
        Case {
            band: Band {
                lo: Some(-255),
                hi: Some(0),
            },
            ..base(DType::BF16, (4, 2), 128)
        },
        Case {
            valid: 1000,
            ..base(DType::BF16, (4, 2), 128)
        },
        Case {
            length: 300,
            valid: 297,
            ..base(DType::BF16, (4, 2), 64)
        },
        base(DType::F32, (4, 2), 64),
        Case {
            kernel: Kernel::Reference,
            ..base(DType::BF16, (4, 2), 64)
        },
    ]
}

/// Attention forward and backward of a GPU against `f64` on the CPU, from the same rounded values.
pub(crate) fn check(case: &Case, gpu: &Device) -> Result<Row> {
    let (h, g) = case.heads;
    let (s, d) = (case.length, case.width);
    // Sequence first in memory, as projections leave it, so that strides count.
    let make = |heads: usize, seed: u64| -> Result<Tensor> {
        Ok(noise(&[2, s, heads, d], seed)?
            .to_dtype(case.dtype)?
            .transpose(1, 2)?)
    };
    let (q, k, v, grad) = (make(h, 1)?, make(g, 2)?, make(g, 3)?, make(h, 4)?);
    let scale = 1.0 / (d as f64).sqrt();
    let spec = Spec::new(scale, case.valid, h, g);
    let spec = if case.band == (Band { lo: None, hi: None }) {
        spec
    } else {
        spec.with_band(case.band)?
    };
    let wide = |x: &Tensor| -> Result<Tensor> { Ok(x.to_dtype(DType::F64)?) };
    let there = |x: &Tensor| -> Result<Tensor> { Ok(x.to_device(gpu)?) };
    let (q64, k64, v64) = (wide(&q)?, wide(&k)?, wide(&v)?);
    let wanted = attention::forward(Kernel::Tiled, &spec, &q64, &k64, &v64)?;
    let wanted_grads = attention::backward(
        Kernel::Tiled,
        &spec,
        (&q64, &k64, &v64),
        &wanted,
        &wide(&grad)?,
    )?;
    let (q, k, v, grad) = (there(&q)?, there(&k)?, there(&v)?, there(&grad)?);
    let found = attention::forward(case.kernel, &spec, &q, &k, &v)?;
    let grads = attention::backward(case.kernel, &spec, (&q, &k, &v), &found, &grad)?;
    let errors = vec![
        ("O".to_owned(), apart(&found.o, &wanted.o)?),
        ("LSE".to_owned(), apart(&found.lse, &wanted.lse)?),
        ("dQ".to_owned(), apart(&grads.q, &wanted_grads.q)?),
        ("dK".to_owned(), apart(&grads.k, &wanted_grads.k)?),
        ("dV".to_owned(), apart(&grads.v, &wanted_grads.v)?),
    ];
    let allowed = match case.dtype {
        DType::BF16 => 8e-3,
        DType::F16 => 1e-3,
        _ => 2e-6,
    };
    Ok(Row {
        name: format!("attention {}", case.name()),
        errors,
        allowed,
    })
}
