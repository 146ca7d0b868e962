//! Sizes as integer polynomials over named atoms.
//!
//! `x.dims3()?` gives three atoms, a struct field one; `b * s`, `t + offset` and `heads / kv_heads` stay symbolic, so that
//! a size can be recognised wherever it comes back. Two atoms that a model must hold equal (the width after a projection
//! and the width of the residual) are unified.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Index into [`Atoms`].
pub(crate) type AtomId = u32;

/// Where an atom comes from; this decides what it may stand for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum AtomKind {
    /// Dimension `.1` of the root function's tensor parameter `.0`: the batch or the sequence.
    Dim(String, usize),
    /// An integer parameter of the root function, such as the offset into a cache.
    Param(String),
    /// A field, or a width that a layer gives: the same on every rank.
    Feature(String),
    /// The rows that a loop on the host listed: as many as it found on this rank.
    Rows(String),
    /// An exact quotient.
    Quotient(Poly, Poly),
}

/// A product of atoms with multiplicity, sorted; the empty product is 1.
type Mono = Vec<AtomId>;

/// A sum of products with integer coefficients. Zero has no terms.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Poly(BTreeMap<Mono, i64>);

impl Poly {
    pub(crate) fn constant(value: i64) -> Self {
        let mut terms = BTreeMap::new();
        if value != 0 {
            terms.insert(Vec::new(), value);
        }
        Self(terms)
    }

    pub(crate) fn atom(id: AtomId) -> Self {
        Self(BTreeMap::from([(vec![id], 1)]))
    }

    pub(crate) fn one() -> Self {
        Self::constant(1)
    }

    pub(crate) fn as_constant(&self) -> Option<i64> {
        match self.0.len() {
            0 => Some(0),
            1 => self.0.get(&Vec::new()).copied(),
            _ => None,
        }
    }

    pub(crate) fn is_one(&self) -> bool {
        self.as_constant() == Some(1)
    }

    /// The single atom that this is, with coefficient one.
    pub(crate) fn as_atom(&self) -> Option<AtomId> {
        match self.monomial() {
            Some((mono, 1)) if mono.len() == 1 => Some(mono[0]),
            _ => None,
        }
    }

    /// The only term, if there is exactly one.
    fn monomial(&self) -> Option<(&Mono, i64)> {
        if self.0.len() == 1 {
            self.0.iter().next().map(|(m, c)| (m, *c))
        } else {
            None
        }
    }

    pub(crate) fn atoms(&self) -> impl Iterator<Item = AtomId> + '_ {
        self.0.keys().flatten().copied()
    }

    /// The products and their coefficients.
    pub(crate) fn terms(&self) -> impl Iterator<Item = (&[AtomId], i64)> + '_ {
        self.0.iter().map(|(m, c)| (m.as_slice(), *c))
    }

    pub(crate) fn contains(&self, id: AtomId) -> bool {
        self.atoms().any(|a| a == id)
    }

    pub(crate) fn add(&self, other: &Self) -> Self {
        let mut out = self.0.clone();
        for (mono, c) in &other.0 {
            let entry = out.entry(mono.clone()).or_insert(0);
            *entry = entry.saturating_add(*c);
            if *entry == 0 {
                out.remove(mono);
            }
        }
        Self(out)
    }

    pub(crate) fn neg(&self) -> Self {
        let opposite = |(m, c): (&Mono, &i64)| (m.clone(), c.saturating_neg());
        Self(self.0.iter().map(opposite).collect())
    }

    pub(crate) fn sub(&self, other: &Self) -> Self {
        self.add(&other.neg())
    }

    /// Whether this is no size of a tensor that anybody could hold, or nothing that a person could read.
    pub(crate) fn is_large(&self) -> bool {
        self.0.len() > 32
            || self
                .0
                .iter()
                .any(|(m, c)| m.len() > 16 || c.unsigned_abs() > 1 << 48)
    }

    /// The part of the terms for which `keep` holds.
    fn filter(&self, keep: impl Fn(&Mono) -> bool) -> Self {
        Self(
            self.0
                .iter()
                .filter(|(m, _)| keep(m))
                .map(|(m, c)| (m.clone(), *c))
                .collect(),
        )
    }

    /// Whether every term contains `atom` exactly once: a multiple of it.
    pub(crate) fn is_multiple_of(&self, atom: AtomId) -> bool {
        !self.0.is_empty()
            && self
                .0
                .keys()
                .all(|m| m.iter().filter(|a| **a == atom).count() == 1)
    }
}

