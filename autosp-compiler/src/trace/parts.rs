//! Shape rules of what takes parts of a tensor or puts parts together.

use super::apply::resolve;
use super::builtin::dim_argument;
use super::call::Arg;
use super::graph::{At, NodeId, Reason};
use super::shape::{Dim, Shape};
use super::shapes::Ruled;
use super::size::Poly;
use super::value::Value;
use super::{Role, Trace};

impl<'a> Trace<'_, 'a> {
    pub(super) fn narrow(
        &mut self,
        node: NodeId,
        mut dims: Vec<Dim>,
        args: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Ruled {
        let d = args
            .get(1)
            .and_then(|a| dim_argument(&a.0))
            .and_then(|d| resolve(d, dims.len()));
        let (Some(d), Some((Value::Size(start), start_expr)), Some((Value::Size(len), len_expr))) =
            (d, args.get(2), args.get(3))
        else {
            return Err(Self::reason(
                format!("cannot follow the range in `{what}`"),
                "give the dimension as a literal or `D::Minus1`",
            ));
        };
        let (start, len) = (start.clone(), len.clone());
        for (size, e, role) in [
            (&start, start_expr, Role::Valid),
            (&len, len_expr, Role::SizeOf(node)),
        ] {
            if let Some(e) = e {
                let at = self.at(at.act, e);
                self.use_size(at, size, role);
            }
        }
        if dims[d].anchored(&self.atoms) && self.counts_tokens(&start) {
            let one = len.poly.is_one();
            let counter = self.counts_rows_of(&dims[d], &start).filter(|_| one);
            let Some(counter) = counter else {
                return Err(Self::scan(what));
            };
            self.nodes[node].op = super::graph::Op::Each { dim: d, counter };
            dims[d] = Dim::default();
            return Ok((Shape::Known(dims), Vec::new()));
        }
        self.starts_at_zero(&start, &len);
        let len = self.dimension(&len);
        let whole = self.atoms.equal(&len, &dims[d].size(&self.atoms));
        let touches = if whole { Vec::new() } else { vec![(0, d)] };
        if !whole {
            // One token out of many: a rule of its own.
            if len.is_one() && dims[d].anchored(&self.atoms) && args[2].1.is_some() {
                self.nodes[node].op = super::graph::Op::Pick { dim: d };
            }
            dims[d] = Dim::of(len);
        }
        Ok((Shape::Known(dims), touches))
    }

    /// Whether a size comes from the counter of a loop over the tokens.
    pub(super) fn counts_tokens(&self, size: &super::value::Size) -> bool {
        self.counters.iter().any(|c| size.poly.contains(c.atom))
    }

    /// Why one token a round is not followed.
    pub(super) fn scan(what: &str) -> Reason {
        Reason {
            code: autosp_plan::codes::SCAN,
            message: format!("`{what}` takes one token in each round of a loop over the tokens"),
            help: "compute all tokens at once, with operations on the whole tensor".to_string(),
            span: None,
        }
    }

    /// A range over positions that begins at an integer parameter begins at an offset into a cache.
    pub(super) fn starts_at_zero(&mut self, start: &super::value::Size, len: &super::value::Size) {
        if self.atoms.anchored(&len.poly) {
            let _ = self.atoms.without_offsets(&start.poly, &mut self.offsets);
        }
    }

    pub(super) fn cat(
        &mut self,
        inputs: &[NodeId],
        mut dims: Vec<Dim>,
        args: &[Arg<'a>],
        what: &str,
    ) -> Ruled {
        let d = args
            .get(1)
            .and_then(|a| dim_argument(&a.0))
            .and_then(|d| resolve(d, dims.len()));
        let Some(d) = d else {
            return Err(Self::reason(
                format!("cannot follow the dimension in `{what}`"),
                "give the dimension as a literal or `D::Minus1`",
            ));
        };
        if let Some((Value::Copies(_, count), _)) = args.first() {
            // n times the same: the copies are the outer factor of the dimension.
            let copies = Dim::repeated(count.poly.clone());
            dims[d].0.splice(0..0, copies.0);
            return Ok((Shape::Known(dims), Vec::new()));
        }
        if let Some((Value::Each(_, count), _)) = args.first() {
            let mut all = Dim::of(count.poly.clone());
            all.0
                .extend(dims[d].0.iter().filter(|f| !f.size.is_one()).cloned());
            dims[d] = all;
            return Ok((Shape::Known(dims), Vec::new()));
        }
        if let Some((Value::List { elems: None, .. }, _)) = args.first() {
            // One stands for all, however many there are.
            let own = dims[d].clone();
            dims[d] = Dim::of(self.fresh_feature("count"));
            dims[d].0.extend(own.0);
            return Ok((Shape::Known(dims), vec![(0, d)]));
        }
        let mut total = Poly::default();
        for input in inputs {
            match &self.nodes[*input].shape {
                Shape::Known(other) if other.len() == dims.len() => {
                    total = total.add(&other[d].size(&self.atoms));
                }
                _ => total = total.add(&self.feature(format!("({what}).part"))),
            }
        }
        dims[d] = Dim::of(total);
        Ok((
            Shape::Known(dims),
            (0..inputs.len()).map(|i| (i, d)).collect(),
        ))
    }
}
