//! The table of settings.

use std::fmt::Write as _;

use super::{Keep, Policies, Policy, SettingsError, Value};
use crate::{codes, units};

/// What values a setting takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A whole number, at least 1.
    Count,
    /// A time in seconds, more than 0.
    Seconds,
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A number of bytes, such as `64GiB`.
    Bytes,
    /// What blocks keep, see [`Policies`].
    Policies,
}

/// When a setting is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAt {
    /// When `autosp::run` starts its ranks.
    Start,
    /// At each forward of a site.
    Forward,
}

/// One setting.
#[derive(Debug, Clone)]
pub struct Key {
    /// Its name in a file; `AUTOSP_` and the name in capitals as a variable.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// The value if nobody sets it.
    pub default: Value,
    /// What it means, with its unit.
    pub doc: &'static str,
    /// When it is read.
    pub read: ReadAt,
}

/// All settings.
pub static KEYS: &[Key] = &[
    Key {
        name: "sp",
        kind: Kind::Count,
        default: Value::Count(1),
        doc: "ranks that share one sequence",
        read: ReadAt::Start,
    },
    Key {
        name: "dp",
        kind: Kind::Count,
        default: Value::Count(1),
        doc: "replicas that share a batch; the world has dp x sp ranks",
        read: ReadAt::Start,
    },
    Key {
        name: "groups",
        kind: Kind::Count,
        default: Value::Count(2),
        doc: "head groups of each site, whose exchanges overlap each other's attention; a site with fewer heads on a rank uses fewer",
        read: ReadAt::Forward,
    },
    Key {
        name: "deadline",
        kind: Kind::Seconds,
        default: Value::Seconds(120.0),
        doc: "seconds from the start of a collective within which the other ranks have to arrive, or the run fails; as long may a process of a launched run say nothing",
        read: ReadAt::Start,
    },
    Key {
        name: "start_deadline",
        kind: Kind::Seconds,
        default: Value::Seconds(300.0),
        doc: "the same for launched processes that have to find each other, and for the collectives of the first step, in which kernels are compiled",
        read: ReadAt::Start,
    },
    Key {
        name: "attention",
        kind: Kind::Choice(&["tiled", "reference"]),
        default: Value::Choice("tiled"),
        doc: "which attention computes the heads of a rank: `tiled` needs memory in proportion to the length, `reference` to its square",
        read: ReadAt::Forward,
    },
    Key {
        name: "device",
        kind: Kind::Choice(&["cpu", "cuda", "cuda-shared"]),
        default: Value::Choice("cpu"),
        doc: "what a rank computes on: the `cpu`, a GPU of its own by `cuda`, or the first GPU for all ranks by `cuda-shared`, which tries sharding on one GPU",
        read: ReadAt::Start,
    },
    Key {
        name: "loss_bytes",
        kind: Kind::Count,
        default: Value::Count(512 << 20),
        doc: "bytes of logits that a loss without whole logits makes at a time; one token at least",
        read: ReadAt::Forward,
    },
    Key {
        name: "policy",
        kind: Kind::Policies,
        default: Value::Policies(Policies::uniform(Keep::on_device(Policy::All))),
        doc: "what a forward keeps for its backward: `all` activations; or the input of each block and, of each attention in it, queries, keys, values and result (`qkv`), the result alone (`attention`), or nothing (`input`), the rest of the block being computed again; with `+offload` on the host. Blocks may differ, in the order in which they run: `all*4, attention+offload` is `all` for four blocks and the other for all after them",
        read: ReadAt::Forward,
    },
    Key {
        name: "host_memory",
        kind: Kind::Bytes,
        default: Value::Bytes(1 << 36),
        doc: "the most memory of the host that a rank takes for what blocks keep there (`+offload`); taken as it is needed in the first steps, and used again",
        read: ReadAt::Start,
    },
    Key {
        name: "tile",
        kind: Kind::Count,
        default: Value::Count(65_536),
        doc: "tokens of a rank that the parts of a block which compute each token by itself (its MLP) take at a time, where the policy keeps less than `all`; what is large inside them is never there for more",
        read: ReadAt::Forward,
    },
    Key {
        name: "zero",
        kind: Kind::Choice(&["0", "1", "2"]),
        default: Value::Choice("0"),
        doc: "ZeRO stage of the trainer: 0, every rank holds the whole optimizer state; 1, each of the dp x sp ranks holds and updates its share; 2, and of the gradients too, which are divided block by block during the backward",
        read: ReadAt::Start,
    },
    Key {
        name: "memory",
        kind: Kind::Choice(&["auto", "fixed"]),
        default: Value::Choice("auto"),
        doc: "who says what a step keeps and cuts: with `auto` a trainer that is told what it trains (`trainer.expect`) chooses `policy`, `groups`, `tile`, `loss_bytes` and `optimizer`, each where nobody has said it, so that a step is fast and fits into the memory of the device and of the host (on the CPU where `memory_limit` says how much there is); with `fixed` what nobody has said has its default",
        read: ReadAt::Start,
    },
    Key {
        name: "memory_limit",
        kind: Kind::Bytes,
        default: Value::Bytes(super::NO_LIMIT),
        doc: "the most memory of its device that a rank takes; a step that needs more ends with an error that says for what, and changes nothing. On the CPU what this library keeps is counted: parameters, gradients, optimizer, what blocks keep, exchanges. The default is no limit",
        read: ReadAt::Start,
    },
    Key {
        name: "optimizer",
        kind: Kind::Choice(&["device", "host"]),
        default: Value::Choice("device"),
        doc: "where the trainer's optimizer has its state (moments, master weights) and steps: on the `device` beside the parameters, or on the `host`, where gradients go and new parameters come from in buckets of at most 1 GiB",
        read: ReadAt::Start,
    },
];

