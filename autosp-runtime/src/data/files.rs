//! Reads documents: text files, JSON lines, files of tokens.

use std::fs;
use std::path::{Path, PathBuf};

use autosp_plan::codes;
use serde_json::Value;

use super::TokenWidth;
use crate::{Error, Result};

/// Hands the documents of text files to `each`, and those of all text files below folders, one document a file. Returns how many
/// files there were.
pub(super) fn texts<P: AsRef<Path>>(
    paths: &[P],
    mut each: impl FnMut(&str) -> Result<()>,
) -> Result<usize> {
    let mut files = 0;
    for (path, named) in expand(paths, |_| true)? {
        let bytes = fs::read(&path).map_err(|error| unreadable(&path, &error))?;
        match std::str::from_utf8(&bytes) {
            Ok(text) if !bytes.contains(&0) => {
                files += 1;
                each(text)?;
            }
            _ if named => {
                let text = format!("expected text in `{}`, found binary data", path.display());
                return Err(Error::new(codes::NO_TEXT, text));
            }
            _ => {}
        }
    }
    Ok(files)
}

/// Hands the string in `field` of each line to `each`; in folders, of files that end in `.jsonl` or `.ndjson`. Empty lines are passed
/// over.
pub(super) fn json_lines<P: AsRef<Path>>(
    paths: &[P],
    field: &str,
    mut each: impl FnMut(&str) -> Result<()>,
) -> Result<usize> {
    let lines = |path: &Path| {
        let ending = path.extension().unwrap_or_default();
        ending == "jsonl" || ending == "ndjson"
    };
    let mut files = 0;
    for (path, _) in expand(paths, lines)? {
        let text = fs::read_to_string(&path).map_err(|error| unreadable(&path, &error))?;
        files += 1;
        for (i, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let refuse = |what: String| {
                let text = format!("{}:{}: {what}", path.display(), i + 1);
                Error::new(codes::DATA_LINE, text)
            };
            let object: Value = serde_json::from_str(line).map_err(|error| {
                let text = error.to_string();
                // Its own line is always 1.
                let reason = text.split(" at line ").next().unwrap_or(&text);
                refuse(format!("column {}: {reason}", error.column()))
            })?;
            match object.get(field) {
                Some(Value::String(text)) => each(text)?,
                Some(other) => {
                    return Err(refuse(format!(
                        "expected a string in `{field}`, found {}",
                        kind(other)
                    )));
                }
                None => {
                    let names: Vec<String> = object
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(name, _)| format!("`{name}`"))
                        .collect();
                    let found = match (object.as_object(), names.is_empty()) {
                        (None, _) => kind(&object).to_owned(),
                        (Some(_), true) => "none".to_owned(),
                        (Some(_), false) => names.join(", "),
                    };
                    return Err(refuse(format!("expected a field `{field}`, found {found}")));
                }
            }
        }
    }
    Ok(files)
}

/// The tokens of a file of little-endian numbers.
pub(super) fn tokens(path: &Path, width: TokenWidth) -> Result<Vec<u32>> {
    let bytes = fs::read(path).map_err(|error| unreadable(path, &error))?;
    let refuse =
        |what: String| Error::new(codes::TOKEN_FILE, format!("`{}`: {what}", path.display()));
    let each = width.bytes();
    if bytes.is_empty() || bytes.len() % each != 0 {
        return Err(refuse(format!(
            "expected tokens of {each} bytes, found {} bytes",
            bytes.len()
        )));
    }
    Ok(bytes
        .chunks_exact(each)
        .map(|token| {
            let mut number = [0; 4];
            number[..each].copy_from_slice(token);
            u32::from_le_bytes(number)
        })
        .collect())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    let text = format!(
        "cannot read `{}`: {}",
        path.display(),
        crate::io_reason(error)
    );
    Error::new(codes::FILE_UNREADABLE, text)
}

/// The files that the paths name, and whether each was named itself; of those in folders, the ones that `wanted` accepts.
fn expand<P: AsRef<Path>>(
    paths: &[P],
    wanted: impl Fn(&Path) -> bool,
) -> Result<Vec<(PathBuf, bool)>> {
    let mut files = Vec::new();
    for path in paths {
        let path = path.as_ref();
        if path.is_dir() {
            let mut found = Vec::new();
            walk(path, &mut found)?;
            files.extend(
                found
                    .into_iter()
                    .filter(|path| wanted(path))
                    .map(|path| (path, false)),
            );
        } else {
            files.push((path.to_owned(), true));
        }
    }
    Ok(files)
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
