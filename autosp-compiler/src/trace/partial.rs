//! Shapes of which some dimensions are known, counted from the left: tables that a model holds and cuts.

use super::Role;
use super::Trace;
use super::builtin::dim_argument;
use super::call::Arg;
use super::graph::At;
use super::shape::{Dim, Shape};
use super::value::Value;
use crate::ops::ShapeRule;

impl<'a> Trace<'_, 'a> {
    /// Where the known dimensions of a tensor of unknown rank go, counted from the left.
    pub(super) fn partial(
        rule: ShapeRule,
        known: Vec<(usize, Dim)>,
        args: &[Arg<'a>],
    ) -> Vec<(usize, Dim)> {
        let place = |i: usize| {
            let d = args.get(i).and_then(|a| dim_argument(&a.0))?;
            usize::try_from(d).ok()
        };
        match (rule, place(1), place(2)) {
            (ShapeRule::Unsqueeze, Some(at), _) => {
                let moved = known
                    .into_iter()
                    .map(|(d, dim)| (d + usize::from(d >= at), dim));
                moved.chain([(at, Dim::default())]).collect()
            }
            (ShapeRule::Squeeze, Some(at), _) => {
                let rest = known.into_iter().filter(|(d, _)| *d != at);
                rest.map(|(d, dim)| (d - usize::from(d > at), dim))
                    .collect()
            }
            (ShapeRule::Transpose, Some(i), Some(j)) => {
                let swapped = |d: usize| match d {
                    d if d == i => j,
                    d if d == j => i,
                    d => d,
                };
                known
                    .into_iter()
                    .map(|(d, dim)| (swapped(d), dim))
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// What is known of a table of unknown rank after an index: the lengths of ranges.
    pub(super) fn index_partial(
        &mut self,
        known: Vec<(usize, Dim)>,
        places: &[(Value, Option<&'a syn::Expr>)],
        at: At,
    ) -> Shape {
        let mut out = Vec::new();
        let mut gone = 0;
        for (d, (place, e)) in places.iter().enumerate() {
            let before = known
                .iter()
                .find(|(k, _)| *k == d)
                .map(|(_, dim)| dim.clone());
            match place {
                Value::Tuple(v) if v.is_empty() => out.extend(before.map(|dim| (d - gone, dim))),
                Value::Range(start, end, end_expr) => {
                    let end_at = At {
                        expr: *end_expr,
                        ..at
                    };
                    let len = end.with(start, end.poly.sub(&start.poly));
                    self.use_size(end_at, &end.clone(), Role::Valid);
                    self.starts_at_zero(&start.clone(), &len);
                    let poly = self.dimension(&len);
                    out.push((d - gone, Dim::of(poly)));
                }
                Value::Size(s) => {
                    if let Some(e) = e {
                        let at = self.at(at.act, e);
                        self.use_size(at, &s.clone(), Role::Valid);
                    }
                    gone += 1;
                }
                _ => {}
            }
        }
        let rest = known.into_iter().filter(|(d, _)| *d >= places.len());
        out.extend(rest.map(|(d, dim)| (d - gone, dim)));
        Shape::Partial(out)
    }
}
