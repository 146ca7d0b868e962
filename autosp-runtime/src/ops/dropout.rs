//! Dropout whose draws do not depend on the mesh.
//!
//! A number is drawn for each element by counter, keyed by seed, step, place of the dropout in the forward, global row and token,
//! and feature: every mesh, every number of threads and a block that is computed again drop the same elements.

use autosp_plan::codes;
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::{owned, record_gradient, tracked};
use crate::Error;
use crate::random::Stream;
use crate::scope;

/// Where rows and tokens are among the dims of a tensor; other dims are features.
pub type RowsAndTokens = [Option<usize>; 2];

/// As `candle_nn::ops::dropout`: elements are zero with probability `p` and else divided by 1 - p. `axes` are the dims of the batch's
/// rows and of the sequence, where there are any: what has no rows is dropped alike for all rows.
///
/// # Errors
/// AS0334 for a probability outside of 0 to 1; AS0305 if no forward is in progress.
pub fn dropout(x: &Tensor, p: f32, axes: RowsAndTokens) -> Result<Tensor> {
    let Some(scope) = scope::current() else {
        return candle_nn::ops::dropout(x, p);
    };
    if !(0.0..1.0).contains(&p) {
        let text = format!("dropout: expected a probability of at least 0 and below 1, found {p}");
        return Err(Error::new(codes::DROPOUT, text).into());
    }
    let shard = scope.shard()?;
    let sp = scope.sp();
    let [rows, tokens] = axes;
    let drawn = Draws {
        stream: Stream::new(sp.seed(), "dropout")
            .keyed(scope.step())
            .keyed(scope::draw()),
        p,
        dims: x.dims().to_vec(),
        rows,
        tokens,
        first_row: match rows {
            Some(dim) => sp.dp_rank() * x.dim(dim)?,
            None => 0,
        },
        first_token: tokens.map_or(0, |_| shard.start),
        length: shard.padded,
    };
    let result = drawn.apply(&x.detach())?;
    if !tracked(x) {
        return Ok(result);
    }
    record_gradient("dropout", [x], owned(&result)?, move |grad| {
        Ok([Some(drawn.apply(grad)?)])
    })
}

