//! Where values come from, and why one is refused.

use std::fmt;

use crate::codes::Code;

/// Where the value of a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// Nobody set it, and the planner has chosen it (`memory = "auto"`).
    Chosen,
    /// The program, through [`Settings::with`](super::Settings::with) or one of its typed forms.
    Program,
    /// A file, with the line that names it.
    File {
        /// The file as it was given.
        path: String,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable, such as `AUTOSP_SP`.
    Variable(String),
    /// A flag of the command line, such as `--sp`.
    Flag(String),
}

impl Source {
    /// The stronger source wins: flag, variable, file, program, default.
    pub(super) fn strength(&self) -> u8 {
        match self {
            Self::Default | Self::Chosen => 0,
            Self::Program => 1,
            Self::File { .. } => 2,
            Self::Variable(_) => 3,
            Self::Flag(_) => 4,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::Chosen => write!(f, "the planner"),
            Self::Program => write!(f, "the program"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why a setting was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsError {
    /// The code that `cargo autosp explain` knows.
    pub code: Code,
    /// What is wrong, with the place it was read from.
    pub message: String,
    /// What to do, if there is something to type.
    pub help: Option<String>,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        if let Some(help) = &self.help {
            write!(f, "\n  help: {help}")?;
        }
        write!(f, " [{}]", self.code.id)
    }
}

impl std::error::Error for SettingsError {}