/// The row of `name`.
pub fn find(name: &str) -> Option<usize> {
    KEYS.iter().position(|key| key.name == name)
}

/// All settings as a Markdown table, for the documentation.
pub fn reference() -> String {
    let mut text =
        "| setting | variable | takes | default | read | meaning |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for key in KEYS {
        let read = match key.read {
            ReadAt::Start => "when ranks start",
            ReadAt::Forward => "at each forward",
        };
        let variable = key.variable();
        let _ = writeln!(
            text,
            "| `{}` | `{variable}` | {} | `{}` | {read} | {} |",
            key.name,
            key.expected(),
            key.default,
            key.doc
        );
    }
    text
}

/// All names, for messages.
pub(super) fn names() -> String {
    KEYS.iter()
        .map(|key| format!("`{}`", key.name))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The known name that was probably meant: at most two edits away, and fewer edits than letters.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    KEYS.iter()
        .map(|key| (edits(name, key.name), key.name))
        .filter(|&(distance, known)| distance <= 2 && distance < known.len().min(name.len()))
        .min()
        .map(|(_, known)| known)
}

/// Levenshtein distance: insertions, deletions and replacements of characters.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

impl Key {
    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        format!(
            "{}{}",
            super::VARIABLE_PREFIX,
            self.name.to_ascii_uppercase()
        )
    }

    /// What the setting takes, for messages and documentation.
    pub fn expected(&self) -> String {
        match self.kind {
            Kind::Count => "a whole number of at least 1".to_owned(),
            Kind::Seconds => "a number of seconds above 0".to_owned(),
            Kind::Bytes => "a size, such as `64GiB`".to_owned(),
            Kind::Policies => "`all`, `qkv`, `attention` or `input`, each with or without `+offload`; or several with numbers of blocks".to_owned(),
            Kind::Choice(words) => words
                .iter()
                .map(|word| format!("`{word}`"))
                .collect::<Vec<_>>()
                .join(" or "),
        }
    }

    /// Reads a value written as text; the error is what was found.
    pub(super) fn parse(&self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        let value = match self.kind {
            Kind::Count => text.parse().ok().map(Value::Count),
            Kind::Seconds => text.parse().ok().map(Value::Seconds),
            Kind::Choice(words) => words
                .iter()
                .find(|&&word| word == text)
                .map(|&word| Value::Choice(word)),
            Kind::Bytes => units::size(text).map(Value::Bytes),
            Kind::Policies => {
                let policies = text
                    .parse()
                    .map_err(|why: String| format!("`{text}`: {why}"));
                return policies.map(Value::Policies);
            }
        };
        value
            .filter(Value::in_range)
            .ok_or_else(|| format!("`{text}`"))
    }

    /// Takes a value of a file, which has a type of its own; the error is what was found.
    pub(super) fn accept(&self, found: &super::file::Found) -> Result<Value, String> {
        use super::file::Found;
        match (self.kind, found) {
            (Kind::Count | Kind::Seconds | Kind::Bytes, Found::Number(text))
            | (Kind::Choice(_) | Kind::Bytes | Kind::Policies, Found::Text(text)) => {
                self.parse(text)
            }
            // Some words are numbers.
            (Kind::Choice(words), Found::Number(text)) if words.contains(&text.as_str()) => {
                self.parse(text)
            }
            (_, Found::Text(text)) => Err(format!("the string {text:?}")),
            (_, Found::Number(text)) => Err(format!("the number {text}")),
            (_, Found::Other(kind)) => Err((*kind).to_owned()),
        }
    }

    pub(super) fn refuse(&self, found: &str, place: &str) -> SettingsError {
        SettingsError {
            code: codes::SETTING_VALUE,
            message: format!(
                "setting `{}` ({place}): expected {}, found {found}",
                self.name,
                self.expected()
            ),
            help: Some(format!("the default is `{} = {}`", self.name, self.default)),
        }
    }
}
