//! What steps and evaluations report.

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
    /// Targets that the loss averaged, over all ranks; 0 if the loss was not [`cross_entropy`](crate::loss::cross_entropy).
    pub valid_tokens: u64,
    /// `valid_tokens` by the time of the step.
    pub tokens_per_s: f64,
    /// Seconds from the begin of the step to its end on this rank.
    pub seconds: f64,
    /// Bytes that all ranks together handed to peers since the previous step or evaluation ended, sharding of the batch included.
    pub bytes_sent: u64,
    /// The part of the attention sites.
    pub exchange_bytes: u64,
    /// Whether the loss or the gradient was not finite and nothing was changed (see [`skip_non_finite`](super::TrainSettings::skip_non_finite)).
    pub skipped: bool,
}

/// What an evaluation found. The same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// The loss.
    pub loss: f64,
    /// Targets that the loss averaged, over all ranks; 0 if the loss was not [`cross_entropy`](crate::loss::cross_entropy).
    pub valid_tokens: u64,
}
