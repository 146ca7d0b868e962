//! What the command line prints for people.

use askama::Template;

pub mod estimate;
pub mod plan;
pub mod survey;

/// One error code.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The code as printed in messages.
    pub id: &'static str,
    /// What is wrong, in one line.
    pub title: &'static str,
    /// Why it is refused and what to do.
    pub explanation: &'static str,
}

/// One code, for the terminal.
#[derive(Debug, Template)]
#[template(path = "report/explanation.txt")]
pub struct Explanation {
    /// The code.
    pub entry: Entry,
}

impl Explanation {
    fn lines(&self) -> String {
        wrap(self.entry.explanation, 80)
    }
}

/// All codes by range, as `docs/errors.md`.
#[derive(Debug, Template)]
#[template(path = "report/errors.md")]
pub struct Errors {
    ranges: Vec<Range>,
}

#[derive(Debug)]
struct Range {
    title: &'static str,
    entries: Vec<Entry>,
}

/// The first four characters of a code say where it comes from.
const RANGES: &[(&str, &str)] = &[
    ("AS01", "Attribute and syntax"),
    ("AS02", "Analysis"),
    ("AS03", "Mesh, scope and sites at run time"),
    ("AS04", "Collectives and faults"),
    ("AS05", "Training, data and files"),
    ("AS06", "Command line"),
];

impl Errors {
    /// Sorts the codes into their ranges; ranges without a code are left out.
    pub fn new(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut ranges: Vec<_> = RANGES
            .iter()
            .map(|&(start, title)| {
                (
                    start,
                    Range {
                        title,
                        entries: Vec::new(),
                    },
                )
            })
            .collect();
        for entry in entries {
            if let Some((_, range)) = ranges
                .iter_mut()
                .find(|(start, _)| entry.id.starts_with(start))
            {
                range.entries.push(entry);
            }
        }
        let ranges = ranges
            .into_iter()
            .map(|(_, range)| range)
            .filter(|range| !range.entries.is_empty())
            .collect();
        Self { ranges }
    }
}

/// Breaks every paragraph at spaces so that no line is longer than `width` characters, unless one word is.
fn wrap(text: &str, width: usize) -> String {
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_keeps_words_and_paragraphs() {
        assert_eq!(wrap("one two three\n\nfour", 8), "one two\nthree\n\nfour");
        assert_eq!(wrap("incomprehensible word", 8), "incomprehensible\nword");
    }

    #[test]
    fn codes_are_listed_under_their_range() {
        let entry = |id| Entry {
            id,
            title: "t",
            explanation: "e",
        };
        let text = Errors::new([entry("AS0201"), entry("AS0601")]).to_string();
        assert!(
            text.contains("## Analysis") && text.contains("## Command line"),
            "{text}"
        );
        assert!(!text.contains("## Collectives"), "{text}");
    }
}
