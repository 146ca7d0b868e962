//! The replaced operations on a GPU against `f64` on the CPU.

use autosp::{Result, ops};
use candle_core::{DType, Device, Tensor, Var};

use super::{Row, apart, noise};

type Operation = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>>;

/// The replaced operations on a GPU against `f64` on the CPU, values and gradients.
#[allow(clippy::too_many_lines, reason = "a list of cases")]
pub(crate) fn check(gpu: &Device, dtype: DType) -> Vec<(String, Result<Row>)> {
    let ids = |device: &Device| -> candle_core::Result<Tensor> {
        let ids: Vec<u32> = (0..60).map(|i| i * i % 37).collect();
        Tensor::from_vec(ids, (2, 30), device)
    };
    let cases: Vec<(&str, Vec<Vec<usize>>, Operation)> = vec![
        (
            "rms_norm",
            vec![vec![3, 70, 4096], vec![4096]],
            Box::new(|x| ops::rms_norm_op(&x[0], &x[1], 1e-5)),
        ),
        (
            "rms_norm of an odd width",
            vec![vec![3, 7, 333], vec![333]],
            Box::new(|x| ops::rms_norm_op(&x[0], &x[1], 1e-5)),
        ),
        (
            "layer_norm",
            vec![vec![2, 50, 1024], vec![1024], vec![1024]],
            Box::new(|x| ops::layer_norm_op(&x[0], &x[1], &x[2], 1e-5)),
        ),
        (
            "silu",
            vec![vec![3, 40, 1001]],
            Box::new(|x| ops::silu(&x[0])),
        ),
        (
            "silu of a transposed tensor",
            vec![vec![8, 40, 64]],
            Box::new(|x| ops::silu(&x[0].transpose(0, 1)?)),
        ),
        (
            "rope",
            vec![vec![2, 4, 33, 64], vec![40, 32], vec![40, 32]],
            Box::new(|x| ops::rope(&x[0], &x[1].detach(), &x[2].detach())),
        ),
        (
            "rope, interleaved, strided",
            vec![vec![2, 33, 4, 64], vec![33, 32], vec![33, 32]],
            Box::new(|x| ops::rope_i(&x[0].transpose(1, 2)?, &x[1].detach(), &x[2].detach())),
        ),
        (
            "linear",
            vec![vec![2, 50, 256], vec![384, 256], vec![384]],
            Box::new(|x| {
                ops::linear(
                    &candle_nn::Linear::new(x[1].clone(), Some(x[2].clone())),
                    &x[0],
                )
            }),
        ),
        (
            "embedding",
            vec![vec![37, 128]],
            Box::new(move |x| {
                ops::embedding(
                    &candle_nn::Embedding::new(x[0].clone(), 128),
                    &ids(x[0].device())?,
                )
            }),
        ),
        (
            "cross_entropy",
            vec![vec![2, 20, 1000]],
            Box::new(|x| {
                let labels: Vec<i64> = (0..40)
                    .map(|i| if i % 7 == 0 { -100 } else { i * 13 % 1000 })
                    .collect();
                let labels = Tensor::from_vec(labels, (2, 20), x[0].device())?;
                autosp::loss::cross_entropy(&(&x[0] * 4.0)?, &labels)
            }),
        ),
        (
            "linear_cross_entropy",
            vec![vec![2, 20, 128], vec![1000, 128], vec![1000]],
            Box::new(|x| {
                let labels: Vec<i64> = (0..40)
                    .map(|i| if i % 7 == 0 { -100 } else { i * 13 % 1000 })
                    .collect();
                let labels = Tensor::from_vec(labels, (2, 20), x[0].device())?;
                autosp::loss::linear_cross_entropy(&x[0], &x[1], Some(&x[2]), &labels)
            }),
        ),
        (
            "product of a gated activation",
            vec![vec![3, 40, 1001], vec![3, 40, 1001]],
            Box::new(|x| autosp::rt::ops::mul(&autosp::rt::ops::silu(&x[0])?, &x[1])),
        ),
    ];
    let check = |shapes: &[Vec<usize>], operation: &Operation| -> Result<Row> {
        let inputs = shapes
            .iter()
            .enumerate()
            .map(|(i, dims)| Ok(noise(dims, 10 + i as u64)?.to_dtype(dtype)?))
            .collect::<Result<Vec<_>>>()?;
        let on = |device: &Device, dtype: DType| -> Result<Vec<Tensor>> {
            let vars = inputs
                .iter()
                .map(|x| Ok(Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?)?))
                .collect::<Result<Vec<_>>>()?;
            let xs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
            let y = operation(&xs)?;
            // A weight that differs from element to element, so that no gradient is plain.
            let weights = noise(y.dims(), 99)?
                .to_dtype(y.dtype())?
                .to_device(device)?;
            let grads = (&y * &weights)?
                .to_dtype(if dtype == DType::F64 {
                    DType::F64
                } else {
                    DType::F32
                })?
                .sum_all()?
                .backward()?;
            let mut all = vec![y];
            all.extend(xs.iter().filter_map(|x| grads.get(x).cloned()));
            Ok(all)
        };
        let (found, wanted) = (on(gpu, dtype)?, on(&Device::Cpu, DType::F64)?);
        let errors = found.iter().zip(&wanted).enumerate().map(|(i, (a, b))| {
            let part = if i == 0 {
                "y".to_owned()
            } else {
                format!("d{}", i - 1)
            };
            Ok((part, apart(a, b)?))
        });
        let mut errors = errors.collect::<Result<Vec<_>>>()?;
        if found.len() != wanted.len() {
            errors.push(("gradients missing".to_owned(), f64::INFINITY));
        }
        let allowed = if dtype == DType::F32 { 5e-6 } else { 1e-2 };
        Ok(Row {
            name: String::new(),
            errors,
            allowed,
        })
    };
    let rows = cases.iter().map(|(name, shapes, operation)| {
        let name = format!("{name} {dtype:?}");
        let row = check(shapes, operation).map(|row| Row {
            name: name.clone(),
            ..row
        });
        (name, row)
    });
    rows.collect()
}
