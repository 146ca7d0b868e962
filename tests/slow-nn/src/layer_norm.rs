//! `candle_nn::layer_norm` with a backward everywhere.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

pub use candle_nn::layer_norm::LayerNormConfig;

/// Layer normalisation, `candle_nn::LayerNorm` by its slow formula.
#[derive(Debug, Clone)]
pub struct LayerNorm(candle_nn::LayerNorm);

impl LayerNorm {
    /// A norm that subtracts the mean and adds a bias.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self(candle_nn::LayerNorm::new(weight, bias, eps))
    }

    /// A norm that subtracts the mean.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self(candle_nn::LayerNorm::new_no_bias(weight, eps))
    }

    /// A norm that divides by the root of the mean square.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self(candle_nn::LayerNorm::rms_norm(weight, eps))
    }

    /// The scale, `[hidden]`.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The shift, `[hidden]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }

    /// What is added to the variance.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.0.bias() {
            Some(bias) if self.0.remove_mean() => {
                candle_nn::ops::layer_norm_slow(x, self.0.weight(), bias, self.0.eps() as f32)
            }
            // candle's other paths have a backward.
            _ => self.0.forward(x),
        }
    }
}

/// Loads a [`LayerNorm`] of `size` features.
///
/// # Errors
/// When a tensor is missing or has another shape.
pub fn layer_norm<C: Into<LayerNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    candle_nn::layer_norm(size, config, vb).map(LayerNorm)
}

/// Loads a [`LayerNorm`] of `size` features that has no bias.
///
/// # Errors
/// When the tensor is missing or has another shape.
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    candle_nn::layer_norm_no_bias(size, eps, vb).map(LayerNorm)
}

/// Root-mean-square normalisation, `candle_nn::RmsNorm` by its slow formula.
#[derive(Debug, Clone)]
pub struct RmsNorm(candle_nn::RmsNorm);

impl RmsNorm {
    /// A norm with the given scale, `[hidden]`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(candle_nn::RmsNorm::new(weight, eps))
    }

    /// The scale, `[hidden]`.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }

    /// The layer norm that it is, without mean and shift.
    pub fn into_inner(self) -> LayerNorm {
        LayerNorm(self.0.into_inner())
    }
}

impl RmsNorm {
    /// candle's own differentiable forward.
    ///
    /// # Errors
    /// When a candle operation fails.
    pub fn forward_diff(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward_diff(x)
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm_slow(x, self.0.weight(), self.0.eps() as f32)
    }
}

/// Loads an [`RmsNorm`] of `size` features.
///
/// # Errors
/// When the tensor is missing or has another shape.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    candle_nn::rms_norm(size, eps, vb).map(RmsNorm)
}
