//! Golden data: weights, tokens, and what Hugging Face transformers computed from them.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Device, Error, Result, Tensor};

use crate::{Json, Tensors};

/// One golden model.
#[derive(Debug)]
pub struct Golden {
    /// Hugging Face's `config.json`.
    pub config: Json,
    /// The parameters, f32.
    pub parameters: Tensors,
    /// One batch of tokens a step, each `[b, s]` of u32.
    pub batches: Vec<Tensor>,
    expected: Json,
}

/// Loss and gradient norms of one label pattern on the first batch.
#[derive(Debug)]
pub struct Case {
    /// How many targets of each row are ignored, from the start.
    pub ignore: usize,
    /// The mean loss over the valid targets.
    pub loss: f64,
    /// How many targets there are.
    pub valid_targets: usize,
    /// The norm over all gradients.
    pub grad_norm: f64,
    /// The norm of each parameter's gradient.
    pub grad_norms: BTreeMap<String, f64>,
}

/// What one optimizer step reports.
#[derive(Debug, Clone, Copy)]
pub struct Norms {
    /// The loss before the step.
    pub loss: f64,
    /// The global gradient norm before clipping.
    pub grad_norm: f64,
}

impl Golden {
    /// Loads `tests/golden/<name>` of this repository.
    ///
    /// # Errors
    /// When a file is missing or has another form than expected.
    pub fn load(name: &str) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../golden")
            .join(name);
        let json = |file: &str| -> Result<Json> {
            serde_json::from_slice(&fs::read(folder.join(file))?).map_err(Error::wrap)
        };
        let tensors = |file: &str| candle_core::safetensors::load(folder.join(file), &Device::Cpu);
        let tokens = tensors("tokens.safetensors")?;
        let tokens = tokens
            .get("tokens")
            .ok_or_else(|| Error::msg("expected a tensor named tokens"))?;
        let batches = (0..tokens.dim(0)?)
            .map(|i| tokens.get(i)?.to_dtype(DType::U32))
            .collect::<Result<_>>()?;
        Ok(Self {
            config: json("config.json")?,
            parameters: tensors("model.safetensors")?.into_iter().collect(),
            batches,
            expected: json("expected.json")?,
        })
    }

    /// The label patterns on the first batch: all targets, few, very few.
    pub fn cases(&self) -> Vec<Case> {
        [
            ("first_batch_all_targets", 0),
            ("first_batch_first_60_targets_ignored", 60),
            ("first_batch_first_85_targets_ignored", 85),
        ]
        .into_iter()
        .map(|(key, ignore)| {
            let case = &self.expected[key];
            Case {
                ignore,
                loss: number(&case["loss"]),
                valid_targets: number(&case["valid_targets"]) as usize,
                grad_norm: number(&case["grad_norm"]),
                grad_norms: case["grad_norms"]
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(name, norm)| (name.clone(), number(norm)))
                    .collect(),
            }
        })
        .collect()
    }

    /// Five steps of SGD: learning rate 0.1, clipped to norm 1.
    pub fn sgd(&self) -> Vec<Norms> {
        self.steps("sgd_lr_0.1_clip_1")
    }

    /// Five steps of AdamW: learning rate 1e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on all, clipped to norm 1.
    pub fn adamw(&self) -> Vec<Norms> {
        self.steps("adamw_lr_1e-3_betas_0.9_0.95_eps_1e-8_decay_0.1_on_all_clip_1")
    }

    fn steps(&self, key: &str) -> Vec<Norms> {
        let steps = self.expected[key].as_array().into_iter().flatten();
        steps
            .map(|step| Norms {
                loss: number(&step["loss"]),
                grad_norm: number(&step["grad_norm"]),
            })
            .collect()
    }
}

/// NaN where there is no number, so that every comparison with it fails.
fn number(value: &Json) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}
