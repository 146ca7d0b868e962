//! From settings to what is pinned, and from a choice back to settings: `memory = "auto"`.

use super::{Choice, Job, Keep, Layers, Machine, Model, Pins};
use crate::settings::{Memory, Place, Policies, Settings, Value};

/// Bytes of logits of one element, as the setting `loss_bytes` counts them: the loss computes in `f32`.
const LOGIT: usize = 4;

impl Choice {
    /// What settings say of sequences of `seq` tokens, of which a replica has `batch`. `whole_logits` says that the program makes all logits
    /// at once, which no setting changes.
    ///
    /// # Errors
    /// What was expected and found, for policies of more or fewer blocks than the model has.
    pub fn of_settings(
        settings: &Settings,
        model: &Model,
        (batch, seq): (usize, usize),
        whole_logits: bool,
    ) -> Result<Self, String> {
        let row = seq.div_ceil(settings.sp());
        let logits = batch * row * model.vocabulary * LOGIT;
        Ok(Self {
            sp: settings.sp(),
            dp: settings.dp(),
            stage: settings.zero().number(),
            host_optimizer: settings.optimizer() == Place::Host,
            layers: Layers::of_settings(settings.policies(), model.layers)?,
            groups: settings.groups(),
            mlp_tiles: row.div_ceil(settings.tile()).max(1),
            loss_tiles: if whole_logits {
                1
            } else {
                logits.div_ceil(settings.loss_bytes()).max(1)
            },
        })
    }
}

impl Pins {
    /// What the settings of a run leave to nobody: the mesh, the stage, whatever somebody has said, and everything under `memory =
    /// "fixed"`. The arguments and errors are those of [`Choice::of_settings`].
    ///
    /// # Errors
    /// As there.
    pub fn of_settings(
        settings: &Settings,
        model: &Model,
        lengths: (usize, usize),
        whole_logits: bool,
    ) -> Result<Self, String> {
        let fixed = settings.memory() == Memory::Fixed;
        let said = |name: &str| fixed || settings.is_said(name);
        // What nobody has said may be of another model.
        let choice = if said("policy") {
            Choice::of_settings(settings, model, lengths, whole_logits)?
        } else {
            let any = Policies::uniform(Keep::ALL[0]);
            let settings = settings.clone().with_policies(any);
            Choice::of_settings(&settings, model, lengths, whole_logits)?
        };
        Ok(Self {
            sp: Some(choice.sp),
            stage: Some(choice.stage),
            host_optimizer: said("optimizer").then_some(choice.host_optimizer),
            layers: said("policy").then_some(choice.layers),
            groups: said("groups").then_some(choice.groups),
            mlp_tiles: said("tile").then_some(choice.mlp_tiles),
            loss_tiles: (whole_logits || said("loss_bytes")).then_some(choice.loss_tiles),
        })
    }
}

impl Choice {
    /// The settings with this choice for sequences of `seq` tokens, wherever nobody has said otherwise.
    #[must_use]
    pub fn settle(&self, mut settings: Settings, job: &Job, seq: usize) -> Settings {
        let row = seq.div_ceil(self.sp);
        let tokens = job.batch * row;
        let place = if self.host_optimizer {
            Place::Host
        } else {
            Place::Device
        };
        let logits = tokens.div_ceil(self.loss_tiles) * job.model.vocabulary * LOGIT;
        settings.choose("policy", Value::Policies(self.layers.policies()));
        settings.choose("groups", Value::Count(self.groups));
        settings.choose("tile", Value::Count(row.div_ceil(self.mlp_tiles).max(1)));
        if self.loss_tiles > 1 {
            settings.choose("loss_bytes", Value::Count(logits));
        }
        settings.choose("optimizer", Value::Choice(place.name()));
        settings
    }
}

