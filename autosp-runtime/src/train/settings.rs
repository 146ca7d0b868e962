//! How to train: the optimizer, the learning rate over the steps, clipping.

use autosp_plan::codes;

use crate::{Error, Result};

/// How a [`Trainer`](super::Trainer) takes its steps.
///
/// ```
/// use autosp_runtime::train::{Optimizer, Schedule, TrainSettings};
///
/// let settings = TrainSettings {
///     schedule: Schedule::cosine(3e-3, 10, 100),
///     ..TrainSettings::default()
/// };
/// assert_eq!(settings.optimizer, Optimizer::adamw());
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "users write it with `..Default::default()`"
)]
pub struct TrainSettings {
    /// The rule of a step; [`Optimizer::adamw`] by default.
    pub optimizer: Optimizer,
    /// The learning rate of each step; constant 1e-3 by default.
    pub schedule: Schedule,
    /// Which variables decay; matrices alone by default.
    pub decay: Decay,
    /// Gradients with a larger global 2-norm are scaled down to it; 1 by default, `None` leaves them.
    pub clip: Option<f64>,
    /// Whether a step whose loss or gradient is not finite is passed over (parameters and optimizer stay, the report says so)
    /// instead of being the error AS0513. Off by default.
    pub skip_non_finite: bool,
    /// Bytes of gradients that are reduced at once; 32 MiB by default.
    pub bucket_bytes: usize,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            optimizer: Optimizer::adamw(),
            schedule: Schedule::constant(1e-3),
            decay: Decay::Matrices,
            clip: Some(1.0),
            skip_non_finite: false,
            bucket_bytes: 32 << 20,
        }
    }
}

/// Which variables the optimizer's weight decay applies to. A [`Group`](super::Group) with a decay of its own overrides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "users write it")]
pub enum Decay {
    /// Variables of two dims or more: not biases, nor the weights of norms.
    Matrices,
    /// All, as candle's and `PyTorch`'s optimizers do it when they are given all variables.
    All,
}

/// The rule of a step. Each computes in `f32` (`f64` for `f64` variables) and keeps its own copy of half-precision variables in `f32`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(clippy::exhaustive_enums, reason = "users write it")]
pub enum Optimizer {
    /// Adam with decoupled weight decay, as `PyTorch`'s `AdamW` computes it. Source: Loshchilov and Hutter, arXiv:1711.05101.
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Each step multiplies the variable by `1 - lr * weight_decay`.
        weight_decay: f64,
    },
    /// Gradient descent with momentum, as `PyTorch`'s `SGD` computes it.
    Sgd {
        /// `buffer = momentum * buffer + gradient`; 0 for none.
        momentum: f64,
        /// Added to the gradient: `weight_decay * variable`.
        weight_decay: f64,
    },
}

impl Optimizer {
    /// `AdamW` with `PyTorch`'s defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
    pub const fn adamw() -> Self {
        Self::AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }

    /// Plain gradient descent.
    pub const fn sgd() -> Self {
        Self::Sgd {
            momentum: 0.0,
            weight_decay: 0.0,
        }
    }
}

/// The learning rate over the steps: a linear warm-up, then half a cosine from the peak to the floor.
///
/// With steps counted from 0: `peak * (step + 1) / warmup` for `step < warmup`, then
/// `floor + (peak - floor) * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2`, and `floor` from `total` on. Without a total
/// the rate stays at the peak.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "plain numbers, and users write them"
)]
pub struct Schedule {
    /// The highest rate.
    pub peak: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// The step at which the floor is reached.
    pub total: Option<u64>,
    /// The rate at the end.
    pub floor: f64,
}

impl Schedule {
    /// The same rate at every step.
    pub const fn constant(rate: f64) -> Self {
        Self {
            peak: rate,
            warmup: 0,
            total: None,
            floor: rate,
        }
    }

    /// `warmup` steps up to `peak`, then a cosine down to a tenth of it at step `total`.
    pub const fn cosine(peak: f64, warmup: u64, total: u64) -> Self {
        Self {
            peak,
            warmup,
            total: Some(total),
            floor: 0.1 * peak,
        }
    }

