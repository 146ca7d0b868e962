//! `explain`: the error codes, from the one table that all messages take them from.

use autosp_plan::codes::{self, Code};
use autosp_templates::report::{Entry, Errors, Explanation};

use crate::{Failure, Outcome};

/// Prints one code, or the list of all.
pub(crate) fn run(code: Option<&str>, markdown: bool) -> Result<Outcome, Failure> {
    let chosen: Vec<&Code> = match code {
        None => codes::ALL.iter().collect(),
        Some(id) => vec![codes::find(id).ok_or_else(|| unknown(id))?],
    };
    let text = match chosen.as_slice() {
        _ if markdown => Errors::new(chosen.iter().map(|code| entry(code))).to_string(),
        [code] => Explanation { entry: entry(code) }.to_string(),
        all => all.iter().fold(String::new(), |list, code| {
            list + code.id + "  " + code.title + "\n"
        }),
    };
    Ok(Outcome::done(text))
}

fn entry(code: &Code) -> Entry {
    Entry {
        id: code.id,
        title: code.title,
        explanation: code.explanation,
    }
}

fn unknown(id: &str) -> Failure {
    let message =
        format!("unknown error code `{id}`\n  help: `cargo autosp explain` lists all codes");
    Failure::new(&codes::UNKNOWN_CODE, message)
}
