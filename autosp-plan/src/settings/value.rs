//! The value of a setting.

use std::fmt;

use super::Policies;

/// The value of a setting, of the type its row says. Printed as a settings file writes it.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number.
    Count(usize),
    /// A time in seconds.
    Seconds(f64),
    /// One of the words of the row.
    Choice(&'static str),
    /// A number of bytes.
    Bytes(u64),
    /// What blocks keep.
    Policies(Policies),
}

impl Value {
    pub(super) fn in_range(&self) -> bool {
        match self {
            Self::Count(n) => *n >= 1,
            // The upper end keeps the conversion into a `Duration` finite.
            Self::Seconds(s) => *s > 0.0 && *s < 1e9,
            Self::Bytes(n) => *n >= 1,
            Self::Choice(_) | Self::Policies(_) => true,
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
            Self::Bytes(n) => write!(f, "\"{}\"", exact(*n)),
            Self::Policies(policies) => write!(f, "\"{policies}\""),
        }
    }
}

/// Bytes in the largest unit of which they are a whole number.
fn exact(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = units
        .into_iter()
        .find(|(shift, _)| bytes >> shift > 0 && bytes.is_multiple_of(1 << shift));
    match whole {
        Some((shift, unit)) => format!("{}{unit}", bytes >> shift),
        None => format!("{bytes}B"),
    }
}
