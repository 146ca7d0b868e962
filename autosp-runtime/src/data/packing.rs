//! What a row of a batch is made of.

use candle_core::{Device, Tensor};

use super::TextData;
use super::text::Rows;
use crate::Result;
use crate::loss::IGNORE;
use crate::random::Stream;

/// What a row of a batch is made of.
///
/// A model whose attention knows nothing of documents sees a row as one text. So a row is one document, unless the crossing is
/// asked for; [`TextData::packed_batch`] is for models that are told which token belongs to which document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::exhaustive_enums, reason = "users write it")]
pub enum Packing {
    /// One document: a long one is cut at a random place, a short one is padded at the end, with labels that are ignored.
    #[default]
    Pad,
    /// All documents end to end, cut at random places: attention crosses documents. Reading several documents with it is
    /// logged as a warning.
    Cross,
}

/// Rows of several documents, and which token belongs to which. For a model that keeps attention within a document and counts
/// positions from its begin.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PackedBatch {
    /// `[rows, seq_len]`, `u32`; padding is token 0.
    pub tokens: Tensor,
    /// `[rows, seq_len]`, `i64`, for [`Sp::shard_labelled`](crate::Sp::shard_labelled): each token itself, -100 for the first of a
    /// document, which nothing predicts, and for padding.
    pub labels: Tensor,
    /// The document of each token of each row, from 0; padding is a document of its own.
    pub documents: Vec<Vec<u32>>,
    /// `[rows, seq_len]`, `u32`: the place of each token in its piece of a document.
    pub positions: Tensor,
}

impl TextData {
    /// As [`labelled_batch`](Self::labelled_batch), with rows that are filled with pieces of documents. Only for models whose attention
    /// takes [`PackedBatch::documents`], in their mask.
    ///
    /// # Errors
    /// As [`labelled_batch`](Self::labelled_batch).
    pub fn packed_batch(
        &self,
        seed: u64,
        step: u64,
        rows: usize,
        seq_len: usize,
    ) -> Result<PackedBatch> {
        self.check(rows, seq_len)?;
        let mut all = Rows::new(rows, seq_len);
        let (mut documents, mut positions) = (Vec::new(), Vec::new());
        for row in 0..rows as u64 {
            let number = step.wrapping_mul(rows as u64).wrapping_add(row);
            let stream = Stream::new(seed, &format!("packed row {number}"));
            let mut ids = Vec::with_capacity(seq_len);
            let mut pieces = 0;
            let first = all.tokens.len();
            while seq_len - ids.len() >= 2 {
                let piece = self.draw(stream, u64::from(pieces), seq_len - ids.len());
                ids.resize(ids.len() + piece.len(), pieces);
                positions.extend(0..piece.len() as u32);
                all.tokens.extend(self.tokens(piece));
                pieces += 1;
            }
            positions.extend(0..(seq_len - ids.len()) as u32);
            ids.resize(seq_len, pieces);
            all.pad();
            for i in (0..seq_len).filter(|&i| i == 0 || ids[i] != ids[i - 1]) {
                all.labels[first + i] = IGNORE;
            }
            documents.push(ids);
        }
        let (tokens, labels) = all.tensors()?;
        Ok(PackedBatch {
            tokens,
            labels,
            documents,
            positions: Tensor::from_vec(positions, (rows, seq_len), &Device::Cpu)?,
        })
    }
}

#[cfg(test)]
mod tests;
