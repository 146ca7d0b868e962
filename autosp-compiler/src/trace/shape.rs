//! Shapes whose dimensions are ordered products of factors, and what movement operations do to them.
//!
//! A flattened `(b, s)` keeps its two factors in order, so that a later split is followed and a reshape that would mix
//! tokens of different positions is seen.

use super::size::{Atoms, Poly, divide};

/// One factor of a dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Factor {
    pub(crate) size: Poly,
    /// Elements do not depend on the index along this factor (it was made by `expand`, `cat` of clones, `repeat`).
    pub(crate) repeat: bool,
}

/// A dimension: the product of its factors, outermost first. No factor: size 1.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Dim(pub(crate) Vec<Factor>);

impl Dim {
    pub(crate) fn of(size: Poly) -> Self {
        if size.is_one() {
            Self(Vec::new())
        } else {
            Self(vec![Factor {
                size,
                repeat: false,
            }])
        }
    }

    pub(crate) fn repeated(size: Poly) -> Self {
        if size.is_one() {
            Self(Vec::new())
        } else {
            Self(vec![Factor { size, repeat: true }])
        }
    }

    pub(crate) fn size(&self, atoms: &Atoms) -> Poly {
        self.0
            .iter()
            .fold(Poly::one(), |acc, f| atoms.mul(&acc, &f.size))
    }

    pub(crate) fn is_one(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn anchored(&self, atoms: &Atoms) -> bool {
        self.0.iter().any(|f| atoms.anchored(&f.size))
    }

    /// The dimension without the factors along which nothing changes.
    pub(crate) fn unrepeated(&self) -> Self {
        Self(self.0.iter().filter(|f| !f.repeat).cloned().collect())
    }

    pub(crate) fn has_repeat(&self) -> bool {
        self.0.iter().any(|f| f.repeat)
    }
}

/// What is known of a tensor's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    Known(Vec<Dim>),
    /// The rank is not known, but these dimensions (from the left) are.
    Partial(Vec<(usize, Dim)>),
    /// One of these, depending on a condition.
    Either(Vec<Vec<Dim>>),
    /// Why it cannot be followed.
    Unknown(String),
}

impl Shape {
    pub(crate) fn known(&self) -> Option<&[Dim]> {
        match self {
            Self::Known(dims) => Some(dims),
            _ => None,
        }
    }
}

/// A target of a reshape.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Size(Poly),
    /// `()`: what is left.
    Hole,
}

/// Splits and merges factors into the target dimensions, or says why that would mix tokens.
pub(crate) fn reshape(
    atoms: &Atoms,
    input: &[Dim],
    targets: &[Target],
    rest: &Poly,
) -> Result<Vec<Dim>, String> {
    let factors: Vec<Factor> = input.iter().flat_map(|d| d.0.iter().cloned()).collect();
    let hole = targets.iter().position(|t| matches!(t, Target::Hole));
    let sizes = |range: &[Target]| -> Vec<Poly> {
        range
            .iter()
            .filter_map(|t| {
                if let Target::Size(p) = t {
                    Some(atoms.normal(p))
                } else {
                    None
                }
            })
            .collect()
    };
    let mut assumed = 0;
    let Some(hole) = hole else {
        let (dims, used) = consume(atoms, &factors, &sizes(targets), true, &mut assumed)?;
        // The total is checked when the program runs, which proves one run of widths and no more.
        if assumed > 1 {
            return Err("the widths on both sides of a token dimension change".to_string());
        }
        return if used == factors.len() {
            Ok(dims)
        } else {
            Err(leftover(atoms, &factors[used..]))
        };
    };
    if let Some(dims) = widths_round(atoms, &factors, targets, hole, rest) {
        return Ok(dims);
    }
    // What stands right of the hole is taken from the right.
    let (left, used_left) = consume(
        atoms,
        &factors,
        &sizes(&targets[..hole]),
        false,
        &mut assumed,
    )?;
    let reversed: Vec<Factor> = factors[used_left..].iter().rev().cloned().collect();
    let right_sizes: Vec<Poly> = sizes(&targets[hole + 1..]).into_iter().rev().collect();
    let (right, used_right) = consume(atoms, &reversed, &right_sizes, false, &mut assumed)?;
    let middle = factors[used_left..factors.len() - used_right].to_vec();
    let right = right
        .into_iter()
        .rev()
        .map(|d| Dim(d.0.into_iter().rev().collect()));
    Ok(left.into_iter().chain([Dim(middle)]).chain(right).collect())
}

