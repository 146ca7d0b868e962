//! Reads `autosp.toml`: a flat table of settings.

use toml::de::{DeTable, DeValue};

use super::SettingsError;
use crate::codes;

/// One `name = value` of a file and its place, lines and columns from 1.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) value: Found,
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Entry {
    /// Whether this is the table that the attribute reads when a model is compiled.
    pub(super) fn is_build(&self) -> bool {
        self.name == "build" && matches!(self.value, Found::Other("a table"))
    }
}

/// A value of a file, before a row of the table has judged it.
#[derive(Debug)]
pub(super) enum Found {
    Number(String),
    Text(String),
    /// Any other type, by its name.
    Other(&'static str),
}

/// All entries of the file, in the order of their lines.
pub(super) fn read(path: &str, text: &str) -> Result<Vec<Entry>, SettingsError> {
    let table = DeTable::parse(text).map_err(|error| {
        let (line, column) = place(text, error.span().map_or(0, |span| span.start));
        SettingsError {
            code: codes::SETTINGS_FILE,
            message: format!("{path}:{line}:{column}: {}", error.message()),
            help: Some("a settings file has lines such as `sp = 4`".to_owned()),
        }
    })?;
    let mut entries: Vec<Entry> = table
        .get_ref()
        .iter()
        .map(|(name, value)| {
            let (line, column) = place(text, name.span().start);
            let value = match value.get_ref() {
                DeValue::Integer(n) => Found::Number(
                    i64::from_str_radix(n.as_str(), n.radix())
                        .map_or_else(|_| n.to_string(), |n| n.to_string()),
                ),
                DeValue::Float(x) => Found::Number(x.as_str().to_owned()),
                DeValue::String(s) => Found::Text(s.to_string()),
                DeValue::Boolean(_) => Found::Other("a truth value"),
                DeValue::Datetime(_) => Found::Other("a date"),
                DeValue::Array(_) => Found::Other("an array"),
                DeValue::Table(_) => Found::Other("a table"),
            };
            Entry {
                name: name.get_ref().to_string(),
                value,
                line,
                column,
            }
        })
        .collect();
    entries.sort_by_key(|entry| (entry.line, entry.column));
    Ok(entries)
}

/// Line and column, both from 1, of a byte offset; columns count characters.
pub(super) fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}
