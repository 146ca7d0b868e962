//! Tests that anybody can write: is a model the same on one rank and on many?
//!
//! ```
//! use autosp_runtime::rt::ops;
//! use autosp_runtime::testing::{Cases, assert_equivalent};
//! use candle_core::{Result, Tensor};
//! use candle_nn::{Module, VarBuilder};
//!
//! // A model under `#[autosp::sequence_parallel]` in a real test; this one has no attention.
//! fn model(vb: VarBuilder, tokens: &Tensor) -> Result<Tensor> {
//!     let x = candle_nn::embedding(32, 8, vb.pp("embed"))?.forward(tokens)?;
//!     let x = ops::rms_norm(&candle_nn::rms_norm(8, 1e-5, vb.pp("norm"))?, &x)?;
//!     candle_nn::linear_no_bias(8, 32, vb.pp("head"))?.forward(&x)
//! }
//!
//! assert_equivalent(&Cases { vocabulary: 32, seq_len: 11, ..Cases::default() }, model);
//! ```

mod differences;
mod report;

use autosp_plan::settings::Policy;
use autosp_plan::{Settings, codes};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

pub use differences::{Sample, assert_gradients, finite_differences};
pub use report::{Case, Difference, Report, Run};

use crate::loss::IGNORE;
use crate::random::Stream;
use crate::train::reduce::{detached, here, presence, sums};
use crate::{Error, Parameters, Result, Sp, loss, memory, run_on_threads};

/// What to compare. All combinations of `sp`, `dp`, `groups` and `policies` are run.
#[derive(Debug, Clone)]
#[allow(
    clippy::exhaustive_structs,
    reason = "users write it with `..Default::default()`"
)]
pub struct Cases {
    /// Ranks that share a sequence; 2 and 4 by default.
    pub sp: Vec<usize>,
    /// Replicas; 1 by default. Each divides `batch`.
    pub dp: Vec<usize>,
    /// Head groups of each site; 1 by default.
    pub groups: Vec<usize>,
    /// What a forward keeps; everything by default.
    pub policies: Vec<Policy>,
    /// Rows of the global batch; 2 by default.
    pub batch: usize,
    /// Tokens of a sequence, S; 18 by default, which 4 ranks do not divide.
    pub seq_len: usize,
    /// Tokens are drawn from `0..vocabulary`, 256 by default.
    pub vocabulary: usize,
    /// Which tokens `(row, position)` are targets; all by default. A token is predicted by the position before it.
    pub targets: fn(usize, usize) -> bool,
    /// Decides parameters and tokens.
    pub seed: u64,
    /// Type of the parameters, `f32` by default.
    pub dtype: DType,
    /// Allowed difference of a tensor relative to its own 2-norm, and of the loss; 1e-5 by default.
    pub relative: f64,
    /// Allowed difference of a tensor relative to the 2-norm of all gradients together; 1e-7 by default.
    pub floor: f64,
}

impl Default for Cases {
    fn default() -> Self {
        Self {
            sp: vec![2, 4],
            dp: vec![1],
            groups: vec![1],
            policies: vec![Policy::All],
            batch: 2,
            seq_len: 18,
            vocabulary: 256,
            targets: |_, _| true,
            seed: 0,
            dtype: DType::F32,
            relative: 1e-5,
            floor: 1e-7,
        }
    }
}

impl Cases {
    /// Tokens and aligned labels of the global batch.
    fn batch(&self) -> Result<(Tensor, Tensor)> {
        let stream = Stream::new(self.seed, "tokens of a test");
        let count = self.batch * self.seq_len;
        let tokens: Vec<u32> = (0..count as u64)
            .map(|i| stream.below(i, self.vocabulary as u64) as u32)
            .collect();
        let label = |(i, &token): (usize, &u32)| {
            if (self.targets)(i / self.seq_len, i % self.seq_len) {
                i64::from(token)
            } else {
                IGNORE
            }
        };
        let labels: Vec<i64> = tokens.iter().enumerate().map(label).collect();
        let shape = (self.batch, self.seq_len);
        Ok((
            Tensor::from_vec(tokens, shape, &Device::Cpu)?,
            Tensor::from_vec(labels, shape, &Device::Cpu)?,
        ))
    }

    fn all(&self) -> Vec<Case> {
        let mut all = Vec::new();
        for &sp in &self.sp {
            for &dp in &self.dp {
                for &groups in &self.groups {
                    all.extend(self.policies.iter().map(|&policy| Case {
                        sp,
                        dp,
                        groups,
                        policy,
                    }));
                }
            }
        }
        all
    }
}

impl Case {
    fn settings(self) -> Settings {
        Settings::default()
            .with_sp(self.sp)
            .with_dp(self.dp)
            .with_groups(self.groups)
            .with_policy(self.policy)
    }
}

