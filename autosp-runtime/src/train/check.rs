//! What a step was predicted to need, and what it needed.

use autosp_plan::codes;
use autosp_plan::planner::{
    self, Abilities, Ability, Choice, Job, Keep, Layers, Machine, Memory, Model, Part, Pins, Rates,
    Time,
};
use autosp_plan::settings::{self, Place, Settings};

use super::Trainer;
use crate::comm::Tag;
use crate::{Error, Purpose, Result, Sp};

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
    /// Whether the prediction is only a bound: of gradients that are divided during the backward, and of an optimizer on the host.
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
    /// Says what is trained, before the first step.
    ///
    /// With the setting `memory = "auto"`, which is the default, the planner then chooses `policy`, `groups`, `tile`, `loss_bytes` and
    /// `optimizer` for this trainer's scopes, each where nobody has said it, so that a step is fast and fits into the memory of the device
    /// (of the CPU into `memory_limit`; without it nothing is chosen there) and, for what lies on the host, into `host_memory` of each rank.
    /// Rank 0 chooses, by the rates of `autosp-rates.toml` if the working folder has that file, and all ranks take what it has chosen. If
    /// nothing fits, that is a warning of `tracing`, and what needs least is taken.
    ///
    /// The first steps are held against what the planner predicts for `workload` with the settings then: bytes of parameters,
    /// gradients, optimizer state and what blocks keep, and on a GPU the peak after the first step and the time of the second (the
    /// first makes plans and buffers). Each is told to subscribers of `tracing`, as a warning if it is off by more than a tenth.
    ///
    /// # Errors
    /// AS0352 for a `policy` of other blocks than the model has; AS0611 for a file of rates that cannot be used; AS0516 for sizes that
    /// cannot be; as [`wait`](crate::comm::Engine::wait).
    pub fn expect(&mut self, workload: Workload) -> Result<()> {
        self.choose(&workload)?;
        self.sp.ledger().forget_most();
        self.expected = Some(Expected {
            workload,
            checked: Vec::new(),
        });
        Ok(())
    }

    /// The settings of this trainer's scopes: those of the run, with what the planner has chosen.
    pub fn settings(&self) -> &Settings {
        self.sp.settings()
    }

    /// Chooses what nobody has said.
    fn choose(&mut self, workload: &Workload) -> Result<()> {
        let settings = self.sp.settings().clone();
        let Some(usable) = self.usable()? else {
            return Ok(());
        };
        if settings.memory() == settings::Memory::Fixed {
            return Ok(());
        }
        let own = if self.sp.is_main() {
            let settled = self.settled(settings.clone(), workload, usable)?;
            Some(settled.chosen())
        } else {
            None
        };
        let chosen = self.said_by_main(Tag::new("planner", "choice"), own)?;
        let settings = settings.with_chosen(&chosen)?;
        tracing::info!(chosen = %chosen.trim_end().replace('\n', ", "), "the planner has chosen");
        self.updater.keep_on(settings.optimizer());
        self.sp = self.sp.with_settings(settings);
        Ok(())
    }

    /// Bytes that tensors may fill on this rank's device, if that is known: on the CPU only `memory_limit` says it.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::unnecessary_wraps))]
    fn usable(&self) -> Result<Option<u64>> {
        let limit = self.sp.settings().memory_limit();
        #[cfg(feature = "cuda")]
        if self.sp.device().is_cuda() {
            let total = crate::cuda::total_memory(self.sp.device())?;
            let machine = machine(&self.sp, limit.map_or(total, |limit| limit.min(total)));
            return Ok(Some(machine.usable()));
        }
        Ok(limit)
    }

    fn settled(&self, settings: Settings, workload: &Workload, usable: u64) -> Result<Settings> {
        let Workload {
            model, seq, batch, ..
        } = workload;
        let whole = workload.loss_tiles <= 1;
        let refuse =
            |text: String| Error::new(codes::TRAIN_SETTING, format!("the planner: {text}"));
        let pins = Pins::of_settings(&settings, model, (*batch, *seq), whole);
        let pins = pins.map_err(|text| Error::new(codes::POLICIES, text))?;
        let mut abilities = Abilities::TRAINER;
        if self.sp.device().is_cpu() {
            // Tried there.
            abilities = abilities
                .with(Ability::Offload)
                .with(Ability::HostOptimizer);
        }
        let rates = match std::fs::read_to_string(Rates::FILE) {
            Ok(text) => Rates::read(&text)
                .map_err(|error| Error::new(codes::RATES, format!("`{}`: {error}", Rates::FILE)))?,
            Err(_) => Rates::default(),
        };
        let job = Job {
            pins,
            rates,
            abilities,
            ..self.job(workload, machine(&self.sp, 0).with_usable(usable))
        };
        let (choice, fits) = planner::choose(&job, *seq).map_err(refuse)?;
        if !fits {
            let memory = Memory::of(&job, &choice, *seq);
            let limiter = memory.limiter(&job).map(|limiter| limiter.to_string());
            tracing::warn!(
                seq,
                peak = memory.peak,
                usable,
                limiter = limiter.unwrap_or_default(),
                "no choice is predicted to fit; the one that needs least is taken"
            );
        }
        Ok(choice.settle(settings, &job, *seq))
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

    fn job(&self, workload: &Workload, machine: Machine) -> Job {
        let dtype = self.vars.first().map(|var| var.dtype());
        Job {
            dtype_bytes: dtype.map_or(4, |dtype| dtype.size_in_bytes()),
            batch: workload.batch,
            ..Job::new(workload.model.clone(), machine)
        }
    }

    /// The settings of this run as a choice of the planner.
    fn planned(&self, workload: &Workload) -> (Job, Choice) {
        let settings = self.sp.settings();
        let job = self.job(workload, machine(&self.sp, u64::MAX));
        let (lengths, whole) = ((workload.batch, workload.seq), workload.loss_tiles <= 1);
        let choice = Choice::of_settings(settings, &workload.model, lengths, whole);
        let choice = choice.unwrap_or_else(|_| {
            // Policies of other blocks than were said: what is found then is not as predicted.
            let layers = Layers::uniform(Keep::ALL[0], workload.model.layers);
            Choice {
                sp: settings.sp(),
                dp: settings.dp(),
                stage: settings.zero().number(),
                host_optimizer: settings.optimizer() == Place::Host,
                layers,
                groups: settings.groups(),
                mlp_tiles: 1,
                loss_tiles: 1,
            }
        });
        (job, choice)
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
                    bound: divided && purpose == Purpose::Gradients
                        || purpose == Purpose::Optimizer && self.updater.place() == Place::Host,
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

/// The ranks of the run, each with so many bytes on its device and `host_memory` of the host.
fn machine(sp: &Sp, device_bytes: u64) -> Machine {
    let ranks = sp.world_size();
    Machine {
        gpus: ranks,
        gpus_per_host: ranks,
        device_bytes,
        host_bytes: sp.settings().host_memory().saturating_mul(ranks as u64),
    }
}
