//! Recognises the band of a mask rule, `lo <= j - i <= hi`, from its condition.

use std::collections::HashSet;
use std::rc::Rc;

use autosp_plan::plan::{Band, Bound, MaskRule};

use crate::place::sites::Site;
use crate::syntax::number;
use crate::trace::Trace;
use crate::trace::graph::{ActId, Op};
use crate::trace::size::Poly;
use crate::trace::value::{Cmp, Cond, Host, Value};

/// A set of (i, j): an interval of j - i, or everything outside of one.
struct Set {
    lo: Option<Poly>,
    hi: Option<Poly>,
    complement: bool,
}

/// The rule of a host array over (query, key).
pub(super) fn rule(trace: &Trace<'_, '_>, host: &Host, act: ActId) -> Option<MaskRule> {
    let [query, key] = host.axes.as_slice() else {
        return None;
    };
    Some(MaskRule {
        ends: (query.end_expr, key.end_expr),
        closures: (query.closure, key.closure),
        band: band(trace, host, act),
    })
}

fn band(trace: &Trace<'_, '_>, host: &Host, act: ActId) -> Option<Band> {
    let Value::Select(cond, then, other) = &host.elem else {
        return None;
    };
    let (then, other) = (number_text(then)?, number_text(other)?);
    let set = set(trace, cond, host)?;
    let (inside, outside) = if set.complement {
        (other, then)
    } else {
        (then, other)
    };
    let bound = |p: Option<&Poly>| -> Option<Option<Bound>> {
        match p {
            None => Some(None),
            Some(p) => self::bound(trace, p, host, act).map(Some),
        }
    };
    Some(Band {
        lo: bound(set.lo.as_ref())?,
        hi: bound(set.hi.as_ref())?,
        inside,
        outside,
    })
}

/// A number as a literal whose type is inferred: the element type is not written anywhere.
fn number_text(value: &Value) -> Option<String> {
    match value {
        Value::Size(s) => s.poly.as_constant().map(|v| v.to_string()),
        Value::Num(Some(v)) if *v == f64::NEG_INFINITY => Some("-1.0 / 0.0".into()),
        Value::Num(Some(v)) if *v == f64::INFINITY => Some("1.0 / 0.0".into()),
        Value::Num(Some(v)) => Some(format!("{v:?}")),
        _ => None,
    }
}

fn set(trace: &Trace<'_, '_>, cond: &Cond, host: &Host) -> Option<Set> {
    let not = |s: Set| Set {
        complement: !s.complement,
        ..s
    };
    match cond {
        Cond::Compare(l, cmp, r) => {
            // l - r, with the offset into a cache left out: it is zero inside a sharded scope
            let diff = trace.atoms.without_offsets(&l.sub(r), &mut Vec::new());
            let (i, j) = (
                Poly::atom(host.axes[0].index),
                Poly::atom(host.axes[1].index),
            );
            let rest_up = diff.sub(&j).add(&i);
            let rest_down = diff.sub(&i).add(&j);
            let free = |p: &Poly| {
                !p.contains(host.axes[0].index)
                    && !p.contains(host.axes[1].index)
                    && !trace.atoms.anchored(p)
            };
            // (j - i) + c cmp 0, or -(j - i) + c cmp 0 with the comparison turned round
            let (c, cmp) = if free(&rest_up) {
                (rest_up.neg(), *cmp)
            } else if free(&rest_down) {
                (rest_down, turned(*cmp))
            } else {
                return None;
            };
            let one = Poly::one();
            Some(match cmp {
                Cmp::Le => Set {
                    lo: None,
                    hi: Some(c),
                    complement: false,
                },
                Cmp::Lt => Set {
                    lo: None,
                    hi: Some(c.sub(&one)),
                    complement: false,
                },
                Cmp::Ge => Set {
                    lo: None,
                    hi: Some(c.sub(&one)),
                    complement: true,
                },
                Cmp::Gt => Set {
                    lo: None,
                    hi: Some(c),
                    complement: true,
                },
                Cmp::Eq => Set {
                    lo: Some(c.clone()),
                    hi: Some(c),
                    complement: false,
                },
                Cmp::Ne => Set {
                    lo: Some(c.clone()),
                    hi: Some(c),
                    complement: true,
                },
            })
        }
        Cond::Not(inner) => set(trace, inner, host).map(not),
        Cond::And(a, b) => intersect(set(trace, a, host)?, set(trace, b, host)?),
        Cond::Or(a, b) => intersect(not(set(trace, a, host)?), not(set(trace, b, host)?)).map(not),
        _ => None,
    }
}

