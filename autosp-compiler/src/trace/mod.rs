//! The second room: interprets the global program, as if on one device, and writes its dataflow graph.
//!
//! Every function of the scope that a root reaches is evaluated on symbolic values, call by call. Nothing is decided here:
//! what cannot be followed becomes a value that carries its reason, and later rooms report it only if it matters.

mod adapter;
mod apply;
mod arithmetic;
mod assign;
pub(crate) mod branch;
mod builtin;
mod call;
mod cause;
mod closure;
mod control;
mod each;
mod eval;
mod fold;
pub(crate) mod graph;
mod join;
mod macros;
mod origin;
mod partial;
mod parts;
mod pattern;
mod rank;
pub(crate) mod rows;
pub(crate) mod shape;
mod shapes;
pub(crate) mod size;
mod tables;
pub(crate) mod value;
mod writes;

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use autosp_plan::codes;
use proc_macro2::Span;

use crate::ops::Table;
use crate::syntax::Scope;
use crate::syntax::types::Ty;
use graph::{ActId, At, Input, Node, NodeId, Op, Reason};
use shape::Shape;
use size::{AtomKind, Atoms, Poly};
use value::{Binding, Presence, Size, Value};

/// Calls nested deeper than this are not followed (models stay below ten).
const DEPTH: usize = 32;
/// Expressions inside expressions, through all calls; deeper ones would run out of stack (models stay below 100).
const NESTING: usize = 100;
/// Expressions evaluated in one trace; more means a program that this interpreter was not made for.
const STEPS: usize = 200_000;
/// Parts of one value, such as the elements of a list: a program doubles them with every line, if it wants to.
const PARTS: usize = 1_000;

/// How one function was evaluated once.
pub(crate) struct Act {
    pub(crate) function: usize,
    /// The activation and the expression of the call.
    pub(crate) parent: Option<(ActId, u32)>,
    pub(crate) params: Vec<(String, Value)>,
    pub(crate) result: Value,
    /// Values of the expressions, where they matter to later rooms.
    pub(crate) values: HashMap<u32, Value>,
    /// What was found out about control flow.
    pub(crate) facts: Vec<(u32, Fact)>,
    /// Calls into the scope: expression of the call to activation.
    pub(crate) calls: Vec<(u32, ActId)>,
    /// Loops over the model's parts.
    pub(crate) loops: Vec<Loop>,
    scopes: Vec<HashMap<String, Binding>>,
    returns: Vec<Value>,
}

/// A branch that the trace could decide, or a write to what is kept between calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fact {
    /// The `if` always takes its first branch.
    Then,
    /// The `if` never takes its first branch.
    Else,
    /// The `match` always takes this arm.
    Arm(usize),
    /// The `if` or `match` may go either way: where its closure is called with other values it may be decided.
    Open,
    /// The statement writes to a cache or memo, which a sharded scope does not keep.
    Write,
    /// This alternative cannot be sharded: an error if it is taken.
    Untaken(usize, String),
}

/// A `for` over a list of the model's parts.
#[derive(Debug, Clone)]
pub(crate) struct Loop {
    pub(crate) expr: u32,
    /// Tensors carried round the loop: variable, before, after.
    pub(crate) carried: Vec<(String, NodeId, NodeId)>,
    pub(crate) span: Span,
}

/// A use of a size, to be classified when placements are known.
#[derive(Debug, Clone)]
pub(crate) struct SizeUse {
    pub(crate) act: ActId,
    pub(crate) expr: u32,
    pub(crate) size: Size,
    pub(crate) role: Role,
    pub(crate) span: Span,
    /// Which of how many sizes, where the expression is a tuple of them.
    pub(crate) part: Option<(usize, usize)>,
    pub(crate) branch: Option<branch::Branch>,
    /// Which call of a closure it is in, 0 outside of closures.
    pub(crate) call: u32,
}

/// What a size is used for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// A size of this tensor.
    SizeOf(NodeId),
    /// A comparison, a float, an index, a range, host data.
    Valid,
    /// Passed to something unknown.
    Unclassified(String),
}

