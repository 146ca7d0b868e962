//! Training steps: loss, backward, reduction over all ranks, clipping, optimizer.

mod optimizer;
pub(crate) mod reduce;
mod settings;

use std::path::Path;
use std::time::Instant;

use autosp_plan::codes;
use candle_core::{DType, Tensor, Var};

pub use settings::{Optimizer, Schedule, TrainSettings};

use crate::comm::{Tag, barrier, broadcast};
use crate::{Bytes, Error, Parameters, Result, Sp, loss, memory};

/// Trains the variables of a [`Parameters`] on every rank alike.
///
/// ```
/// use autosp_runtime::{Parameters, Settings, loss, run_with};
/// use autosp_runtime::train::{TrainSettings, Trainer};
/// use candle_core::{DType, Module, Tensor};
///
/// # fn main() -> autosp_runtime::Result<()> {
/// run_with(Settings::default().with_dp(2), |sp| {
///     let parameters = Parameters::init(7, DType::F32, sp.device());
///     let model = candle_nn::linear(4, 3, parameters.builder())?;
///     let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
///     let (x, labels) = (Tensor::ones((2, 4), DType::F32, sp.device())?, Tensor::new(&[0i64, 2], sp.device())?);
///     let report = trainer.step(|| loss::cross_entropy(&model.forward(&x)?, &labels))?;
///     assert_eq!((report.step, report.valid_tokens), (1, 4));
///     Ok(())
/// })?;
/// # Ok(())
/// # }
/// ```
pub struct Trainer {
    sp: Sp,
    parameters: Parameters,
    named: Vec<(String, Var)>,
    settings: TrainSettings,
    updater: optimizer::Updater,
    steps: u64,
    /// The ledger when the previous step or evaluation ended.
    mark: Bytes,
}

/// What a step did. The same on every rank, but for the times.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// The loss before the step.
    pub loss: f64,
    /// The 2-norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// The learning rate that the step used.
    pub learning_rate: f64,
    /// Targets that the loss averaged, over all ranks; 0 if the loss was not [`loss::cross_entropy`].
    pub valid_tokens: u64,
    /// `valid_tokens` by the time of the step.
    pub tokens_per_s: f64,
    /// Seconds from the begin of the step to its end on this rank.
    pub seconds: f64,
    /// Bytes that all ranks together handed to peers since the previous step or evaluation ended, sharding of the batch included.
    pub bytes_sent: u64,
    /// The part of the attention sites.
    pub exchange_bytes: u64,
    /// Whether the loss or the gradient was not finite and nothing was changed (see [`TrainSettings::skip_non_finite`]).
    pub skipped: bool,
}

/// What an evaluation found. The same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// The loss.
    pub loss: f64,
    /// Targets that the loss averaged, over all ranks; 0 if the loss was not [`loss::cross_entropy`].
    pub valid_tokens: u64,
}

impl Trainer {
    /// A trainer for all trainable variables that `parameters` holds by now: build the model first. Every rank takes over the values
    /// of rank 0, frozen ones included.
    ///
    /// # Errors
    /// AS0516 for a setting that cannot be, or if there is nothing to train; AS0540 if the model has not asked for a tensor of its
    /// files; as [`wait`](crate::comm::Engine::wait), and AS0406 if
    /// the ranks have built different models.
    pub fn new(sp: &Sp, parameters: Parameters, settings: TrainSettings) -> Result<Self> {
        settings.check()?;
        let named = parameters.named();
        if named.is_empty() {
            let text = "expected parameters that a model was built from, found no variable";
            return Err(Error::new(codes::TRAIN_SETTING, text)
                .with_help("Model::load(parameters.builder(), ..)"));
        }
        parameters.expect_all_used()?;
        if sp.world_size() > 1 {
            for (name, var) in parameters.all() {
                // A copy, since steps change variables in place and a peer may still read.
                let own = if sp.is_main() {
                    var.as_detached_tensor().copy()?
                } else {
                    var.as_detached_tensor()
                };
                let first = broadcast(
                    sp.world_group(),
                    Tag::new("parameters", "broadcast"),
                    &own,
                    0,
                )
                .map_err(|error| error.context(format_args!("`{name}`")))?;
                if !sp.is_main() {
                    var.set(&first)?;
                }
            }
        }
        let updater =
            optimizer::Updater::new(settings.optimizer, named.iter().map(|(_, var)| var.dtype()));
        let mark = sp.ledger().snapshot();
        Ok(Self {
            sp: sp.clone(),
            parameters,
            named,
            settings,
            updater,
            steps: 0,
            mark,
        })
    }

