//! `expand`: the file with the code that the attribute emits, formatted.

use std::path::Path;

use autosp_templates::report::plan as report;

use crate::{Failure, Outcome, REFUSED, plan, source};

/// Prints the expansion, or the refusals.
pub(crate) fn run(file: &Path) -> Result<Outcome, Failure> {
    let (name, text) = source::open(file)?;
    let expansion =
        autosp_compiler::expand(&text).map_err(|error| source::unparsable(&name, &error))?;
    Ok(match expansion {
        Ok(expansion) => Outcome::done(prettyplease::unparse(&expansion)),
        Err(refusals) => {
            let refusals = refusals.iter().map(plan::refusal).collect();
            let text = report::Plan {
                file: name,
                refusals,
                ..report::Plan::default()
            }
            .to_string();
            Outcome {
                text,
                code: REFUSED,
            }
        }
    })
}
