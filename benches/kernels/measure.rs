//! Times and distances.

use std::process::ExitCode;
use std::time::Instant;

use autosp::cuda::probe::probes;
use autosp::rt::ops;
use autosp::{Error, Result, codes};
use candle_core::{DType, Device, Tensor, Var};
use clap::Parser;
use serde_json::json;

/// Measures kernels.
#[derive(Debug, Parser)]
struct Options {
    /// Rows of the tensors
    #[arg(long, default_value_t = 32768)]
    tokens: usize,
    /// Width of the rows
    #[arg(long, default_value_t = 4096)]
    hidden: usize,
    /// Classes of the losses
    #[arg(long, default_value_t = 32000)]
    vocab: usize,
    /// bf16, fp16 or fp32
    #[arg(long, value_delimiter = ',', default_value = "bf16,fp32")]
    dtypes: Vec<String>,
    /// Runs of each kernel that are timed together
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// What cargo passes to a benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

pub(crate) fn run() -> ExitCode {
    match all(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn all(options: &Options) -> Result<()> {
    // A rank has its device as training has it: its stream, its pool.
    let mut settings = autosp::Settings::from_env()?;
    settings.set(
        "device",
        "cuda",
        autosp::settings::Source::Flag("--features cuda".to_owned()),
    )?;
    autosp::run_with(settings, |sp| {
        for name in &options.dtypes {
            let dtype = match name.as_str() {
                "bf16" => DType::BF16,
                "fp16" => DType::F16,
                "fp32" => DType::F32,
                other => {
                    let text = format!("expected --dtypes of bf16, fp16, fp32, found {other}");
                    return Err(Error::new(codes::ARGUMENT, text));
                }
            };
            times(sp.device(), dtype, options)?;
            distances(sp.device(), dtype)?;
        }
        Ok(())
    })
    .map(drop)
}

/// Seconds of one run, of several put on the stream together.
fn seconds(device: &Device, runs: usize, run: impl Fn() -> candle_core::Result<()>) -> Result<f64> {
    for _ in 0..3 {
        run()?;
    }
    device.synchronize()?;
    let started = Instant::now();
    for _ in 0..runs {
        run()?;
    }
    device.synchronize()?;
    Ok(started.elapsed().as_secs_f64() / runs as f64)
}

fn times(device: &Device, dtype: DType, options: &Options) -> Result<()> {
    let sizes = [options.tokens, options.hidden, options.vocab];
    for probe in probes(device, dtype, sizes)? {
        let time = seconds(device, options.runs, || probe.run())?;
        // A copy reads and writes: half as many bytes each way.
        let plain = Tensor::zeros(probe.bytes / 2, DType::U8, device)?;
        let copy = seconds(device, options.runs, || plain.copy().map(drop))?;
        let rate = |time: f64| (probe.bytes as f64 / time / 1e8).round() / 10.0;
        println!(
            "{}",
            json!({
                "kernel": probe.name,
                "dtype": dtype.as_str(),
                "shape": probe.shape,
                "bytes": probe.bytes,
                "us": (time * 1e7).round() / 10.0,
                "gb_per_s": rate(time),
                "copy_gb_per_s": rate(copy),
                "share_of_copy": (copy / time * 1e3).round() / 1e3,
            })
        );
    }
    Ok(())
}

/// An operation of some tensors.
type Operation = fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// Operations with the shapes of their operands, of which the first so many get a gradient.
fn operations() -> Vec<(&'static str, Operation, Vec<Vec<usize>>, usize)> {
    let rows = vec![96, 1000];
    vec![
        (
            "rms_norm",
            |x| ops::rms_norm_op(&x[0], &x[1], 1e-5),
            vec![rows.clone(), vec![1000]],
            2,
        ),
        (
            "layer_norm",
            |x| ops::layer_norm_op(&x[0], &x[1], &x[2], 1e-5),
            vec![rows.clone(), vec![1000], vec![1000]],
            3,
        ),
        ("silu", |x| ops::silu(&x[0]), vec![rows.clone()], 1),
        (
            "rope",
            |x| ops::rope(&x[0], &x[1], &x[2]),
            vec![vec![2, 3, 40, 64], vec![40, 32], vec![40, 32]],
            1,
        ),
        (
            "cross_entropy",
            |x| {
                let labels = Tensor::arange(0u32, 96, x[0].device())?;
                autosp::loss::cross_entropy(&x[0], &labels)
            },
            vec![rows.clone()],
            1,
        ),
        (
            "linear_cross_entropy",
            |x| {
                let labels = Tensor::arange(0u32, 96, x[0].device())?;
                autosp::loss::linear_cross_entropy(&x[0], &x[1], Some(&x[2]), &labels)
            },
            vec![vec![96, 128], vec![1000, 128], vec![1000]],
            3,
        ),
    ]
}

fn distances(device: &Device, dtype: DType) -> Result<()> {
    for (name, operation, shapes, gradients) in operations() {
        let operands: Vec<Tensor> = shapes
            .iter()
            .map(|shape| {
                // Smaller where products follow, so that losses are in the range of a model's.
                let scale = if shape.len() == 2 && shape[1] == 128 {
                    0.3
                } else {
                    1.0
                };
                Tensor::randn(0f32, scale, &shape[..], &Device::Cpu)?.to_dtype(dtype)
            })
            .collect::<candle_core::Result<_>>()?;
        let of =
            |device: &Device, dtype: DType| results(operation, &operands, gradients, device, dtype);
        let exact = of(&Device::Cpu, DType::F64)?;
        let apart = |found: &[Tensor]| -> Result<Vec<f64>> {
            found
                .iter()
                .zip(&exact)
                .map(|(a, b)| {
                    let norm = |x: Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
                    Ok((norm((a - b)?)? / norm(b.clone())?).sqrt())
                })
                .collect()
        };
        let (ours, twin) = (
            apart(&of(device, dtype)?)?,
            apart(&of(&Device::Cpu, dtype)?)?,
        );
        println!(
            "{}",
            json!({ "operation": name, "dtype": dtype.as_str(), "error": ours, "twin_error": twin })
        );
        // Results of f32 may be exact by chance.
        if let Some(i) = (0..ours.len()).find(|&i| !(ours[i] <= 2.0 * twin[i] + 3e-7)) {
            let text = format!(
                "{name}: expected result {i} within {:.1e} of f64, twice the twin's error, found {:.1e}",
                2.0 * twin[i],
                ours[i]
            );
            return Err(Error::new(codes::NOT_EQUIVALENT, text));
        }
    }
    Ok(())
}

/// The result and the gradients of the first operands, in f64 on the CPU.
fn results(
    operation: Operation,
    operands: &[Tensor],
    gradients: usize,
    device: &Device,
    dtype: DType,
) -> Result<Vec<Tensor>> {
    let leaves: Vec<Var> = operands
        .iter()
        .map(|x| Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?))
        .collect::<candle_core::Result<_>>()?;
    let tensors: Vec<Tensor> = leaves
        .iter()
        .enumerate()
        .map(|(i, var)| {
            if i < gradients {
                var.as_tensor().clone()
            } else {
                var.as_detached_tensor()
            }
        })
        .collect();
    let y = operation(&tensors)?;
    // The same weights for every result, exact in every type.
    let weights: Vec<f32> = (0..y.elem_count())
        .map(|i| ((i * 7) % 5) as f32 - 1.5)
        .collect();
    let weights = Tensor::from_vec(weights, y.shape(), &Device::Cpu)?;
    let weights = weights.to_dtype(y.dtype())?.to_device(device)?;
    let grads = (&y * weights)?.sum_all()?.backward()?;
    let exact = |x: &Tensor| x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let mut all = vec![exact(&y)?];
    for (i, var) in leaves[..gradients].iter().enumerate() {
        let grad = grads.get(var).ok_or_else(|| {
            let text = format!("expected a gradient of operand {i}, found none");
            Error::new(codes::NOT_EQUIVALENT, text)
        })?;
        all.push(exact(grad)?);
    }
    Ok(all)
}
