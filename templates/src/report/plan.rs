//! A plan, for people.

use askama::Template;

use super::wrap;

/// What is decided for one model file.
#[derive(Debug, Default, Template)]
#[template(path = "report/plan.txt")]
pub struct Plan {
    /// The file as the user named it.
    pub file: String,
    /// Attention sites, in the order of the source.
    pub sites: Vec<Site>,
    /// Loops over the model's blocks.
    pub blocks: Vec<Block>,
    /// Worth knowing, but no refusal.
    pub notes: Vec<String>,
    /// What cannot be done.
    pub refusals: Vec<Refusal>,
    /// The settings of a run that is started here.
    pub settings: Vec<Setting>,
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Its name in a settings file.
    pub name: String,
    /// Its value, as a settings file writes it.
    pub value: String,
    /// Where the value came from.
    pub source: String,
}

/// One attention site.
#[derive(Debug, Default)]
pub struct Site {
    /// The function, such as `llama::Attention::forward`.
    pub function: String,
    /// 1-based line of the product of queries and keys.
    pub line: usize,
    /// The operands, outermost axis first.
    pub operands: Vec<Operand>,
    /// Which key head serves a query head.
    pub heads: String,
    /// What is known of the mask.
    pub mask: String,
    /// How it can run, best first.
    pub strategies: Vec<String>,
    /// Bytes that the exchanges of one rank send, as a formula.
    pub bytes: String,
}

/// One operand of a site.
#[derive(Debug)]
pub struct Operand {
    /// `q`, `k` or `v`.
    pub name: &'static str,
    /// Axes by letter.
    pub axes: String,
    /// The size of each axis in the model's own words.
    pub shape: String,
}

/// One loop over blocks.
#[derive(Debug)]
pub struct Block {
    /// The function that holds the loop.
    pub function: String,
    /// 1-based line of the loop.
    pub line: usize,
    /// What is checkpointed, or why nothing is.
    pub scope: Result<String, String>,
}

/// One refusal.
#[derive(Debug, Default)]
pub struct Refusal {
    /// Its code.
    pub code: &'static str,
    /// 1-based line, 0 where there is none.
    pub line: usize,
    /// 1-based column.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What one needs to know to believe it.
    pub notes: Vec<String>,
    /// What to type.
    pub help: Option<String>,
}

impl Plan {
    /// The first line: how many of what.
    fn summary(&self) -> String {
        let scopes = self
            .blocks
            .iter()
            .filter(|block| block.scope.is_ok())
            .count();
        [
            (self.sites.len(), "attention site"),
            (scopes, "checkpoint scope"),
            (self.refusals.len(), "refusal"),
        ]
        .map(|(count, thing)| match count {
            0 => format!("no {thing}"),
            1 => format!("1 {thing}"),
            _ => format!("{count} {thing}s"),
        })
        .join(", ")
    }

    /// `text` broken to fit beside a label of `indent` columns.
    #[allow(clippy::unused_self)] // askama calls methods of the template.
    fn fit(&self, text: &str, indent: usize) -> String {
        wrap(text, 100 - indent).replace('\n', &format!("\n{}", " ".repeat(indent)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let operand = |name, axes: &str, shape: &str| Operand {
            name,
            axes: axes.into(),
            shape: shape.into(),
        };
        Plan {
            file: "llama.rs".into(),
            sites: vec![Site {
                function: "Attention::forward".into(),
                line: 12,
                operands: vec![
                    operand("q", "b h s d", "[2, 4, s, 8]"),
                    operand("k", "b g s d", "[2, 2, s, 8]"),
                ],
                heads: "query head h uses key head h / 2".into(),
                mask: "causal".into(),
                strategies: vec!["ulysses".into()],
                bytes: "many words ".repeat(12).trim().into(),
            }],
            blocks: vec![
                Block {
                    function: "Model::forward".into(),
                    line: 30,
                    scope: Ok("block.forward(&x)".into()),
                },
                Block {
                    function: "Model::other".into(),
                    line: 40,
                    scope: Err("two tensors are carried".into()),
                },
            ],
            settings: vec![Setting {
                name: "sp".into(),
                value: "4".into(),
                source: "autosp.toml:1".into(),
            }],
            ..Plan::default()
        }
    }

    #[test]
    fn everything_that_was_decided_is_printed() {
        let text = plan().to_string();
        for part in [
            "llama.rs: 1 attention site, 1 checkpoint scope, no refusal",
            "Attention::forward, line 12",
            "b g s d",
            "[2, 2, s, 8]",
            "h / 2",
            "causal",
            "ulysses",
            "block.forward(&x)",
            "two tensors are carried",
            "sp             = 4            autosp.toml:1",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        assert!(
            text.lines()
                .all(|line| line.len() <= 100 && line.trim_end() == line),
            "{text}"
        );
        assert!(!text.contains("\n\n\n"), "{text}");
    }

    #[test]
    fn refusals_have_place_notes_and_help() {
        let refusal = Refusal {
            code: "AS0201",
            line: 3,
            column: 7,
            message: "`x.mean(1)` mixes tokens".into(),
            notes: vec!["dim 1 is the sequence".into()],
            help: Some("use something else".into()),
        };
        let text = Plan {
            refusals: vec![refusal],
            ..Plan::default()
        }
        .to_string();
        let expected = "3:7  `x.mean(1)` mixes tokens [AS0201]\n  note: dim 1 is the sequence\n  help: use something else";
        assert!(text.contains(expected), "{text}");
    }
}
