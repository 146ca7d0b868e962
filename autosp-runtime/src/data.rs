//! Batches: text as tokens, and each rank's part of a global batch.
//!
//! A batch is global: every rank is given the same `[B, S]` tokens and takes its rows (by dp) and its part of the sequence (by sp).

mod files;
mod packing;
mod pass;
mod reader;
mod rows;
mod shard;
mod text;
mod tokenizer;

pub use packing::{PackedBatch, Packing};
pub use pass::Batches;
pub use reader::{TextReader, TokenWidth};
pub use rows::Rows;
pub use shard::Batch;
pub use text::TextData;
pub use tokenizer::{Tokenizer, VOCABULARY};
