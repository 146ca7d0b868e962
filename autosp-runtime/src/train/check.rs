//! What a step was predicted to need, and what it needed.

use autosp_plan::planner::{Choice, Job, Keep, Layers, Machine, Memory, Model, Part, Time};

use super::Trainer;
use crate::{Purpose, Result};

/// How far a figure may be off before it is a warning.
const ALLOWED: f64 = 0.1;

/// What is trained: the sizes that predictions need.
#[derive(Debug, Clone, PartialEq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "plain numbers, and users write them"
)]
pub struct Workload {
    /// The model; [`Model::from_config`] reads it from a `config.json`.
    pub model: Model,
    /// Tokens of a sequence, S.
    pub seq: usize,
    /// Rows of a batch on each replica.
    pub batch: usize,
    /// Tiles of the loss along the tokens; 1 for whole logits.
    pub loss_tiles: usize,
}

/// A figure that was predicted, and measured.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Checked {
    /// What it is: `parameters`, `gradients`, `optimizer`, `kept`, `peak` in bytes, or `step` in seconds.
    pub what: &'static str,
    /// What the planner said.
    pub predicted: f64,
    /// What it was on this rank.
    pub measured: f64,
    /// Whether the prediction is only a bound: of gradients that are divided during the backward.
    pub bound: bool,
}

impl Checked {
    /// How much more was measured than predicted, as a part of the prediction.
    pub fn off(&self) -> f64 {
        self.measured / self.predicted - 1.0
    }

    /// Whether it is off by at most a tenth.
    pub fn holds(&self) -> bool {
        self.off() <= ALLOWED && (self.bound || self.off() >= -ALLOWED)
    }
}

/// What the first steps are held against.
pub(super) struct Expected {
    workload: Workload,
    checked: Vec<Checked>,
}

impl Trainer {
    /// Holds the first steps against what the planner predicts for `workload` with the settings of this run: bytes of parameters,
    /// gradients, optimizer state and what blocks keep, and on a GPU the peak after the first step and the time of the second (the
    /// first makes plans and buffers). Each is told to subscribers of `tracing`, as a warning if it is off by more than a tenth.
    pub fn expect(&mut self, workload: Workload) {
        self.sp.ledger().forget_most();
        self.expected = Some(Expected {
            workload,
            checked: Vec::new(),
        });
    }

    /// What was predicted and measured by now; empty before the first step, and without [`expect`](Self::expect).
    pub fn checked(&self) -> &[Checked] {
        self.expected
            .as_ref()
            .map_or(&[], |expected| &expected.checked)
    }

    /// Looks at a step that took `seconds`.
    pub(super) fn check(&mut self, seconds: f64) -> Result<()> {
        let Some(mut expected) = self.expected.take() else {
            return Ok(());
        };
        let before = expected.checked.len();
        let (job, choice) = self.planned(&expected.workload);
        let seq = expected.workload.seq;
        if before == 0 {
            expected.checked = self.memory(&Memory::of(&job, &choice, seq))?;
        } else if self.sp.device().is_cuda()
            && expected.checked.iter().all(|one| one.what != "step")
        {
            expected.checked.push(Checked {
                what: "step",
                predicted: Time::of(&job, &choice, seq).total(),
                measured: seconds,
                bound: false,
            });
        }
        for one in &expected.checked[before..] {
            let Checked {
                what,
                predicted,
                measured,
                ..
            } = *one;
            let off = one.off();
            if one.holds() {
                tracing::info!(what, predicted, measured, off, "as predicted");
            } else {
                tracing::warn!(what, predicted, measured, off, "not as predicted");
            }
        }
        self.expected = Some(expected);
        Ok(())
    }

    /// The settings of this run as a choice of the planner.
    fn planned(&self, workload: &Workload) -> (Job, Choice) {
        let settings = self.sp.settings();
        let machine = Machine {
            gpus: self.sp.world_size(),
            gpus_per_host: self.sp.world_size(),
            device_bytes: u64::MAX,
            host_bytes: u64::MAX,
        };
        let dtype = self
            .vars
            .first()
            .map_or(4, |var| var.dtype().size_in_bytes());
        let job = Job {
            dtype_bytes: dtype,
            batch: workload.batch,
            ..Job::new(workload.model.clone(), machine)
        };
        let choice = Choice {
            sp: settings.sp(),
            dp: settings.dp(),
            stage: settings.zero().number(),
            host_optimizer: false,
            layers: Layers::of_settings(settings.policies(), workload.model.layers)
                .unwrap_or_else(|_| Layers::uniform(Keep::ALL[0], workload.model.layers)),
            groups: settings.groups(),
            mlp_tiles: self.tiles(workload),
            loss_tiles: workload.loss_tiles.max(1),
        };
        (job, choice)
    }

    /// Tiles of a feed-forward in the blocks that are computed again.
    fn tiles(&self, workload: &Workload) -> usize {
        let settings = self.sp.settings();
        let tokens = workload.batch * workload.seq.div_ceil(settings.sp());
        tokens.div_ceil(settings.tile()).max(1)
    }

    /// What the ledger and the device have, beside what was predicted.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
    fn memory(&self, predicted: &Memory) -> Result<Vec<Checked>> {
        let ledger = self.sp.ledger();
        let divided = self.divider.is_some();
        let mut checked = Vec::new();
        for (part, bytes) in predicted.most {
            let purpose = match part {
                Part::Parameters => Purpose::Parameters,
                Part::Optimizer => Purpose::Optimizer,
                Part::Gradients => Purpose::Gradients,
                _ => Purpose::Kept,
            };
            let measured = ledger.most(purpose);
            // Where nothing is counted nothing can be compared: a model without blocks keeps everything in candle's graph.
            if measured > 0 {
                checked.push(Checked {
                    what: purpose.name(),
                    predicted: bytes as f64,
                    measured: measured as f64,
                    bound: divided && purpose == Purpose::Gradients,
                });
            }
        }
        #[cfg(feature = "cuda")]
        if self.sp.device().is_cuda() {
            checked.push(Checked {
                what: "peak",
                predicted: predicted.peak as f64,
                measured: crate::cuda::memory(self.sp.device(), false)?.peak as f64,
                bound: false,
            });
        }
        Ok(checked)
    }
}
