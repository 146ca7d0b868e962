//! What a choice asks of the trainer.

use std::fmt;

/// A technique that a choice may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Ability {
    /// Policies that differ from block to block.
    Mixed,
    /// What a block keeps lies on the host.
    Offload,
    /// The feed-forward in tiles along the tokens.
    MlpTiles,
    /// Logits and loss in tiles along the tokens, so that the logits are never whole.
    LossTiles,
    /// The optimizer's state on the host.
    HostOptimizer,
    /// `ZeRO` stage 2: gradients are divided while the backward runs.
    Zero2,
    /// `ZeRO` stage 3: parameters are divided and gathered a block ahead.
    Zero3,
}

impl Ability {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Mixed,
        Self::Offload,
        Self::MlpTiles,
        Self::LossTiles,
        Self::HostOptimizer,
        Self::Zero2,
        Self::Zero3,
    ];

    /// As a command line writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Offload => "offload",
            Self::MlpTiles => "mlp-tiles",
            Self::LossTiles => "loss-tiles",
            Self::HostOptimizer => "host-optimizer",
            Self::Zero2 => "zero-2",
            Self::Zero3 => "zero-3",
        }
    }

    /// What it is, in words.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Mixed => "policies that differ from block to block",
            Self::Offload => "activations kept on the host",
            Self::MlpTiles => "the feed-forward in tiles",
            Self::LossTiles => "the loss in tiles",
            Self::HostOptimizer => "the optimizer's state on the host",
            Self::Zero2 => "gradients divided during the backward",
            Self::Zero3 => "parameters divided among the ranks",
        }
    }
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities(u8);

impl Abilities {
    /// None.
    pub const NONE: Self = Self(0);

    /// All.
    pub const ALL: Self = Self::of(&Ability::ALL);

    /// What the trainer of this version does, but for [`Ability::Offload`] and [`Ability::HostOptimizer`]: those have not run on a GPU yet,
    /// and are chosen where they are asked for.
    pub const TRAINER: Self = Self::of(&[
        Ability::Mixed,
        Ability::MlpTiles,
        Ability::LossTiles,
        Ability::Zero2,
    ]);

    /// These.
    pub const fn of(list: &[Ability]) -> Self {
        let (mut set, mut i) = (0, 0);
        while i < list.len() {
            set |= 1 << list[i] as u8;
            i += 1;
        }
        Self(set)
    }

    /// These and `ability`.
    #[must_use]
    pub const fn with(self, ability: Ability) -> Self {
        Self(self.0 | 1 << ability as u8)
    }

    /// Whether `ability` is among these.
    pub const fn has(self, ability: Ability) -> bool {
        self.0 & 1 << ability as u8 != 0
    }

    /// Those that are in neither `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// One after the other.
    pub fn iter(self) -> impl Iterator<Item = Ability> {
        Ability::ALL.into_iter().filter(move |&one| self.has(one))
    }

    /// Reads names with commas between them; `all` is all of them.
    ///
    /// # Errors
    /// What was expected and found.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut set = Self::NONE;
        for word in text
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
        {
            if word == "all" {
                set = Self::ALL;
                continue;
            }
            let found = Ability::ALL.into_iter().find(|one| one.name() == word);
            set = set.with(found.ok_or_else(|| {
                let names = Ability::ALL.map(Ability::name).join("`, `");
                format!("expected `all` or some of `{names}`, found `{word}`")
            })?);
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_and_subtracted() {
        let some = Abilities::read("offload, zero-2").unwrap();
        assert_eq!(
            some.iter().collect::<Vec<_>>(),
            [Ability::Offload, Ability::Zero2]
        );
        assert_eq!(Abilities::read("all").unwrap(), Abilities::ALL);
        assert_eq!(Abilities::read(" ").unwrap(), Abilities::NONE);
        let rest = Abilities::ALL.without(some);
        assert!(!rest.has(Ability::Offload) && rest.has(Ability::Zero3));
        assert!(
            Abilities::read("tiles")
                .unwrap_err()
                .contains("found `tiles`")
        );
    }
}
