//! Text as tokens, kept as the documents it came in.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use autosp_plan::codes;
use candle_core::{Device, Tensor};

use super::{Packing, TextReader, Tokenizer};
use crate::loss::IGNORE;
use crate::random::Stream;
use crate::{Error, Result};

/// A text, as tokens and where its documents end. Clones share it.
///
/// [`TextData::open`] takes files as they are; [`TextReader`] knows tokenizers, JSON lines and files of tokens.
#[derive(Clone)]
pub struct TextData {
    documents: Arc<Documents>,
    files: usize,
    packing: Packing,
    tokenizer: Tokenizer,
}

/// Documents end to end.
pub(super) struct Documents {
    tokens: Tokens,
    /// Where each document ends; none is empty.
    ends: Vec<usize>,
}

/// A byte a token, as long as that is enough.
enum Tokens {
    Bytes(Vec<u8>),
    Numbers(Vec<u32>),
}

impl Documents {
    pub(super) const fn new() -> Self {
        Self {
            tokens: Tokens::Bytes(Vec::new()),
            ends: Vec::new(),
        }
    }

    pub(super) fn push_bytes(&mut self, bytes: &[u8]) {
        match &mut self.tokens {
            Tokens::Bytes(all) => all.extend_from_slice(bytes),
            Tokens::Numbers(all) => all.extend(bytes.iter().map(|&byte| u32::from(byte))),
        }
        self.close();
    }

    pub(super) fn push(&mut self, tokens: impl Iterator<Item = u32>) {
        for token in tokens {
            match (&mut self.tokens, u8::try_from(token)) {
                (Tokens::Numbers(all), _) => all.push(token),
                (Tokens::Bytes(all), Ok(byte)) => all.push(byte),
                (Tokens::Bytes(all), Err(_)) => {
                    let mut numbers: Vec<u32> = all.iter().map(|&byte| u32::from(byte)).collect();
                    numbers.push(token);
                    self.tokens = Tokens::Numbers(numbers);
                }
            }
        }
        self.close();
    }

    fn close(&mut self) {
        if self.len() > self.ends.last().copied().unwrap_or(0) {
            self.ends.push(self.len());
        }
    }

    pub(super) const fn count(&self) -> usize {
        self.ends.len()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) const fn len(&self) -> usize {
        match &self.tokens {
            Tokens::Bytes(all) => all.len(),
            Tokens::Numbers(all) => all.len(),
        }
    }

    pub(super) fn range(&self, i: usize) -> Range<usize> {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        start..self.ends[i]
    }

    /// The document that holds the token at `place`.
    pub(super) fn at(&self, place: usize) -> usize {
        self.ends.partition_point(|&end| end <= place)
    }

    fn read(&self, range: Range<usize>, into: &mut Vec<u32>) {
        match &self.tokens {
            Tokens::Bytes(all) => into.extend(all[range].iter().map(|&byte| u32::from(byte))),
            Tokens::Numbers(all) => into.extend_from_slice(&all[range]),
        }
    }
}

