//! The value of a setting.

use std::fmt;

/// The value of a setting, of the type its row says. Printed as a settings file writes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// A whole number.
    Count(usize),
    /// A time in seconds.
    Seconds(f64),
    /// One of the words of the row.
    Choice(&'static str),
}

impl Value {
    pub(super) fn in_range(self) -> bool {
        match self {
            Self::Count(n) => n >= 1,
            // The upper end keeps the conversion into a `Duration` finite.
            Self::Seconds(s) => s > 0.0 && s < 1e9,
            Self::Choice(_) => true,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(n) => write!(f, "{n}"),
            Self::Seconds(s) => write!(f, "{s}"),
            Self::Choice(word) if word.bytes().all(|b| b.is_ascii_digit()) => f.write_str(word),
            Self::Choice(word) => write!(f, "{word:?}"),
        }
    }
}