/// The outcome of a trace.
pub(crate) struct Trace<'s, 'a> {
    pub(crate) scope: &'s Scope<'a>,
    pub(crate) atoms: Atoms,
    pub(crate) nodes: Vec<Node>,
    pub(crate) acts: Vec<Act>,
    pub(crate) sizes: Vec<SizeUse>,
    /// Integer parameters of the root that are offsets into a cache.
    pub(crate) offsets: Vec<String>,
    /// Tensors that are read to the host: what follows depends on them in ways that are not seen.
    pub(crate) reads: Vec<NodeId>,
    /// A softmax was to be computed of something that was lost.
    pub(crate) lost_softmax: bool,
    /// Counters of loops over the tokens.
    counters: Vec<each::Counter>,
    /// Inputs whose rank was taken from their uses.
    pub(crate) assumed_ranks: Vec<String>,
    /// Helpers of libraries that were followed through a definition of our own: the path as written, and the definition.
    pub(crate) helpers: Vec<(String, String)>,
    /// Reads to the host whose rows were followed.
    pub(crate) row_reads: HashSet<NodeId>,
    /// The loops that evaluation is in: what each carries round, and what of it had changed where a round was left early.
    rounds: Vec<writes::Round>,
    /// The loops that evaluation is in: whether one passes over empty lists of rows.
    skips: Vec<bool>,
    table: &'static Table,
    /// Fields that are written while the root runs.
    written: HashSet<String>,
    fields: HashMap<String, NodeId>,
    /// What stands in a `vec!`, parsed once.
    macros: HashMap<*const syn::Macro, &'static syn::Expr>,
    depth: usize,
    nesting: usize,
    steps: usize,
    fresh: u32,
    /// The branches that evaluation is in and that may be left untaken.
    branches: Vec<branch::Branch>,
    /// Branches that are known to be untaken, and why.
    pub(crate) untaken: Vec<(branch::Branch, String)>,
    /// The `if`s whose question the configuration settles: function and expression.
    pub(crate) settled: HashSet<(usize, u32)>,
    /// What rules sharding out, whatever was followed.
    pub(crate) causes: Vec<crate::error::Refusal>,
    /// Closures that evaluation is in: a branch there cannot leave its function.
    closures: usize,
    /// The call of a closure that evaluation is in.
    call: u32,
    /// Calls that are not followed and that may come to functions of the scope: their names, and why.
    pub(crate) hidden: Vec<(Vec<String>, Reason)>,
    /// Calls of closures, with the sizes of the input that they were given.
    pub(crate) closure_calls: Vec<(ActId, u32, Vec<Vec<Poly>>)>,
}

impl<'s, 'a> Trace<'s, 'a> {
    /// Evaluates a root function on its own parameters; once more where an operation had to know how many dimensions an input
    /// has before the function reads them.
    pub(crate) fn run(
        scope: &'s Scope<'a>,
        table: &'static Table,
        root: usize,
        untaken: Vec<(branch::Branch, String)>,
    ) -> Self {
        let first = Self::once(scope, table, root, untaken.clone(), &[]);
        let ranks = first.read_too_late();
        if ranks.is_empty() {
            return first;
        }
        Self::once(scope, table, root, untaken, &ranks)
    }

    fn once(
        scope: &'s Scope<'a>,
        table: &'static Table,
        root: usize,
        untaken: Vec<(branch::Branch, String)>,
        ranks: &[(String, usize)],
    ) -> Self {
        let mut trace = Self {
            scope,
            atoms: Atoms::default(),
            nodes: Vec::new(),
            acts: Vec::new(),
            sizes: Vec::new(),
            offsets: Vec::new(),
            reads: Vec::new(),
            lost_softmax: false,
            counters: Vec::new(),
            assumed_ranks: Vec::new(),
            helpers: Vec::new(),
            row_reads: HashSet::new(),
            rounds: Vec::new(),
            skips: Vec::new(),
            table,
            written: scope.written_by(root),
            fields: HashMap::new(),
            macros: HashMap::new(),
            depth: 0,
            nesting: 0,
            steps: 0,
            fresh: 0,
            branches: Vec::new(),
            untaken,
            settled: HashSet::new(),
            causes: Vec::new(),
            closures: 0,
            call: 0,
            hidden: Vec::new(),
            closure_calls: Vec::new(),
        };
        let function = &scope.functions[root];
        let at = At {
            act: 0,
            expr: u32::MAX,
            span: function.sig.ident.span(),
        };
        let mut params = Vec::new();
        for input in &function.sig.inputs {
            match input {
                syn::FnArg::Receiver(_) => {
                    let ty = Ty::Scope(function.owner.clone().unwrap_or_default());
                    params.push((
                        "self".to_string(),
                        Value::Object {
                            ty,
                            path: "self".into(),
                        },
                        true,
                    ));
                }
                syn::FnArg::Typed(t) => {
                    let name = param_name(&t.pat);
                    let ty = scope.ty(&t.ty, function.owner.as_deref());
                    let value = trace.root_param(&ty, &name, at);
                    params.push((name, value, matches!(&*t.ty, syn::Type::Reference(_))));
                }
            }
        }
        trace.take_ranks(ranks);
        trace.activate(root, None, params);
        trace
    }