    /// The rate of a step, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let Some(total) = self.total else {
            return self.peak;
        };
        if step >= total {
            return self.floor;
        }
        let progress = (step - self.warmup) as f64 / (total - self.warmup) as f64;
        self.floor
            + (self.peak - self.floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

impl TrainSettings {
    /// # Errors
    /// AS0516 naming the setting, what it takes and what was found.
    pub(super) fn check(&self) -> Result<()> {
        let schedule = self.schedule;
        require(
            "schedule.peak",
            "a finite rate of at least 0",
            schedule.peak,
            |x| x >= 0.0,
        )?;
        require(
            "schedule.floor",
            "a finite rate of at least 0",
            schedule.floor,
            |x| x >= 0.0,
        )?;
        if let Some(clip) = self.clip {
            require("clip", "a norm above 0", clip, |x| x > 0.0)?;
        }
        match self.optimizer {
            Optimizer::AdamW {
                beta1,
                beta2,
                eps,
                weight_decay,
            } => {
                require("beta1", "0 to below 1", beta1, |x| (0.0..1.0).contains(&x))?;
                require("beta2", "0 to below 1", beta2, |x| (0.0..1.0).contains(&x))?;
                require("eps", "a number of at least 0", eps, |x| x >= 0.0)?;
                require(
                    "weight_decay",
                    "a number of at least 0",
                    weight_decay,
                    |x| x >= 0.0,
                )
            }
            Optimizer::Sgd {
                momentum,
                weight_decay,
            } => {
                require("momentum", "a number of at least 0", momentum, |x| x >= 0.0)?;
                require(
                    "weight_decay",
                    "a number of at least 0",
                    weight_decay,
                    |x| x >= 0.0,
                )
            }
        }
    }
}

pub(super) fn require(
    name: &str,
    expected: &str,
    found: f64,
    accepted: impl Fn(f64) -> bool,
) -> Result<()> {
    if found.is_finite() && accepted(found) {
        return Ok(());
    }
    Err(Error::new(
        codes::TRAIN_SETTING,
        format!("`{name}`: expected {expected}, found {found}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_and_follows_a_cosine() {
        let schedule = Schedule {
            peak: 1.0,
            warmup: 4,
            total: Some(12),
            floor: 0.2,
        };
        let expected = [0.25, 0.5, 0.75, 1.0, 1.0];
        for (step, expected) in expected.into_iter().enumerate() {
            assert!(
                (schedule.rate(step as u64) - expected).abs() < 1e-12,
                "{step}"
            );
        }
        assert!(
            (schedule.rate(8) - 0.6).abs() < 1e-12,
            "half-way between peak and floor"
        );
        assert!(
            (schedule.rate(12) - 0.2).abs() < 1e-12 && (schedule.rate(1000) - 0.2).abs() < 1e-12
        );
        assert!((4..12).all(|step| schedule.rate(step + 1) < schedule.rate(step)));
        assert!((Schedule::constant(0.5).rate(1_000_000) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let good = TrainSettings::default();
        good.check().unwrap();
        let wrong = [
            TrainSettings {
                clip: Some(0.0),
                ..good
            },
            TrainSettings {
                schedule: Schedule::constant(f64::NAN),
                ..good
            },
            TrainSettings {
                schedule: Schedule {
                    floor: -1.0,
                    ..good.schedule
                },
                ..good
            },
            TrainSettings {
                optimizer: Optimizer::AdamW {
                    beta1: 1.0,
                    beta2: 0.9,
                    eps: 0.0,
                    weight_decay: 0.0,
                },
                ..good
            },
            TrainSettings {
                optimizer: Optimizer::Sgd {
                    momentum: -0.1,
                    weight_decay: 0.0,
                },
                ..good
            },
        ];
        for (settings, name) in wrong
            .iter()
            .zip(["clip", "peak", "floor", "beta1", "momentum"])
        {
            let error = settings.check().unwrap_err();
            assert!(
                error.code() == codes::TRAIN_SETTING && error.message().contains(name),
                "{error}"
            );
        }
    }
}
