//! Groups of variables that are stepped in their own way.

use autosp_plan::codes;
use candle_core::Var;

use super::settings::{Decay, Optimizer, TrainSettings, require};
use crate::{Error, Result};

/// Variables whose names match a pattern, and how they are stepped. A variable is in the first group that matches; one that is in none
/// is stepped as [`TrainSettings`] says.
///
/// ```
/// use autosp_runtime::train::Group;
///
/// // Embeddings learn at a tenth of the rate and do not decay.
/// let group = Group { rate: 0.1, weight_decay: Some(0.0), ..Group::new("*embed_tokens.weight") };
/// assert!(group.matches("model.embed_tokens.weight") && !group.matches("lm_head.weight"));
/// ```
#[derive(Debug, Clone, PartialEq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "users write it with `..Group::new(..)`"
)]
pub struct Group {
    /// The name, with `*` for any characters, also none.
    pub pattern: String,
    /// The learning rate of a step is multiplied by this; 1 by default.
    pub rate: f64,
    /// Weight decay in place of the optimizer's.
    pub weight_decay: Option<f64>,
}

impl Group {
    /// A group that is stepped like all others.
    pub fn new(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            rate: 1.0,
            weight_decay: None,
        }
    }

    /// Whether a variable of this name is meant.
    pub fn matches(&self, name: &str) -> bool {
        matches(&self.pattern, name)
    }
}

/// Whether `name` is `pattern` with something in the place of each `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(name) = name.strip_prefix(head) else {
        return false;
    };
    (0..=name.len())
        .filter(|&at| name.is_char_boundary(at))
        .any(|at| matches(rest, &name[at..]))
}

/// How one variable is stepped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Manner {
    /// Factor of the learning rate.
    pub(super) rate: f64,
    pub(super) weight_decay: f64,
}

/// The manner of each variable.
///
/// # Errors
/// AS0516 for a value that cannot be, or a group without a variable.
pub(super) fn manners(
    settings: &TrainSettings,
    groups: &[Group],
    named: &[(String, Var)],
) -> Result<Vec<Manner>> {
    for group in groups {
        let what = |field| format!("{field} of the group `{}`", group.pattern);
        require(
            &what("rate"),
            "a finite factor of at least 0",
            group.rate,
            |x| x >= 0.0,
        )?;
        if let Some(decay) = group.weight_decay {
            require(
                &what("weight_decay"),
                "a number of at least 0",
                decay,
                |x| x >= 0.0,
            )?;
        }
        if !named.iter().any(|(name, _)| group.matches(name)) {
            let names: Vec<&str> = named
                .iter()
                .take(3)
                .map(|(name, _)| name.as_str())
                .collect();
            let text = format!(
                "expected the group `{}` to match a trainable variable, found none among {} such as `{}`",
                group.pattern,
                named.len(),
                names.join("`, `")
            );
            return Err(Error::new(codes::TRAIN_SETTING, text));
        }
    }
    let (Optimizer::AdamW { weight_decay, .. } | Optimizer::Sgd { weight_decay, .. }) =
        settings.optimizer;
    let manner = |(name, var): &(String, Var)| {
        let group = groups.iter().find(|group| group.matches(name));
        let decays = settings.decay == Decay::All || var.rank() >= 2;
        let default = if decays { weight_decay } else { 0.0 };
        Manner {
            rate: group.map_or(1.0, |group| group.rate),
            weight_decay: group
                .and_then(|group| group.weight_decay)
                .unwrap_or(default),
        }
    };
    Ok(named.iter().map(manner).collect())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*", "", true),
            ("*.bias", "layers.0.bias", true),
            ("*.bias", "layers.0.bias.x", false),
            ("layers.*.norm*", "layers.11.norm1.weight", true),
            ("layers.*.norm*", "layer.11.norm", false),
            ("*a*a", "aba", true),
            ("*a*a", "ab", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn the_first_group_counts_and_biases_do_not_decay() {
        let var = |shape: &[usize]| Var::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let named = vec![
            ("a.bias".to_owned(), var(&[3])),
            ("a.weight".to_owned(), var(&[3, 3])),
            ("b.weight".to_owned(), var(&[3, 3])),
        ];
        let groups = [
            Group {
                weight_decay: Some(0.5),
                ..Group::new("b.*")
            },
            Group {
                rate: 0.25,
                ..Group::new("*.weight")
            },
        ];
        let settings = TrainSettings::default();
        let found = manners(&settings, &groups, &named).unwrap();
        let found: Vec<(f64, f64)> = found.iter().map(|m| (m.rate, m.weight_decay)).collect();
        assert_eq!(found, [(1.0, 0.0), (0.25, 0.01), (1.0, 0.5)]);
        let all = TrainSettings {
            decay: Decay::All,
            ..settings
        };
        assert!((manners(&all, &[], &named).unwrap()[0].weight_decay - 0.01).abs() < 1e-12);
        for wrong in [
            Group::new("c.*"),
            Group {
                rate: f64::NAN,
                ..Group::new("*")
            },
            Group {
                weight_decay: Some(-1.0),
                ..Group::new("*")
            },
        ] {
            let error = manners(&settings, std::slice::from_ref(&wrong), &named).unwrap_err();
            assert!(
                error.code() == codes::TRAIN_SETTING && error.message().contains(&wrong.pattern),
                "{error}"
            );
        }
    }
}