impl Machine {
    /// Ranks whose tensors may fill `bytes` of their devices each, whatever else there is.
    #[must_use]
    pub fn with_usable(self, bytes: u64) -> Self {
        Self {
            device_bytes: Self::around(bytes),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::choose;
    use super::super::tests::{h200, llama_8b};
    use super::*;
    use crate::settings::{Policy, Source};

    fn job(settings: &Settings, usable: u64, seq: usize) -> Job {
        let machine = h200(settings.sp() * settings.dp()).with_usable(usable);
        let pins = Pins::of_settings(settings, &llama_8b(), (1, seq), false).unwrap();
        Job {
            pins,
            ..Job::new(llama_8b(), machine)
        }
    }

    #[test]
    fn less_memory_keeps_less_and_what_was_said_stays() {
        let settings = Settings::default()
            .with_sp(4)
            .with_dp(2)
            .with_zero(crate::settings::Zero::Stage2);
        let seq = 64 << 10;
        let (roomy, fits) = choose(&job(&settings, 200 << 30, seq), seq).unwrap();
        assert!(fits && roomy.layers.single() == Some(Keep::on_device(Policy::All)));
        let tight = job(&settings, 60 << 30, seq);
        let (frugal, fits) = choose(&tight, seq).unwrap();
        assert!(fits && frugal.layers != roomy.layers, "{frugal:?}");
        let settled = frugal.settle(settings.clone(), &tight, seq);
        assert_eq!(settled.policies(), &frugal.layers.policies());
        assert_eq!(settled.source("policy"), Some(&Source::Chosen));
        assert!(!settled.is_said("policy") && settled.is_said("sp"));

        // A pin holds, and so do all defaults of a run that is not to choose.
        let said = settings.clone().with_policy(Policy::Qkv).with_groups(1);
        let (pinned, _) = choose(&job(&said, 60 << 30, seq), seq).unwrap();
        assert_eq!(
            (pinned.layers.single(), pinned.groups),
            (Some(Keep::on_device(Policy::Qkv)), 1)
        );
        let settled = pinned.settle(said.clone(), &tight, seq);
        assert_eq!(settled.policies(), said.policies());
        let fixed = settings.with_memory(Memory::Fixed);
        let (left, fits) = choose(&job(&fixed, 40 << 30, seq), seq).unwrap();
        assert!(!fits && left.groups == 2 && left.layers == roomy.layers);
    }

    #[test]
    fn nothing_fits_and_the_closest_is_chosen() {
        let settings = Settings::default();
        let (closest, fits) = choose(&job(&settings, 1 << 30, 1 << 20), 1 << 20).unwrap();
        assert!(!fits && closest.layers.single() == Some(Keep::on_device(Policy::Input)));
        let wrong: Settings = settings.with("policy", "all*3").unwrap();
        assert!(Pins::of_settings(&wrong, &llama_8b(), (1, 64), false).is_err());
    }

    proptest! {
        /// Settings that were chosen lead back to the choice, so that what is predicted is what runs.
        #[test]
        fn what_was_settled_is_what_was_chosen(gib in 20u64..200, kilo in 1usize..256, sp in 0u32..4) {
            let settings = Settings::default().with_sp(1 << sp).with_dp(8 >> sp).with_zero(crate::settings::Zero::Stage1);
            let seq = kilo << 10;
            let job = job(&settings, gib << 30, seq);
            let (choice, _) = choose(&job, seq).unwrap();
            let settled = choice.settle(settings, &job, seq).with_memory(Memory::Fixed);
            let pins = Pins::of_settings(&settled, &job.model, (1, seq), choice.loss_tiles == 1).unwrap();
            // Tiles are of whole tokens: a few more of them may make fewer tiles.
            for (pin, chosen) in [(pins.mlp_tiles, choice.mlp_tiles), (pins.loss_tiles, choice.loss_tiles)] {
                prop_assert!(pin.is_some_and(|n| n <= chosen), "{:?} {}", pin, chosen);
            }
            let rest = Pins { mlp_tiles: None, loss_tiles: None, ..pins };
            prop_assert!(rest.allow(&choice), "{:?} {:?}", rest, choice);
            // Other ranks get it as text.
            let told = Settings::default().with_chosen(&settled.chosen()).unwrap();
            prop_assert_eq!(told.chosen(), settled.chosen());
        }

        #[test]
        fn as_much_is_usable_as_was_said(bytes in 0u64..1 << 50) {
            let machine = h200(1).with_usable(bytes);
            prop_assert!(machine.usable() >= bytes && machine.usable() < bytes + 100, "{}", machine.usable());
        }
    }
}