/// All atoms of one trace, with the equalities found so far.
#[derive(Debug, Default)]
pub(crate) struct Atoms {
    kinds: Vec<AtomKind>,
    /// `same[a] = b`: atom `a` is written as `b` from now on.
    same: Vec<AtomId>,
    /// Dimensions of the input that turned out to be widths: a layer runs along them.
    widths: Vec<AtomId>,
    /// Widths of tables that nobody has named.
    unseen: Vec<AtomId>,
}

impl Atoms {
    pub(crate) fn intern(&mut self, kind: AtomKind) -> AtomId {
        if let Some(found) = self.kinds.iter().position(|k| *k == kind) {
            return found as AtomId;
        }
        self.kinds.push(kind);
        self.same.push(self.kinds.len() as AtomId - 1);
        self.kinds.len() as AtomId - 1
    }

    pub(crate) fn kind(&self, id: AtomId) -> &AtomKind {
        &self.kinds[id as usize]
    }

    fn root(&self, mut id: AtomId) -> AtomId {
        while self.same[id as usize] != id {
            id = self.same[id as usize];
        }
        id
    }

    /// Rewrites a size with the equalities found so far.
    pub(crate) fn normal(&self, p: &Poly) -> Poly {
        if p.atoms().all(|a| self.same[a as usize] == a) {
            return p.clone();
        }
        let mut out = Poly::default();
        for (mono, c) in &p.0 {
            let mut mono: Mono = mono.iter().map(|a| self.root(*a)).collect();
            mono.sort_unstable();
            out = out.add(&Poly(BTreeMap::from([(mono, *c)])));
        }
        out
    }

    pub(crate) fn equal(&self, a: &Poly, b: &Poly) -> bool {
        self.normal(a) == self.normal(b)
    }

    /// Whether a size has a batch or sequence dimension in it.
    pub(crate) fn anchored(&self, p: &Poly) -> bool {
        p.atoms().any(|a| self.is_dim(self.root(a)))
    }

    /// Whether an atom may be the batch or the sequence.
    pub(crate) fn is_dim(&self, atom: AtomId) -> bool {
        matches!(self.kind(atom), AtomKind::Dim(..) | AtomKind::Rows(_))
            && !self.widths.contains(&atom)
    }

    /// Whether a size counts listed rows, which every rank has its own of.
    pub(crate) fn counts_rows(&self, p: &Poly) -> bool {
        p.atoms().any(|a| matches!(self.kind(a), AtomKind::Rows(_)))
    }

    /// A layer runs along this size: if it is a dimension of the input, it is a width.
    pub(crate) fn is_width(&mut self, p: &Poly) {
        if let Some(atom) = self.normal(p).as_atom()
            && self.is_dim(atom)
        {
            self.widths.push(atom);
        }
    }

    /// Whether two atoms are dimensions of different inputs, which may be equal: tokens and their mask. The lengths are
    /// compared when the model is entered.
    fn of_two_inputs(&self, x: AtomId, y: AtomId) -> bool {
        let inputs = |root: AtomId| {
            let members = (0..self.kinds.len() as AtomId).filter(move |a| self.root(*a) == root);
            members.filter_map(|a| match self.kind(a) {
                AtomKind::Dim(input, _) => Some(input),
                _ => None,
            })
        };
        let dims =
            matches!(self.kind(x), AtomKind::Dim(..)) && matches!(self.kind(y), AtomKind::Dim(..));
        dims && inputs(x).all(|input| inputs(y).all(|other| other != input))
    }

    /// Writes `x` as `y` from now on.
    fn merge(&mut self, x: AtomId, y: AtomId) {
        if self.widths.contains(&x) {
            self.widths.push(y);
        }
        self.same[x as usize] = y;
    }

    /// Dimension `d` of an input, negative from the end as long as its rank is not known.
    pub(crate) fn dim(&mut self, input: &str, d: i64) -> Poly {
        let d = usize::try_from(d).unwrap_or_else(|_| usize::MAX - d.unsigned_abs() as usize);
        Poly::atom(self.intern(AtomKind::Dim(input.to_string(), d)))
    }

    /// The rank of an input is known now: dimensions that were counted from the end are those counted from the beginning.
    pub(crate) fn rank_of(&mut self, input: &str, rank: usize) {
        for back in 1..=rank {
            let late = AtomKind::Dim(input.to_string(), usize::MAX - back);
            if let Some(late) = self.kinds.iter().position(|k| *k == late) {
                let early = self.intern(AtomKind::Dim(input.to_string(), rank - back));
                let (late, early) = (self.root(late as AtomId), self.root(early));
                if late != early {
                    self.merge(late, early);
                }
            }
        }
    }

    /// Whether only dimensions of one input are held to be equal to this one.
    pub(crate) fn alone(&self, atom: AtomId) -> bool {
        let members = (0..self.kinds.len() as AtomId).filter(|a| self.root(*a) == self.root(atom));
        members.count() == 1
    }

