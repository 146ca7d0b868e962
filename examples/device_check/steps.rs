//! Whole steps of ranks on GPUs against one rank on the CPU.

use autosp::settings::Source;
use autosp::{Error, Parameters, Result, Settings, TrainSettings, Trainer, codes};
use candle_core::{DType, Device, Tensor};

use super::{Row, llama};

/// What a run is given beside its mesh, in the words of the settings file; tokens of a rank are 2 x 255.
const CHOICES: [&[(&str, &str)]; 12] = [
    &[],
    &[("policy", "qkv")],
    &[("policy", "attention")],
    &[("policy", "input")],
    &[("policy", "all+offload")],
    &[("policy", "attention+offload")],
    &[("policy", "input+offload"), ("tile", "100")],
    &[("tile", "64"), ("groups", "1")],
    &[("policy", "attention"), ("tile", "64"), ("zero", "1")],
    &[("zero", "1")],
    &[("zero", "2")],
    &[
        ("zero", "2"),
        ("policy", "attention+offload"),
        ("loss_bytes", "65536"),
    ],
];

/// A loss and a norm of gradients a step.
type Figures = Vec<(f64, f64)>;

/// Three steps of a small Llama, with logits and without them, for each choice: losses and gradient norms of GPU ranks against one rank on
/// the CPU in `f32`.
pub(crate) fn check(gpus: usize) -> Result<Vec<(String, Result<Row>)>> {
    let wanted = steps(Settings::default(), DType::F32, false)?;
    let mut rows = Vec::new();
    let mut places = vec![
        (1, "cuda", "one GPU"),
        (2, "cuda-shared", "two ranks on one GPU"),
    ];
    if gpus > 1 {
        places.push((gpus, "cuda", "several GPUs"));
    }
    for dtype in [DType::F32, DType::BF16] {
        for (sp, device, place) in &places {
            for choice in CHOICES {
                for tiled in [false, true] {
                    let words: Vec<String> =
                        choice.iter().map(|(k, v)| format!("{k} {v}")).collect();
                    let loss = if tiled { "tiled loss" } else { "whole logits" };
                    let name = format!("{dtype:?}, {place}, {loss} {}", words.join(", "));
                    let found = settings(*sp, device, choice)
                        .and_then(|settings| steps(settings, dtype, tiled));
                    let row = found.map(|found| compare(name.clone(), dtype, &found, &wanted));
                    rows.push((name, row));
                }
            }
        }
    }
    Ok(rows)
}

fn settings(sp: usize, device: &str, choice: &[(&str, &str)]) -> Result<Settings> {
    let mut settings = Settings::default().with_sp(sp);
    for (name, value) in choice.iter().chain([&("device", device)]) {
        settings.set(name, value, Source::Flag("--steps".to_owned()))?;
    }
    Ok(settings)
}

fn compare(name: String, dtype: DType, found: &Figures, wanted: &Figures) -> Row {
    let errors = found
        .iter()
        .zip(wanted)
        .enumerate()
        .flat_map(|(i, (a, b))| {
            [("loss", a.0, b.0), ("norm", a.1, b.1)]
                .map(|(part, a, b)| (format!("{part} {}", i + 1), (a - b).abs() / b.abs()))
        });
    Row {
        name,
        errors: errors.collect(),
        allowed: if dtype == DType::F32 { 2e-5 } else { 2e-2 },
    }
}

fn steps(settings: Settings, dtype: DType, tiled: bool) -> Result<Figures> {
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
                if tiled {
                    return model.forward_loss(&batch.tokens, 0, &mut cache, &batch.labels);
                }
                let logits = model.forward(&batch.tokens, 0, &mut cache)?;
                autosp::loss::cross_entropy(&logits, &batch.labels)
            })?;
            figures.push((report.loss, report.grad_norm));
        }
        Ok(figures)
    })?;
    ranks
        .into_iter()
        .next()
        .ok_or_else(|| Error::new(codes::ARGUMENT, "no rank has figures"))
}
