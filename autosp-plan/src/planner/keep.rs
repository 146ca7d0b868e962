//! What the blocks keep, block by block.

use std::fmt;

use crate::settings::{Keep, Policies};

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
        let policies: Policies = text.parse()?;
        policies.over(layers).map(Self)
    }

    /// As settings have them.
    pub fn policies(&self) -> Policies {
        match self.single() {
            Some(keep) => Policies::uniform(keep),
            None => Policies::runs(&self.0),
        }
    }

    /// What settings say of `layers` blocks.
    ///
    /// # Errors
    /// What was expected and found, for policies of more or fewer blocks.
    pub fn of_settings(policies: &Policies, layers: usize) -> Result<Self, String> {
        policies.over(layers).map(Self)
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
    use super::*;
    use crate::settings::Policy;

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
        assert_eq!(
            Layers::of_settings(&mixed.policies(), 3).unwrap(),
            mixed.clone()
        );
        assert!(Layers::of_settings(&mixed.policies(), 4).is_err());
        for (text, part) in [
            ("al", "found `al`"),
            ("all*2", "for 3 blocks, found `all*2` for 2"),
            ("all*4", "for 3 blocks, found `all*4` for 4"),
            ("all*3, qkv", "for at least 4"),
        ] {
            let error = Layers::read(text, 3).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
