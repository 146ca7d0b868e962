//! Holds what a GPU computes against the processor, and several ranks against one: attention, the replaced operations, whole steps.
//!
//! `cargo run --release --features cuda --example device_check -- --json docs/device-runs/FILE.json --sources $(scripts/cuda-sources.sh)`.
//! With two GPUs it also runs two ranks over NCCL. Errors are |a - b| / |b|, 2-norms, against `f64` on the CPU from the same values.

#![allow(clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

use std::process::ExitCode;

use autosp::attention::{self, Kernel, Spec};
use autosp::mask::Band;
use autosp::{Parameters, Result, Settings, TrainSettings, Trainer, ops, settings};
use candle_core::{DType, Device, Tensor, Var};
use clap::Parser;
use serde_json::{Value, json};

/// The model, as its file has it.
#[autosp::sequence_parallel]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod llama {
    include!("models/llama.rs");
}

/// Checks a GPU against the processor.
#[derive(Debug, Parser)]
struct Options {
    /// The figures go here as JSON
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// What the CUDA sources hash to, for the JSON
    #[arg(long, default_value = "")]
    sources: String,
    /// GPUs to use
    #[arg(long, default_value_t = 1)]
    gpus: usize,
    /// Whether whole steps are checked too
    #[arg(long)]
    steps: bool,
}

/// One comparison: a name, the errors by part, and the most that is allowed.
struct Row {
    name: String,
    errors: Vec<(String, f64)>,
    allowed: f64,
}

impl Row {
    fn good(&self) -> bool {
        self.errors.iter().all(|(_, error)| *error <= self.allowed)
    }

    fn show(&self) {
        let errors: Vec<String> = self
            .errors
            .iter()
            .map(|(part, error)| format!("{part} {error:.1e}"))
            .collect();
        let verdict = if self.good() { "ok  " } else { "FAIL" };
        println!(
            "{verdict} {:<44} {} (allowed {:.0e})",
            self.name,
            errors.join(", "),
            self.allowed
        );
    }

    fn json(&self) -> Value {
        let errors: serde_json::Map<String, Value> = self
            .errors
            .iter()
            .map(|(part, error)| (part.clone(), json!(error)))
            .collect();
        json!({ "check": self.name, "errors": errors, "allowed": self.allowed, "ok": self.good() })
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    #[cfg(feature = "cuda")]
    let versions = autosp::cuda::versions()?.to_string();
    #[cfg(not(feature = "cuda"))]
    let versions = "built without the feature `cuda`".to_owned();
    println!("{versions}");
    let mut rows: Vec<Row> = Vec::new();
    let mut add = |row: Result<Row>, name: &str| {
        let row = row.unwrap_or_else(|error| {
            println!("{name}: {error}");
            Row {
                name: name.to_owned(),
                errors: vec![("refused".to_owned(), f64::INFINITY)],
                allowed: 0.0,
            }
        });
        row.show();
        rows.push(row);
    };
    let on_gpu = Settings::default().with_device(settings::Device::Cuda);
    let devices = autosp::run_with(on_gpu, |sp| Ok(sp.device().clone()))?;
    let gpu = &devices[0];
    for case in attention_cases() {
        add(check_attention(&case, gpu), &case.name());
    }
    for dtype in [DType::F32, DType::BF16] {
        for (name, row) in check_operations(gpu, dtype) {
            add(row, &name);
        }
    }
    if options.steps {
        for dtype in [DType::F32, DType::BF16] {
            add(check_steps(dtype, 1, false), "step on one GPU");
            add(check_steps(dtype, 2, false), "step of two ranks on one GPU");
            if options.gpus > 1 {
                add(
                    check_steps(dtype, options.gpus, true),
                    "step of several GPUs",
                );
            }
        }
    }
    let good = rows.iter().all(Row::good);
    if let Some(path) = &options.json {
        let checks: Vec<Value> = rows.iter().map(Row::json).collect();
        let report = json!({ "libraries": versions, "sources": options.sources, "gpus": options.gpus, "ok": good, "checks": checks });
        let text = format!("{report:#}\n");
        std::fs::write(path, text).map_err(|error| {
            autosp::Error::new(autosp::codes::FILE_UNWRITABLE, error.to_string())
        })?;
    }
    println!(
        "{} of {} checks are good",
        rows.iter().filter(|row| row.good()).count(),
        rows.len()
    );
    Ok(good)
}

/// Values in -1..1 that depend on the seed alone.
fn noise(dims: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        })
        .collect();
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

