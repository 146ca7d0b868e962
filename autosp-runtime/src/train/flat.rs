//! The variables as flat buckets, and which part of a bucket belongs to a rank.
//!
//! A bucket is a run of consecutive variables of one type, end to end. Gradients are summed bucket by bucket and updated variables are
//! gathered bucket by bucket. From ZeRO stage 1 on each rank owns an equal share of every bucket; else it owns all of it.

use std::ops::Range;

use candle_core::{DType, Tensor, Var};

use crate::Result;
use crate::comm::chunk;
use crate::ops::wide;

/// Consecutive variables of one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// The variables, by their place in the order of names.
    pub(crate) vars: Range<usize>,
    /// Where each variable begins, and the end of the last.
    bounds: Vec<usize>,
    /// Type of the variables.
    pub(crate) dtype: DType,
}

/// A contiguous part of a variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The variable, by its place in the order of names.
    pub(crate) var: usize,
    /// Elements of the flat variable.
    pub(crate) range: Range<usize>,
}

/// Divides variables into buckets of at most `bytes` bytes in their wide type; a larger variable has a bucket of its own.
pub(crate) fn buckets(vars: &[Var], bytes: usize) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for (i, var) in vars.iter().enumerate() {
        let (dtype, count) = (var.dtype(), var.elem_count());
        let most = bytes / wide(dtype).size_in_bytes();
        match buckets.last_mut() {
            Some(last) if last.dtype == dtype && last.elements() + count <= most => {
                last.vars.end = i + 1;
                last.bounds.push(last.elements() + count);
            }
            _ => buckets.push(Bucket {
                vars: i..i + 1,
                bounds: vec![0, count],
                dtype,
            }),
        }
    }
    buckets
}

impl Bucket {
    /// Elements of all variables.
    pub(crate) fn elements(&self) -> usize {
        self.bounds.last().copied().unwrap_or(0)
    }

    /// The elements that `rank` of `size` owns.
    pub(crate) fn share(&self, size: usize, rank: usize) -> Range<usize> {
        chunk(self.elements(), size, rank)
    }

    /// The parts of variables in a range of the bucket's elements, in order; empty ones are left out.
    pub(crate) fn pieces(&self, share: &Range<usize>) -> Vec<Piece> {
        let part = |(var, bounds): (usize, &[usize])| {
            let range = share.start.max(bounds[0])..share.end.min(bounds[1]);
            (range.start < range.end).then(|| Piece {
                var,
                range: range.start - bounds[0]..range.end - bounds[0],
            })
        };
        self.vars
            .clone()
            .zip(self.bounds.windows(2))
            .filter_map(part)
            .collect()
    }

    /// Each variable's part of a whole flat bucket, in the variable's shape.
    pub(crate) fn split(&self, flat: &Tensor, vars: &[Var]) -> Result<Vec<Tensor>> {
        let parts = self.vars.clone().zip(self.bounds.windows(2));
        parts
            .map(|(var, bounds)| {
                let part = flat.narrow(0, bounds[0], bounds[1] - bounds[0])?;
                Ok(part.reshape(vars[var].shape())?)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The shares of all ranks together are every element of every variable, once.
        #[test]
        fn shares_cover_every_element_once(
            sizes in prop::collection::vec((1usize..30, any::<bool>()), 1..8), ranks in 1usize..7, bytes in 1usize..300,
        ) {
            let vars: Vec<Var> = sizes
                .iter()
                .map(|&(n, half)| Var::zeros(n, if half { DType::BF16 } else { DType::F32 }, &Device::Cpu).unwrap())
                .collect();
            let mut seen: Vec<Vec<u32>> = sizes.iter().map(|&(n, _)| vec![0; n]).collect();
            let buckets = buckets(&vars, bytes);
            prop_assert_eq!(buckets.iter().map(|bucket| bucket.vars.len()).sum::<usize>(), vars.len());
            for bucket in &buckets {
                prop_assert!(bucket.vars.len() == 1 || 4 * bucket.elements() <= bytes);
                prop_assert!(bucket.vars.clone().all(|var| vars[var].dtype() == bucket.dtype));
                for rank in 0..ranks {
                    let share = bucket.share(ranks, rank);
                    let pieces = bucket.pieces(&share);
                    prop_assert_eq!(pieces.iter().map(|piece| piece.range.len()).sum::<usize>(), share.len());
                    for piece in pieces {
                        for i in piece.range {
                            seen[piece.var][i] += 1;
                        }
                    }
                }
            }
            prop_assert!(seen.iter().flatten().all(|&times| times == 1));
        }
    }
}
