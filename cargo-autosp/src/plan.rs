//! `plan`: what is decided for a file, and everything that is refused.

use std::path::Path;

use autosp_compiler::{Analysis, Refusal};
use autosp_plan::{Settings, codes, plan};
use autosp_templates::report::plan as report;
use serde_json::{Value, json};

use crate::{Failure, Format, Outcome, REFUSED, source};

/// Analyses the file and prints the plan.
pub(crate) fn run(file: &Path, format: Format) -> Result<Outcome, Failure> {
    let (name, text) = source::open(file)?;
    let settings = Settings::load().map_err(|error| {
        let help = error.help.map_or(String::new(), |help| format!("; {help}"));
        let code = codes::find(error.code.id).unwrap_or(&codes::SETTINGS_FILE);
        Failure::new(code, error.message + &help)
    })?;
    let analysis =
        autosp_compiler::analyse(&text).map_err(|error| source::unparsable(&name, &error))?;
    let code = if analysis.refusals.is_empty() {
        0
    } else {
        REFUSED
    };
    let text = match format {
        Format::Json => json(&name, &analysis, &settings)?,
        Format::Text => view(name, &analysis, &settings).to_string(),
    };
    Ok(Outcome { text, code })
}

/// The same facts for programs.
fn json(file: &str, analysis: &Analysis, settings: &Settings) -> Result<String, Failure> {
    let Analysis { plan, refusals, .. } = analysis;
    let refusals: Vec<Value> = refusals
        .iter()
        .map(|refusal| {
            json!({
                "code": refusal.code.id,
                "line": refusal.line(),
                "column": refusal.column(),
                "message": refusal.message,
                "notes": refusal.notes,
                "help": refusal.help,
            })
        })
        .collect();
    let settings: Vec<Value> = settings
        .entries()
        .map(|(key, value, source)| {
            json!({"name": key.name, "value": value.to_string(), "source": source.to_string()})
        })
        .collect();
    let document = json!({
        "file": file,
        "sites": plan.sites,
        "blocks": plan.blocks,
        "notes": plan.notes,
        "refusals": refusals,
        "settings": settings,
    });
    let text = serde_json::to_string_pretty(&document).map_err(|error| {
        Failure::new(
            &codes::UNREADABLE_FILE,
            format!("cannot print the plan of `{file}`: {error}"),
        )
    })?;
    Ok(text + "\n")
}

fn view(file: String, analysis: &Analysis, settings: &Settings) -> report::Plan {
    report::Plan {
        file,
        sites: analysis.plan.sites.iter().map(site).collect(),
        blocks: analysis.plan.blocks.iter().map(block).collect(),
        notes: analysis.plan.notes.clone(),
        refusals: analysis.refusals.iter().map(refusal).collect(),
        settings: settings
            .entries()
            .map(|(key, value, source)| report::Setting {
                name: key.name.to_owned(),
                value: value.to_string(),
                source: source.to_string(),
            })
            .collect(),
    }
}

fn site(site: &plan::Site) -> report::Site {
    let operand = |name, axes: &str, shape: &str| report::Operand {
        name,
        axes: axes.to_owned(),
        shape: shape.to_owned(),
    };
    let plan::Site {
        layout, operands, ..
    } = site;
    report::Site {
        function: site.function.clone(),
        line: site.line,
        operands: vec![
            operand("q", &layout.q, &operands.q),
            operand("k", &layout.k, &operands.k),
            operand("v", &layout.v, &operands.v),
        ],
        heads: site.heads.to_string(),
        mask: site.mask.clone(),
        strategies: site.strategies.clone(),
        bytes: site.bytes.clone(),
    }
}

fn block(block: &plan::Block) -> report::Block {
    report::Block {
        function: block.function.clone(),
        line: block.line,
        scope: block
            .scope
            .clone()
            .ok_or_else(|| block.why_none.clone().unwrap_or_default()),
    }
}

/// A refusal as it is printed.
pub(crate) fn refusal(refusal: &Refusal) -> report::Refusal {
    report::Refusal {
        code: refusal.code.id,
        line: refusal.line(),
        column: refusal.column(),
        message: refusal.message.clone(),
        notes: refusal.notes.clone(),
        help: refusal.help.clone(),
    }
}
