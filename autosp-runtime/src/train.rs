//! Training steps: loss, backward, reduction over all ranks, clipping, optimizer.

mod check;
pub(crate) mod divide;
mod flat;
mod groups;
mod optimizer;
pub(crate) mod reduce;
mod report;
mod settings;
mod state;
mod step;
mod update;

use std::path::Path;

use autosp_plan::codes;
use autosp_plan::settings::Zero;
use candle_core::Var;

pub use check::{Checked, Workload};
pub use groups::Group;
pub use report::{Evaluation, StepReport};
pub use settings::{Decay, Optimizer, Schedule, TrainSettings};
pub use state::Resumed;

use crate::comm::{Tag, barrier, broadcast};
use crate::{Bytes, Error, Parameters, Purpose, Result, Sp, memory, site};

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
    /// The variables of `named`.
    vars: Vec<Var>,
    settings: TrainSettings,
    manners: Vec<groups::Manner>,
    buckets: Vec<flat::Bucket>,
    /// The parts of variables that this rank updates, bucket by bucket: the slots of the updater.
    pieces: Vec<Vec<flat::Piece>>,
    updater: optimizer::Updater,
    /// With the optimizer on the host, once it has stepped.
    desk: Option<optimizer::Desk>,
    /// Bytes of the host that the optimizer takes, as the ledger has them.
    hosted: u64,
    /// Under `zero = 2`.
    divider: Option<divide::Divider>,
    /// What the first steps are held against.
    expected: Option<check::Expected>,
    steps: u64,
    /// The ledger when the previous step or evaluation ended.
    mark: Bytes,
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
        let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
        let buckets = flat::buckets(&vars, settings.bucket_bytes);
        let zero = sp.settings().zero();
        let share = |bucket: &flat::Bucket| {
            if zero.divides_state() {
                bucket.share(sp.world_size(), sp.rank())
            } else {
                0..bucket.elements()
            }
        };
        let pieces: Vec<Vec<flat::Piece>> = buckets
            .iter()
            .map(|bucket| bucket.pieces(&share(bucket)))
            .collect();
        let types = pieces.iter().flatten().map(|piece| vars[piece.var].dtype());
        let mut updater = optimizer::Updater::new(settings.optimizer, types);
        updater.keep_on(sp.settings().optimizer());
        let manners = groups::manners(&settings, &[], &named)?;
        let divider = (zero == Zero::Stage2).then(|| divide::Divider::new(sp, &vars, &buckets));
        let held = parameters.all();
        let held = held.iter().map(|(_, var)| site::bytes(var)).sum();
        sp.ledger().set(Purpose::Parameters, held);
        memory::limit::expect_within(sp)?;
        let mark = sp.ledger().snapshot();
        Ok(Self {
            expected: None,
            divider,
            sp: sp.clone(),
            parameters,
            named,
            vars,
            settings,
            manners,
            buckets,
            pieces,
            updater,
            desk: None,
            hosted: 0,
            steps: 0,
            mark,
        })
    }

    /// Steps variables whose names match in their own way; the first group that matches counts, and an earlier call is overridden.
    ///
    /// ```
    /// # use autosp_runtime::{Parameters, Settings, run_with};
    /// # use autosp_runtime::train::{Group, TrainSettings, Trainer};
    /// # use candle_core::DType;
    /// # run_with(Settings::default(), |sp| {
    /// # let parameters = Parameters::init(7, DType::F32, sp.device());
    /// # candle_nn::linear(4, 3, parameters.builder().pp("head"))?;
    /// let slow = Group { rate: 0.1, ..Group::new("head.*") };
    /// let trainer = Trainer::new(sp, parameters, TrainSettings::default())?.with_groups(&[slow])?;
    /// # Ok(())
    /// # })?;
    /// # Ok::<(), autosp_runtime::Error>(())
    /// ```
    ///
    /// # Errors
    /// AS0516 for a value that cannot be, or a group that matches no trainable variable.
    pub fn with_groups(mut self, groups: &[Group]) -> Result<Self> {
        self.manners = groups::manners(&self.settings, groups, &self.named)?;
        Ok(self)
    }

    /// Bytes of optimizer state and master weights that this rank holds. From `zero = 1` on that is its share.
    pub fn optimizer_bytes(&self) -> u64 {
        self.updater.bytes()
    }

    /// Writes all parameters as a safetensors file, on rank 0; returns on every rank once it is there.
    ///
    /// # Errors
    /// AS0505 if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        if self.sp.is_main() {
            let path = path.as_ref();
            self.parameters.save(path)?;
            tracing::info!(path = %path.display(), "saved");
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
}

#[cfg(test)]
mod tests;
