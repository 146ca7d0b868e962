//! Calls: into the scope, into the table, into what is not known.

use super::graph::{ActId, At, Input, Reason};
use super::value::{Cond, Presence, Size, Value};
use super::{Role, Trace, param_name};
use crate::syntax::asserts::Kind;
use crate::syntax::number::WRITERS;
use crate::syntax::text;
use crate::syntax::types::Ty;
use autosp_plan::codes;

/// An evaluated argument with its expression, if it has one of its own.
pub(super) type Arg<'a> = (Value, Option<&'a syn::Expr>);

/// Methods that give their receiver, as far as an analysis of data flow goes.
const TRANSPARENT: &[&str] = &[
    "clone",
    "as_ref",
    "as_mut",
    "to_owned",
    "borrow",
    "borrow_mut",
    "into",
    "unwrap",
    "expect",
    "ok",
    "copied",
    "cloned",
    "deref",
    "as_deref",
    "lock",
    "read",
    "as_slice",
    "map_err",
    "context",
    "into_iter",
    "iter",
    "iter_mut",
    "as_str",
    "to_vec",
    "collect",
    "by_ref",
    "as_deref_mut",
    "unwrap_or_default",
    "try_into",
];

impl<'a> Trace<'_, 'a> {
    pub(super) fn method_call(&mut self, act: ActId, m: &'a syn::ExprMethodCall, at: At) -> Value {
        let receiver = self.eval(act, &m.receiver);
        let name = m.method.to_string();
        let kept = WRITERS.contains(&name.as_str())
            && matches!(
                receiver,
                Value::Option(..) | Value::List { .. } | Value::EmptyStore
            );
        if super::writes::writes(&name)
            && !kept
            && let Some(lost) = self.lose_place(act, &m.receiver, &text(m))
        {
            return lost;
        }
        if let Some(value) = self.rows_method(act, &receiver, m) {
            return value;
        }
        if let Some(value) = self.adapter(act, &receiver, &name, m, at) {
            return value;
        }
        let args: Vec<Arg<'a>> = m
            .args
            .iter()
            .map(|e| (self.eval(act, e), Some(e)))
            .collect();
        if let Value::Unknown(r) = &receiver {
            return Value::Unknown(r.clone());
        }
        match &receiver {
            Value::Asserted(_) if TRANSPARENT.contains(&name.as_str()) => receiver,
            Value::Asserted(kind) => self.asserted_call(*kind, &args, at, &text(m)),
            Value::Tensor(_) | Value::ShapeOf(_) => {
                self.tensor_method(receiver, m, &name, args, at)
            }
            Value::Object {
                ty: Ty::Scope(ty), ..
            } => {
                if let Some(function) = self.scope.method(ty, &name) {
                    return self.enter(function, at, Some(&receiver), args);
                }
                if TRANSPARENT.contains(&name.as_str()) {
                    return receiver;
                }
                self.unknown_call(&text(m), &args, at)
            }
            Value::Object {
                ty: Ty::Lib(path),
                path: object,
            } => {
                let full = format!("{path}::{name}");
                if let Some(row) = self.table.get(&full) {
                    let object = object.clone();
                    return self.apply(row, &args, at, &text(m), Some(&object));
                }
                // A cache that a sharded scope does not use is not emptied by it.
                if path.starts_with("candle_nn::kv_cache::") && name == "reset" {
                    self.acts[act].facts.push((at.expr, super::Fact::Write));
                    return Value::Unit;
                }
                // What a layer shows of its weights
                if path.starts_with("candle_nn::") || path.starts_with("candle_transformers::") {
                    let tensor = |this: &mut Self| {
                        this.of_type(&Ty::Tensor, &format!("{object}.{name}()"), at)
                    };
                    match name.as_str() {
                        "weight" | "embeddings" => return tensor(self),
                        "bias" => return Value::Option(Presence::Maybe, Box::new(tensor(self))),
                        _ => {}
                    }
                }
                if TRANSPARENT.contains(&name.as_str()) {
                    return receiver;
                }
                self.unknown_call_of(&full, &text(m), &args, at)
            }
            _ => match args.first() {
                Some((value, _)) if name == "push" && self.fills(act, &m.receiver, value, at) => {
                    Value::Unit
                }
                _ => self.builtin(act, receiver, &name, args, m, at),
            },
        }
    }

    fn tensor_method(
        &mut self,
        receiver: Value,
        m: &'a syn::ExprMethodCall,
        name: &str,
        args: Vec<Arg<'a>>,
        at: At,
    ) -> Value {
        if let Some(value) = self.tensor_builtin(&receiver, name, &args, at) {
            return value;
        }
        // `x.apply(&layer)` is `layer.forward(&x)`.
        if matches!(name, "apply" | "apply_t") {
            let subject: Arg<'a> = (receiver, Some(&m.receiver));
            return match args.into_iter().next() {
                Some((Value::Asserted(kind), _)) => {
                    self.asserted_call(kind, &[subject], at, &text(m))
                }
                Some((
                    Value::Object {
                        ty: Ty::Lib(path),
                        path: object,
                    },
                    _,
                )) => match self.table.get(&format!("{path}::forward")) {
                    Some(row) => self.apply(row, &[subject], at, &text(m), Some(&object)),
                    None => self.unknown_call(&text(m), &[subject], at),
                },
                Some((
                    Value::Object {
                        ty: Ty::Scope(ty),
                        path,
                    },
                    _,
                )) => match self.scope.applied(&ty) {
                    Some(function) => self.enter(
                        function,
                        at,
                        Some(&Value::Object {
                            ty: Ty::Scope(ty),
                            path,
                        }),
                        vec![subject],
                    ),
                    None => self.unknown_call(&text(m), &[subject], at),
                },
                _ => self.unknown_call(&text(m), &[subject], at),
            };
        }
        let full = format!("candle_core::Tensor::{name}");
        let mut all: Vec<Arg<'a>> = vec![(receiver, Some(&m.receiver))];
        all.extend(args);
        if let Some(row) = self.table.get(&full) {
            self.apply(row, &all, at, &text(m), None)
        } else {
            self.unknown_call(&text(m), &all, at)
        }
    }

    /// Operators on tensors are the methods of the same name.
    pub(super) fn operator(
        &mut self,
        name: &str,
        operands: &[Arg<'a>],
        at: At,
        what: &str,
    ) -> Value {
        match self.table.get(&format!("candle_core::Tensor::{name}")) {
            Some(row) => self.apply(row, operands, at, what, None),
            None => self.unknown_call(what, operands, at),
        }
    }

    pub(super) fn call(&mut self, act: ActId, c: &'a syn::ExprCall, at: At) -> Value {
        let syn::Expr::Path(p) = &*c.func else {
            let callee = self.eval(act, &c.func);
            let args: Vec<Arg<'a>> = c
                .args
                .iter()
                .map(|e| (self.eval(act, e), Some(e)))
                .collect();
            return self.call_value(act, callee, args, &text(c), at);
        };
        let args: Vec<Arg<'a>> = c
            .args
            .iter()
            .map(|e| (self.eval(act, e), Some(e)))
            .collect();
        let segments: Vec<String> = p
            .path
            .segments
            .iter()
            .map(|s| s.ident.to_string())
            .collect();
        if let [name] = segments.as_slice() {
            if let Some(binding) = self.lookup(act, name) {
                return self.call_value(act, binding.value, args, &text(c), at);
            }
            match name.as_str() {
                "Ok" | "Box" => return args.into_iter().next().map_or(Value::Unit, |a| a.0),
                "Some" => {
                    return Value::Option(
                        Presence::Some,
                        Box::new(args.into_iter().next().map_or(Value::Opaque, |a| a.0)),
                    );
                }
                "Err" => return Value::Never,
                _ => {}
            }
            if let Some(function) = self.scope.free(name) {
                if self.scope.has_alternatives(name) {
                    return self.unknown_call(&text(c), &args, at);
                }
                return self.enter(function, at, None, args);
            }
        }
        if let [.., ty, name] = segments.as_slice() {
            let owner = self.scope.functions[self.acts[act].function].owner.clone();
            let ty = if ty == "Self" {
                owner.unwrap_or_default()
            } else {
                ty.clone()
            };
            if let Some(function) = self.scope.method(&ty, name) {
                return self.enter_path(function, at, args);
            }
            if let Some(made) = Self::made_value(&ty, name, &args) {
                return made;
            }
            if matches!(name.as_str(), "min" | "max") && args.len() == 2 {
                return self.min_max(&args, at);
            }
        }
        let full = self.scope.names.resolve(&p.path);
        let full = full
            .strip_prefix("crate::")
            .map_or(full.clone(), String::from);
        if let Some(row) = self.table.get(&full) {
            return self.apply(row, &args, at, &text(c), None);
        }
        if let Some(function) = self.scope.library(&full) {
            if full.starts_with(crate::syntax::library::SHARED) {
                self.note_helper(function, &segments);
            }
            return self.enter(function, at, None, args);
        }
        // `Module::forward(&layer, x)`
        if segments.last().is_some_and(|s| s == "forward")
            && let Some((
                Value::Object {
                    ty: Ty::Lib(path),
                    path: object,
                },
                _,
            )) = args.first().cloned()
            && let Some(row) = self.table.get(&format!("{path}::forward"))
        {
            return self.apply(row, &args[1..], at, &text(c), Some(&object));
        }
        let layer = self.made_layer(&full, &args, c);
        layer.unwrap_or_else(|| self.unknown_call(&text(c), &args, at))
    }

    /// A value of a type of the standard library.
    fn made_value(ty: &str, name: &str, args: &[Arg<'a>]) -> Option<Value> {
        let first = || args.first().map_or(Value::Opaque, |a| a.0.clone());
        Some(match (ty, name) {
            ("u8" | "u32" | "u64" | "i64" | "usize" | "f32" | "f64", "from" | "try_from") => {
                match first() {
                    Value::Bool(c) => Value::from_bool(c),
                    other => other,
                }
            }
            ("Box" | "Arc" | "Rc" | "RefCell" | "Mutex" | "Some", "new") => first(),
            ("Vec", "new" | "with_capacity") => Value::List {
                elems: Some(Vec::new()),
                any: Box::new(Value::Opaque),
            },
            _ => return None,
        })
    }

    /// `Conv1d::new(weight, ..)`: a layer made of the model's own weights.
    fn made_layer(&self, full: &str, args: &[Arg<'a>], c: &syn::ExprCall) -> Option<Value> {
        let ty = full.strip_suffix("::new")?;
        self.table.get(&format!("{ty}::forward"))?;
        let mut tensors = Vec::new();
        for (value, _) in args {
            value.tensors(&mut tensors);
        }
        let weight = |n: &usize| matches!(self.nodes[*n].op, super::graph::Op::Field);
        let own = !tensors.is_empty()
            && tensors.iter().all(weight)
            && args.iter().all(|(value, _)| value.lost().is_none());
        own.then(|| Value::Object {
            ty: Ty::Lib(ty.to_string()),
            path: text(c),
        })
    }

    /// A helper of a library that is followed through its definition, which is checked when the program runs.
    fn note_helper(&mut self, function: usize, segments: &[String]) {
        let written = self.scope.names.written(segments);
        let helper = (written, self.scope.functions[function].name.clone());
        if !self.helpers.contains(&helper) {
            self.helpers.push(helper);
        }
    }

    /// A call through a path, `Attention::forward(&self.attn, x)` or `Self::helper(x)`.
    fn enter_path(&mut self, function: usize, at: At, mut args: Vec<Arg<'a>>) -> Value {
        let receiver = self.scope.functions[function].sig.receiver().is_some();
        let object = if receiver && !args.is_empty() {
            Some(args.remove(0).0)
        } else {
            None
        };
        self.enter(function, at, object.as_ref(), args)
    }

    /// A call of something that the analysis does not see into.
    fn asserted_call(&mut self, kind: Kind, args: &[Arg<'a>], at: At, what: &str) -> Value {
        for (value, e) in args {
            if let Some(r) = value.lost() {
                return Value::Unknown(r.clone());
            }
            if let (Value::Size(s), Some(e)) = (value, e) {
                let at = self.at(at.act, e);
                self.use_size(at, &s.clone(), Role::Unclassified(what.to_string()));
            }
        }
        if kind == Kind::Tokenwise {
            return self.apply(crate::ops::tokenwise(), args, at, what, None);
        }
        let shape = super::shape::Shape::Partial(Vec::new());
        Value::Tensor(self.node(super::graph::Op::Field, Vec::new(), shape, at, what))
    }

    /// Evaluates a function of the scope on the arguments.
    fn enter(
        &mut self,
        function: usize,
        at: At,
        receiver: Option<&Value>,
        args: Vec<Arg<'a>>,
    ) -> Value {
        let f = &self.scope.functions[function];
        if let Some(kind) = self
            .scope
            .asserted(&f.path, &[Kind::Tokenwise, Kind::Replicated])
        {
            let what = f.path.clone();
            return self.asserted_call(kind, &args, at, &what);
        }
        let mut params = Vec::new();
        let mut args = args.into_iter();
        for input in &f.sig.inputs {
            match input {
                syn::FnArg::Receiver(_) => params.push((
                    "self".to_string(),
                    receiver.cloned().unwrap_or(Value::Opaque),
                    true,
                )),
                syn::FnArg::Typed(t) => {
                    let (mut value, e) = args.next().unwrap_or((Value::Opaque, None));
                    // A reference that the function may write through, handed on.
                    let handed =
                        matches!(&*t.ty, syn::Type::Reference(r) if r.mutability.is_some());
                    if let (true, Some(e)) = (handed, e)
                        && let Some(lost) = self.lose_place(at.act, e, &text(e))
                    {
                        value = lost;
                    }
                    // A function given as an argument is called where it is used; its own parameters are unknown there.
                    params.push((
                        param_name(&t.pat),
                        value,
                        matches!(&*t.ty, syn::Type::Reference(_)),
                    ));
                }
            }
        }
        if f.sig.receiver().is_none() && receiver.is_some() {
            return Self::lost(&f.path);
        }
        // A function that (indirectly) calls itself is not followed.
        let mut up = Some(at.act);
        while let Some(act) = up {
            if self.acts[act].function == function {
                return Self::lost(&f.path);
            }
            up = self.acts[act].parent.map(|(p, _)| p);
        }
        self.activate(function, Some((at.act, at.expr)), params)
    }

    /// A call of something that is neither in the scope nor in the table. It matters only if tensors or sizes go in.
    pub(super) fn unknown_call(&mut self, what: &str, args: &[Arg<'a>], at: At) -> Value {
        let name = what.split('(').next().unwrap_or(what);
        let name = name.rsplit(['.', ' ']).next().unwrap_or(name).to_string();
        self.unknown_call_of(&name, what, args, at)
    }

    /// The same where the called function has a name of its own, such as the method of a library's type.
    fn unknown_call_of(&mut self, name: &str, what: &str, args: &[Arg<'a>], at: At) -> Value {
        let mut inputs = Vec::new();
        for (value, e) in args {
            let mut tensors = Vec::new();
            value.tensors(&mut tensors);
            let expr = e.map(|e| self.at(at.act, e).expr);
            inputs.extend(tensors.into_iter().map(|node| Input { node, expr }));
            if let Some(r) = value.lost() {
                return Value::Unknown(r.clone());
            }
            if let (Value::Size(s), Some(e)) = (value, e) {
                let at = self.at(at.act, e);
                self.use_size(at, &s.clone(), Role::Unclassified(what.to_string()));
            }
        }
        // A closure may run any number of times and write to what it captured.
        for (value, _) in args {
            if let Value::Closure(closure) = value {
                inputs.extend(self.captured(at.act, closure));
            }
        }
        if inputs.is_empty() {
            let sized = args.iter().any(|(v, _)| match v {
                Value::Size(_) => false,
                Value::Closure(c) => self.captures_size(at.act, c),
                other => self.sized(other),
            });
            return if sized {
                Self::lost(what)
            } else {
                Value::Opaque
            };
        }
        let reason = Reason {
            code: codes::UNKNOWN_CALL,
            message: format!("unknown call `{what}` on a sharded value"),
            help: if self.scope.functions.iter().any(|f| f.name == name) {
                format!(
                    "name the type that has `{name}`, in the place of `dyn` or of a type parameter"
                )
            } else {
                format!(
                    "move `{name}` into the annotated module, or write it with candle's own operations"
                )
            },
            span: Some(at.span),
        };
        let closure = args.iter().any(|(v, _)| matches!(v, Value::Closure(_)));
        let mut names = vec![name.to_string()];
        for (value, _) in args {
            if let Value::Closure(closure) = value {
                names.extend(self.calls_in(at.act, closure));
            }
        }
        names.retain(|name| self.scope.functions.iter().any(|f| f.name == *name));
        if !names.is_empty() {
            let span = Some(at.span);
            let reason = Reason {
                span,
                ..reason.clone()
            };
            self.hidden.push((names, reason));
        }
        let node = self.unknown(reason, inputs, at, what);
        if closure {
            self.reads.push(node);
        }
        Value::Tensor(node)
    }

    fn min_max(&mut self, args: &[Arg<'a>], at: At) -> Value {
        for (value, e) in args {
            if let (Value::Size(s), Some(e)) = (value, e) {
                let at = self.at(at.act, e);
                self.use_size(at, &s.clone(), Role::Valid);
            }
        }
        Value::Size(Size::of(self.fresh_feature("size")))
    }

    /// What a boolean method says of a known value.
    pub(super) fn presence(receiver: &Value, name: &str) -> Option<Value> {
        let Value::Option(presence, _) = receiver else {
            return None;
        };
        let some = match presence {
            Presence::Some => Cond::Known(true),
            Presence::None => Cond::Known(false),
            Presence::Maybe => Cond::Unknown,
        };
        match name {
            "is_some" => Some(Value::Bool(some)),
            "is_none" => Some(Value::Bool(super::eval::not(some))),
            _ => None,
        }
    }

    pub(super) fn is_transparent(name: &str) -> bool {
        TRANSPARENT.contains(&name)
    }
}