/// |a - b| / |b|, infinite for what is not finite.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    let up = |x: &Tensor| -> Result<Tensor> {
        Ok(x.to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .flatten_all()?)
    };
    let (a, b) = (up(a)?, up(b)?);
    let norm = |x: Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    let error = norm((a - &b)?)? / norm(b)?.max(1e-30);
    Ok(if error.is_finite() {
        error
    } else {
        f64::INFINITY
    })
}

struct Case {
    dtype: DType,
    heads: (usize, usize),
    length: usize,
    valid: usize,
    width: usize,
    band: Band,
    kernel: Kernel,
}

impl Case {
    fn name(&self) -> String {
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

fn attention_cases() -> Vec<Case> {
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
fn check_attention(case: &Case, gpu: &Device) -> Result<Row> {
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

type Operation = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>>;

/// The replaced operations on a GPU against `f64` on the CPU, values and gradients.
#[allow(clippy::too_many_lines, reason = "a list of cases")]
fn check_operations(gpu: &Device, dtype: DType) -> Vec<(String, Result<Row>)> {
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

/// Three steps of a small Llama: losses and gradient norms of GPU ranks against one rank on the CPU in `f32`.
fn check_steps(dtype: DType, sp: usize, own_gpus: bool) -> Result<Row> {
    let device = if own_gpus || sp == 1 {
        settings::Device::Cuda
    } else {
        settings::Device::CudaShared
    };
    let found = steps(Settings::default().with_sp(sp).with_device(device), dtype)?;
    let wanted = steps(Settings::default(), DType::F32)?;
    let errors = found
        .iter()
        .zip(&wanted)
        .enumerate()
        .flat_map(|(i, (a, b))| {
            [("loss", a.0, b.0), ("norm", a.1, b.1)]
                .map(|(part, a, b)| (format!("{part} {}", i + 1), (a - b).abs() / b.abs()))
        });
    let place = if own_gpus { "GPUs" } else { "ranks on one GPU" };
    let allowed = if dtype == DType::F32 { 2e-5 } else { 2e-2 };
    Ok(Row {
        name: format!("three steps, {dtype:?}, {sp} {place}"),
        errors: errors.collect(),
        allowed,
    })
}

fn steps(settings: Settings, dtype: DType) -> Result<Vec<(f64, f64)>> {
    let config = llama::Config {
        vocab_size: 512,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: None,
        max_position_embeddings: 512,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        last_token_only: false,
    };
    let ranks = autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(3, dtype, sp.device());
        let model = llama::Llama::load(parameters.builder(), &config)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        let mut figures = Vec::new();
        for step in 0..3_u32 {
            let ids: Vec<u32> = (0..2 * 509)
                .map(|i: u32| (i * i + 31 * step + i / 3) % 512)
                .collect();
            let batch = sp.shard(&Tensor::from_vec(ids, (2, 509), &Device::Cpu)?)?;
            let mut cache = llama::Cache::new(false, dtype, &config, sp.device())?;
            let report = trainer.step(|| -> candle_core::Result<Tensor> {
                let logits = model.forward(&batch.tokens, 0, &mut cache)?;
                autosp::loss::cross_entropy(&logits, &batch.labels)
            })?;
            figures.push((report.loss, report.grad_norm));
        }
        Ok(figures)
    })?;
    Ok(ranks[0].clone())
}
