//! What belongs to a sharded batch beside its tokens: masks and other numbers of each token, and one label for each row.

use autosp_plan::codes;
use candle_core::{DType, Device, Tensor};

use crate::loss::IGNORE;
use crate::scope::Shard;
use crate::{Error, Result, Sp};

/// This rank's part of a global batch with one label a row.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Rows {
    /// `[B / dp, len]`, of the type of the global tokens; padding is token 0.
    pub tokens: Tensor,
    /// `[B / dp]`, `i64`: the labels of the rows that this rank owns, -100 for the others. Every row of the global batch is owned by
    /// one rank.
    pub labels: Tensor,
    /// Where in the sequence the tokens are.
    pub shard: Shard,
}

impl Sp {
    /// This rank's part of the global batch `tokens` `[B, S]` whose rows have one label each, `labels` `[B]`: for a model that makes one
    /// vector of logits a row. All ranks of a sequence compute the same logits; the loss of a row is counted by its owner alone.
    ///
    /// ```
    /// use autosp_runtime::{Settings, run_with};
    /// use candle_core::{Device, Tensor};
    ///
    /// # fn main() -> autosp_runtime::Result<()> {
    /// let labels = run_with(Settings::default().with_sp(2), |sp| {
    ///     let tokens = Tensor::new(&[[5u32, 6, 7], [8, 9, 10]], &Device::Cpu)?;
    ///     let classes = Tensor::new(&[1i64, 0], &Device::Cpu)?;
    ///     Ok(sp.shard_rows(&tokens, &classes)?.labels.to_vec1::<i64>()?)
    /// })?;
    /// assert_eq!(labels, [[1, -100], [-100, 0]]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`shard`](Self::shard); AS0509 for labels that are no whole numbers of shape `[B]`.
    pub fn shard_rows(&self, tokens: &Tensor, labels: &Tensor) -> Result<Rows> {
        if labels.rank() != 1 || !labels.dtype().is_int() || labels.dims() != &tokens.dims()[..1] {
            let text = format!(
                "expected whole labels of shape [{}], one a row, found {:?} of shape {:?}",
                tokens.dims().first().unwrap_or(&0),
                labels.dtype(),
                labels.dims()
            );
            return Err(Error::new(codes::BATCH_SHAPE, text));
        }
        let batch = self.shard(tokens)?;
        let count = labels.dim(0)? / self.mesh().dp;
        let first = self.dp_rank() * count;
        let own = labels
            .narrow(0, first, count)?
            .to_dtype(DType::I64)?
            .to_device(&Device::Cpu)?
            .to_vec1::<i64>()?;
        let checksum = own.iter().fold(0_u64, |sum, &label| {
            sum.wrapping_mul(31).wrapping_add(label as u64)
        });
        self.agree("sp.shard_rows", "labels (their checksum)", &[checksum])?;
        let (rank, size) = (self.sp_rank(), self.mesh().sp);
        let owned = own.iter().enumerate().map(|(row, &label)| {
            if (first + row) % size == rank {
                label
            } else {
                IGNORE
            }
        });
        let labels = Tensor::from_vec(owned.collect(), count, self.device())?;
        Ok(Rows {
            tokens: batch.tokens,
            labels,
            shard: batch.shard,
        })
    }

    /// This rank's part of a global tensor `x` `[B, S, ..]` that has a number (or several) for each token of a batch: its padding mask,
    /// the types of its tokens, given positions. Rows by dp, sequence by sp, as [`shard`](Self::shard) cuts tokens; padding is 0.
    ///
    /// # Errors
    /// AS0508 if dp does not divide B; AS0509 for a tensor of fewer than two dims; AS0306 if the ranks of a sequence were given tensors
    /// of different lengths.
    pub fn shard_aligned(&self, x: &Tensor) -> Result<Tensor> {
        if x.rank() < 2 || x.elem_count() == 0 {
            let text = format!(
                "expected a tensor [batch, sequence, ..] beside the tokens, found {:?}",
                x.dims()
            );
            return Err(Error::new(codes::BATCH_SHAPE, text));
        }
        let shard = Shard::new(x.dim(1)?, self.sp_rank(), self.mesh().sp);
        let mut own = self.replica(x)?;
        if shard.padded > shard.valid {
            own = own.pad_with_zeros(1, 0, shard.padded - shard.valid)?;
        }
        let own = own
            .narrow(1, shard.start, shard.len)?
            .contiguous()?
            .to_device(self.device())?;
        self.register_shard(own.id(), shard)?;
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Settings, run_with};

    #[test]
    fn every_row_has_one_owner() {
        for (sp, dp) in [(1, 1), (2, 1), (4, 2), (3, 2)] {
            let tokens = Tensor::zeros((4, 5), DType::U32, &Device::Cpu).unwrap();
            let labels = Tensor::new(&[3u32, 1, 0, 2], &Device::Cpu).unwrap();
            let found = run_with(Settings::default().with_sp(sp).with_dp(dp), |sp| {
                let rows = sp.shard_rows(&tokens, &labels)?;
                Ok((sp.dp_rank(), rows.labels.to_vec1::<i64>()?))
            });
            let mut owned = vec![Vec::new(); 4];
            for (replica, labels) in found.unwrap() {
                for (row, label) in labels.iter().enumerate() {
                    owned[replica * (4 / dp) + row].extend((*label != IGNORE).then_some(*label));
                }
            }
            assert_eq!(owned, [[3], [1], [0], [2]]);
        }
    }

    #[test]
    fn what_is_aligned_is_cut_like_the_tokens() {
        let x = Tensor::arange(0f32, 30.0, &Device::Cpu)
            .unwrap()
            .reshape((2, 5, 3))
            .unwrap();
        let parts = run_with(Settings::default().with_sp(2).with_dp(2), |sp| {
            Ok(sp.shard_aligned(&x)?.flatten_all()?.to_vec1::<f32>()?)
        });
        let numbers = |from: usize, n: usize| (from..from + n).map(|x| x as f32);
        let expected: Vec<Vec<f32>> = vec![
            numbers(0, 9).collect(),
            numbers(9, 6).chain([0.0; 3]).collect(),
            numbers(15, 9).collect(),
            numbers(24, 6).chain([0.0; 3]).collect(),
        ];
        assert_eq!(parts.unwrap(), expected);
    }

    #[test]
    fn labels_of_another_shape_are_refused() {
        let failed = run_with(Settings::default(), |sp| {
            let tokens = Tensor::zeros((2, 5), DType::U32, &Device::Cpu)?;
            let labels = Tensor::zeros((2, 5), DType::I64, &Device::Cpu)?;
            Ok(sp.shard_rows(&tokens, &labels)?.shard)
        });
        assert_eq!(failed.unwrap_err().code(), codes::BATCH_SHAPE);
    }
}