fn turned(cmp: Cmp) -> Cmp {
    match cmp {
        Cmp::Le => Cmp::Ge,
        Cmp::Lt => Cmp::Gt,
        Cmp::Ge => Cmp::Le,
        Cmp::Gt => Cmp::Lt,
        same => same,
    }
}

/// Written as a plain interval, if the set is one: a half line is the complement of the other half line.
fn interval(s: Set) -> Option<(Option<Poly>, Option<Poly>)> {
    let one = Poly::one();
    match (s.complement, s.lo, s.hi) {
        (false, lo, hi) => Some((lo, hi)),
        (true, None, Some(hi)) => Some((Some(hi.add(&one)), None)),
        (true, Some(lo), None) => Some((None, Some(lo.sub(&one)))),
        _ => None,
    }
}

fn intersect(a: Set, b: Set) -> Option<Set> {
    let ((a_lo, a_hi), (b_lo, b_hi)) = (interval(a)?, interval(b)?);
    let one_of = |x: Option<Poly>, y: Option<Poly>| match (x, y) {
        (Some(_), Some(_)) => None,
        (x, y) => Some(x.or(y)),
    };
    Some(Set {
        lo: one_of(a_lo, b_lo)?,
        hi: one_of(a_hi, b_hi)?,
        complement: false,
    })
}

/// A bound as a constant plus expressions that stand in the closure.
fn bound(trace: &Trace<'_, '_>, p: &Poly, host: &Host, act: ActId) -> Option<Bound> {
    let mut out = Bound::default();
    let a = &trace.acts[act];
    let numbers = &trace.scope.functions[a.function].numbers;
    for (atoms, coefficient) in trace.atoms.normal(p).terms() {
        match atoms {
            [] => out.constant = coefficient,
            [atom] => {
                let body = numbers.get(host.axes[1].closure)?;
                let wanted = Poly::atom(*atom);
                let expr = number::within(numbers, body).into_iter().find(|e| {
                    matches!(numbers.get(*e), Some(syn::Expr::Path(_) | syn::Expr::Field(_)))
                        && matches!(a.values.get(e), Some(Value::Size(s)) if trace.atoms.equal(&s.poly, &wanted))
                })?;
                out.terms.push((coefficient, expr));
            }
            _ => return None,
        }
    }
    Some(out)
}

/// The interval of j - i that a rule singles out, inside or outside of it.
fn interval_of(trace: &Trace<'_, '_>, host: &Host) -> Option<(Option<Poly>, Option<Poly>)> {
    let Value::Select(cond, _, _) = &host.elem else {
        return None;
    };
    let set = set(trace, cond, host)?;
    Some((set.lo, set.hi))
}

/// Whether what lies outside of the band is hidden, and what lies inside stays as it is.
fn hides(band: &Band) -> bool {
    matches!(band.inside.as_str(), "0" | "0.0" | "-0.0")
        && band.outside != "0"
        && band.outside != "0.0"
}

/// A literal as a person reads it.
fn number(literal: &str) -> &str {
    match literal {
        "-1.0 / 0.0" => "-inf",
        "1.0 / 0.0" => "inf",
        other => other,
    }
}

/// The masks of a site, in words.
pub(super) fn describe(trace: &Trace<'_, '_>, site: &Site) -> String {
    let mut seen: HashSet<*const Host> = HashSet::new();
    let mut words = Vec::new();
    for node in &site.masks {
        let Op::Mask(host) = &trace.nodes[*node].op else {
            continue;
        };
        for host in &host.all() {
            if !seen.insert(Rc::as_ptr(host)) {
                continue;
            }
            let act = trace.nodes[*node].at.act;
            let band = rule(trace, host, act).and_then(|r| r.band);
            words.push(match (interval_of(trace, host), band) {
                (Some((None, Some(hi))), Some(band)) if hi == Poly::default() && hides(&band) => {
                    "causal: key <= query".to_string()
                }
                (Some((lo, hi)), Some(band)) => {
                    let lo = lo.map_or(String::new(), |p| format!("{} <= ", trace.atoms.show(&p)));
                    let hi = hi.map_or(String::new(), |p| format!(" <= {}", trace.atoms.show(&p)));
                    format!(
                        "{} where {lo}key - query{hi}, {} elsewhere",
                        number(&band.inside),
                        number(&band.outside)
                    )
                }
                _ => "a rule over (query, key), evaluated tile by tile".to_string(),
            });
        }
    }
    for (user, operand) in &site.keys {
        let node = trace.nodes[*user].inputs[*operand].node;
        let text = format!("keys by `{}`", trace.nodes[node].text);
        if !words.contains(&text) {
            words.push(text);
        }
    }
    if words.is_empty() {
        "none".to_string()
    } else {
        words.join(" and ")
    }
}
