//! Why a command could not do its work: one line, with the error's code at the end.

use std::fmt;

use autosp_plan::codes::Code;

/// A message and its code.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    code: &'static Code,
}

impl Failure {
    /// `message` under `code`.
    pub(crate) fn new(code: &'static Code, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {} [{}]", self.message, self.code.id)
    }
}