/// A hole beside named widths in one run of widths, as in `(b, s, 3, (), width)` of `[b, s, projected]`: the names are the new
/// factors, and the hole is the rest.
fn widths_round(
    atoms: &Atoms,
    factors: &[Factor],
    targets: &[Target],
    hole: usize,
    rest: &Poly,
) -> Option<Vec<Dim>> {
    let width = |t: &&Target| matches!(t, Target::Size(p) if !atoms.anchored(p));
    let before = targets[..hole].iter().rev().take_while(width).count();
    let after = targets[hole + 1..].iter().take_while(width).count();
    if before == 0 {
        return None;
    }
    let sizes = |range: &[Target]| -> Vec<Poly> {
        let size = |t: &Target| match t {
            Target::Size(p) => Some(atoms.normal(p)),
            Target::Hole => None,
        };
        range.iter().filter_map(size).collect()
    };
    let mut assumed = 0;
    let first = sizes(&targets[..hole - before]);
    let (left, used) = consume(atoms, factors, &first, false, &mut assumed).ok()?;
    let reversed: Vec<Factor> = factors[used..].iter().rev().cloned().collect();
    let last: Vec<Poly> = sizes(&targets[hole + 1 + after..])
        .into_iter()
        .rev()
        .collect();
    let (right, used_right) = consume(atoms, &reversed, &last, false, &mut assumed).ok()?;
    let middle = &factors[used..factors.len() - used_right];
    let plain = |f: &Factor| !f.repeat && !atoms.anchored(&f.size);
    // Widths that are named one by one are matched as they stand.
    let named = sizes(&targets[hole - before..hole]);
    if assumed > 0
        || middle.is_empty()
        || !middle.iter().all(plain)
        || product_of(atoms, middle, named.first()?).is_some()
    {
        return None;
    }
    let right = right
        .into_iter()
        .rev()
        .map(|d| Dim(d.0.into_iter().rev().collect()));
    let after = sizes(&targets[hole + 1..hole + 1 + after]);
    let dims = left
        .into_iter()
        .chain(named.into_iter().map(Dim::of))
        .chain([Dim::of(rest.clone())])
        .chain(after.into_iter().map(Dim::of))
        .chain(right);
    Some(dims.collect())
}

fn leftover(atoms: &Atoms, left: &[Factor]) -> String {
    let names: Vec<String> = left.iter().map(|f| atoms.show(&f.size)).collect();
    format!("the new shape has no place for `{}`", names.join(" * "))
}

/// Matches factors to sizes in order. Batch and sequence factors must match exactly; a run of features between them is
/// regrouped freely, for its element count is checked when the program runs. `last` says that nothing follows.
fn consume(
    atoms: &Atoms,
    factors: &[Factor],
    sizes: &[Poly],
    last: bool,
    assumed: &mut usize,
) -> Result<(Vec<Dim>, usize), String> {
    let mut at = 0;
    let mut dims: Vec<Dim> = Vec::with_capacity(sizes.len());
    let mut j = 0;
    while j < sizes.len() {
        let mut rest = sizes[j].clone();
        let mut dim = Dim::default();
        while !rest.is_one() {
            let Some(factor) = factors.get(at) else {
                return Err(format!(
                    "expected more elements for `{}`",
                    atoms.show(&sizes[j])
                ));
            };
            let size = atoms.normal(&factor.size);
            if size == rest {
                rest = Poly::one();
            } else if let Some(quotient) = divide(&rest, &size) {
                rest = quotient;
            } else if let Some(count) = product_of(atoms, &factors[at..], &rest) {
                // heads * (hidden / heads) is hidden
                dim.0.extend(factors[at..at + count].iter().cloned());
                at += count;
                break;
            } else if !atoms.anchored(&size) && !atoms.anchored(&rest) {
                let (run, used, taken) =
                    features(atoms, &factors[at..], &rest, &sizes[j + 1..], last)?;
                let mut run = run.into_iter();
                dim.0.extend(run.next().unwrap_or_default().0);
                dims.push(dim);
                dims.extend(run);
                let product =
                    |sizes: &[Poly]| sizes.iter().fold(Poly::one(), |acc, p| atoms.mul(&acc, p));
                let have = Dim(factors[at..at + used].to_vec()).size(atoms);
                let want = atoms.mul(&rest, &product(&sizes[j + 1..=j + taken]));
                *assumed += usize::from(!atoms.equal(&have, &want));
                at += used;
                j += 1 + taken;
                dim = Dim::default();
                if j >= sizes.len() {
                    return Ok((dims, at));
                }
                rest = sizes[j].clone();
                continue;
            } else {
                return Err(format!(
                    "expected `{}` next, found `{}`",
                    atoms.show(&size),
                    atoms.show(&rest)
                ));
            }
            dim.0.push(factor.clone());
            at += 1;
        }
        dims.push(dim);
        j += 1;
    }
    // Features that the last size did not name (a width given under another name) belong to it.
    Ok((dims, at))
}

