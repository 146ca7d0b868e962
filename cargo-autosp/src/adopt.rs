//! `adopt`: a model file of a dependency becomes an annotated module of one's own crate.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use autosp_compiler::adopt::{Adopted, Origin, adopt};
use autosp_plan::{codes, io_reason};
use autosp_templates::report::plan as report;

use crate::metadata::{Metadata, Package, ident};
use crate::{Failure, Outcome, REFUSED, plan, source};

/// What is adopted, and where it goes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The dependency that has the model, such as candle-transformers
    dependency: String,
    /// The module that holds it, such as `qwen2` or `models::qwen2`
    module: String,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
    /// Write over a file that is there, and also if the model is refused
    #[arg(long)]
    force: bool,
    /// The manifest of your crate
    #[arg(long)]
    manifest_path: Option<PathBuf>,
}

/// Copies the file and says what was done.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let metadata = Metadata::read(arguments.manifest_path.as_deref())?;
    let package = metadata.package(&arguments.dependency)?;
    let (file, path) = find(package, &arguments.module)?;
    let out = &arguments.out;
    if out.exists() && !arguments.force {
        return Err(Failure::new(
            &codes::EXISTS,
            format!(
                "`{}` is there already\n  help: --force writes over it",
                out.display()
            ),
        ));
    }
    let name = path.last().cloned().unwrap_or_default();
    let text = fs::read_to_string(&file).map_err(|error| unreadable(&file, &error))?;
    let origin = origin(&metadata, package, &path);
    let adopted = adopt(&text, &name, &origin)
        .map_err(|error| source::unparsable(&file.display().to_string(), &error))?;
    if let Some(module) = adopted.elsewhere.first() {
        return Err(Failure::new(
            &codes::DEPENDENCY,
            format!(
                "`{}` keeps its module `{module}` in a file of its own\n  help: adopt `{}::{module}`",
                path.join("::"),
                path.join("::")
            ),
        ));
    }
    let analysis = autosp_compiler::analyse(&adopted.text)
        .map_err(|error| source::unparsable(&name, &error))?;
    if !analysis.refusals.is_empty() && !arguments.force {
        let text = report::Plan {
            file: path.join("::"),
            refusals: analysis.refusals.iter().map(plan::refusal).collect(),
            ..report::Plan::default()
        };
        return Ok(Outcome {
            text: text.to_string(),
            code: REFUSED,
        });
    }
    write(out, &adopted.text)?;
    Ok(Outcome::done(said(
        &metadata,
        package,
        &path,
        out,
        &adopted,
        analysis.plan.sites.len(),
    )))
}

/// The file of a module, and its path below the crate.
fn find(package: &Package, module: &str) -> Result<(PathBuf, Vec<String>), Failure> {
    let wanted: Vec<&str> = module.split("::").collect();
    let source = package.folder.join("src");
    let mut found: Vec<(PathBuf, Vec<String>)> = files(&source)
        .into_iter()
        .filter_map(|file| {
            let path = module_path(&source, &file)?;
            let tail = path.len().checked_sub(wanted.len())?;
            (path[tail..] == wanted[..]).then_some((file, path))
        })
        .collect();
    found.sort();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Failure::new(
            &codes::DEPENDENCY,
            format!("`{}` has no module `{module}`", package.name),
        )),
        _ => {
            let all: Vec<String> = found.iter().map(|(_, path)| path.join("::")).collect();
            Err(Failure::new(
                &codes::DEPENDENCY,
                format!(
                    "`{module}` is one of {}\n  help: give one of these",
                    all.join(", ")
                ),
            ))
        }
    }
}

/// All Rust files below a folder, in order.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// `models::qwen2` for `src/models/qwen2.rs`, `models::clip` for `src/models/clip/mod.rs`.
fn module_path(source: &Path, file: &Path) -> Option<Vec<String>> {
    let mut path: Vec<String> = file
        .strip_prefix(source)
        .ok()?
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if path.last().is_some_and(|last| last == "mod") {
        path.pop();
    }
    Some(path)
}

fn origin(metadata: &Metadata, package: &Package, path: &[String]) -> Origin {
    let renamed = package
        .dependencies
        .iter()
        .map(|(dependency, _, there)| {
            let here = metadata
                .own_name(dependency)
                .map_or_else(|| ident(dependency), String::from);
            (there.clone(), here)
        })
        .filter(|(there, here)| there != here);
    let own = metadata.own_name(&package.name);
    Origin {
        krate: own.map_or_else(|| ident(&package.name), String::from),
        parent: path[..path.len().saturating_sub(1)].to_vec(),
        renamed: renamed.collect(),
    }
}

fn unreadable(file: &Path, error: &std::io::Error) -> Failure {
    let message = format!("cannot read `{}`: {}", file.display(), io_reason(error));
    Failure::new(&codes::UNREADABLE_FILE, message)
}

/// Writes a whole file or none.
fn write(out: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(
            &codes::UNREADABLE_FILE,
            format!("cannot write `{}`: {}", out.display(), io_reason(&error)),
        )
    };
    if let Some(folder) = out.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let new = out.with_extension("rs.new");
    fs::write(&new, text).map_err(failed)?;
    fs::rename(&new, out).map_err(failed)
}

/// What was done, and what is left to do.
fn said(
    metadata: &Metadata,
    package: &Package,
    path: &[String],
    out: &Path,
    adopted: &Adopted,
    sites: usize,
) -> String {
    let mut text = String::new();
    let licence = package.license.as_deref().unwrap_or("licence not stated");
    let _ = writeln!(
        text,
        "{}: {} of {} {} ({licence}), {sites} attention site{}",
        out.display(),
        path.join("::"),
        package.name,
        package.version,
        if sites == 1 { "" } else { "s" },
    );
    for (before, after, count) in &adopted.changed {
        let _ = writeln!(text, "  `{before}` became `{after}`, {count} times");
    }
    for function in &adopted.losses {
        let _ = writeln!(
            text,
            "  `{function}` keeps one token; `{function}_loss` is the loss over all of them"
        );
    }
    if let Some(stem) = out.file_stem() {
        let _ = writeln!(
            text,
            "  help: add `mod {};` beside it",
            stem.to_string_lossy()
        );
    }
    let mut missing: Vec<String> = package
        .dependencies
        .iter()
        .filter(|(_, _, there)| adopted.names.contains(there))
        .filter(|(dependency, _, _)| metadata.own_name(dependency).is_none())
        .map(|(dependency, version, _)| format!("{dependency}@{}", version.trim_start_matches('^')))
        .chain(
            metadata
                .own_name(&package.name)
                .is_none()
                .then(|| format!("{}@{}", package.name, package.version)),
        )
        .collect();
    missing.sort();
    missing.dedup();
    for dependency in missing {
        let _ = writeln!(text, "  help: cargo add {dependency}");
    }
    text
}
