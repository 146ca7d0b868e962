//! What the blocks keep, block by block.

use std::fmt;
use std::str::FromStr;

use crate::settings::Policy;

/// What one block keeps from its forward to its backward, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "two choices")]
pub struct Keep {
    /// What.
    pub policy: Policy,
    /// Whether on the host in place of the device.
    pub offload: bool,
}

impl Keep {
    /// All of them: the four policies, then the four with offload.
    pub const ALL: [Self; 8] = {
        let mut all = [Self::on_device(Policy::All); 8];
        let mut i = 0;
        while i < 8 {
            all[i] = Self {
                policy: Policy::ALL[i % 4],
                offload: i >= 4,
            };
            i += 1;
        }
        all
    };

    /// A policy on the device.
    pub const fn on_device(policy: Policy) -> Self {
        Self {
            policy,
            offload: false,
        }
    }

    /// A policy on the host.
    pub const fn offloaded(policy: Policy) -> Self {
        Self {
            policy,
            offload: true,
        }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.policy.name())?;
        f.write_str(if self.offload { "+offload" } else { "" })
    }
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let found = Self::ALL.into_iter().find(|keep| keep.to_string() == text);
        found.ok_or_else(|| {
            format!("expected `all`, `qkv`, `attention` or `input`, each with or without `+offload`, found `{text}`")
        })
    }
}

/// What the blocks of a model keep: runs of blocks, from the first.
///
/// Written as `all*4, input+offload*28`; the last run may leave its number out and is then all that is left.
///
/// ```
/// use autosp_plan::planner::Layers;
///
/// let layers = Layers::read("all*4, input+offload", 32)?;
/// assert_eq!(layers.to_string(), "all*4, input+offload*28");
/// assert!(Layers::read("all*33", 32).is_err());
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers(Vec<(Keep, usize)>);

impl Layers {
    /// All `layers` blocks alike.
    pub fn uniform(keep: Keep, layers: usize) -> Self {
        Self::two(keep, layers, keep, 0)
    }

    /// The first `n` blocks keep one thing and the next `m` another.
    pub fn two(first: Keep, n: usize, then: Keep, m: usize) -> Self {
        let mut runs = vec![(first, n), (then, m)];
        runs.retain(|(_, count)| *count > 0);
        if let [(a, n), (b, m)] = runs[..]
            && a == b
        {
            runs = vec![(a, n + m)];
        }
        Self(runs)
    }

    /// Reads runs for `layers` blocks.
    ///
    /// # Errors
    /// What was expected and found, for words that are none or runs that are not as many blocks.
    pub fn read(text: &str, layers: usize) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(',').collect();
        let mut runs: Vec<(Keep, usize)> = Vec::new();
        let mut left = layers;
        for (i, part) in parts.iter().enumerate() {
            let (word, count) = match part.split_once('*') {
                Some((word, count)) => {
                    let parsed = count.trim().parse().ok().filter(|n| (1..=left).contains(n));
                    let count = parsed.ok_or_else(|| {
                        format!(
                            "expected a number of the {left} blocks that are left, found `{}`",
                            count.trim()
                        )
                    })?;
                    (word, count)
                }
                None if i + 1 == parts.len() && left > 0 => (*part, left),
                None => {
                    return Err(format!(
                        "expected a number of blocks, such as `{}*2`, found none",
                        part.trim()
                    ));
                }
            };
            let keep = word.parse()?;
            left -= count;
            match runs.last_mut() {
                Some((last, n)) if *last == keep => *n += count,
                _ => runs.push((keep, count)),
            }
        }
        if left > 0 {
            return Err(format!(
                "expected {layers} blocks, found {} in `{text}`",
                layers - left
            ));
        }
        Ok(Self(runs))
    }

    /// The runs: what is kept, by how many blocks.
    pub fn runs(&self) -> &[(Keep, usize)] {
        &self.0
    }

    /// What block `at` keeps, counted from 0; beyond the last the last run's.
    pub fn of(&self, at: usize) -> Keep {
        let mut end = 0;
        for &(keep, count) in &self.0 {
            end += count;
            if at < end {
                return keep;
            }
        }
        self.0.last().map_or(Keep::ALL[0], |(keep, _)| *keep)
    }

    /// The word of a uniform list.
    pub fn single(&self) -> Option<Keep> {
        match self.0[..] {
            [(keep, _)] => Some(keep),
            _ => None,
        }
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(keep) = self.single() {
            return keep.fmt(f);
        }
        for (i, (keep, count)) in self.0.iter().enumerate() {
            write!(f, "{}{keep}*{count}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn runs_are_read_and_refused() {
        assert_eq!(
            Layers::read("qkv", 3).unwrap().of(2),
            Keep::on_device(Policy::Qkv)
        );
        assert_eq!(Layers::read("all*1,all*2", 3).unwrap().to_string(), "all");
        let mixed = Layers::read("all*1, input+offload*2", 3).unwrap();
        assert_eq!(
            [0, 1, 2, 9].map(|at| mixed.of(at).offload),
            [false, true, true, true]
        );
        for (text, part) in [
            ("", "expected `all`"),
            ("al", "found `al`"),
            ("all, qkv", "such as `all*2`"),
            ("all*2", "expected 3 blocks, found 2"),
            ("all*4", "3 blocks that are left, found `4`"),
            ("all*3, qkv", "such as `qkv*2`"),
            ("all*x", "found `x`"),
            ("all+offload+offload", "found `all+offload+offload`"),
        ] {
            let error = Layers::read(text, 3).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(runs in prop::collection::vec((0usize..8, 1usize..9), 1..5)) {
            let text: Vec<String> = runs.iter().map(|&(keep, n)| format!("{}*{n}", Keep::ALL[keep])).collect();
            let layers = runs.iter().map(|(_, n)| n).sum();
            let read = Layers::read(&text.join(","), layers).unwrap();
            prop_assert_eq!(Layers::read(&read.to_string(), layers).unwrap(), read);
        }
    }
}
