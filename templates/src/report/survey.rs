//! What becomes of many files, for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use askama::Template;

/// All files of a folder, as `docs/models.md`.
#[derive(Debug, Template)]
#[template(path = "report/survey.md")]
pub struct Survey {
    title: String,
    files: Vec<File>,
}

/// One file.
#[derive(Debug)]
pub struct File {
    /// Its path below the folder.
    pub name: String,
    /// Its plan, or why it has none.
    pub outcome: Result<Planned, Refused>,
}

/// A file that is accepted.
#[derive(Debug)]
pub struct Planned {
    /// Its attention sites in words.
    pub sites: Vec<String>,
    /// How positions are dealt with, in words.
    pub positions: Vec<String>,
    /// Its checkpoint scopes, or why there is none.
    pub blocks: Vec<String>,
}

/// A file that is refused.
#[derive(Debug)]
pub struct Refused {
    /// The code of the first reason.
    pub code: &'static str,
    /// What the code means.
    pub title: &'static str,
    /// 1-based line.
    pub line: usize,
    /// The first reason.
    pub message: String,
    /// What to do.
    pub help: String,
    /// How many reasons more there are.
    pub more: usize,
}

impl Survey {
    /// A survey of `title`, in the order of the files.
    pub fn new(title: String, files: Vec<File>) -> Self {
        Self { title, files }
    }

    fn planned(&self) -> impl Iterator<Item = (&str, &Planned)> {
        self.files
            .iter()
            .filter_map(|f| Some((f.name.as_str(), f.outcome.as_ref().ok()?)))
    }

    fn refused(&self) -> impl Iterator<Item = (&str, &Refused)> {
        self.files
            .iter()
            .filter_map(|f| Some((f.name.as_str(), f.outcome.as_ref().err()?)))
    }

    /// Code, what it means, and how many files are refused for it.
    fn codes(&self) -> Vec<(&str, &str, usize)> {
        let mut count: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for (_, refused) in self.refused() {
            *count.entry((refused.code, refused.title)).or_default() += 1;
        }
        count.into_iter().map(|((c, t), n)| (c, t, n)).collect()
    }

    /// One line for each file, for the terminal.
    pub fn lines(&self) -> String {
        let mut text = String::new();
        for file in &self.files {
            let _ = match &file.outcome {
                Ok(p) => writeln!(text, "{}: {}", file.name, p.sites.join("; ")),
                Err(r) => writeln!(text, "{}:{}: {} [{}]", file.name, r.line, r.message, r.code),
            };
        }
        let _ = writeln!(
            text,
            "{} files: {} planned, {} refused",
            self.files.len(),
            self.planned().count(),
            self.refused().count()
        );
        text
    }
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn cells(texts: &[String]) -> String {
    texts
        .iter()
        .map(|t| cell(t))
        .collect::<Vec<_>>()
        .join("<br>")
}
