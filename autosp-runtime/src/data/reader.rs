//! How text is read: what makes tokens of it, what ends a document, whether attention crosses documents.

use std::path::Path;

use autosp_plan::codes;

use super::text::{Documents, TextData};
use super::{Packing, Tokenizer, VOCABULARY, files};
use crate::{Error, Result};

/// The size of a token in a file of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, reason = "users write it")]
pub enum TokenWidth {
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

impl TokenWidth {
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// Reads a [`TextData`]: by default one document a file, one token a byte, and each row of a batch out of one document.
///
/// ```no_run
/// use autosp_runtime::{TextReader, Tokenizer};
///
/// # fn main() -> autosp_runtime::Result<()> {
/// let tokenizer = Tokenizer::open("model/tokenizer.json")?;
/// let end = tokenizer.token("</s>")?;
/// let text = TextReader::new().tokenizer(tokenizer).end_token(end).json_lines(&["corpus.jsonl"], "text")?;
/// # let _ = text;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct TextReader {
    tokenizer: Tokenizer,
    end: Option<u32>,
    packing: Packing,
    vocabulary: Option<usize>,
}

impl TextReader {
    /// Bytes, one document a row.
    pub fn new() -> Self {
        Self::default()
    }

    /// What makes tokens of text.
    pub fn tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = tokenizer;
        self
    }

    /// The token that is put after each document; in files of tokens, the one that ends a document there.
    pub fn end_token(mut self, token: u32) -> Self {
        self.end = Some(token);
        self
    }

    /// What a row of a batch is made of.
    pub fn packing(mut self, packing: Packing) -> Self {
        self.packing = packing;
        self
    }

    /// The model's vocabulary: a larger token is refused when it is read.
    pub fn vocabulary(mut self, tokens: usize) -> Self {
        self.vocabulary = Some(tokens);
        self
    }

    /// Reads text files, and folders with all text files below them, in the order of their names: one document a file.
    ///
    /// Text is what is valid UTF-8 and has no zero byte. In folders, other files are passed over, as are names that begin with a dot
    /// and folders called `target`.
    ///
    /// # Errors
    /// AS0501 for a path that cannot be read; AS0506 for a file that is no text, and if there is no text at all; AS0545 if the
    /// tokenizer fails; AS0548 for a token beyond the vocabulary.
    pub fn text<P: AsRef<Path>>(&self, paths: &[P]) -> Result<TextData> {
        let mut documents = Documents::new();
        let files = files::texts(paths, |text| self.take(&mut documents, text))?;
        self.finish(documents, files, paths)
    }

    /// Reads JSON lines: one document a line, the string in `field` of its object. In folders, files that end in `.jsonl` or `.ndjson`.
    ///
    /// # Errors
    /// As [`text`](Self::text); AS0546 with file and line for a line without such a string.
    pub fn json_lines<P: AsRef<Path>>(&self, paths: &[P], field: &str) -> Result<TextData> {
        let mut documents = Documents::new();
        let files = files::json_lines(paths, field, |text| self.take(&mut documents, text))?;
        self.finish(documents, files, paths)
    }

    /// Reads files of tokens: little-endian numbers and nothing else. A file is one document, or several where
    /// [`end_token`](Self::end_token) says what ends one. The tokenizer is used for decoding alone.
    ///
    /// # Errors
    /// AS0501 for a file that cannot be read; AS0548 if its length is no multiple of the width, and for a token beyond the
    /// vocabulary; AS0506 if no document has a token.
    pub fn tokens<P: AsRef<Path>>(&self, paths: &[P], width: TokenWidth) -> Result<TextData> {
        let mut documents = Documents::new();
        for path in paths {
            let path = path.as_ref();
            let tokens = files::tokens(path, width)?;
            self.check(&tokens)
                .map_err(|error| error.context(format_args!("`{}`", path.display())))?;
            for document in tokens.split_inclusive(|&token| Some(token) == self.end) {
                documents.push(document.iter().copied());
            }
        }
        self.finish(documents, paths.len(), paths)
    }

    /// Takes documents that are tokens already.
    ///
    /// # Errors
    /// AS0506 if no document has a token; AS0548 for a token beyond the vocabulary.
    pub fn documents(
        &self,
        documents: impl IntoIterator<Item = impl AsRef<[u32]>>,
    ) -> Result<TextData> {
        let mut all = Documents::new();
        for document in documents {
            self.check(document.as_ref())?;
            self.push(&mut all, document.as_ref());
        }
        self.finish::<&Path>(all, 0, &[])
    }

    fn take(&self, documents: &mut Documents, text: &str) -> Result<()> {
        let all_bytes = self.vocabulary.is_none_or(|tokens| tokens >= VOCABULARY);
        if self.tokenizer.is_bytes() && self.end.is_none() && all_bytes {
            documents.push_bytes(text.as_bytes());
        } else {
            let tokens = self.tokenizer.encode(text)?;
            self.check(&tokens)?;
            self.push(documents, &tokens);
        }
        Ok(())
    }

    /// An empty document stays empty.
    fn push(&self, documents: &mut Documents, tokens: &[u32]) {
        if !tokens.is_empty() {
            documents.push(tokens.iter().copied().chain(self.end));
        }
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let Some(vocabulary) = self.vocabulary else {
            return Ok(());
        };
        match tokens.iter().find(|&&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(token) => Err(Error::new(
                codes::TOKEN_FILE,
                format!(
                    "expected tokens below {vocabulary}, the size of the vocabulary, found {token}"
                ),
            )),
        }
    }

    fn finish<P: AsRef<Path>>(
        &self,
        documents: Documents,
        files: usize,
        paths: &[P],
    ) -> Result<TextData> {
        if documents.is_empty() {
            let names: Vec<String> = paths
                .iter()
                .map(|path| format!("`{}`", path.as_ref().display()))
                .collect();
            let place = if names.is_empty() {
                "no path".to_owned()
            } else {
                names.join(", ")
            };
            let text = format!("expected text in {place}, found none");
            return Err(Error::new(codes::NO_TEXT, text));
        }
        if self.packing == Packing::Cross && documents.count() > 1 {
            tracing::warn!(documents = documents.count(), "attention crosses documents");
        }
        Ok(TextData::new(
            documents,
            files,
            self.packing,
            self.tokenizer.clone(),
        ))
    }
}

#[cfg(test)]
mod tests;
