//! What is chosen, and what the user has chosen already.

use super::{Abilities, Ability, Keep, Layers};

/// One way to train.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "plain choices")]
pub struct Choice {
    /// Ranks that share a sequence.
    pub sp: usize,
    /// Replicas.
    pub dp: usize,
    /// `ZeRO` stage, 0 to 3.
    pub stage: u8,
    /// Whether the optimizer's state lies on the host.
    pub host_optimizer: bool,
    /// What each block keeps.
    pub layers: Layers,
    /// Head groups of each attention.
    pub groups: usize,
    /// Tiles of the feed-forward along the tokens; 1 for none.
    pub mlp_tiles: usize,
    /// Tiles of the loss along the tokens; 1 for whole logits.
    pub loss_tiles: usize,
}

impl Choice {
    /// Ranks of the world.
    pub fn world(&self) -> usize {
        self.sp * self.dp
    }

    /// What it asks of the trainer.
    pub fn needs(&self) -> Abilities {
        let offloads = |&(keep, _): &(Keep, usize)| keep.offload;
        let all = [
            (self.layers.single().is_none(), Ability::Mixed),
            (self.layers.runs().iter().any(offloads), Ability::Offload),
            (self.mlp_tiles > 1, Ability::MlpTiles),
            (self.loss_tiles > 1, Ability::LossTiles),
            (self.host_optimizer, Ability::HostOptimizer),
            (self.stage == 2, Ability::Zero2),
            (self.stage == 3, Ability::Zero3),
        ];
        let needed = all.into_iter().filter(|(needed, _)| *needed);
        needed.fold(Abilities::NONE, |set, (_, ability)| set.with(ability))
    }
}

/// What is not to be chosen, since the user has said it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(
    clippy::exhaustive_structs,
    reason = "written with `..Default::default()`"
)]
pub struct Pins {
    /// Ranks that share a sequence.
    pub sp: Option<usize>,
    /// `ZeRO` stage.
    pub stage: Option<u8>,
    /// Whether the optimizer's state lies on the host.
    pub host_optimizer: Option<bool>,
    /// What the blocks keep.
    pub layers: Option<Layers>,
    /// Head groups.
    pub groups: Option<usize>,
    /// Tiles of the feed-forward.
    pub mlp_tiles: Option<usize>,
    /// Tiles of the loss.
    pub loss_tiles: Option<usize>,
}

impl Pins {
    /// Whether `choice` keeps to them.
    pub fn allow(&self, choice: &Choice) -> bool {
        fn same<T: PartialEq>(pin: Option<&T>, found: &T) -> bool {
            pin.is_none_or(|pin| pin == found)
        }
        same(self.sp.as_ref(), &choice.sp)
            && same(self.stage.as_ref(), &choice.stage)
            && same(self.host_optimizer.as_ref(), &choice.host_optimizer)
            && same(self.layers.as_ref(), &choice.layers)
            && same(self.groups.as_ref(), &choice.groups)
            && same(self.mlp_tiles.as_ref(), &choice.mlp_tiles)
            && same(self.loss_tiles.as_ref(), &choice.loss_tiles)
    }

    /// The names of those that are there.
    pub fn names(&self) -> Vec<&'static str> {
        let all = [
            ("sp", self.sp.is_some()),
            ("zero", self.stage.is_some()),
            ("host_optimizer", self.host_optimizer.is_some()),
            ("policy", self.layers.is_some()),
            ("groups", self.groups.is_some()),
            ("mlp_tiles", self.mlp_tiles.is_some()),
            ("loss_tiles", self.loss_tiles.is_some()),
        ];
        all.into_iter()
            .filter(|(_, set)| *set)
            .map(|(name, _)| name)
            .collect()
    }
}