    /// Holds two sizes to be equal, if that is possible: exactly where a batch or sequence dimension is part of either,
    /// by assumption (candle checks it when it runs) where both are features.
    pub(crate) fn unify(&mut self, a: &Poly, b: &Poly) -> bool {
        let (a, b) = (self.normal(a), self.normal(b));
        if a == b {
            return true;
        }
        if let (Some(x), Some(y)) = (a.as_atom(), b.as_atom())
            && self.of_two_inputs(x, y)
        {
            self.merge(x, y);
            return true;
        }
        if self.anchored(&a) || self.anchored(&b) {
            return false;
        }
        // A quotient may be one of the very size that it would stand for.
        let whole = |p: &Poly| {
            let atom = p.as_atom();
            atom.is_none_or(|atom| !matches!(self.kind(atom), AtomKind::Quotient(..)))
        };
        if !whole(&a) || !whole(&b) {
            return true;
        }
        match (a.as_atom(), b.as_atom()) {
            (Some(x), _)
                if (matches!(self.kind(x), AtomKind::Feature(_))) && b.as_atom().is_some() =>
            {
                self.same[x as usize] = b.as_atom().unwrap_or(x);
            }
            (_, Some(y))
                if matches!(self.kind(y), AtomKind::Feature(_)) && a.as_atom().is_some() =>
            {
                self.same[y as usize] = a.as_atom().unwrap_or(y);
            }
            _ => {}
        }
        !(a.as_constant().is_some() && b.as_constant().is_some())
    }

    pub(crate) fn mul(&self, a: &Poly, b: &Poly) -> Poly {
        let mut out = Poly::default();
        for (m, c) in &a.0 {
            for (n, d) in &b.0 {
                let mut mono = [m.as_slice(), n.as_slice()].concat();
                mono.sort_unstable();
                out = out.add(&self.cancel(mono, c.saturating_mul(*d)));
            }
        }
        out
    }

    /// `b * (a / b)` is `a`.
    fn cancel(&self, mut mono: Mono, c: i64) -> Poly {
        for (i, id) in mono.iter().enumerate() {
            let AtomKind::Quotient(num, den) = self.kind(*id) else {
                continue;
            };
            let (Some((num, 1)), Some((den, 1))) = (num.monomial(), den.monomial()) else {
                continue;
            };
            let mut rest = mono.clone();
            rest.remove(i);
            if let Some(mut left) = without(&rest, den) {
                left.extend_from_slice(num);
                left.sort_unstable();
                mono = left;
                return self.cancel(mono, c);
            }
        }
        Poly(BTreeMap::from([(mono, c)]))
    }

    /// The exact quotient, or a symbol for it.
    pub(crate) fn div(&mut self, a: &Poly, b: &Poly) -> Poly {
        let (a, b) = (self.normal(a), self.normal(b));
        if let Some(exact) = divide(&a, &b) {
            return exact;
        }
        let id = self.intern(AtomKind::Quotient(a, b));
        Poly::atom(id)
    }

    /// How many times larger one product is than another, once what they have in common is left out; None where batch or
    /// sequence remain on either side.
    pub(crate) fn ratio(&mut self, large: &Poly, small: &Poly) -> Option<Poly> {
        let (large, small) = (self.normal(large), self.normal(small));
        let ((mut l, lc), (mut s, sc)) = match (large.monomial(), small.monomial()) {
            (Some((l, lc)), Some((s, sc))) => ((l.clone(), lc), (s.clone(), sc)),
            _ => return None,
        };
        s.retain(|atom| match l.iter().position(|other| other == atom) {
            Some(at) => {
                l.remove(at);
                false
            }
            None => true,
        });
        let (l, s) = (
            Poly(BTreeMap::from([(l, lc)])),
            Poly(BTreeMap::from([(s, sc)])),
        );
        if self.anchored(&l) || self.anchored(&s) {
            return None;
        }
        Some(self.div(&l, &s))
    }

    /// A width of a table that nobody has named: it may be one, or the size that it meets.
    pub(crate) fn unseen(&mut self, p: &Poly) {
        self.unseen.extend(p.as_atom());
    }

    /// Whether a size is such a width.
    pub(crate) fn is_unseen(&self, p: &Poly) -> bool {
        self.normal(p)
            .as_atom()
            .is_some_and(|atom| self.unseen.contains(&atom))
    }

    /// Drops the integer parameters that are added to a batch or sequence dimension (offsets into a cache, zero while
    /// training) and names them.
    pub(crate) fn without_offsets(&self, p: &Poly, dropped: &mut Vec<String>) -> Poly {
        let p = self.normal(p);
        let offset = |m: &Mono| m.len() == 1 && matches!(self.kind(m[0]), AtomKind::Param(_));
        for mono in p.0.keys().filter(|m| offset(m)) {
            if let AtomKind::Param(name) = self.kind(mono[0])
                && !dropped.contains(name)
            {
                dropped.push(name.clone());
            }
        }
        p.filter(|m| !offset(m))
    }

