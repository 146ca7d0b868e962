//! Expressions.

use super::graph::{ActId, At};
use super::value::{Closure, Cond, Presence, Size, Value};
use super::{DEPTH, NESTING, PARTS, Role, STEPS, Trace};
use crate::syntax::asserts::Kind;
use crate::syntax::text;
use crate::syntax::types::Ty;

/// Macros that give no tensor and write to no variable.
pub(super) const SPEAKING: &[&str] = &[
    "format",
    "print",
    "println",
    "eprint",
    "eprintln",
    "assert",
    "assert_eq",
    "assert_ne",
    "debug_assert",
    "debug_assert_eq",
    "debug_assert_ne",
    "trace",
    "debug",
    "info",
    "warn",
    "error",
    "span",
    "event",
    "matches",
    "concat",
    "env",
    "line",
    "file",
    "stringify",
    "ensure",
];

impl<'a> Trace<'_, 'a> {
    /// Evaluates an expression and keeps its value where a later room may ask for it.
    pub(crate) fn eval(&mut self, act: ActId, e: &'a syn::Expr) -> Value {
        self.steps += 1;
        if self.steps > STEPS {
            return Self::lost("a program of this size");
        }
        let at = self.at(act, e);
        if self.nesting > NESTING {
            return Self::lost("an expression nested so deeply");
        }
        self.nesting += 1;
        let mut value = self.eval_inner(act, e, at);
        self.nesting -= 1;
        let mut left = PARTS;
        if !value.fits(&mut left) {
            value = match value {
                Value::Bool(_) => Value::Bool(Cond::Unknown),
                _ => Self::lost("a value of so many parts"),
            };
        }
        if let Value::Unknown(reason) = &value
            && reason.span.is_none()
        {
            let reason = super::graph::Reason {
                span: Some(at.span),
                ..(**reason).clone()
            };
            value = Value::Unknown(reason.into());
        }
        if at.expr != u32::MAX && !matches!(value, Value::Opaque | Value::Unit | Value::Closure(_))
        {
            self.acts[act].values.insert(at.expr, value.clone());
        }
        value
    }

    fn eval_inner(&mut self, act: ActId, e: &'a syn::Expr, at: At) -> Value {
        match e {
            syn::Expr::Path(p) => self.path(act, p),
            syn::Expr::Lit(l) => literal(&l.lit),
            syn::Expr::Paren(p) => self.eval(act, &p.expr),
            syn::Expr::Group(g) => self.eval(act, &g.expr),
            syn::Expr::Reference(r) if r.mutability.is_some() => {
                let value = self.eval(act, &r.expr);
                self.lose_place(act, &r.expr, &text(r)).unwrap_or(value)
            }
            syn::Expr::Reference(r) => self.eval(act, &r.expr),
            syn::Expr::Try(t) => self.eval(act, &t.expr),
            syn::Expr::Unary(u) => self.unary(act, u, at),
            syn::Expr::Binary(b) => self.binary(act, b, at),
            syn::Expr::Tuple(t) => {
                Value::Tuple(t.elems.iter().map(|e| self.eval(act, e)).collect())
            }
            syn::Expr::Array(a) => self.list(act, a.elems.iter(), at),
            syn::Expr::Repeat(r) => {
                let any = self.eval(act, &r.expr);
                match self.eval(act, &r.len) {
                    Value::Size(count) if any.tensor().is_some() => {
                        Value::Copies(Box::new(any), Box::new(count))
                    }
                    _ => Value::List {
                        elems: None,
                        any: Box::new(any),
                    },
                }
            }
            syn::Expr::Cast(c) => self.cast(act, c),
            syn::Expr::Field(f) => self.field(act, f, at),
            syn::Expr::Index(i) => self.index(act, i, at),
            syn::Expr::MethodCall(m) => self.method_call(act, m, at),
            syn::Expr::Call(c) => self.call(act, c, at),
            syn::Expr::Block(b) => match &b.label {
                Some(label) => self.labelled(act, label, &b.block, &text(&b.label)),
                None => self.block(act, &b.block),
            },
            syn::Expr::Unsafe(b) => self.block(act, &b.block),
            syn::Expr::If(i) => self.if_else(act, i, at),
            syn::Expr::Match(m) => self.match_arms(act, m, at),
            syn::Expr::ForLoop(f) => self.for_loop(act, f, at),
            syn::Expr::While(w) => {
                self.eval(act, &w.cond);
                self.loop_body(act, &w.body, at);
                Value::Unit
            }
            syn::Expr::Loop(l) => {
                self.loop_body(act, &l.body, at);
                Self::lost("a `loop` with a value")
            }
            syn::Expr::Closure(c) => self.closure_value(act, c, at),
            syn::Expr::Return(r) => {
                let value = r.expr.as_ref().map_or(Value::Unit, |e| self.eval(act, e));
                if value != Value::Never {
                    self.acts[act].returns.push(value);
                }
                Value::Never
            }
            syn::Expr::Break(_) | syn::Expr::Continue(_) => {
                self.leave_round(act);
                Value::Never
            }
            syn::Expr::Assign(a) => self.assignment(act, a, at),
            syn::Expr::Range(r) => self.range(act, r),
            syn::Expr::Struct(s) => {
                let mut held = false;
                for field in &s.fields {
                    let value = self.eval(act, &field.expr);
                    held |= super::control::has_tensor(&value) || self.sized(&value);
                }
                if let Some(rest) = &s.rest {
                    let value = self.eval(act, rest);
                    held |= super::control::has_tensor(&value) || value.lost().is_some();
                }
                if held {
                    return Self::lost(&text(s));
                }
                let path = s
                    .path
                    .segments
                    .last()
                    .map(|s| s.ident.to_string())
                    .unwrap_or_default();
                Value::Object {
                    ty: Ty::Scope(path),
                    path: text(s),
                }
            }
            syn::Expr::Let(l) => {
                let value = self.eval(act, &l.expr);
                self.bind(act, &l.pat, value, true);
                Value::Bool(Cond::Unknown)
            }
            syn::Expr::Macro(m) => self.macro_call(act, &m.mac, at),
            syn::Expr::Infer(_) => Value::Opaque,
            other => Self::lost(&text(other)),
        }
    }

    fn closure_value(&mut self, act: ActId, c: &syn::ExprClosure, at: At) -> Value {
        self.closure_writes(act, c);
        Value::Closure(Closure {
            expr: at.expr,
            env: self.acts[act].scopes.clone().into(),
        })
    }

    fn path(&mut self, act: ActId, p: &'a syn::ExprPath) -> Value {
        if let Some(ident) = p.path.get_ident() {
            let name = ident.to_string();
            if let Some(binding) = self.lookup(act, &name) {
                return binding.value;
            }
            if name == "None" {
                return Value::Option(Presence::None, Box::new(Value::Opaque));
            }
            if let Some(e) = self.scope.consts.get(&name).copied() {
                // Constants may be defined by each other, and wrongly in a circle.
                if self.depth > DEPTH {
                    return Value::Opaque;
                }
                self.depth += 1;
                let value = self.eval(act, e);
                self.depth -= 1;
                return value;
            }
        }
        let last = p
            .path
            .segments
            .last()
            .map(|s| s.ident.to_string())
            .unwrap_or_default();
        // A variant of a library's type that is a layer, such as `Activation::Gelu`.
        if let [.., _, _] = p.path.segments.iter().collect::<Vec<_>>().as_slice() {
            let full = self.scope.names.resolve(&p.path);
            if let Some((ty, _)) = full.rsplit_once("::")
                && self.table.get(&format!("{ty}::forward")).is_some()
            {
                return Value::Object {
                    ty: Ty::Lib(ty.to_string()),
                    path: text(p),
                };
            }
        }
        match last.as_str() {
            "Minus1" => Value::FromEnd(-1),
            "Minus2" => Value::FromEnd(-2),
            "NEG_INFINITY" => Value::Num(Some(f64::NEG_INFINITY)),
            "INFINITY" => Value::Num(Some(f64::INFINITY)),
            "MIN" => Value::Num(Some(f64::from(f32::MIN))),
            _ => Value::Opaque,
        }
    }

    fn unary(&mut self, act: ActId, u: &'a syn::ExprUnary, at: At) -> Value {
        let value = self.eval(act, &u.expr);
        if let Some(r) = value.lost() {
            return Value::Unknown(r.clone());
        }
        match (&u.op, value) {
            (syn::UnOp::Deref(_), value) => value,
            (syn::UnOp::Not(_), Value::Bool(c)) => Value::Bool(not(c)),
            (syn::UnOp::Neg(_), Value::Num(n)) => Value::Num(n.map(|n| -n)),
            (syn::UnOp::Neg(_), Value::Size(s)) => Value::Size(Size {
                poly: s.poly.neg(),
                origins: s.origins,
            }),
            (syn::UnOp::Neg(_), Value::Tensor(n)) => {
                self.operator("neg", &[(Value::Tensor(n), Some(&*u.expr))], at, &text(u))
            }
            _ => Value::Opaque,
        }
    }

    fn binary(&mut self, act: ActId, b: &'a syn::ExprBinary, at: At) -> Value {
        let left = self.eval(act, &b.left);
        if matches!(b.op, syn::BinOp::And(_) | syn::BinOp::Or(_)) {
            let right = self.eval(act, &b.right);
            if let Some(r) = left.lost().or(right.lost()) {
                return Value::Unknown(r.clone());
            }
            let (Value::Bool(l), Value::Bool(r)) = (left, right) else {
                return Value::Bool(Cond::Unknown);
            };
            let and = matches!(b.op, syn::BinOp::And(_));
            return Value::Bool(match (and, l, r) {
                (true, Cond::Known(false), _) | (true, _, Cond::Known(false)) => Cond::Known(false),
                (false, Cond::Known(true), _) | (false, _, Cond::Known(true)) => Cond::Known(true),
                (_, Cond::Known(_), other) | (_, other, Cond::Known(_)) => other,
                (true, l, r) => Cond::And(Box::new(l), Box::new(r)),
                (false, l, r) => Cond::Or(Box::new(l), Box::new(r)),
            });
        }
        let right = self.eval(act, &b.right);
        let assign = matches!(
            b.op,
            syn::BinOp::AddAssign(_)
                | syn::BinOp::SubAssign(_)
                | syn::BinOp::MulAssign(_)
                | syn::BinOp::DivAssign(_)
        );
        let value = self.arithmetic(act, b, left, right, at);
        if assign {
            if let syn::Expr::Path(p) = &*b.left
                && let Some(ident) = p.path.get_ident()
            {
                self.assign(act, &ident.to_string(), value);
            } else {
                self.lose_place(act, &b.left, &text(b));
            }
            return Value::Unit;
        }
        value
    }

    fn cast(&mut self, act: ActId, c: &'a syn::ExprCast) -> Value {
        let value = self.eval(act, &c.expr);
        let float = matches!(self.scope.ty(&c.ty, None), Ty::Float);
        match value {
            Value::Size(s) if float => {
                let at = self.at(act, &c.expr);
                self.use_size(at, &s, Role::Valid);
                Value::Num(s.poly.as_constant().map(|v| v as f64))
            }
            Value::Bool(cond) if !float => Value::from_bool(cond),
            other => other,
        }
    }

    fn field(&mut self, act: ActId, f: &'a syn::ExprField, at: At) -> Value {
        let base = self.eval(act, &f.base);
        let name = match &f.member {
            syn::Member::Named(n) => n.to_string(),
            syn::Member::Unnamed(i) => i.index.to_string(),
        };
        match base {
            Value::Object {
                ty: Ty::Scope(ty),
                path,
            } => {
                let key = format!("{ty}::{name}");
                let said = self
                    .scope
                    .asserted(&key, &[Kind::Tokenwise, Kind::Replicated]);
                let declared = match self.scope.types.get(&ty) {
                    Some(crate::syntax::TypeDef::Struct(fields)) => fields.get(&name).cloned(),
                    Some(crate::syntax::TypeDef::Enum(_)) => None,
                    None => return Self::outside(&ty, &name),
                };
                let Some(declared) = declared else {
                    return Value::Opaque;
                };
                if let Some(kind) = said {
                    let path = format!("{path}.{name}");
                    return if kind == Kind::Replicated && declared.holds_tensor() {
                        self.of_type(&declared, &path, at)
                    } else {
                        Value::Asserted(kind)
                    };
                }
                let path = format!("{path}.{name}");
                if self.written.contains(&name) && declared.holds_tensor() {
                    return self.stored(&declared, &path, at);
                }
                self.of_type(&declared, &path, at)
            }
            Value::Tuple(values) => f_index(&f.member)
                .and_then(|i| values.get(i).cloned())
                .unwrap_or(Value::Opaque),
            other => other
                .lost()
                .map_or(Value::Opaque, |r| Value::Unknown(r.clone())),
        }
    }

    /// A field that the model writes to between calls: empty, as it is before the first call.
    fn stored(&mut self, ty: &Ty, path: &str, at: At) -> Value {
        match ty {
            Ty::Option(_) => Value::Option(Presence::None, Box::new(Value::Opaque)),
            Ty::Map(_) => Value::EmptyStore,
            Ty::List(inner) => {
                let any = self.stored(inner, path, at);
                Value::List {
                    elems: None,
                    any: Box::new(any),
                }
            }
            Ty::Tensor => {
                let reason = Self::reason(
                    format!("`{path}` is written while the model runs, so that one call depends on another"),
                    "keep what is carried between calls in an `Option`, which is `None` while training".to_string(),
                );
                self.note_state(path, at.span);
                let node = self.unknown(reason, Vec::new(), at, path);
                Value::Tensor(node)
            }
            other => self.of_type(other, path, at),
        }
    }

    fn index(&mut self, act: ActId, i: &'a syn::ExprIndex, at: At) -> Value {
        let base = self.eval(act, &i.expr);
        let index = self.eval(act, &i.index);
        if let Value::Rows(list) = &base {
            return Self::rows_index(list, &index);
        }
        if let Some(r) = base.lost() {
            return Value::Unknown(r.clone());
        }
        match (base, index) {
            (
                Value::List {
                    elems: Some(elems),
                    any,
                },
                Value::Size(s),
            ) => s
                .poly
                .as_constant()
                .and_then(|k| elems.get(k as usize).cloned())
                .unwrap_or(*any),
            (Value::ShapeOf(node), Value::Range(start, end, _)) => {
                let ends = (start.poly.as_constant(), end.poly.as_constant());
                let (Some(start), Some(end)) = ends else {
                    return Self::lost("a part of a tensor's sizes");
                };
                if end.saturating_sub(start) > PARTS as i64 {
                    return Self::lost("a part of a tensor's sizes");
                }
                let elems: Vec<Value> = (start..end).map(|k| self.dim_of(node, k, at)).collect();
                let any = Box::new(elems.first().cloned().unwrap_or(Value::Opaque));
                let elems = Some(elems);
                Value::List { elems, any }
            }
            // The whole of it
            (base, Value::Tuple(all)) if all.is_empty() => base,
            (Value::List { elems: None, any }, _) => self.any_element(*any),
            (Value::ShapeOf(node), Value::Size(s)) if s.poly.as_constant().is_some() => {
                self.dim_of(node, s.poly.as_constant().unwrap_or_default(), at)
            }
            (base, _) if super::control::has_tensor(&base) || self.sized(&base) => {
                Self::lost(&text(i))
            }
            _ => Value::Opaque,
        }
    }

    /// One element of a list of which only the kind is known. A number is none that was seen before: two elements may differ.
    fn any_element(&mut self, any: Value) -> Value {
        match any {
            // One that a shard may have a part of stays what it is: its uses are classified.
            Value::Size(s) if !self.atoms.anchored(&s.poly) => {
                let poly = self.fresh_feature("element");
                Value::Size(Size { poly, ..s })
            }
            other => other,
        }
    }

    fn range(&mut self, act: ActId, r: &'a syn::ExprRange) -> Value {
        let bound = |this: &mut Self, e: Option<&'a syn::Expr>| -> Option<Size> {
            match e.map(|e| this.eval(act, e)) {
                Some(Value::Size(s)) => Some(s),
                _ => None,
            }
        };
        let start = bound(self, r.start.as_deref());
        let end = bound(self, r.end.as_deref());
        match (&r.start, &r.end, start, end) {
            (None, None, _, _) => Value::Tuple(Vec::new()),
            (Some(_), Some(end_expr), Some(start), Some(end))
                if matches!(r.limits, syn::RangeLimits::HalfOpen(_)) =>
            {
                let at = self.at(act, end_expr);
                Value::Range(Box::new(start), Box::new(end), at.expr)
            }
            (Some(_), None, Some(start), _) => Value::From(Box::new(start)),
            (None, Some(end_expr), _, Some(end)) => {
                let at = self.at(act, end_expr);
                Value::Range(Box::new(Size::constant(0)), Box::new(end), at.expr)
            }
            _ => Value::Opaque,
        }
    }

    pub(super) fn list(
        &mut self,
        act: ActId,
        elems: impl Iterator<Item = &'a syn::Expr>,
        at: At,
    ) -> Value {
        let values: Vec<Value> = elems.map(|e| self.eval(act, e)).collect();
        let mut all = values.iter().cloned();
        let first = all.next().unwrap_or(Value::Opaque);
        let any = all.fold(first, |acc, v| self.join(acc, v, &Cond::Unknown, at));
        Value::List {
            elems: Some(values),
            any: Box::new(any),
        }
    }
}

pub(super) fn not(c: Cond) -> Cond {
    match c {
        Cond::Known(b) => Cond::Known(!b),
        Cond::Not(inner) => *inner,
        Cond::Unknown => Cond::Unknown,
        other => Cond::Not(Box::new(other)),
    }
}

fn f_index(member: &syn::Member) -> Option<usize> {
    if let syn::Member::Unnamed(i) = member {
        Some(i.index as usize)
    } else {
        None
    }
}

fn literal(lit: &syn::Lit) -> Value {
    match lit {
        syn::Lit::Int(i) if matches!(i.suffix(), "f32" | "f64") => {
            Value::Num(i.base10_digits().parse().ok())
        }
        syn::Lit::Int(i) => i
            .base10_parse::<i64>()
            .map_or(Value::Opaque, |v| Value::Size(Size::constant(v))),
        syn::Lit::Float(f) => Value::Num(f.base10_parse().ok()),
        syn::Lit::Bool(b) => Value::Bool(Cond::Known(b.value)),
        _ => Value::Opaque,
    }
}
