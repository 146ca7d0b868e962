//! Cutting a global batch into shards.

use autosp_plan::codes;
use candle_core::{DType, Device, Tensor};

use crate::loss::IGNORE;
use crate::scope::Shard;
use crate::{Error, Result, Sp};

/// This rank's part of a global batch.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Batch {
    /// `[B / dp, len]`, of the type of the global tokens; padding is token 0.
    pub tokens: Tensor,
    /// `[B / dp, len]`, `i64`: the token after each, -100 where there is none and for padding.
    pub labels: Tensor,
    /// Where in the sequence the tokens are.
    pub shard: Shard,
}

impl Sp {
    /// This rank's part of the global batch `tokens` `[B, S]`, for next-token prediction: rows by dp, sequence by sp.
    ///
    /// Labels are shifted before they are cut, so that the last token of a shard predicts the first of the next one; the last token of
    /// a row predicts nothing. A length that sp does not divide is padded at the end.
    ///
    /// ```
    /// use autosp_runtime::{Settings, run_with};
    /// use candle_core::{Device, Tensor};
    ///
    /// # fn main() -> autosp_runtime::Result<()> {
    /// let labels = run_with(Settings::default().with_sp(2), |sp| {
    ///     let tokens = Tensor::new(&[[5u32, 6, 7]], &Device::Cpu)?;
    ///     Ok(sp.shard(&tokens)?.labels.to_vec2::<i64>()?)
    /// })?;
    /// assert_eq!(labels, [[[6, 7]], [[-100, -100]]]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// AS0508 if dp does not divide B; AS0509 for tokens that are no whole numbers of shape `[B, S]`; AS0306 if the ranks of a sequence
    /// were given different tokens.
    pub fn shard(&self, tokens: &Tensor) -> Result<Batch> {
        let rows = self.rows(tokens, tokens, "tokens")?;
        self.cut(tokens, shift(&rows))
    }

    /// As [`shard`](Self::shard) for labels that are aligned with the tokens, as Hugging Face has them: `labels[i]` belongs to token
    /// `i`, which is predicted from the tokens before it; -100 is ignored. They are shifted here.
    ///
    /// # Errors
    /// As [`shard`](Self::shard); AS0509 if the labels have another shape than the tokens.
    pub fn shard_labelled(&self, tokens: &Tensor, labels: &Tensor) -> Result<Batch> {
        let labels = self.rows(labels, tokens, "labels")?;
        self.cut(tokens, shift(&labels))
    }

    /// As [`shard`](Self::shard) for targets that are shifted already: `targets[i]` is what position `i` predicts; -100 is ignored.
    ///
    /// # Errors
    /// As [`shard`](Self::shard); AS0509 if the targets have another shape than the tokens.
    pub fn shard_targets(&self, tokens: &Tensor, targets: &Tensor) -> Result<Batch> {
        let targets = self.rows(targets, tokens, "targets")?;
        self.cut(tokens, targets)
    }

    /// The rows of this replica of a global `[B, S]` tensor, as numbers.
    fn rows(&self, x: &Tensor, tokens: &Tensor, what: &str) -> Result<Vec<Vec<i64>>> {
        let whole = |x: &Tensor| x.rank() == 2 && x.elem_count() > 0 && x.dtype().is_int();
        if !whole(tokens) || !whole(x) || x.dims() != tokens.dims() {
            let expected = if whole(tokens) {
                format!("{:?}", tokens.dims())
            } else {
                "[batch, sequence]".to_owned()
            };
            let text = format!(
                "expected whole {what} of shape {expected}, found {:?} of shape {:?}",
                x.dtype(),
                x.dims()
            );
            return Err(Error::new(codes::BATCH_SHAPE, text));
        }
        Ok(self
            .replica(x)?
            .to_dtype(DType::I64)?
            .to_device(&Device::Cpu)?
            .to_vec2::<i64>()?)
    }

    pub(super) fn replica(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, dp) = (x.dim(0)?, self.mesh().dp);
        if rows % dp != 0 {
            let text =
                format!("expected a global batch that divides by dp = {dp}, found {rows} rows");
            return Err(Error::new(codes::BATCH_SPLIT, text)
                .with_help(format!("--batch {}", rows.next_multiple_of(dp))));
        }
        Ok(x.narrow(0, self.dp_rank() * (rows / dp), rows / dp)?)
    }

    fn cut(&self, tokens: &Tensor, mut labels: Vec<Vec<i64>>) -> Result<Batch> {
        let shard = Shard::new(tokens.dim(1)?, self.sp_rank(), self.mesh().sp);
        let rows = self.replica(tokens)?;
        let checksum = checksum(
            &rows
                .to_dtype(DType::I64)?
                .to_device(&Device::Cpu)?
                .flatten_all()?
                .to_vec1::<i64>()?,
            &labels,
        );
        self.agree("sp.shard", "tokens (their checksum)", &[checksum])?;
        let padding = shard.padded - shard.valid;
        let tokens = if padding == 0 {
            rows
        } else {
            rows.pad_with_zeros(1, 0, padding)?
        };
        let tokens = tokens
            .narrow(1, shard.start, shard.len)?
            .contiguous()?
            .to_device(self.device())?;
        let count = labels.len();
        for row in &mut labels {
            row.resize(shard.padded, IGNORE);
        }
        let labels: Vec<i64> = labels
            .iter()
            .flat_map(|row| &row[shard.start..shard.start + shard.len])
            .copied()
            .collect();
        let labels = Tensor::from_vec(labels, (count, shard.len), self.device())?;
        self.register_shard(tokens.id(), shard)?;
        Ok(Batch {
            tokens,
            labels,
            shard,
        })
    }
}

/// Each row moved one to the left; the last place is ignored.
fn shift(rows: &[Vec<i64>]) -> Vec<Vec<i64>> {
    rows.iter()
        .map(|row| row[1..].iter().copied().chain([IGNORE]).collect())
        .collect()
}

/// FNV-1a over the numbers.
fn checksum(tokens: &[i64], labels: &[Vec<i64>]) -> u64 {
    let numbers = tokens.iter().chain(labels.iter().flatten());
    numbers.fold(0xCBF2_9CE4_8422_2325, |hash: u64, &x| {
        (hash ^ x as u64)
            .wrapping_mul(0x0100_0000_01B3)
            .rotate_left(17)
    })
}

#[cfg(test)]
mod tests;
