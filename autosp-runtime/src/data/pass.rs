//! One pass over a text.

use std::path::Path;

use super::text::Rows;
use super::{Batch, TextData};
use crate::{Result, Sp};

/// Sharded batches, one after the other.
pub type Batches = Box<dyn Iterator<Item = Result<Batch>>>;

impl Sp {
    /// One pass over a text file or a folder of them, from its begin, one token a byte: [`pass`](Self::pass) over [`TextData::open`].
    ///
    /// # Errors
    /// As [`TextData::open`] and [`pass`](Self::pass).
    pub fn text(&self, path: impl AsRef<Path>, seq_len: usize) -> Result<Batches> {
        self.pass(&TextData::open(&[path])?, seq_len)
    }

    /// One pass over a text, from its begin: sharded batches of one sequence of `seq_len` tokens a replica. What is left of a document
    /// is padded, and so are the rows that the last batch has no text for; their labels are ignored.
    ///
    /// # Errors
    /// AS0507 if no document is as long as the sequence.
    pub fn pass(&self, text: &TextData, seq_len: usize) -> Result<Batches> {
        text.check(1, seq_len)?;
        let (sp, text) = (self.clone(), text.clone());
        let pieces = text.pieces(seq_len);
        let dp = sp.mesh().dp;
        Ok(Box::new((0..pieces.len().div_ceil(dp)).map(move |i| {
            let mut rows = Rows::new(dp, seq_len);
            for row in i * dp..(i + 1) * dp {
                if let Some(piece) = pieces.get(row) {
                    rows.tokens.extend(text.tokens(piece.clone()));
                }
                rows.pad();
            }
            let (tokens, labels) = rows.tensors()?;
            sp.shard_labelled(&tokens, &labels)
        })))
    }
}
