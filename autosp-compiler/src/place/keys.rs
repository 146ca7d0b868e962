//! Masks over keys that a caller gives.

use autosp_plan::codes;

use super::sites::Site;
use super::{Conversion, Place, Placer};
use crate::error::Refusal;
use crate::trace::shape::{Dim, Shape, show};

impl Placer<'_, '_, '_> {
    /// The masks over keys that the operands of a site's scores are.
    pub(super) fn keys(&mut self, site: &Site) {
        for (node, input) in site.keys.iter().copied() {
            let trace = self.trace;
            let operand = trace.nodes[node].inputs[input].node;
            let shapes: Vec<&[Dim]> = match &trace.nodes[operand].shape {
                Shape::Known(dims) => vec![dims],
                Shape::Either(all) => all.iter().map(Vec::as_slice).collect(),
                _ => Vec::new(),
            };
            let has = |dim: &Dim, repeated: bool| {
                dim.0.iter().any(|f| {
                    f.repeat == repeated && trace.atoms.normal(&f.size).contains(self.sequence)
                })
            };
            let mut all_queries = false;
            let place = self.place[operand];
            if let Some(layer) = trace.learned(operand) {
                self.problems.insert(
                    node,
                    Refusal::new(
                        codes::LEARNED_BIAS,
                        trace.nodes[node].at.span,
                        format!(
                            "`{}` adds a learned bias to the scores",
                            trace.nodes[node].text
                        ),
                    )
                    .note(format!("it comes out of `{}`", trace.nodes[layer].text))
                    .help(
                        "`.detach()` it if it is not trained, or use rotary or absolute positions",
                    ),
                );
                continue;
            }
            let fine = match place {
                Place::Given | Place::Replicated => true,
                Place::Sharded => shapes.iter().all(|dims| {
                    let Some((keys, before)) = dims.split_last() else {
                        return false;
                    };
                    all_queries |= before.last().is_some_and(|q| has(q, true));
                    has(keys, false)
                        && keys.0.len() == 1
                        && before.iter().all(|d| !has(d, false))
                        && before.iter().rev().skip(1).all(|d| !has(d, true))
                }),
                _ => false,
            };
            if !fine || (place == Place::Sharded && shapes.is_empty()) {
                let shape = match shapes.first() {
                    Some(dims) => show(&trace.atoms, dims),
                    None => "of an unknown shape".to_string(),
                };
                self.problems.insert(
                    node,
                    Refusal::new(
                        codes::MASK,
                        trace.nodes[node].at.span,
                        format!("cannot follow the mask `{}`", trace.nodes[operand].text),
                    )
                    .note(format!(
                        "it is {shape}; a mask from the caller has one number a key, [b, 1, 1, s]"
                    ))
                    .help("`mask.reshape((b, 1, 1, s))?` of a mask [b, s]")
                    .in_branch(trace.nodes[node].branch),
                );
            }
            self.conversions
                .push((node, Conversion::Keys { input, all_queries }));
        }
    }
}