    /// Takes one step: runs `loss` in a sharded scope, walks back, sums the gradients over all ranks, clips them, and updates the
    /// variables. All ranks take the same steps.
    ///
    /// # Errors
    /// Those of `loss`; AS0512 if a variable has no gradient on any rank; AS0513 if the loss or the gradient is not finite, unless
    /// such steps are skipped; AS0509 if the loss is no scalar. After an error the variables are what they were.
    pub fn step<E>(&mut self, loss: impl FnOnce() -> Result<Tensor, E>) -> Result<StepReport>
    where
        Error: From<E>,
    {
        let started = Instant::now();
        self.expect_same_variables()?;
        memory::forget();
        loss::take_targets();
        let sp = self.sp.clone();
        let (value, finite, grads) = sp.scope(|| -> Result<_> {
            let loss = loss()?;
            let value = scalar(&loss)?;
            let own = {
                let mut grads = loss.backward()?;
                drop(loss);
                memory::collect(&mut grads)?;
                reduce::detached(&grads, &self.named)
            };
            let presence = reduce::presence(&sp, &own, &[value.is_finite()])?;
            presence.require(&self.named)?;
            let sums = reduce::reduce(&sp, own, &self.named, self.settings.bucket_bytes)?;
            Ok((value, presence.unanimous[0], sums))
        })?;
        let grad_norm = reduce::global_norm(&grads)?;
        let skipped = !(finite && grad_norm.is_finite());
        if skipped && !self.settings.skip_non_finite {
            let text = format!(
                "step {}: expected a finite loss and gradient, found loss {value} and gradient norm {grad_norm}",
                self.steps + 1
            );
            return Err(Error::new(codes::NOT_FINITE, text)
                .with_help("TrainSettings { skip_non_finite: true, .. }"));
        }
        let learning_rate = self.settings.schedule.rate(self.steps);
        if !skipped {
            // The formula of PyTorch's clip_grad_norm_.
            let scale = self
                .settings
                .clip
                .map_or(1.0, |most| (most / (grad_norm + 1e-6)).min(1.0));
            self.updater.step(
                learning_rate,
                scale,
                self.named.iter().map(|(_, var)| var).zip(&grads),
            )?;
        }
        self.steps += 1;
        let bytes = self.bytes()?;
        let (seconds, valid_tokens) = (started.elapsed().as_secs_f64(), loss::take_targets());
        Ok(StepReport {
            step: self.steps,
            loss: value,
            grad_norm,
            learning_rate,
            valid_tokens,
            tokens_per_s: valid_tokens as f64 / seconds,
            seconds,
            bytes_sent: bytes.sent,
            exchange_bytes: bytes.exchange,
            skipped,
        })
    }

    /// Runs `loss` in a sharded scope, without a step.
    ///
    /// # Errors
    /// Those of `loss`; AS0509 if the loss is no scalar.
    pub fn evaluate<E>(&mut self, loss: impl FnOnce() -> Result<Tensor, E>) -> Result<Evaluation>
    where
        Error: From<E>,
    {
        loss::take_targets();
        let value = self.sp.scope(|| -> Result<f64> { scalar(&loss()?) })?;
        self.mark = self.sp.ledger().snapshot();
        Ok(Evaluation {
            loss: value,
            valid_tokens: loss::take_targets(),
        })
    }

    /// Writes all parameters as a safetensors file, on rank 0; returns on every rank once it is there.
    ///
    /// # Errors
    /// AS0505 if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        if self.sp.is_main() {
            self.parameters.save(path)?;
        }
        barrier(self.sp.world_group(), Tag::new("save", "barrier"))
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Steps taken so far, skipped ones included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn expect_same_variables(&self) -> Result<()> {
        let now = self.parameters.named();
        if now.len() == self.named.len() {
            return Ok(());
        }
        match now
            .iter()
            .find(|(name, _)| self.named.iter().all(|(known, _)| known != name))
        {
            None => Ok(()),
            Some((name, _)) => {
                let text = format!(
                    "expected the variables that the trainer was made with, found `{name}` as well"
                );
                Err(Error::new(codes::TRAIN_SETTING, text)
                    .with_help("build the model before `Trainer::new`"))
            }
        }
    }

    /// The bytes of all ranks since the mark, those of asking for them included.
    fn bytes(&mut self) -> Result<Bytes> {
        let since = self.sp.ledger().since(self.mark);
        let mut bytes = self.sp.sum_bytes(since)?;
        let now = self.sp.ledger().snapshot();
        let asking = self.sp.ledger().since(self.mark) - since;
        // Each rank sends as much as this one to ask.
        bytes.sent += asking.sent * self.sp.world_size() as u64;
        self.mark = now;
        Ok(bytes)
    }
}

fn scalar(loss: &Tensor) -> Result<f64> {
    if loss.elem_count() != 1 {
        let text = format!(
            "expected the loss to be a scalar, found shape {:?}",
            loss.dims()
        );
        return Err(Error::new(codes::BATCH_SHAPE, text));
    }
    Ok(loss
        .detach()
        .flatten_all()?
        .get(0)?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?)
}

#[cfg(test)]
mod tests;