    fn root_param(&mut self, ty: &Ty, name: &str, at: At) -> Value {
        match ty {
            Ty::Tensor => {
                let shape = Shape::Partial(Vec::new());
                Value::Tensor(self.node(Op::Param(name.to_string()), Vec::new(), shape, at, name))
            }
            Ty::Int => {
                let atom = self.atoms.intern(AtomKind::Param(name.to_string()));
                Value::Size(Size::of(Poly::atom(atom)))
            }
            Ty::Option(inner) => {
                Value::Option(Presence::Maybe, Box::new(self.root_param(inner, name, at)))
            }
            other => self.of_type(other, name, at),
        }
    }

    /// A value of a declared type, found at a path.
    pub(crate) fn of_type(&mut self, ty: &Ty, path: &str, at: At) -> Value {
        match ty {
            Ty::Tensor => {
                let known = self.fields.get(path).copied();
                let node = known.unwrap_or_else(|| {
                    let node =
                        self.node(Op::Field, Vec::new(), Shape::Partial(Vec::new()), at, path);
                    self.fields.insert(path.to_string(), node);
                    node
                });
                Value::Tensor(node)
            }
            Ty::Int => {
                let atom = self.atoms.intern(AtomKind::Feature(path.to_string()));
                Value::Size(Size::of(Poly::atom(atom)))
            }
            Ty::Float => Value::Num(None),
            Ty::Bool => Value::Bool(value::Cond::Unknown),
            Ty::Scope(_) | Ty::Lib(_) => Value::Object {
                ty: ty.clone(),
                path: path.to_string(),
            },
            Ty::Option(inner) => {
                Value::Option(Presence::Maybe, Box::new(self.of_type(inner, path, at)))
            }
            Ty::List(inner) => {
                let any = self.of_type(inner, &format!("{path}[_]"), at);
                Value::List {
                    elems: None,
                    any: Box::new(any),
                }
            }
            Ty::Tuple(tys) => Value::Tuple(
                tys.iter()
                    .enumerate()
                    .map(|(i, t)| self.of_type(t, &format!("{path}.{i}"), at))
                    .collect(),
            ),
            Ty::Map(_) | Ty::Other => Value::Opaque,
        }
    }

    pub(crate) fn node(
        &mut self,
        op: Op,
        inputs: Vec<Input>,
        shape: Shape,
        at: At,
        text: &str,
    ) -> NodeId {
        self.nodes.push(Node {
            op,
            inputs,
            shape,
            at,
            touches: Vec::new(),
            text: text.to_string(),
            sizes_read: false,
            branch: self.branches.last().copied(),
            call: self.call,
        });
        self.nodes.len() - 1
    }

    /// A tensor that could not be followed.
    fn unknown(&mut self, reason: Reason, inputs: Vec<Input>, at: At, text: &str) -> NodeId {
        let message = reason.message.clone();
        self.node(
            Op::Unknown(Rc::new(reason)),
            inputs,
            Shape::Unknown(message),
            at,
            text,
        )
    }

    /// A width that nothing is known of but its place.
    fn feature(&mut self, name: String) -> Poly {
        Poly::atom(self.atoms.intern(AtomKind::Feature(name)))
    }

    fn fresh_feature(&mut self, what: &str) -> Poly {
        self.fresh += 1;
        let name = format!("{what}#{}", self.fresh);
        self.feature(name)
    }