/// How many of the first factors multiply to a size, if any number does.
fn product_of(atoms: &Atoms, factors: &[Factor], size: &Poly) -> Option<usize> {
    let mut product = Poly::one();
    for (i, factor) in factors.iter().enumerate() {
        product = atoms.mul(&product, &atoms.normal(&factor.size));
        if atoms.equal(&product, size) {
            return Some(i + 1);
        }
    }
    None
}

/// Regroups a run of feature factors. Returns the dimensions, how many factors and how many further sizes were used.
fn features(
    atoms: &Atoms,
    factors: &[Factor],
    first: &Poly,
    further: &[Poly],
    last: bool,
) -> Result<(Vec<Dim>, usize, usize), String> {
    let run = factors
        .iter()
        .take_while(|f| !atoms.anchored(&f.size))
        .count();
    let taken = further.iter().take_while(|p| !atoms.anchored(p)).count();
    if !last && run == factors.len() && taken == further.len() && run > 1 {
        return Err(format!(
            "cannot tell which of the widths `{}` names",
            atoms.show(first)
        ));
    }
    if taken == 0 {
        return Ok((vec![Dim(factors[..run].to_vec())], run, 0));
    }
    // Several names for several widths: the names given are taken as the new factors.
    let dims = std::iter::once(first)
        .chain(&further[..taken])
        .map(|p| Dim::of(p.clone()))
        .collect();
    Ok((dims, run, taken))
}

