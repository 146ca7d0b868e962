//! What was done to the scores, kept in the one form that attention computes: factor, cap, masks.

use crate::attention::Spec;
use crate::mask::{Action, Term};

/// s = scale q·k, or cap · tanh(scale q·k), then masks in their order.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    scale: f64,
    /// The factor on tanh, once there was one.
    cap: Option<f64>,
    terms: Vec<Term>,
    /// Whether all masks so far only fill with -inf, which no positive factor changes.
    only_minus_infinity: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            scale: 1.0,
            cap: None,
            terms: Vec::new(),
            only_minus_infinity: true,
        }
    }
}

impl Recipe {
    pub(super) fn scaled(&self, mul: f64, add: f64) -> Result<Self, String> {
        if add != 0.0 {
            return Err(format!("expected no summand on the scores, found {add}"));
        }
        if !mul.is_finite() {
            return Err(format!(
                "expected a finite factor on the scores, found {mul}"
            ));
        }
        if !self.terms.is_empty() && (!self.only_minus_infinity || mul <= 0.0) {
            return Err(format!(
                "expected factors before masks, found the factor {mul} after a mask that is not a fill with -inf"
            ));
        }
        let mut recipe = self.clone();
        match &mut recipe.cap {
            Some(cap) => *cap *= mul,
            None => recipe.scale *= mul,
        }
        Ok(recipe)
    }

    pub(super) fn capped(&self) -> Result<Self, String> {
        if self.cap.is_some() {
            return Err("expected one soft cap, found a second tanh".to_owned());
        }
        if !self.terms.is_empty() {
            return Err("expected the soft cap before masks, found tanh after a mask".to_owned());
        }
        Ok(Self {
            cap: Some(1.0),
            ..self.clone()
        })
    }

    pub(super) fn masked(&self, term: Term, action: Action) -> Self {
        let mut recipe = self.clone();
        recipe.terms.push(term);
        recipe.only_minus_infinity &= matches!(
            action,
            Action::Fill {
                value: f64::NEG_INFINITY,
                ..
            }
        );
        recipe
    }

    pub(super) fn spec(&self, valid: usize, heads: usize, kv_heads: usize) -> Spec {
        let mut spec = Spec::new(self.scale, valid, heads, kv_heads);
        spec.cap = self.cap;
        spec.terms.clone_from(&self.terms);
        spec
    }
}