impl TextData {
    /// Reads text files, and folders with all text files below them: one document a file, one token a byte, each row of a batch out of
    /// one document. [`TextReader`] reads in other ways.
    ///
    /// # Errors
    /// As [`TextReader::text`].
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        TextReader::new().text(paths)
    }

    /// A text that is at hand: one document, one token a byte.
    pub fn from_text(text: &str) -> Self {
        let mut documents = Documents::new();
        documents.push_bytes(text.as_bytes());
        Self::new(documents, 0, Packing::default(), Tokenizer::bytes())
    }

    pub(super) fn new(
        documents: Documents,
        files: usize,
        packing: Packing,
        tokenizer: Tokenizer,
    ) -> Self {
        Self {
            documents: Arc::new(documents),
            files,
            packing,
            tokenizer,
        }
    }

    /// Tokens in the text.
    pub fn len(&self) -> usize {
        self.documents.len()
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// Files that were read.
    pub fn files(&self) -> usize {
        self.files
    }

    /// Documents that are not empty.
    pub fn documents(&self) -> usize {
        self.documents.count()
    }

    /// The tokens of a document, counted from 0; `None` if there are not as many.
    pub fn document(&self, i: usize) -> Option<Vec<u32>> {
        (i < self.documents()).then(|| self.tokens(self.documents.range(i)))
    }

    /// Tokens of the whole text, documents end to end; the range is cut at the end of the text.
    pub fn tokens(&self, range: Range<usize>) -> Vec<u32> {
        let end = range.end.min(self.len());
        let mut tokens = Vec::new();
        self.documents.read(range.start.min(end)..end, &mut tokens);
        tokens
    }

    /// What a row of a batch is made of.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// What made the tokens, and what makes text of a model's.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The global batch of a step: `[rows, seq_len]` of `u32` tokens on the CPU, cut from the text at random places. It depends on
    /// the text, the seed and the step alone, so that every rank of every mesh draws the same one.
    ///
    /// # Errors
    /// AS0547 if a document is shorter than the sequence, unless attention may cross documents: [`labelled_batch`](Self::labelled_batch)
    /// says what is padding. Else as [`labelled_batch`](Self::labelled_batch).
    pub fn batch(&self, seed: u64, step: u64, rows: usize, seq_len: usize) -> Result<Tensor> {
        self.check(rows, seq_len)?;
        if self.packing == Packing::Pad {
            let lengths = (0..self.documents()).map(|i| self.documents.range(i).len());
            if let Some(short) = lengths.min().filter(|&length| length < seq_len) {
                let text = format!(
                    "expected documents of at least {seq_len} tokens for one sequence each, found one of {short}"
                );
                return Err(Error::new(codes::DOCUMENT_SHORT, text).with_help(
                    "text.labelled_batch(..), or TextReader::new().packing(Packing::Cross)",
                ));
            }
        }
        Ok(self.labelled_batch(seed, step, rows, seq_len)?.0)
    }

    /// As [`batch`](Self::batch), with labels as [`Sp::shard_labelled`](crate::Sp::shard_labelled) takes them: `[rows, seq_len]` of `i64`,
    /// each token itself, -100 for padding.
    ///
    /// Where rows are single documents, a document is drawn by its tokens, so that each token of the text counts the same; one shorter
    /// than the sequence is taken whole and padded at the end. Causal attention never looks at that padding; attention in both
    /// directions has to be told which keys are there.
    ///
    /// # Errors
    /// AS0507 if no document is as long as the sequence; AS0509 for an empty batch or a sequence of fewer than 2 tokens, which has no
    /// target.
    pub fn labelled_batch(
        &self,
        seed: u64,
        step: u64,
        rows: usize,
        seq_len: usize,
    ) -> Result<(Tensor, Tensor)> {
        self.check(rows, seq_len)?;
        let stream = Stream::new(seed, "batches of text");
        let mut all = Rows::new(rows, seq_len);
        for row in 0..rows as u64 {
            let draw = step.wrapping_mul(rows as u64).wrapping_add(row);
            let range = match self.packing {
                Packing::Cross => {
                    let start = stream.below(draw, (self.len() - seq_len + 1) as u64) as usize;
                    start..start + seq_len
                }
                Packing::Pad => self.draw(stream, draw, seq_len),
            };
            self.documents.read(range, &mut all.tokens);
            all.pad();
        }
        all.tensors()
    }

    /// A piece of at most `most` tokens out of one document of at least 2, which [`check`](Self::check) has found.
    pub(super) fn draw(&self, stream: Stream, draw: u64, most: usize) -> Range<usize> {
        let documents = &self.documents;
        let place = stream.below(draw.wrapping_mul(2), documents.len() as u64) as usize;
        let first = documents.at(place);
        // A token alone has no target; the next document takes its turn.
        let range = (first..documents.count())
            .chain(0..first)
            .map(|i| documents.range(i))
            .find(|range| range.len() > 1)
            .unwrap_or(0..0);
        let places = range.len().saturating_sub(most) + 1;
        let start = range.start + stream.below(draw.wrapping_mul(2) + 1, places as u64) as usize;
        start..range.end.min(start + most)
    }

    /// Whether there are such batches.
    pub(super) fn check(&self, rows: usize, seq_len: usize) -> Result<()> {
        if rows == 0 || seq_len < 2 {
            let text = format!(
                "expected a batch of at least 1 row and 2 tokens, found {rows} x {seq_len}"
            );
            return Err(Error::new(codes::BATCH_SHAPE, text));
        }
        let documents = &self.documents;
        let (what, longest) = match self.packing {
            Packing::Cross => ("text", self.len()),
            Packing::Pad if documents.count() == 1 => ("text", self.len()),
            Packing::Pad => {
                let lengths = (0..documents.count()).map(|i| documents.range(i).len());
                ("document", lengths.max().unwrap_or(0))
            }
        };
        if longest >= seq_len {
            return Ok(());
        }
        let text = format!(
            "expected a {what} of at least {seq_len} tokens for one sequence, found {longest}"
        );
        Err(Error::new(codes::TEXT_SHORT, text).with_help(format!("--seq-len {longest}")))
    }

    /// The pieces of one pass: at most `most` tokens each, in the order of the text.
    pub(super) fn pieces(&self, most: usize) -> Vec<Range<usize>> {
        let cut = |range: Range<usize>| {
            range
                .clone()
                .step_by(most.max(1))
                .map(move |start| start..range.end.min(start + most))
        };
        let all: Vec<Range<usize>> = match self.packing {
            Packing::Cross => cut(0..self.len()).collect(),
            Packing::Pad => (0..self.documents())
                .flat_map(|i| cut(self.documents.range(i)))
                .collect(),
        };
        // A token alone has no target.
        all.into_iter().filter(|range| range.len() > 1).collect()
    }
}

/// Rows of a batch that are filled one after the other.
pub(super) struct Rows {
    pub(super) tokens: Vec<u32>,
    pub(super) labels: Vec<i64>,
    shape: (usize, usize),
}

impl Rows {
    pub(super) fn new(rows: usize, seq_len: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(rows * seq_len),
            labels: Vec::with_capacity(rows * seq_len),
            shape: (rows, seq_len),
        }
    }

    /// Labels what has been read, and fills the row.
    pub(super) fn pad(&mut self) {
        let read = self.labels.len();
        self.labels
            .extend(self.tokens[read..].iter().map(|&token| i64::from(token)));
        let end = read + self.shape.1;
        self.tokens.resize(end, 0);
        self.labels.resize(end, IGNORE);
    }

    pub(super) fn tensors(self) -> Result<(Tensor, Tensor)> {
        Ok((
            Tensor::from_vec(self.tokens, self.shape, &Device::Cpu)?,
            Tensor::from_vec(self.labels, self.shape, &Device::Cpu)?,
        ))
    }
}

#[cfg(test)]
mod tests;
