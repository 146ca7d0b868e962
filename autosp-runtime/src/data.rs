//! Batches: text as tokens, and each rank's part of a global batch.
//!
//! A batch is global: every rank is given the same `[B, S]` tokens and takes its rows (by dp) and its part of the sequence (by sp).

mod rows;
mod shard;
mod text;

pub use rows::Rows;
pub use shard::Batch;
pub use text::{Batches, TextData, VOCABULARY};
