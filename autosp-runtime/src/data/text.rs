//! Text as bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use autosp_plan::codes;
use candle_core::{Device, Tensor};

use super::Batch;
use crate::random::Stream;
use crate::{Error, Result, Sp};

/// Tokens of [`TextData`]: the bytes.
pub const VOCABULARY: usize = 256;

/// A text of one byte a token. Clones share it.
#[derive(Clone)]
pub struct TextData {
    bytes: Arc<[u8]>,
    files: usize,
}

impl TextData {
    /// Reads files, and folders with all text files below them, in the order of their names.
    ///
    /// Text is what is valid UTF-8 and has no zero byte. In folders, other files are passed over, as are names that begin with a dot
    /// and folders called `target`.
    ///
    /// # Errors
    /// AS0501 for a path that cannot be read; AS0506 for a file that is no text, and if there is no text at all.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let mut text = Vec::new();
        let mut files = 0;
        for path in paths {
            let path = path.as_ref();
            if path.is_dir() {
                let mut found = Vec::new();
                walk(path, &mut found)?;
                for file in found {
                    if let Some(bytes) = read(&file)? {
                        text.extend(bytes);
                        files += 1;
                    }
                }
            } else {
                let bytes = read(path)?.ok_or_else(|| {
                    Error::new(
                        codes::NO_TEXT,
                        format!("expected text in `{}`, found binary data", path.display()),
                    )
                })?;
                text.extend(bytes);
                files += 1;
            }
        }
        if text.is_empty() {
            let names: Vec<String> = paths
                .iter()
                .map(|path| format!("`{}`", path.as_ref().display()))
                .collect();
            let place = if names.is_empty() {
                "no path".to_owned()
            } else {
                names.join(", ")
            };
            return Err(Error::new(
                codes::NO_TEXT,
                format!("expected text in {place}, found none"),
            ));
        }
        Ok(Self {
            bytes: text.into(),
            files,
        })
    }

    /// A text that is at hand.
    pub fn from_text(text: &str) -> Self {
        Self {
            bytes: text.as_bytes().into(),
            files: 1,
        }
    }

    /// Tokens in the text.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no text.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Files that were read.
    pub fn files(&self) -> usize {
        self.files
    }

    /// The tokens, one a byte.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Tokens of a text.
    pub fn encode(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// The text of tokens; what is not UTF-8, or no byte, becomes a replacement character.
    pub fn decode(tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .map(|&token| u8::try_from(token).unwrap_or(0xFF))
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The global batch of a step: `[rows, seq_len]` of `u32` tokens on the CPU, cut from the text at random places. It depends on
    /// the text, the seed and the step alone, so that every rank of every mesh draws the same one.
    ///
    /// # Errors
    /// AS0507 if the text is shorter than the sequence; AS0509 for an empty batch or a sequence of fewer than 2 tokens, which has no
    /// target.
    pub fn batch(&self, seed: u64, step: u64, rows: usize, seq_len: usize) -> Result<Tensor> {
        if rows == 0 || seq_len < 2 {
            let text = format!(
                "expected a batch of at least 1 row and 2 tokens, found {rows} x {seq_len}"
            );
            return Err(Error::new(codes::BATCH_SHAPE, text));
        }
        self.check_length(seq_len)?;
        let stream = Stream::new(seed, "batches of text");
        let places = (self.len() - seq_len + 1) as u64;
        let draws = step.wrapping_mul(rows as u64);
        let mut tokens = Vec::with_capacity(rows * seq_len);
        for row in 0..rows as u64 {
            let start = stream.below(draws.wrapping_add(row), places) as usize;
            tokens.extend(
                self.bytes[start..start + seq_len]
                    .iter()
                    .map(|&byte| u32::from(byte)),
            );
        }
        Ok(Tensor::from_vec(tokens, (rows, seq_len), &Device::Cpu)?)
    }

    fn check_length(&self, seq_len: usize) -> Result<()> {
        if self.len() >= seq_len {
            return Ok(());
        }
        let text = format!(
            "expected a text of at least {seq_len} tokens for one sequence, found {}",
            self.len()
        );
        Err(Error::new(codes::TEXT_SHORT, text).with_help(format!("--seq-len {}", self.len())))
    }
}

/// Sharded batches, one after the other.
pub type Batches = Box<dyn Iterator<Item = Result<Batch>>>;

impl Sp {
    /// One pass over a text file or a folder of them, from its begin: sharded batches of one sequence of `seq_len` tokens a replica.
    /// What is left at the end, too short for a batch, is passed over.
    ///
    /// # Errors
    /// As [`TextData::open`]; AS0507 if the text is too short for one batch.
    pub fn text(&self, path: impl AsRef<Path>, seq_len: usize) -> Result<Batches> {
        let data = TextData::open(&[path])?;
        let sp = self.clone();
        let dp = sp.mesh().dp;
        data.check_length(seq_len.saturating_mul(dp).max(2))?;
        let batches = data.len() / (seq_len.max(1) * dp);
        Ok(Box::new((0..batches).map(move |i| {
            let start = i * dp * seq_len;
            let tokens = data.bytes[start..start + dp * seq_len]
                .iter()
                .map(|&byte| u32::from(byte))
                .collect();
            sp.shard(&Tensor::from_vec(tokens, (dp, seq_len), &Device::Cpu)?)
        })))
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::new(
        codes::FILE_UNREADABLE,
        format!(
            "cannot read `{}`: {}",
            path.display(),
            crate::io_reason(error)
        ),
    )
}

/// A file's bytes; `None` if it is no text.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let bytes = fs::read(path).map_err(|error| unreadable(path, &error))?;
    let is_text = !bytes.contains(&0) && std::str::from_utf8(&bytes).is_ok();
    Ok(is_text.then_some(bytes))
}

/// All files below a folder, in the order of their names. Links are not followed, since they may lead in circles.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |error: std::io::Error| unreadable(folder, &error);
    let mut entries = fs::read_dir(folder)
        .map_err(failed)?
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(failed)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let kind = entry.file_type().map_err(failed)?;
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        if kind.is_dir() && name != "target" {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
