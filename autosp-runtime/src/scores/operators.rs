//! Operators and argument forms of candle's tensors, for scores and masks.

use std::ops::{Add, Div, Mul, Sub};

use autosp_plan::codes;
use candle_core::{DType, Result, Tensor};

use super::Scores;
use crate::error::Error;
use crate::mask::{Action, Mask};

/// What can be added to scores: a [`Mask`], or a tensor that every rank holds whole (see [`Mask::dense`]).
pub trait AsMask {
    /// As a mask.
    ///
    /// # Errors
    /// As [`Mask::dense`].
    fn as_mask(&self) -> Result<Mask>;
}

impl AsMask for Mask {
    fn as_mask(&self) -> Result<Mask> {
        Ok(self.clone())
    }
}

impl AsMask for Tensor {
    fn as_mask(&self) -> Result<Mask> {
        Mask::dense(self)
    }
}

/// The two sides of `mask.where_cond(on_true, on_false)`: scores and a fill, or two numbers.
pub trait Choice<Other: ?Sized> {
    /// Scores, or the float mask of two numbers.
    type Output;

    /// Chooses `on_true` where `mask` is non-zero.
    ///
    /// # Errors
    /// AS0330 for a fill of several values, AS0325 for a float mask or one that does not broadcast to the scores.
    fn choose(mask: &Mask, on_true: &Self, on_false: &Other) -> Result<Self::Output>;
}

impl Choice<Scores> for Tensor {
    type Output = Scores;

    fn choose(mask: &Mask, on_true: &Self, on_false: &Scores) -> Result<Scores> {
        on_false.masked(
            mask,
            Action::Fill {
                value: scalar(on_true)?,
                nonzero: true,
            },
        )
    }
}

impl Choice<Tensor> for Scores {
    type Output = Scores;

    fn choose(mask: &Mask, on_true: &Self, on_false: &Tensor) -> Result<Scores> {
        on_true.masked(
            mask,
            Action::Fill {
                value: scalar(on_false)?,
                nonzero: false,
            },
        )
    }
}

impl Choice<Tensor> for Tensor {
    type Output = Mask;

    fn choose(mask: &Mask, on_true: &Self, on_false: &Tensor) -> Result<Mask> {
        mask.select(scalar(on_true)?, scalar(on_false)?, on_true.dtype())
    }
}

impl Choice<Mask> for Tensor {
    type Output = Mask;

    fn choose(mask: &Mask, on_true: &Self, on_false: &Mask) -> Result<Mask> {
        mask.fill(scalar(on_true)?, true, on_false)
    }
}

impl Choice<Tensor> for Mask {
    type Output = Mask;

    fn choose(mask: &Mask, on_true: &Self, on_false: &Tensor) -> Result<Mask> {
        mask.fill(scalar(on_false)?, false, on_true)
    }
}

impl Mask {
    /// As `Tensor::where_cond`: with scores on one side and one number on the other the scores with a fill, with two numbers a float
    /// mask, with one number and another form of the same mask that mask with a fill. A number is a scalar tensor, or one that was broadcast.
    ///
    /// # Errors
    /// AS0330 for a fill of several values, AS0325 for a float mask or one that does not broadcast to the scores.
    pub fn where_cond<A: Choice<B>, B: ?Sized>(
        &self,
        on_true: &A,
        on_false: &B,
    ) -> Result<A::Output> {
        A::choose(self, on_true, on_false)
    }
}

/// The number that a scalar or broadcast scalar tensor holds.
pub(super) fn scalar(x: &Tensor) -> Result<f64> {
    let one = x.elem_count() > 0
        && x.dims()
            .iter()
            .zip(x.stride())
            .all(|(&size, &stride)| size == 1 || stride == 0);
    if !one {
        let text = format!("expected one number, found a tensor {:?}", x.dims());
        return Err(Error::new(codes::FILL, text)
            .with_help("Tensor::new(f32::NEG_INFINITY, device)?.broadcast_as(shape)?")
            .into());
    }
    if x.track_op() {
        let text = "expected a constant, found a number that is computed from variables and would lose its gradient";
        return Err(Error::new(codes::FILL, text).into());
    }
    let mut x = x.clone();
    for dim in 0..x.rank() {
        x = x.narrow(dim, 0, 1)?;
    }
    x.flatten_all()?
        .to_dtype(DType::F64)?
        .get(0)?
        .to_scalar::<f64>()
}

macro_rules! operators {
    ($($scores:ty),*) => { $(
        impl Mul<f64> for $scores {
            type Output = Result<Scores>;
            fn mul(self, factor: f64) -> Self::Output {
                self.affine(factor, 0.0)
            }
        }
        impl Div<f64> for $scores {
            type Output = Result<Scores>;
            fn div(self, divisor: f64) -> Self::Output {
                self.affine(1.0 / divisor, 0.0)
            }
        }
        impl Mul<$scores> for f64 {
            type Output = Result<Scores>;
            fn mul(self, scores: $scores) -> Self::Output {
                scores.affine(self, 0.0)
            }
        }
        impl<M: AsMask> Add<&M> for $scores {
            type Output = Result<Scores>;
            fn add(self, mask: &M) -> Self::Output {
                self.broadcast_add(mask)
            }
        }
        impl<M: AsMask> Sub<&M> for $scores {
            type Output = Result<Scores>;
            fn sub(self, mask: &M) -> Self::Output {
                self.broadcast_sub(mask)
            }
        }
        impl Add<Mask> for $scores {
            type Output = Result<Scores>;
            fn add(self, mask: Mask) -> Self::Output {
                self.broadcast_add(&mask)
            }
        }
        impl Add<Result<Mask>> for $scores {
            type Output = Result<Scores>;
            fn add(self, mask: Result<Mask>) -> Self::Output {
                self.broadcast_add(&mask?)
            }
        }
        impl Add<$scores> for &Mask {
            type Output = Result<Scores>;
            fn add(self, scores: $scores) -> Self::Output {
                scores.broadcast_add(self)
            }
        }
    )* };
}

operators!(Scores, &Scores);

impl Add<&Mask> for Result<Scores> {
    type Output = Result<Scores>;
    fn add(self, mask: &Mask) -> Self::Output {
        self?.broadcast_add(mask)
    }
}

impl Add<Mask> for Result<Scores> {
    type Output = Result<Scores>;
    fn add(self, mask: Mask) -> Self::Output {
        self?.broadcast_add(&mask)
    }
}
