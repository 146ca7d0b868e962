//! Steps and evaluations.

use std::time::Instant;

use autosp_plan::codes;
use candle_core::{DType, Tensor};

use super::{Evaluation, StepReport, Trainer, divide, reduce};
use crate::memory::limit::{Doing, go_on_to};
use crate::ops::wide;
use crate::site::bytes;
use crate::{Bytes, Error, Purpose, Result, loss, memory};

/// The micro-batches of a step so far.
#[derive(Default)]
struct Gathered {
    /// The gradients of a single micro-batch as they are; of several the sum on this rank, each times its weight. Under `zero = 2`
    /// those are sums over the ranks, of which this rank has its share, bucket by bucket.
    grads: Vec<Option<Tensor>>,
    /// Under `zero = 2`, the variables of which some rank has found a gradient.
    found: Vec<bool>,
    losses: Mean,
}

/// A mean of losses in which each counts as often as it has targets, or once where no loss counts targets.
#[derive(Default)]
struct Mean {
    /// Weight and value of each.
    losses: Vec<(f64, f64)>,
    targets: Option<u64>,
}

impl Mean {
    /// Takes a loss, with the targets that it counted.
    ///
    /// # Errors
    /// AS0516 if only some losses count targets.
    fn add(&mut self, value: f64, targets: Option<u64>) -> Result<()> {
        if !self.losses.is_empty() && targets.is_some() != self.targets.is_some() {
            let text = "expected the losses of all micro-batches to be `cross_entropy`, or of none, found some";
            return Err(Error::new(codes::TRAIN_SETTING, text));
        }
        self.losses
            .push((targets.map_or(1.0, |targets| targets as f64), value));
        self.targets = targets.map(|targets| self.targets() + targets);
        Ok(())
    }

    fn targets(&self) -> u64 {
        self.targets.unwrap_or(0)
    }

    /// The sum of the weights, and the mean.
    ///
    /// # Errors
    /// AS0510 if no loss has a target.
    fn end(&self) -> Result<(f64, f64)> {
        let total: f64 = self.losses.iter().map(|(weight, _)| weight).sum();
        if total == 0.0 {
            let text = "expected at least one target in some batch, found none";
            return Err(Error::new(codes::NO_TARGET, text));
        }
        let mean = match self.losses.as_slice() {
            [(_, value)] => *value,
            several => several.iter().map(|(w, x)| w * x).sum::<f64>() / total,
        };
        Ok((total, mean))
    }
}

impl Trainer {
    /// Takes one step: runs `loss` in a sharded scope, walks back, sums the gradients over all ranks, clips them, and updates the
    /// variables. All ranks take the same steps.
    ///
    /// # Errors
    /// Those of `loss`; AS0512 if a variable has no gradient on any rank; AS0513 if the loss or the gradient is not finite, unless
    /// such steps are skipped; AS0509 if the loss is no scalar; AS0562 if the device has no memory left, or more was held than
    /// `memory_limit`. After an error before the update the variables are what they were.
    pub fn step<E>(&mut self, loss: impl FnOnce() -> Result<Tensor, E>) -> Result<StepReport>
    where
        Error: From<E>,
    {
        self.step_over([loss], |loss| loss())
    }

    /// Takes one step over several micro-batches, as one batch of all their rows: forward and backward run for one after the other,
    /// gradients add up on each rank, and are summed over the ranks once.
    ///
    /// The loss of the step is the sum of all token losses of all micro-batches divided by the number of all their targets, and the
    /// gradient is that of this loss, however many targets each has: a [`cross_entropy`](loss::cross_entropy) is a mean, which counts
    /// as often as it has targets, which may be none. Where no loss is a `cross_entropy`, each counts once. All ranks go through the same
    /// number of micro-batches.
    ///
    /// ```
    /// # use autosp_runtime::{Parameters, Settings, loss, run_with};
    /// # use autosp_runtime::train::{TrainSettings, Trainer};
    /// # use candle_core::{DType, Module, Tensor};
    /// # run_with(Settings::default(), |sp| {
    /// # let parameters = Parameters::init(7, DType::F32, sp.device());
    /// # let model = candle_nn::linear(4, 3, parameters.builder())?;
    /// # let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
    /// # let x = Tensor::ones((2, 4), DType::F32, sp.device())?;
    /// let batches = [[0i64, 2], [1, -100]];
    /// let report = trainer.step_over(batches, |labels| {
    ///     loss::cross_entropy(&model.forward(&x)?, &Tensor::new(&labels, sp.device())?)
    /// })?;
    /// assert_eq!(report.valid_tokens, 3);
    /// # Ok(())
    /// # })?;
    /// # Ok::<(), autosp_runtime::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`step`](Self::step); AS0510 if no micro-batch has a target; AS0516 if there is no micro-batch, or only some of the losses
    /// are a `cross_entropy`.
    pub fn step_over<B, E>(
        &mut self,
        batches: impl IntoIterator<Item = B>,
        loss: impl FnMut(B) -> Result<Tensor, E>,
    ) -> Result<StepReport>
    where
        Error: From<E>,
    {
        let done = self.take_step(batches, loss);
        done.map_err(|error| memory::limit::explained(&self.sp, error))
    }

