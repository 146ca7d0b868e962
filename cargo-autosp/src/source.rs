//! The file that a command is about.

use std::{fs, path::Path};

use autosp_compiler::ParseError;
use autosp_plan::{codes, io_reason};

use crate::Failure;

/// The file to analyse and its text: the file itself, or the one that its annotated module includes.
pub(crate) fn open(file: &Path) -> Result<(String, String), Failure> {
    let name = file.display().to_string();
    let text = read(file)?;
    let included = autosp_compiler::included(&text).map_err(|error| unparsable(&name, &error))?;
    let Some(path) = included else {
        return Ok((name, text));
    };
    let model = file.with_file_name(path);
    Ok((model.display().to_string(), read(&model)?))
}

fn read(file: &Path) -> Result<String, Failure> {
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