/// As `candle_nn::Dropout::forward`: see [`dropout`].
///
/// # Errors
/// As [`dropout`].
pub fn dropout_layer(
    layer: &candle_nn::Dropout,
    x: &Tensor,
    train: bool,
    axes: RowsAndTokens,
) -> Result<Tensor> {
    if !train {
        return Ok(x.clone());
    }
    // candle shows the probability nowhere else.
    let shown = format!("{layer:?}");
    let p = shown
        .split(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-' | 'e')))
        .find_map(|part| part.parse::<f32>().ok());
    let Some(p) = p else {
        let text = format!("dropout: expected a layer that shows its probability, found {shown}");
        return Err(Error::new(codes::DROPOUT, text).into());
    };
    dropout(x, p, axes)
}

/// What one dropout draws for its elements.
struct Draws {
    stream: Stream,
    p: f32,
    dims: Vec<usize>,
    rows: Option<usize>,
    tokens: Option<usize>,
    first_row: usize,
    first_token: usize,
    /// Tokens of a row: of the whole sequence.
    length: usize,
}

impl Draws {
    /// The factor of every element, in the order of the dims.
    fn factors(&self) -> Vec<f32> {
        let count = self.dims.iter().product::<usize>();
        let kept = 1.0 / (1.0 - self.p);
        (0..count)
            .into_par_iter()
            .map(|at| {
                if self.stream.uniform(self.counter(at)) < f64::from(self.p) {
                    0.0
                } else {
                    kept
                }
            })
            .collect()
    }

    /// The number of an element: by its row, then its token, then its features. Padding has numbers of its own, since a row is as
    /// long as what is beyond it.
    fn counter(&self, mut at: usize) -> u64 {
        let (mut row, mut token, mut feature, mut features) = (0, 0, 0, 1);
        for (dim, &size) in self.dims.iter().enumerate().rev() {
            let place = at % size;
            at /= size;
            if self.rows == Some(dim) {
                row = self.first_row + place;
            } else if self.tokens == Some(dim) {
                token = self.first_token + place;
            } else {
                feature += place * features;
                features *= size;
            }
        }
        debug_assert!(self.tokens.is_none() || token < self.length);
        // A token's number may not depend on how far the sequence was padded.
        ((row as u64) << 40)
            .wrapping_add(token as u64)
            .wrapping_mul(features as u64)
            .wrapping_add(feature as u64)
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let factors = Tensor::from_vec(self.factors(), self.dims.as_slice(), &Device::Cpu)?;
        let dtype = match x.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let factors = factors.to_dtype(dtype)?.to_device(x.device())?;
        (x.to_dtype(dtype)? * factors)?.to_dtype(x.dtype())
    }
}

#[cfg(test)]
mod tests {
    use autosp_plan::Settings;
    use candle_core::Var;

    use super::*;
    use crate::run_with;
    use crate::scope::Shard;

    /// Ones [2, s, 4] after two dropouts on every mesh, joined to the whole, with the gradient.
    fn dropped(sp: usize, dp: usize, s: usize) -> (Vec<f32>, Vec<f32>) {
        let parts = run_with(Settings::default().with_sp(sp).with_dp(dp), |sp_| {
            sp_.set_seed(5);
            let shard = Shard::new(s, sp_.sp_rank(), sp);
            let own = Tensor::ones((2 / dp, shard.len, 4), DType::F32, &Device::Cpu)?;
            sp_.register_shard(own.id(), shard)?;
            sp_.scope(|| {
                scope::enter("test", &[("x", &own, 1)])?;
                let x = Var::from_tensor(&own)?;
                let y = dropout(x.as_tensor(), 0.25, [Some(0), Some(1)])?;
                let y = dropout_layer(&candle_nn::Dropout::new(0.5), &y, true, [Some(0), Some(1)])?;
                let grads = y.sum_all()?.backward()?;
                let grad = grads.get(&x).unwrap().clone();
                Ok([y.detach(), grad].map(|t| t.narrow(1, 0, shard.valid_here()).unwrap()))
            })
        })
        .unwrap();
        let join = |which: usize| {
            let rows: Vec<Tensor> = parts
                .chunks(sp)
                .map(|ranks| {
                    let ranks: Vec<&Tensor> = ranks.iter().map(|r| &r[which]).collect();
                    Tensor::cat(&ranks, 1).unwrap()
                })
                .collect();
            let whole = Tensor::cat(&rows, 0).unwrap();
            whole.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        (join(0), join(1))
    }

    #[test]
    fn every_mesh_drops_the_same_elements() {
        for s in [64, 61] {
            let expected = dropped(1, 1, s);
            assert_eq!(expected.0.len(), 2 * s * 4);
            for (sp, dp) in [(2, 1), (4, 1), (1, 2), (4, 2)] {
                assert_eq!(dropped(sp, dp, s), expected, "sp {sp} dp {dp} s {s}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_divided_and_its_gradient_too() {
        let (y, grad) = dropped(2, 1, 64);
        let kept = 1.0 / (0.75 * 0.5);
        assert!(y.iter().all(|y| *y == 0.0 || (y - kept).abs() < 1e-6));
        assert_eq!(y, grad);
        let share = y.iter().filter(|y| **y != 0.0).count() as f64 / y.len() as f64;
        assert!((share - 0.375).abs() < 0.08, "{share}");
    }

    #[test]
    fn a_scope_entered_again_where_it_was_draws_the_same() {
        let drawn = run_with(Settings::default(), |sp| {
            let shard = Shard::new(8, 0, 1);
            let own = Tensor::ones((1, 8, 4), DType::F32, &Device::Cpu)?;
            sp.register_shard(own.id(), shard)?;
            sp.scope(|| {
                scope::enter("test", &[("x", &own, 1)])?;
                let once = || {
                    dropout(&own, 0.5, [Some(0), Some(1)])?
                        .flatten_all()?
                        .to_vec1::<f32>()
                };
                let here = scope::require("test")?;
                let (first, second) = (once()?, once()?);
                Ok((first.clone(), second, here.run(once)?, first))
            })
        });
        let (first, second, again, _) = drawn.unwrap().remove(0);
        assert_ne!(first, second);
        assert_eq!(first, again);
    }

    #[test]
    fn probabilities_outside_of_their_range_are_refused() {
        let failed = run_with(Settings::default(), |sp| {
            sp.scope(|| {
                Ok(dropout(
                    &Tensor::ones(3, DType::F32, &Device::Cpu)?,
                    1.0,
                    [None, None],
                )?
                .rank())
            })
        });
        assert_eq!(failed.unwrap_err().code(), codes::DROPOUT);
    }
}
