//! `survey`: what becomes of every file of a folder.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use autosp_compiler::Analysis;
use autosp_plan::plan::{Action, Plan};
use autosp_plan::{codes, io_reason};
use autosp_templates::report::survey as report;

use crate::metadata::Metadata;
use crate::{Failure, Outcome, adopt, source};

/// Which files.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A folder of Rust files, or a dependency whose `src/models` is meant
    what: String,
    /// Print Markdown, as in docs/models.md
    #[arg(long)]
    markdown: bool,
}

/// Analyses all files below the folder.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let (title, folder) = folder(&arguments.what)?;
    let mut files = Vec::new();
    for path in adopt::files(&folder) {
        let name = path.strip_prefix(&folder).unwrap_or(&path);
        let name = name.display().to_string();
        let text = fs::read_to_string(&path).map_err(|error| {
            let message = format!("cannot read `{name}`: {}", io_reason(&error));
            Failure::new(&codes::UNREADABLE_FILE, message)
        })?;
        let analysis =
            autosp_compiler::analyse(&text).map_err(|error| source::unparsable(&name, &error))?;
        files.push(file(name, &analysis));
    }
    let survey = report::Survey::new(title, files);
    let text = if arguments.markdown {
        survey.to_string()
    } else {
        survey.lines()
    };
    Ok(Outcome::done(text))
}

/// What to call the files, and where they are.
fn folder(what: &str) -> Result<(String, PathBuf), Failure> {
    let path = Path::new(what);
    if path.is_dir() {
        return Ok((what.to_string(), path.to_path_buf()));
    }
    let metadata = Metadata::read(None)?;
    let package = metadata.package(what)?;
    let models = package.folder.join("src/models");
    let folder = if models.is_dir() {
        models
    } else {
        package.folder.join("src")
    };
    Ok((format!("{} {}", package.name, package.version), folder))
}

fn file(name: String, analysis: &Analysis) -> report::File {
    let Analysis { plan, refusals, .. } = analysis;
    let outcome = match refusals.first() {
        None => Ok(report::Planned {
            sites: plan.sites.iter().map(site).collect(),
            positions: positions(plan),
            blocks: plan
                .blocks
                .iter()
                .map(|b| match (&b.scope, &b.why_none) {
                    (Some(call), _) => format!("`{call}`"),
                    (None, Some(why)) => format!("none: {why}"),
                    (None, None) => "none".to_string(),
                })
                .collect(),
        }),
        Some(refusal) => Err(report::Refused {
            code: refusal.code.id,
            title: refusal.code.title,
            line: refusal.line(),
            message: refusal.message.clone(),
            help: refusal.help.clone().unwrap_or_default(),
            more: refusals.len() - 1,
        }),
    };
    report::File { name, outcome }
}

fn site(site: &autosp_plan::plan::Site) -> String {
    let layout = &site.layout;
    format!(
        "`{}` line {}: q `{}`, k `{}`, v `{}`; mask {}",
        site.function, site.line, layout.q, layout.k, layout.v, site.mask
    )
}

/// How positions are dealt with, in words.
fn positions(plan: &Plan) -> Vec<String> {
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for edit in plan.twins.iter().flat_map(|t| &t.edits) {
        let what = match &edit.action {
            Action::Slice(_) => "tables cut to the rank's rows",
            Action::Valid | Action::ValidParts(..) => "lengths of the whole sequence",
            Action::Pick(_) => "picks of one token",
            _ => continue,
        };
        *count.entry(what).or_default() += 1;
    }
    let mut words: Vec<String> = count
        .into_iter()
        .map(|(what, n)| format!("{n} {what}"))
        .collect();
    for root in &plan.roots {
        for offset in &root.offsets {
            let zero = format!("`{offset}` = 0");
            if !words.contains(&zero) {
                words.push(zero);
            }
        }
    }
    words
}