    fn take_step<B, E>(
        &mut self,
        batches: impl IntoIterator<Item = B>,
        mut loss: impl FnMut(B) -> Result<Tensor, E>,
    ) -> Result<StepReport>
    where
        Error: From<E>,
    {
        let started = Instant::now();
        let _span = tracing::info_span!("step", step = self.steps + 1).entered();
        self.expect_same_variables()?;
        self.sp.ledger().take_breach();
        memory::forget();
        let mut batches = batches.into_iter().peekable();
        let Some(first) = batches.next() else {
            let text = "expected at least one micro-batch for a step, found none";
            return Err(Error::new(codes::TRAIN_SETTING, text));
        };
        let mut gathered = Gathered::default();
        // One batch alone must have targets, and its gradient is taken as it is.
        if batches.peek().is_none() {
            self.backward(&mut gathered, || loss(first))?;
        } else {
            loss::allow_empty(|| {
                std::iter::once(first)
                    .chain(batches)
                    .try_for_each(|batch| self.backward(&mut gathered, || loss(batch)))
            })?;
        }
        self.update(started, gathered)
    }

    /// Forward and backward of one micro-batch.
    fn backward<E>(
        &mut self,
        gathered: &mut Gathered,
        loss: impl FnOnce() -> Result<Tensor, E>,
    ) -> Result<()>
    where
        Error: From<E>,
    {
        loss::take_targets();
        let (sp, named, divider) = (&self.sp, &self.named, &mut self.divider);
        if let Some(divider) = divider {
            divider.beside(&gathered.grads);
        }
        let (value, own) = sp.scope(|| -> Result<_> {
            go_on_to(Doing::Forward);
            let loss = loss()?;
            let value = scalar(&loss)?;
            go_on_to(Doing::Backward);
            let mut grads = divide::during(divider, || loss.backward())?;
            drop(loss);
            memory::collect(&mut grads)?;
            let own = reduce::detached(&grads, named);
            drop(grads);
            let own = if let Some(divider) = divider {
                divider.finish(own, &mut gathered.found)?
            } else {
                let all = own.iter().chain(&gathered.grads).flatten();
                sp.ledger().set(Purpose::Gradients, all.map(bytes).sum());
                own
            };
            memory::limit::expect_within(sp)?;
            Ok((value, own))
        })?;
        gathered.losses.add(value, loss::take_targets())?;
        let weights: Vec<f64> = gathered.losses.losses.iter().map(|(w, _)| *w).collect();
        let scaled = |grad: &Tensor, weight: f64| -> Result<Tensor> {
            Ok((grad.to_dtype(wide(grad.dtype()))? * weight)?)
        };
        let weight = match weights.as_slice() {
            [_] => {
                gathered.grads = own;
                return Ok(());
            }
            // Until now it was unknown that there are several.
            &[first, second] => {
                for grad in gathered.grads.iter_mut().flatten() {
                    *grad = scaled(grad, first)?;
                }
                second
            }
            [.., last] => *last,
            [] => 1.0,
        };
        for (sum, grad) in gathered.grads.iter_mut().zip(own) {
            let Some(grad) = grad else { continue };
            let grad = scaled(&grad, weight)?;
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
        Ok(())
    }

    /// Sums, clips and applies the gradients.
    fn update(&mut self, started: Instant, gathered: Gathered) -> Result<StepReport> {
        let Gathered {
            grads,
            found,
            losses,
        } = gathered;
        go_on_to(Doing::Reduction);
        let (total, value) = losses.end()?;
        let single = losses.losses.len() == 1;
        let finite = losses.losses.iter().all(|(_, value)| value.is_finite());
        let sharded = self.sp.settings().zero().divides_state();
        let divided = self.divider.is_some();
        let here = if divided { found } else { reduce::here(&grads) };
        let presence = reduce::presence(&self.sp, &here, &[finite])?;
        presence.require(&self.named)?;
        let reduction = tracing::info_span!("reduction").entered();
        let mut sums = if divided {
            grads.into_iter().flatten().collect()
        } else {
            self.reduced(grads, single, sharded)?
        };
        if !single {
            for sum in &mut sums {
                *sum = (&*sum / total)?;
            }
        }
        let ledger = self.sp.ledger();
        ledger.set(Purpose::Gradients, sums.iter().map(bytes).sum());
        memory::limit::expect_within(&self.sp)?;
        let grad_norm = reduce::global_norm(&self.sp, &sums, sharded)?;
        drop(reduction);
        let skipped = !(presence.unanimous[0] && grad_norm.is_finite());
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
            go_on_to(Doing::Update);
            self.expect_room()?;
            self.apply(learning_rate, scale, sums, sharded)?;
        }
        self.sp.ledger().set(Purpose::Gradients, 0);
        self.count_optimizer();
        self.steps += 1;
        let bytes = self.bytes()?;
        let (seconds, valid_tokens) = (started.elapsed().as_secs_f64(), losses.targets());
        self.check(seconds)?;
        tracing::info!(
            loss = value,
            grad_norm,
            learning_rate,
            valid_tokens,
            seconds,
            skipped,
            "step done"
        );
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

    /// The gradients summed over the ranks, bucket by bucket.
    fn reduced(
        &self,
        grads: Vec<Option<Tensor>>,
        single: bool,
        sharded: bool,
    ) -> Result<Vec<Tensor>> {
        let mut grads = grads.into_iter();
        let sum = |bucket: &super::flat::Bucket| {
            // Those of one batch are as candle computed them: in f32 they would only be larger.
            let travels = if single {
                bucket.dtype
            } else {
                wide(bucket.dtype)
            };
            let grads = grads.by_ref();
            reduce::reduce(&self.sp, bucket, grads, &self.vars, (travels, sharded))
        };
        self.buckets.iter().map(sum).collect()
    }

    /// Runs `loss` in a sharded scope, without a step: for a validation loss. No backward is prepared where blocks are checkpoints, so
    /// that the activations of one block are all that is held there.
    ///
    /// # Errors
    /// Those of `loss`; AS0509 if the loss is no scalar.
    pub fn evaluate<E>(&mut self, loss: impl FnOnce() -> Result<Tensor, E>) -> Result<Evaluation>
    where
        Error: From<E>,
    {
        self.evaluate_over([loss], |loss| loss())
    }

    /// As [`evaluate`](Self::evaluate), over several batches: the loss is that of all their targets together, as in
    /// [`step_over`](Self::step_over).
    ///
    /// # Errors
    /// Those of `loss`; AS0509 if a loss is no scalar; AS0510 if there is no target, or no batch; AS0516 if only some of the losses are
    /// a `cross_entropy`.
    pub fn evaluate_over<B, E>(
        &mut self,
        batches: impl IntoIterator<Item = B>,
        mut loss: impl FnMut(B) -> Result<Tensor, E>,
    ) -> Result<Evaluation>
    where
        Error: From<E>,
    {
        let _span = tracing::info_span!("evaluation").entered();
        let mut losses = Mean::default();
        for batch in batches {
            loss::take_targets();
            let value = self.sp.scope(|| {
                let run = || -> Result<f64> { scalar(&loss(batch)?) };
                memory::forward_only(|| loss::allow_empty(run))
            })?;
            losses.add(value, loss::take_targets())?;
        }
        let (_, mean) = losses.end()?;
        self.mark = self.sp.ledger().snapshot();
        Ok(Evaluation {
            loss: mean,
            valid_tokens: losses.targets(),
        })
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
