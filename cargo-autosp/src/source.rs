//! The file that a command is about.

use std::{fs, path::Path};

use autosp_compiler::ParseError;
use autosp_plan::{codes, io_reason};

use crate::Failure;

/// Reads a Rust file.
pub(crate) fn read(file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file).map_err(|error| {
        let message = format!("cannot read `{}`: {}", file.display(), io_reason(&error));
        Failure::new(&codes::UNREADABLE_FILE, message)
    })
}

/// Says where a file is not Rust.
pub(crate) fn unparsable(file: &str, error: &ParseError) -> Failure {
    Failure::new(
        &codes::UNPARSABLE_FILE,
        format!("cannot parse `{file}`: {error}"),
    )
}
