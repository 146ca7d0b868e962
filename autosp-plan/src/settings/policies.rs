//! What each block keeps, as people write it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use super::Policy;

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

/// What blocks keep, in the order in which a forward runs them: runs of blocks, and what all blocks after them keep.
///
/// Written as `all*4, input+offload*28`; where the last run leaves its number out it is that of all further blocks.
///
/// ```
/// use autosp_plan::settings::{Keep, Policies, Policy};
///
/// let policies: Policies = "all*4, input+offload".parse()?;
/// assert_eq!(policies.of(3), Some(Keep::on_device(Policy::All)));
/// assert_eq!(policies.of(40), Some(Keep::offloaded(Policy::Input)));
/// assert_eq!("all*4".parse::<Policies>()?.of(4), None);
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policies {
    runs: Cow<'static, [(Keep, usize)]>,
    rest: Option<Keep>,
}

impl Policies {
    /// The same for every block.
    pub const fn uniform(keep: Keep) -> Self {
        Self {
            runs: Cow::Borrowed(&[]),
            rest: Some(keep),
        }
    }

    /// So many blocks each, and no more blocks than that.
    pub fn runs(runs: &[(Keep, usize)]) -> Self {
        let mut joined: Vec<(Keep, usize)> = Vec::new();
        for &(keep, count) in runs.iter().filter(|(_, count)| *count > 0) {
            match joined.last_mut() {
                Some((last, n)) if *last == keep => *n += count,
                _ => joined.push((keep, count)),
            }
        }
        Self {
            runs: joined.into(),
            rest: None,
        }
    }

    /// What block `at` keeps, counted from 0; `None` beyond the last.
    pub fn of(&self, at: usize) -> Option<Keep> {
        let mut end = 0;
        for &(keep, count) in self.runs.iter() {
            end += count;
            if at < end {
                return Some(keep);
            }
        }
        self.rest
    }

    /// The least number of blocks that there have to be, and whether there may be more.
    pub fn blocks(&self) -> (usize, bool) {
        let counted = self.runs.iter().map(|(_, count)| count).sum::<usize>();
        // The last, open run is of one block at least, where others come before it.
        match self.rest {
            Some(_) if counted > 0 => (counted + 1, true),
            rest => (counted, rest.is_some()),
        }
    }

    /// The word that all blocks have.
    pub fn single(&self) -> Option<Keep> {
        match (&*self.runs, self.rest) {
            ([], rest) => rest,
            ([(keep, _)], rest) if rest.is_none_or(|rest| rest == *keep) => Some(*keep),
            _ => None,
        }
    }

    /// Whether some block keeps on the host.
    pub fn offload(&self) -> bool {
        let mut runs = self.runs.iter().map(|(keep, _)| keep).chain(&self.rest);
        runs.any(|keep| keep.offload)
    }

    /// The runs of a model with `layers` blocks.
    ///
    /// # Errors
    /// What was expected and found, if these are policies for more or fewer blocks.
    pub fn over(&self, layers: usize) -> Result<Vec<(Keep, usize)>, String> {
        let (least, more) = self.blocks();
        if layers < least || (layers > least && !more) {
            return Err(format!(
                "expected policies for {layers} blocks, found `{self}` for {}{least}",
                if more { "at least " } else { "" }
            ));
        }
        let mut runs = self.runs.to_vec();
        if let Some(rest) = self.rest {
            let counted = runs.iter().map(|(_, count)| count).sum::<usize>();
            runs.push((rest, layers - counted));
        }
        let Self { runs, .. } = Self::runs(&runs);
        Ok(runs.into_owned())
    }
}

impl fmt::Display for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (keep, count) in self.runs.iter() {
            write!(f, "{separator}{keep}*{count}")?;
            separator = ", ";
        }
        match self.rest {
            Some(rest) => write!(f, "{separator}{rest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Policies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(',').collect();
        let mut runs: Vec<(Keep, usize)> = Vec::new();
        let mut rest = None;
        for (i, part) in parts.iter().enumerate() {
            match part.split_once('*') {
                Some((word, count)) => {
                    let count = count.trim();
                    let parsed = count.parse().ok().filter(|n| (1..=MOST).contains(n));
                    let parsed = parsed
                        .ok_or_else(|| format!("expected a number of blocks, found `{count}`"))?;
                    runs.push((word.parse()?, parsed));
                }
                None if i + 1 == parts.len() => rest = Some(part.parse()?),
                None => {
                    let word: Keep = part.parse()?;
                    return Err(format!(
                        "expected a number of blocks, such as `{word}*2`, found none"
                    ));
                }
            }
        }
        let mut all = Self::runs(&runs);
        // `all*2, all` is `all` for two blocks at least: no less is said than what is meant.
        all.rest = rest;
        Ok(all)
    }
}

/// The most blocks of a run that can be said.
const MOST: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn policies_are_read_and_refused() {
        let read = |text: &str| text.parse::<Policies>();
        let uniform = read(" qkv ").unwrap();
        assert_eq!(uniform, Policies::uniform(Keep::on_device(Policy::Qkv)));
        assert_eq!(
            (uniform.of(99), uniform.blocks()),
            (uniform.single(), (0, true))
        );
        let open = read("all*1,all*1, input+offload").unwrap();
        assert_eq!(open.to_string(), "all*2, input+offload");
        assert_eq!(open.blocks(), (3, true));
        assert!(open.offload() && open.single().is_none());
        assert_eq!(open.over(2).unwrap_err().matches("at least 3").count(), 1);
        assert_eq!(
            open.over(4).unwrap(),
            [
                (Keep::on_device(Policy::All), 2),
                (Keep::offloaded(Policy::Input), 2)
            ]
        );
        let closed = read("all*2, qkv*1").unwrap();
        assert_eq!(
            (closed.of(2), closed.of(3)),
            (Some(Keep::on_device(Policy::Qkv)), None)
        );
        assert!(!closed.offload());
        assert!(closed.over(3).is_ok() && closed.over(4).is_err() && closed.over(2).is_err());
        for (text, part) in [
            ("", "expected `all`"),
            ("al", "found `al`"),
            ("all, qkv", "such as `all*2`"),
            ("all*0", "found `0`"),
            ("all*x", "found `x`"),
            ("all*2,", "found ``"),
            ("all+offload+offload", "found `all+offload+offload`"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(
            runs in prop::collection::vec((0usize..8, 1usize..9), 0..5), rest in prop::option::of(0usize..8),
        ) {
            prop_assume!(rest.is_some() || !runs.is_empty());
            let counted = runs.iter().map(|&(keep, n)| format!("{}*{n}", Keep::ALL[keep]));
            let text: Vec<String> = counted.chain(rest.map(|keep| Keep::ALL[keep].to_string())).collect();
            let read: Policies = text.join(" , ").parse().unwrap();
            prop_assert_eq!(read.to_string().parse::<Policies>().unwrap(), read.clone());
            // Block by block they are those that were written.
            let mut blocks: Vec<Keep> = runs.iter().flat_map(|&(keep, n)| vec![Keep::ALL[keep]; n]).collect();
            for (at, keep) in blocks.iter().enumerate() {
                prop_assert_eq!(read.of(at), Some(*keep));
            }
            prop_assert_eq!(read.of(blocks.len()), rest.map(|keep| Keep::ALL[keep]));
            blocks.extend(rest.map(|keep| Keep::ALL[keep]));
            let over = read.over(blocks.len()).unwrap();
            let spread: Vec<Keep> = over.iter().flat_map(|&(keep, n)| vec![keep; n]).collect();
            prop_assert_eq!(spread, blocks);
        }
    }
}