    /// A size as a person would write it.
    pub(crate) fn show(&self, p: &Poly) -> String {
        let p = self.normal(p);
        if p.0.is_empty() {
            return "0".into();
        }
        let mut out = String::new();
        // Terms with atoms first: `s - 1`, not `-1 + s`.
        for (mono, c) in
            p.0.iter()
                .filter(|(m, _)| !m.is_empty())
                .chain(p.0.iter().filter(|(m, _)| m.is_empty()))
        {
            let sign = if *c < 0 { "-" } else { "+" };
            if !out.is_empty() {
                let _ = write!(out, " {sign} ");
            } else if *c < 0 {
                out.push('-');
            }
            let names: Vec<String> = mono.iter().map(|a| self.name(*a)).collect();
            if mono.is_empty() || c.unsigned_abs() != 1 {
                let _ = write!(out, "{}", c.unsigned_abs());
                if !names.is_empty() {
                    out.push('*');
                }
            }
            out.push_str(&names.join("*"));
        }
        out
    }

    fn name(&self, id: AtomId) -> String {
        match self.kind(id) {
            AtomKind::Dim(of, d) if *d > usize::MAX / 2 => {
                format!("{of}.dim(-{})", usize::MAX - d)
            }
            AtomKind::Dim(of, d) => format!("{of}.dim({d})"),
            AtomKind::Param(name) | AtomKind::Feature(name) => name.clone(),
            AtomKind::Rows(_) => "rows".to_string(),
            AtomKind::Quotient(a, b) => format!("({}/{})", self.show(a), self.show(b)),
        }
    }
}

/// The multiset difference, if `part` is contained in `whole`.
fn without(whole: &Mono, part: &Mono) -> Option<Mono> {
    let mut left = whole.clone();
    for atom in part {
        let at = left.iter().position(|a| a == atom)?;
        left.remove(at);
    }
    Some(left)
}

/// The exact quotient by a single term.
pub(crate) fn divide(a: &Poly, b: &Poly) -> Option<Poly> {
    let (den, d) = b.monomial()?;
    let mut out = BTreeMap::new();
    for (mono, c) in &a.0 {
        if c.checked_rem(d)? != 0 {
            return None;
        }
        out.insert(without(mono, den)?, c / d);
    }
    Some(Poly(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feature(atoms: &mut Atoms, name: &str) -> Poly {
        Poly::atom(atoms.intern(AtomKind::Feature(name.into())))
    }

    #[test]
    fn a_quotient_cancels_with_its_divisor() {
        let mut atoms = Atoms::default();
        let (heads, kv) = (feature(&mut atoms, "heads"), feature(&mut atoms, "kv"));
        let rep = atoms.div(&heads, &kv);
        assert_eq!(atoms.mul(&kv, &rep), heads);
        assert_eq!(atoms.show(&rep), "(heads/kv)");
    }

    #[test]
    fn features_unify_but_dimensions_do_not() {
        let mut atoms = Atoms::default();
        let (a, b) = (feature(&mut atoms, "a"), feature(&mut atoms, "b"));
        let s = Poly::atom(atoms.intern(AtomKind::Dim("x".into(), 1)));
        assert!(atoms.unify(&a, &b));
        assert!(atoms.equal(&a, &b));
        assert!(!atoms.unify(&a, &s));
        assert!(!atoms.unify(&Poly::constant(2), &Poly::constant(3)));
    }

    #[test]
    fn offsets_are_dropped_and_named() {
        let mut atoms = Atoms::default();
        let s = Poly::atom(atoms.intern(AtomKind::Dim("x".into(), 1)));
        let offset = Poly::atom(atoms.intern(AtomKind::Param("index_pos".into())));
        let mut dropped = Vec::new();
        assert_eq!(atoms.without_offsets(&s.add(&offset), &mut dropped), s);
        assert_eq!(dropped, ["index_pos"]);
        assert_eq!(atoms.show(&s.sub(&Poly::one())), "x.dim(1) - 1");
    }

    #[test]
    fn division_is_exact_or_symbolic() {
        let mut atoms = Atoms::default();
        let (a, b) = (feature(&mut atoms, "a"), feature(&mut atoms, "b"));
        let ab = atoms.mul(&a, &b);
        assert_eq!(atoms.div(&ab, &b), a);
        assert_eq!(divide(&Poly::constant(6), &Poly::constant(4)), None);
    }
}