    /// Evaluates a function; `params` are name, value and whether the parameter is a reference.
    fn activate(
        &mut self,
        function: usize,
        parent: Option<(ActId, u32)>,
        params: Vec<(String, Value, bool)>,
    ) -> Value {
        let act = self.acts.len();
        let f = &self.scope.functions[function];
        let mut vars = HashMap::new();
        for (name, value, by_ref) in &params {
            vars.insert(
                name.clone(),
                Binding {
                    value: value.clone(),
                    by_ref: *by_ref,
                },
            );
        }
        self.acts.push(Act {
            function,
            parent,
            params: params.into_iter().map(|(n, v, _)| (n, v)).collect(),
            result: Value::Unit,
            values: HashMap::new(),
            facts: Vec::new(),
            calls: Vec::new(),
            loops: Vec::new(),
            scopes: vec![vars],
            returns: Vec::new(),
        });
        if let Some((caller, expr)) = parent {
            self.acts[caller].calls.push((expr, act));
        }
        // Destructured parameters, `(q, k): (&Tensor, &Tensor)`.
        for input in &f.sig.inputs {
            if let syn::FnArg::Typed(t) = input
                && !matches!(&*t.pat, syn::Pat::Ident(_))
            {
                let value = self
                    .lookup(act, &param_name(&t.pat))
                    .map_or(Value::Opaque, |b| b.value);
                self.bind(act, &t.pat, value, true);
            }
        }
        self.depth += 1;
        // A branch in here leaves this function, whatever it was called from.
        let closures = std::mem::take(&mut self.closures);
        let tail = if self.depth > DEPTH {
            Self::lost(&f.path)
        } else {
            self.block(act, f.block)
        };
        self.closures = closures;
        self.depth -= 1;
        let mut result = tail;
        for value in std::mem::take(&mut self.acts[act].returns) {
            let at = At {
                act,
                expr: u32::MAX,
                span: f.sig.ident.span(),
            };
            result = self.join(result, value, &value::Cond::Unknown, at);
        }
        self.acts[act].result = result.clone();
        result
    }

    pub(crate) fn lookup(&self, act: ActId, name: &str) -> Option<Binding> {
        self.acts[act]
            .scopes
            .iter()
            .rev()
            .find_map(|s| s.get(name))
            .cloned()
    }

    fn declare(&mut self, act: ActId, name: &str, value: Value, by_ref: bool) {
        if let Some(scope) = self.acts[act].scopes.last_mut() {
            scope.insert(name.to_string(), Binding { value, by_ref });
        }
    }

    fn assign(&mut self, act: ActId, name: &str, value: Value) {
        if let Some(binding) = self.acts[act]
            .scopes
            .iter_mut()
            .rev()
            .find_map(|s| s.get_mut(name))
        {
            binding.value = value;
        }
    }

    fn at(&self, act: ActId, e: &syn::Expr) -> At {
        let f = &self.scope.functions[self.acts[act].function];
        At {
            act,
            expr: f.numbers.id(e),
            span: crate::syntax::span(e),
        }
    }

    /// Records a use of a size; sizes without a batch or sequence dimension need no class.
    fn use_size(&mut self, at: At, size: &Size, role: Role) {
        if self.atoms.anchored(&size.poly) {
            self.sizes.push(SizeUse {
                act: at.act,
                expr: at.expr,
                size: size.clone(),
                role,
                span: at.span,
                part: None,
                branch: self.branches.last().copied(),
                call: self.call,
            });
        }
    }

    /// Whether a value is, or holds, a size of the input: one that a shard may have a part of.
    fn sized(&self, value: &Value) -> bool {
        match value {
            Value::Size(s) => self.atoms.anchored(&s.poly),
            Value::From(s) => self.atoms.anchored(&s.poly),
            Value::Range(start, end, _) => {
                self.atoms.anchored(&start.poly) || self.atoms.anchored(&end.poly)
            }
            Value::ShapeOf(node) => match &self.nodes[*node].shape {
                Shape::Known(dims) => dims.iter().any(|d| d.anchored(&self.atoms)),
                _ => true,
            },
            Value::Tuple(values) => values.iter().any(|v| self.sized(v)),
            Value::List { elems, any } => match elems {
                Some(elems) => elems.iter().any(|v| self.sized(v)),
                None => self.sized(any),
            },
            Value::Option(Presence::None, _) => false,
            Value::Option(_, v) | Value::Copies(v, _) | Value::Each(v, _) => self.sized(v),
            Value::Select(_, a, b) => self.sized(a) || self.sized(b),
            _ => false,
        }
    }

    /// A size as a dimension: offsets into a cache are dropped and remembered.
    fn dimension(&mut self, size: &Size) -> Poly {
        let atoms = &self.atoms;
        if atoms.anchored(&size.poly) {
            atoms.without_offsets(&size.poly, &mut self.offsets)
        } else {
            size.poly.clone()
        }
    }

    /// A reason with the code for what the analysis cannot follow.
    fn reason(message: impl Into<String>, help: impl Into<String>) -> Reason {
        Reason {
            code: codes::NOT_FOLLOWED,
            message: message.into(),
            help: help.into(),
            span: None,
        }
    }
}

/// The name of a parameter; a pattern has one that no program can write.
pub(crate) fn param_name(pat: &syn::Pat) -> String {
    match pat {
        syn::Pat::Ident(i) => i.ident.to_string(),
        syn::Pat::Wild(_) => "_".into(),
        other => format!("({})", crate::syntax::text(other)),
    }
}