/// Loss and gradients of one run, in `f64`.
pub(crate) struct Outcome {
    loss: f64,
    gradients: Vec<Gradient>,
}

pub(crate) struct Gradient {
    name: String,
    dims: Vec<usize>,
    values: Vec<f64>,
}

/// Runs `model` (from a builder and `[b, s]` tokens to `[b, s, vocabulary]` logits) on one rank and on every mesh of the cases, with
/// the same parameters and tokens, and compares the loss and every gradient.
///
/// All runs are inside a sharded scope: a model under the attribute runs its twin, also on the one rank.
///
/// # Panics
/// If a run fails or differs by more than [`Cases`] allow; the message says which tensor differs, where, and by how much.
#[track_caller]
pub fn assert_equivalent(
    cases: &Cases,
    model: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync,
) {
    let report = equivalence(cases, model);
    if let Err(error) = report.and_then(|report| report.check()) {
        panic!("{error}");
    }
}

/// As [`assert_equivalent`], for callers that look at the differences themselves.
///
/// # Errors
/// Those of the model; AS0512 if a variable gets no gradient on any rank. A difference is no error here: see [`Report::check`].
pub fn equivalence(
    cases: &Cases,
    model: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync,
) -> Result<Report> {
    let one = Case {
        sp: 1,
        dp: 1,
        groups: 1,
        policy: Policy::All,
    };
    compare(cases, &outcome(cases, one, &model)?, &model)
}

/// As [`equivalence`], against another model that runs on one device outside any scope: usually the same architecture by candle's
/// slow, differentiable operations. Both ask their builder for the same names.
///
/// # Errors
/// As [`equivalence`].
pub fn equivalence_to(
    reference: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync,
    cases: &Cases,
    model: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync,
) -> Result<Report> {
    let (tokens, labels) = cases.batch()?;
    let expected = run_on_threads(Settings::default(), |sp| {
        let batch = sp.shard_labelled(&tokens, &labels)?;
        let parameters = Parameters::init(cases.seed, cases.dtype, &Device::Cpu);
        let logits = reference(parameters.builder(), &batch.tokens)?;
        gradients(
            sp,
            &parameters,
            &loss::cross_entropy(&logits, &batch.labels)?,
        )
    })?;
    let expected = expected
        .into_iter()
        .next()
        .ok_or_else(|| Error::new(codes::MESH, "expected one rank, found none"))?;
    compare(cases, &expected, &model)
}

type Model<'a> = &'a (dyn Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor> + Sync);

fn compare(cases: &Cases, expected: &Outcome, model: Model<'_>) -> Result<Report> {
    let mut runs = Vec::new();
    for case in cases.all() {
        let found = outcome(cases, case, model).map_err(|error| error.context(case))?;
        runs.push(Run::new(cases, case, &found, expected)?);
    }
    Ok(Report { runs })
}

/// Loss and gradients on the mesh of a case.
fn outcome(cases: &Cases, case: Case, model: Model<'_>) -> Result<Outcome> {
    let (tokens, labels) = cases.batch()?;
    let mut outcomes = run_on_threads(case.settings(), |sp| {
        let batch = sp.shard_labelled(&tokens, &labels)?;
        let parameters = Parameters::init(cases.seed, cases.dtype, &Device::Cpu);
        sp.scope(|| {
            let logits = model(parameters.builder(), &batch.tokens)?;
            gradients(
                sp,
                &parameters,
                &loss::cross_entropy(&logits, &batch.labels)?,
            )
        })
    })?;
    let first = outcomes.swap_remove(0);
    if let Some(other) = outcomes
        .iter()
        .find(|other| other.loss.to_bits() != first.loss.to_bits())
    {
        let text = format!(
            "expected one loss on all ranks, found {} and {}",
            first.loss, other.loss
        );
        return Err(Error::new(codes::NOT_EQUIVALENT, text).context(case));
    }
    Ok(first)
}

/// Walks back and sums over the ranks.
fn gradients(sp: &Sp, parameters: &Parameters, loss: &Tensor) -> Result<Outcome> {
    let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    memory::forget();
    let mut grads = loss.backward()?;
    memory::collect(&mut grads)?;
    let named = parameters.named();
    let own = detached(&grads, &named);
    presence(sp, &here(&own), &[])?.require(&named)?;
    let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
    let sums = sums(sp, own, &vars, usize::MAX)?;
    let mut gradients = Vec::with_capacity(sums.len());
    for ((name, var), sum) in named.into_iter().zip(sums) {
        let values = sum.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        gradients.push(Gradient {
            name,
            dims: var.dims().to_vec(),
            values,
        });
    }
    Ok(Outcome {
        loss: value,
        gradients,
    })
}

#[cfg(test)]
mod tests;
