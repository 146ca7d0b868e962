//! Patterns: what they bind and whether they match.

use super::Trace;
use super::graph::{ActId, At};
use super::value::{Cond, Presence, Value};
use crate::syntax::types::Ty;
use crate::syntax::{TypeDef, span};

impl<'a> Trace<'_, 'a> {
    /// Binds the names of a pattern.
    pub(super) fn bind(&mut self, act: ActId, pat: &'a syn::Pat, value: Value, by_ref: bool) {
        match pat {
            syn::Pat::Ident(i) => self.bind_name(act, i, value, by_ref),
            syn::Pat::Type(t) => self.bind(act, &t.pat, value, by_ref),
            syn::Pat::Paren(p) => self.bind(act, &p.pat, value, by_ref),
            syn::Pat::Reference(r) => self.bind(act, &r.pat, value, false),
            syn::Pat::Guard(g) => self.bind(act, &g.pat, value, by_ref),
            syn::Pat::Tuple(t) => self.bind_all(act, &t.elems, value, by_ref),
            syn::Pat::Slice(s) => self.bind_all(act, &s.elems, value, by_ref),
            syn::Pat::TupleStruct(t) => {
                let name = t
                    .path
                    .segments
                    .last()
                    .map(|s| s.ident.to_string())
                    .unwrap_or_default();
                match (name.as_str(), value) {
                    ("Some", Value::Option(_, inner)) if t.elems.len() == 1 => {
                        self.bind(act, &t.elems[0], *inner, by_ref);
                    }
                    ("Some" | "Ok", value) if t.elems.len() == 1 => {
                        self.bind(act, &t.elems[0], value, by_ref);
                    }
                    (
                        _,
                        Value::Object {
                            ty: Ty::Scope(ty),
                            path,
                        },
                    ) => {
                        let fields: Vec<(String, Ty)> = match self.scope.types.get(&ty) {
                            Some(TypeDef::Enum(variants)) => variants
                                .get(&name)
                                .map(|f| f.fields.clone())
                                .unwrap_or_default(),
                            Some(TypeDef::Struct(f)) => f.fields.clone(),
                            None => Vec::new(),
                        };
                        let at = At {
                            act,
                            expr: u32::MAX,
                            span: span(pat),
                        };
                        for (elem, (field, ty)) in t.elems.iter().zip(fields) {
                            let value = self.of_type(&ty, &format!("{path}.{name}.{field}"), at);
                            self.bind(act, elem, value, by_ref);
                        }
                    }
                    (_, other) => self.bind_rest(act, t.elems.iter(), &other, by_ref),
                }
            }
            syn::Pat::Struct(s) => {
                let at = At {
                    act,
                    expr: u32::MAX,
                    span: span(pat),
                };
                for field in &s.fields {
                    let value = match (&value, &field.member) {
                        (
                            Value::Object {
                                ty: Ty::Scope(ty),
                                path,
                            },
                            syn::Member::Named(n),
                        ) => {
                            let declared = match self.scope.types.get(ty) {
                                Some(TypeDef::Struct(f)) => f.get(&n.to_string()).cloned(),
                                _ => None,
                            };
                            let path = format!("{path}.{n}");
                            declared.map_or(Value::Opaque, |ty| self.of_type(&ty, &path, at))
                        }
                        (value, _) if super::control::has_tensor(value) => {
                            Self::lost(&crate::syntax::text(s))
                        }
                        (value, _) => value
                            .lost()
                            .map_or(Value::Opaque, |r| Value::Unknown(r.clone())),
                    };
                    self.bind(act, &field.pat, value, by_ref);
                }
            }
            syn::Pat::Or(o) => {
                if let Some(first) = o.cases.first() {
                    self.bind(act, first, value, by_ref);
                }
            }
            _ => {}
        }
    }

    fn bind_name(&mut self, act: ActId, i: &'a syn::PatIdent, value: Value, by_ref: bool) {
        // What has that name already is compared with, not bound.
        let name = i.ident.to_string();
        if name == "None" || self.scope.consts.contains_key(&name) {
            return;
        }
        // `rest @ ..` is several.
        let value = match &i.subpat {
            Some((_, p)) if matches!(**p, syn::Pat::Rest(_)) => Self::lost(&crate::syntax::text(i)),
            _ => value,
        };
        if let Some((_, p)) = &i.subpat {
            self.bind(act, p, value.clone(), by_ref);
        }
        let by_ref = by_ref || i.by_ref.is_some();
        self.declare(act, &i.ident.to_string(), value, by_ref);
    }

    fn bind_all(
        &mut self,
        act: ActId,
        pats: &'a syn::punctuated::Punctuated<syn::Pat, syn::Token![,]>,
        value: Value,
        by_ref: bool,
    ) {
        let rest = pats.iter().position(|p| matches!(p, syn::Pat::Rest(_)));
        let values = match value {
            Value::Tuple(values)
            | Value::List {
                elems: Some(values),
                ..
            } => values,
            Value::ShapeOf(node) => {
                // `[b, s, h]` or `&[b, s, h]` of `x.dims()`
                let at = self.nodes[node].at;
                (0..pats.len() as i64)
                    .map(|d| self.dim_with_rank(node, d, pats.len(), at))
                    .collect()
            }
            Value::List { elems: None, any } => vec![*any; pats.len()],
            other => return self.bind_rest(act, pats.iter(), &other, by_ref),
        };
        for (i, pat) in pats.iter().enumerate() {
            let at = match rest {
                Some(r) if i > r => (values.len() + i).checked_sub(pats.len()),
                _ => Some(i),
            };
            let value = at
                .and_then(|k| values.get(k).cloned())
                .unwrap_or(Value::Opaque);
            self.bind(act, pat, value, by_ref);
        }
    }

    fn bind_rest(
        &mut self,
        act: ActId,
        pats: impl Iterator<Item = &'a syn::Pat>,
        value: &Value,
        by_ref: bool,
    ) {
        // What a tensor or something lost is taken apart into is as unknown as the whole.
        let value = match value {
            Value::Unknown(_) | Value::Tensor(_) => value.clone(),
            other => other
                .lost()
                .map_or(Value::Opaque, |r| Value::Unknown(r.clone())),
        };
        for pat in pats {
            self.bind(act, pat, value.clone(), by_ref);
        }
    }

    /// Whether a pattern matches a value.
    pub(super) fn matches(pat: &syn::Pat, value: &Value) -> Cond {
        match (pat, value) {
            (syn::Pat::Paren(p), _) => Self::matches(&p.pat, value),
            (syn::Pat::Reference(r), _) => Self::matches(&r.pat, value),
            (syn::Pat::Guard(g), _) => match Self::matches(&g.pat, value) {
                Cond::Known(false) => Cond::Known(false),
                _ => Cond::Unknown,
            },
            (syn::Pat::Lit(l), Value::Size(s)) => match (&l.lit, s.poly.as_constant()) {
                (syn::Lit::Int(i), Some(value)) => i
                    .base10_parse::<i64>()
                    .map_or(Cond::Unknown, |v| Cond::Known(v == value)),
                _ => Cond::Unknown,
            },
            (syn::Pat::Ident(i), Value::Option(presence, _)) if i.ident == "None" => match presence
            {
                Presence::None => Cond::Known(true),
                Presence::Some => Cond::Known(false),
                Presence::Maybe => Cond::Unknown,
            },
            (syn::Pat::Ident(i), _)
                if i.subpat.is_none() && i.ident.to_string().starts_with(char::is_lowercase) =>
            {
                Cond::Known(true)
            }
            (syn::Pat::TupleStruct(t), Value::Option(presence, inner))
                if t.path.is_ident("Some") =>
            {
                match presence {
                    Presence::None => Cond::Known(false),
                    Presence::Some => t
                        .elems
                        .first()
                        .map_or(Cond::Unknown, |p| Self::matches(p, inner)),
                    Presence::Maybe => Cond::Unknown,
                }
            }
            (syn::Pat::Tuple(t), Value::Tuple(values)) => {
                let rest = t.elems.iter().position(|p| matches!(p, syn::Pat::Rest(_)));
                let at = |i: usize| match rest {
                    Some(rest) if i > rest => (values.len() + i).checked_sub(t.elems.len()),
                    _ => Some(i),
                };
                let each = t.elems.iter().enumerate();
                let all: Vec<Cond> = each
                    .filter(|(_, p)| !matches!(p, syn::Pat::Rest(_)))
                    .map(|(i, p)| match at(i).and_then(|i| values.get(i)) {
                        Some(value) => Self::matches(p, value),
                        None => Cond::Unknown,
                    })
                    .collect();
                if all.contains(&Cond::Known(false)) {
                    Cond::Known(false)
                } else if all.iter().all(|c| *c == Cond::Known(true)) {
                    Cond::Known(true)
                } else {
                    Cond::Unknown
                }
            }
            (syn::Pat::Type(t), _) => Self::matches(&t.pat, value),
            _ if always(pat) => Cond::Known(true),
            _ => Cond::Unknown,
        }
    }
}

/// Whether a pattern matches whatever it is held against.
fn always(pat: &syn::Pat) -> bool {
    match pat {
        syn::Pat::Wild(_) | syn::Pat::Rest(_) => true,
        syn::Pat::Ident(i) => {
            i.subpat.is_none() && i.ident.to_string().starts_with(char::is_lowercase)
        }
        syn::Pat::Tuple(t) => t.elems.iter().all(always),
        syn::Pat::Paren(p) => always(&p.pat),
        syn::Pat::Reference(r) => always(&r.pat),
        syn::Pat::Type(t) => always(&t.pat),
        _ => false,
    }
}
