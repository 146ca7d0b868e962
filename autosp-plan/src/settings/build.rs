//! The table `[build]` of a settings file: what the attribute reads when a model is compiled.

use std::fmt::Write as _;

use toml::de::{DeTable, DeValue};

use super::file::place;
use super::{Settings, SettingsError};
use crate::codes;

/// Name and meaning of every key of `[build]`; all are lists of names.
pub const BUILD_KEYS: &[(&str, &str)] = &[
    (
        "tokenwise",
        "functions and fields that compute every token by itself, as `\"Type::function\"` or `\"Type::field\"`",
    ),
    (
        "replicated",
        "functions and fields that are the same on every rank",
    ),
    (
        "sharded",
        "public functions whose callers know that they get one rank's tokens, merged with the rows",
    ),
];

/// One name of a list in `[build]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildEntry {
    /// The key.
    pub key: &'static str,
    /// A name in its list.
    pub name: String,
    /// 1-based line of the name.
    pub line: usize,
    /// 1-based column of the name.
    pub column: usize,
}

/// Reads what a settings file says to the compiler, and holds the rest of it against the table of settings.
///
/// # Errors
/// AS0310 for a file that is not TOML, with line and column; AS0308 for a key that does not exist, AS0309 for a value of another
/// type than its key takes, both with the place and what is known.
pub fn build(path: &str, text: &str) -> Result<Vec<BuildEntry>, SettingsError> {
    // Everything but `[build]`, which this passes over.
    Settings::default().with_file(path, text)?;
    let table = DeTable::parse(text).map_err(|error| SettingsError {
        code: codes::SETTINGS_FILE,
        message: format!("{path}: {}", error.message()),
        help: None,
    })?;
    let mut entries = Vec::new();
    let Some(section) = table.get_ref().get("build") else {
        return Ok(entries);
    };
    let at = |offset: usize| {
        let (line, column) = place(text, offset);
        format!("{path}:{line}:{column}")
    };
    let wrong = |place: String, message: &str, help: &str| SettingsError {
        code: codes::SETTING_VALUE,
        message: format!("{place}: {message}"),
        help: Some(help.to_owned()),
    };
    let Some(section_table) = section.get_ref().as_table() else {
        return Err(wrong(
            at(section.span().start),
            "expected a table `build`",
            "[build]",
        ));
    };
    for (name, value) in section_table {
        let known = BUILD_KEYS
            .iter()
            .find(|(key, _)| *key == name.get_ref().as_ref());
        let Some((key, _)) = known else {
            let names: Vec<String> = BUILD_KEYS
                .iter()
                .map(|(key, _)| format!("`{key}`"))
                .collect();
            return Err(SettingsError {
                code: codes::UNKNOWN_SETTING,
                message: format!(
                    "{}: unknown setting `build.{}`",
                    at(name.span().start),
                    name.get_ref()
                ),
                help: Some(format!(
                    "the settings of `[build]` are {}",
                    names.join(", ")
                )),
            });
        };
        let example = format!("{key} = [\"Type::function\"]");
        let DeValue::Array(list) = value.get_ref() else {
            return Err(wrong(
                at(value.span().start),
                "expected a list of names",
                &example,
            ));
        };
        for item in list {
            let DeValue::String(name) = item.get_ref() else {
                return Err(wrong(
                    at(item.span().start),
                    "expected a name in quotes",
                    &example,
                ));
            };
            let (line, column) = place(text, item.span().start);
            entries.push(BuildEntry {
                key,
                name: name.to_string(),
                line,
                column,
            });
        }
    }
    entries.sort_by_key(|e| (e.line, e.column));
    Ok(entries)
}

/// The keys of `[build]` as a Markdown table, for the documentation.
pub fn build_reference() -> String {
    let mut text = "\nThe table `[build]` of the file that an attribute names, `#[sequence_parallel(plan = \"autosp.toml\")]`, is read when the \
        module is\ncompiled, and again whenever the file changes. The path is that of the package, else that of the source file.\n\n\
        | setting | takes | read | meaning |\n|---|---|---|---|\n"
        .to_owned();
    for (key, doc) in BUILD_KEYS {
        let _ = writeln!(
            text,
            "| `build.{key}` | a list of names | when the module is compiled | {doc} |"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_with_their_place() {
        let found = build("a.toml", "sp = 2\n[build]\nreplicated = [\"Rope::table\"]\ntokenwise = [\n  \"mlp\", \"Gate::forward\"]\n").unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|e| (e.key, e.name.as_str(), e.line, e.column))
            .collect();
        assert_eq!(
            found,
            [
                ("replicated", "Rope::table", 3, 15),
                ("tokenwise", "mlp", 5, 3),
                ("tokenwise", "Gate::forward", 5, 10)
            ]
        );
        assert_eq!(build("a.toml", "groups = 3\n").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let cases = [
            ("sp = 2\nlength = 3\n", "a.toml:2:1", codes::UNKNOWN_SETTING),
            ("sp = \n", "a.toml:1:", codes::SETTINGS_FILE),
            (
                "[build]\ntokens = []\n",
                "a.toml:2:1",
                codes::UNKNOWN_SETTING,
            ),
            (
                "[build]\ntokenwise = \"x\"\n",
                "a.toml:2:13",
                codes::SETTING_VALUE,
            ),
            (
                "[build]\ntokenwise = [1]\n",
                "a.toml:2:14",
                codes::SETTING_VALUE,
            ),
            ("build = 1\n", "a.toml:1:1", codes::UNKNOWN_SETTING),
        ];
        for (text, place, code) in cases {
            let error = build("a.toml", text).unwrap_err();
            assert!(error.message.contains(place), "{text}: {}", error.message);
            assert_eq!(error.code, code, "{text}");
        }
    }

    #[test]
    fn the_runtime_passes_over_what_the_compiler_reads() {
        let settings = Settings::default()
            .with_file("a.toml", "sp = 2\n[build]\ntokenwise = [\"mlp\"]\n")
            .unwrap();
        assert_eq!(settings.sp(), 2);
    }
}