/// `a` broadcast against `b` from the right; `None` where sizes of batch or sequence contradict each other.
pub(crate) fn broadcast(atoms: &mut Atoms, a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, String> {
    let rank = a.len().max(b.len());
    let mut out = Vec::with_capacity(rank);
    for i in 0..rank {
        let left = (i + a.len()).checked_sub(rank).map(|k| &a[k]);
        let right = (i + b.len()).checked_sub(rank).map(|k| &b[k]);
        out.push(match (left, right) {
            (Some(l), Some(r)) if l == r => l.clone(),
            (Some(l), Some(r)) if r.is_one() => l.clone(),
            (Some(l), Some(r)) if l.is_one() => r.clone(),
            (Some(l), Some(r)) => {
                let (p, q) = (l.size(atoms), r.size(atoms));
                if let Some(dim) = one_or_all(atoms, (l, &p), (r, &q)) {
                    out.push(dim);
                    continue;
                }
                if !atoms.unify(&p, &q) {
                    return Err(format!(
                        "expected size `{}` in dimension {i}, found `{}`",
                        atoms.show(&p),
                        atoms.show(&q)
                    ));
                }
                // Keep the finer description; elements repeat only where they repeat in both.
                let finer = if l.0.len() >= r.0.len() { l } else { r };
                Dim(finer
                    .0
                    .iter()
                    .map(|f| Factor {
                        size: f.size.clone(),
                        repeat: false,
                    })
                    .collect())
            }
            (Some(d), None) | (None, Some(d)) => d.clone(),
            (None, None) => Dim::default(),
        });
    }
    Ok(out)
}

/// Sizes that differ can still be broadcast if one of them is one, which is checked when the program runs: rows of a batch
/// beside rows and heads, or a table whose sizes nobody has named.
fn one_or_all(atoms: &mut Atoms, (l, p): (&Dim, &Poly), (r, q): (&Dim, &Poly)) -> Option<Dim> {
    let anchored = (atoms.anchored(p), atoms.anchored(q));
    let wide = match anchored {
        (true, false) if atoms.is_unseen(q) => l,
        (false, true) if atoms.is_unseen(p) => r,
        (true, true) if !atoms.equal(p, q) => {
            if divide(&atoms.normal(p), &atoms.normal(q)).is_some_and(|x| !atoms.anchored(&x)) {
                l
            } else if divide(&atoms.normal(q), &atoms.normal(p))
                .is_some_and(|x| !atoms.anchored(&x))
            {
                r
            } else {
                return None;
            }
        }
        _ => return None,
    };
    let factors = wide.0.iter().map(|f| Factor {
        size: f.size.clone(),
        repeat: false,
    });
    Some(Dim(factors.collect()))
}

/// A shape as a person would write it: `[x.dim(0), heads, x.dim(1), head_dim]`.
pub(crate) fn show(atoms: &Atoms, dims: &[Dim]) -> String {
    let names: Vec<String> = dims
        .iter()
        .map(|d| match d.0.len() {
            0 => "1".to_string(),
            1 => atoms.show(&d.0[0].size),
            _ => format!(
                "({})",
                d.0.iter()
                    .map(|f| atoms.show(&f.size))
                    .collect::<Vec<_>>()
                    .join(" * ")
            ),
        })
        .collect();
    format!("[{}]", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::size::AtomKind;
    use super::*;

    fn reshape(atoms: &Atoms, input: &[Dim], targets: &[Target]) -> Result<Vec<Dim>, String> {
        super::reshape(atoms, input, targets, &Poly::constant(7))
    }

    struct World {
        atoms: Atoms,
        b: Poly,
        s: Poly,
        heads: Poly,
        width: Poly,
        hidden: Poly,
    }

    fn world() -> World {
        let mut atoms = Atoms::default();
        let mut dim = |d| Poly::atom(atoms.intern(AtomKind::Dim("x".into(), d)));
        let (b, s) = (dim(0), dim(1));
        let mut feature = |n: &str| Poly::atom(atoms.intern(AtomKind::Feature(n.into())));
        let (heads, width, hidden) = (feature("heads"), feature("width"), feature("hidden"));
        World {
            atoms,
            b,
            s,
            heads,
            width,
            hidden,
        }
    }

    fn dims(sizes: &[&Poly]) -> Vec<Dim> {
        sizes.iter().map(|p| Dim::of((*p).clone())).collect()
    }

    fn targets(sizes: &[&Poly]) -> Vec<Target> {
        sizes.iter().map(|p| Target::Size((*p).clone())).collect()
    }

    #[test]
    fn heads_split_and_merge_again() {
        let w = world();
        let x = dims(&[&w.b, &w.s, &w.hidden]);
        let split = reshape(&w.atoms, &x, &targets(&[&w.b, &w.s, &w.heads, &w.width])).unwrap();
        assert_eq!(split, dims(&[&w.b, &w.s, &w.heads, &w.width]));
        let merged = reshape(&w.atoms, &split, &targets(&[&w.b, &w.s, &w.hidden])).unwrap();
        assert_eq!(merged.len(), 3);
        assert_eq!(merged[2].0.len(), 2);
    }

    #[test]
    fn a_missing_transpose_is_seen() {
        let w = world();
        let y = dims(&[&w.b, &w.heads, &w.s, &w.width]);
        let err = reshape(&w.atoms, &y, &targets(&[&w.b, &w.s, &w.hidden])).unwrap_err();
        assert!(
            err.contains("expected `heads` next, found `x.dim(1)`"),
            "{err}"
        );
    }

    #[test]
    fn flattened_tokens_split_back() {
        let w = world();
        let bs = w.atoms.mul(&w.b, &w.s);
        let flat = reshape(
            &w.atoms,
            &dims(&[&w.b, &w.s, &w.hidden]),
            &targets(&[&bs, &w.hidden]),
        )
        .unwrap();
        assert_eq!(flat[0].0.len(), 2);
        let back = reshape(&w.atoms, &flat, &targets(&[&w.b, &w.s, &w.hidden])).unwrap();
        assert_eq!(back, dims(&[&w.b, &w.s, &w.hidden]));
        // s before b would interleave the tokens of different rows
        assert!(reshape(&w.atoms, &flat, &targets(&[&w.s, &w.b, &w.hidden])).is_err());
    }

    #[test]
    fn a_hole_takes_what_is_left() {
        let w = world();
        let x = dims(&[&w.b, &w.s, &w.heads, &w.width]);
        let targets = [
            Target::Size(w.b.clone()),
            Target::Size(w.s.clone()),
            Target::Hole,
        ];
        let out = reshape(&w.atoms, &x, &targets).unwrap();
        assert_eq!(out[2].0.len(), 2);
        let targets = [Target::Hole, Target::Size(w.width.clone())];
        let out = reshape(&w.atoms, &x, &targets).unwrap();
        assert_eq!((out[0].0.len(), out[1].0.len()), (3, 1));
    }

    #[test]
    fn repeated_heads_keep_their_flag() {
        let mut w = world();
        let kv = Poly::atom(w.atoms.intern(AtomKind::Feature("kv".into())));
        let rep = w.atoms.div(&w.heads.clone(), &kv);
        let x = vec![
            Dim::of(w.b.clone()),
            Dim::of(kv.clone()),
            Dim::repeated(rep),
            Dim::of(w.s.clone()),
            Dim::of(w.width.clone()),
        ];
        let out = reshape(&w.atoms, &x, &targets(&[&w.b, &w.heads, &w.s, &w.width]));
        let out = out.unwrap();
        assert!(out[1].has_repeat());
        assert_eq!(out[1].unrepeated(), Dim::of(kv));
    }
}
