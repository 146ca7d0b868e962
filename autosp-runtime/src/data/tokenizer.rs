//! Text to tokens and back.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use autosp_plan::codes;

use crate::{Error, Result};

/// Tokens where text is taken as it is: the bytes.
pub const VOCABULARY: usize = 256;

/// Makes tokens of text: its bytes, or what a `tokenizer.json` says. Clones share it.
///
/// ```
/// use autosp_runtime::Tokenizer;
///
/// # fn main() -> autosp_runtime::Result<()> {
/// let bytes = Tokenizer::bytes();
/// assert_eq!(bytes.encode("hé")?, [104, 195, 169]);
/// assert_eq!(bytes.decode(&[104, 195, 169])?, "hé");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Tokenizer(Kind);

#[derive(Clone)]
enum Kind {
    Bytes,
    File(Arc<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// One token a byte of UTF-8.
    pub const fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// Reads a Hugging Face `tokenizer.json`, or the one in a folder. Truncation and padding that it may ask for are left out: a
    /// document is taken whole.
    ///
    /// # Errors
    /// AS0501 if the file cannot be read, AS0545 if it is no tokenizer.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = if path.is_dir() {
            path.join("tokenizer.json")
        } else {
            path.to_owned()
        };
        let name = path.display();
        let text = std::fs::read(&path).map_err(|error| super::files::unreadable(&path, &error))?;
        let refuse = |error: tokenizers::Error| {
            let text = format!("`{name}` is no tokenizer: {}", one_line(&error));
            Error::new(codes::TOKENIZER, text)
        };
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(text).map_err(refuse)?;
        tokenizer.with_truncation(None).map_err(refuse)?;
        tokenizer.with_padding(None);
        Ok(Self(Kind::File(Arc::new(tokenizer))))
    }

    /// The tokens of a text, with those that the tokenizer puts around a text, such as the one of its begin.
    ///
    /// # Errors
    /// AS0545 if the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.0 {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::File(tokenizer) => Ok(tokenizer
                .encode_fast(text, true)
                .map_err(|error| failed("encode", &error))?
                .get_ids()
                .to_vec()),
        }
    }

    /// The text of tokens, special ones left out; what is not UTF-8 becomes a replacement character.
    ///
    /// # Errors
    /// AS0545 if the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        match &self.0 {
            Kind::Bytes => {
                let bytes: Vec<u8> = tokens
                    .iter()
                    .map(|&token| u8::try_from(token).unwrap_or(0xFF))
                    .collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::File(tokenizer) => tokenizer
                .decode(tokens, true)
                .map_err(|error| failed("decode", &error)),
        }
    }

    /// Tokens that there are: the smallest vocabulary of a model that takes them.
    pub fn vocabulary(&self) -> usize {
        match &self.0 {
            Kind::Bytes => VOCABULARY,
            // Ids may have gaps, so that the largest counts.
            Kind::File(tokenizer) => tokenizer
                .get_vocab(true)
                .values()
                .max()
                .map_or(0, |&largest| largest as usize + 1),
        }
    }

    /// The number of a token as the tokenizer writes it, such as `</s>`.
    ///
    /// # Errors
    /// AS0545 if there is no such token; bytes have none.
    pub fn token(&self, text: &str) -> Result<u32> {
        let found = match &self.0 {
            Kind::Bytes => None,
            Kind::File(tokenizer) => tokenizer.token_to_id(text),
        };
        found.ok_or_else(|| {
            let text = format!("expected a token of the tokenizer, found `{text}`");
            Error::new(codes::TOKENIZER, text)
        })
    }

    pub(super) const fn is_bytes(&self) -> bool {
        matches!(self.0, Kind::Bytes)
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::bytes()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Bytes => write!(f, "bytes"),
            Kind::File(_) => write!(f, "a tokenizer of {} tokens", self.vocabulary()),
        }
    }
}

fn failed(what: &str, error: &tokenizers::Error) -> Error {
    Error::new(
        codes::TOKENIZER,
        format!("the tokenizer cannot {what}: {}", one_line(error)),
    )
}

fn one_line(error: &tokenizers::Error) -> String {
    error.to_string().lines().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
pub(super) mod tests;
