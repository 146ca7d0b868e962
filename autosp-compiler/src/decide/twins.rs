//! Turns what was found about each evaluation of each function into edits, and evaluations that agree into one twin.

use std::collections::HashMap;

use autosp_plan::codes;
use autosp_plan::plan::{Action, Edit, Kind, Plan, Twin};

use super::blocks::Found;
use super::loss::Loss;
use super::mask;
use crate::error::Refusal;
use crate::ops::{Recorded, Row};
use crate::place::{Conversion, Place, Placed};
use crate::syntax::number;
use crate::trace::graph::{ActId, Node, NodeId, Op};
use crate::trace::value::{Presence, Value};
use crate::trace::{Fact, SizeUse, Trace};

/// Adds the twins that a root needs and returns the root's own.
pub(super) fn build(
    plan: &mut Plan,
    trace: &Trace<'_, '_>,
    placed: &Placed,
    site_ids: &[usize],
    elided: &[(ActId, u32, u32)],
    blocks: &[Found],
    loss: Option<&Loss>,
) -> Result<usize, Refusal> {
    let mut builder = Builder {
        trace,
        placed,
        loss,
        edits: vec![Vec::new(); trace.acts.len()],
        of: None,
        asked: Vec::new(),
    };
    builder.facts();
    builder.nodes(site_ids)?;
    builder.recorded(blocks, elided);
    builder.of = None;
    super::twice::check(trace, placed, &builder.asked)?;
    for u in &placed.valid {
        builder.valid(u)?;
    }
    for (act, outer, inner) in elided {
        builder.push(*act, *outer, Action::Inner(*inner));
    }
    for (act, call, tiled) in super::tiles::find(trace, placed, blocks) {
        builder.push(act, call, Action::Tiled(tiled));
    }
    for block in blocks {
        if let Some((act, call, checkpoint)) = &block.scope {
            builder.push(*act, *call, Action::Checkpoint(checkpoint.clone()));
        }
    }
    builder.finish(plan)
}

struct Builder<'t, 's, 'a> {
    trace: &'t Trace<'s, 'a>,
    placed: &'t Placed,
    /// How a twin for the loss differs.
    loss: Option<&'t Loss>,
    edits: Vec<Vec<Edit>>,
    /// The tensor that edits are made for.
    of: Option<NodeId>,
    /// What tensors in closures ask for.
    asked: Vec<(NodeId, Edit)>,
}

impl Builder<'_, '_, '_> {
    fn push(&mut self, act: ActId, expr: u32, action: Action) {
        let edit = Edit { expr, action };
        if let Some(node) = self.of.filter(|n| self.trace.nodes[*n].call > 0) {
            self.asked.push((node, edit.clone()));
        }
        if expr != u32::MAX && !self.edits[act].contains(&edit) {
            self.edits[act].push(edit);
        }
    }

    fn facts(&mut self) {
        for (act, a) in self.trace.acts.iter().enumerate() {
            for (expr, fact) in &a.facts {
                // A branch that one evaluation takes and another does not (the body of a closure) stays as it is written.
                let two = |f: &Fact| match fact {
                    Fact::Untaken(..) => !matches!(f, Fact::Untaken(..) | Fact::Open),
                    _ => true,
                };
                if a.facts
                    .iter()
                    .any(|(e, f)| e == expr && f != fact && two(f))
                {
                    continue;
                }
                let action = match fact {
                    Fact::Open => continue,
                    Fact::Then => Action::Then,
                    Fact::Else => Action::Else,
                    Fact::Arm(k) => Action::Arm(*k),
                    Fact::Write => Action::Drop,
                    Fact::Untaken(k, why) => Action::Untaken(*k, why.clone()),
                };
                self.push(act, *expr, action);
            }
        }
    }

    fn nodes(&mut self, site_ids: &[usize]) -> Result<(), Refusal> {
        let (trace, placed) = (self.trace, self.placed);
        for (site, id) in placed.sites.iter().zip(site_ids) {
            for (node, action) in [
                (site.matmul, Action::Scores(*id)),
                (site.softmax, Action::Softmax),
            ] {
                let at = trace.nodes[node].at;
                self.of = Some(node);
                self.push(at.act, at.expr, action);
            }
            self.of = Some(site.out);
            let at = trace.nodes[site.out].at;
            let method = matches!(self.expr(at.act, at.expr), Some(syn::Expr::MethodCall(_)));
            if !method {
                self.push(at.act, at.expr, Action::Attend);
            }
            for node in &site.masks {
                if let Op::Mask(host) = &trace.nodes[*node].op {
                    let at = trace.nodes[*node].at;
                    self.of = Some(*node);
                    self.push(at.act, at.expr, Action::Mask);
                    for host in host.all() {
                        let rule = mask::rule(trace, &host, at.act);
                        let (Some(rule), Some(expr)) = (rule, host.expr) else {
                            return Err(Refusal::new(codes::MASK, at.span, format!("cannot follow the rule behind `{}`", trace.nodes[*node].text))
                                .help("build the mask from `(0..t).flat_map(|i| (0..t).map(move |j| ..)).collect()`"));
                        };
                        self.push(at.act, expr, Action::Rule(rule));
                    }
                }
            }
        }
        for (node, n) in trace.nodes.iter().enumerate() {
            self.of = Some(node);
            let head = self.loss.and_then(|loss| loss.tail.heads.get(&node));
            let replaced = match head {
                Some(head) => Some((*head).to_string()),
                None => n.row().and_then(|r| r.twin.clone()),
            };
            if let (Some(twin), false) = (replaced, placed.place[node].lazy()) {
                self.push(n.at.act, n.at.expr, Action::Replace(twin));
            }
        }
        for (node, conversion) in &placed.conversions {
            let n = &trace.nodes[*node];
            self.of = Some(*node);
            match conversion {
                Conversion::Pick { dim } => {
                    let action = if self.loss.is_some_and(|loss| loss.fold) {
                        Action::Fold(*dim)
                    } else {
                        Action::Pick(*dim)
                    };
                    self.push(n.at.act, n.at.expr, action);
                }
                Conversion::Draw { rows, tokens } => {
                    self.push(n.at.act, n.at.expr, Action::Draw(*rows, *tokens));
                }
                Conversion::Sequence => {
                    let name = n.row().map_or("", Row::name);
                    let path = format!("sequence::{name}");
                    self.push(n.at.act, n.at.expr, Action::Replace(path));
                }
                Conversion::Slice { input, dim } => {
                    let expr = operand(n, *input, "cut the table")?;
                    self.push(n.at.act, expr, Action::Slice(*dim));
                }
                Conversion::Keys { input, all_queries } => {
                    let expr = operand(n, *input, "gather the mask")?;
                    self.push(n.at.act, expr, Action::Keys(*all_queries));
                }
            }
        }
        Ok(())
    }

    /// The operations of blocks that have a form for a block's tape.
    fn recorded(&mut self, blocks: &[Found], elided: &[(ActId, u32, u32)]) {
        let trace = self.trace;
        let calls = blocks.iter().filter_map(|block| block.scope.as_ref());
        let inside: Vec<ActId> = calls
            .flat_map(|(act, call, _)| {
                let calls = trace.acts[*act].calls.iter();
                calls
                    .filter(move |(e, _)| e == call)
                    .map(|(_, callee)| *callee)
            })
            .collect();
        for (node, n) in trace.nodes.iter().enumerate() {
            let Some(how) = n.row().and_then(|row| row.recorded) else {
                continue;
            };
            let mut within = Some(n.at.act);
            while let Some(act) = within.filter(|act| !inside.contains(act)) {
                within = trace.acts[act]
                    .parent
                    .filter(|(parent, call)| !self.left_out(elided, *parent, *call))
                    .map(|(parent, _)| parent);
            }
            let lazy = |node: NodeId| self.placed.place[node].lazy();
            if within.is_none()
                || lazy(node)
                || n.inputs.iter().any(|input| lazy(input.node))
                || self.left_out(elided, n.at.act, n.at.expr)
            {
                continue;
            }
            let fits = match (self.expr(n.at.act, n.at.expr), how) {
                (Some(syn::Expr::MethodCall(m)), Recorded::Method) => {
                    n.row().is_some_and(|row| m.method == row.name())
                }
                (Some(syn::Expr::MethodCall(_) | syn::Expr::Binary(_)), Recorded::Operator) => {
                    n.inputs.len() == 2
                }
                _ => false,
            };
            if fits {
                self.of = Some(node);
                self.push(n.at.act, n.at.expr, Action::Recorded);
            }
        }
    }

    /// Whether the expression is in one that is left out.
    fn left_out(&self, elided: &[(ActId, u32, u32)], act: ActId, expr: u32) -> bool {
        let numbers = &self.trace.scope.functions[self.trace.acts[act].function].numbers;
        let holds = |outer: u32| {
            let outer = numbers.get(outer);
            outer.is_some_and(|e| number::within(numbers, e).contains(&expr))
        };
        let mut here = elided.iter().filter(|(of, ..)| *of == act);
        here.any(|(_, outer, inner)| holds(*outer) && !holds(*inner))
    }

    fn expr(&self, act: ActId, expr: u32) -> Option<&syn::Expr> {
        self.trace.scope.functions[self.trace.acts[act].function]
            .numbers
            .get(expr)
    }

    /// Wraps the parts of a size expression that are multiples of the sequence.
    fn valid(&mut self, u: &SizeUse) -> Result<(), Refusal> {
        let refuse = || {
            Refusal::new(
                codes::SIZE_USE,
                u.span,
                format!(
                    "cannot turn the size `{}` of a shard into one of the sequence",
                    self.trace.atoms.show(&u.size.poly)
                ),
            )
            .help("compute it from the tensor's own dimension where it is used")
        };
        if let Some((part, count)) = u.part {
            let size = self.trace.atoms.normal(&u.size.poly);
            let size = self.trace.atoms.without_offsets(&size, &mut Vec::new());
            if !size.is_multiple_of(self.placed.sequence) {
                return Err(refuse());
            }
            self.valid_part(u, part, count);
            return Ok(());
        }
        let numbers = &self.trace.scope.functions[self.trace.acts[u.act].function].numbers;
        let e = numbers.get(u.expr).ok_or_else(refuse)?;
        let mut out = Vec::new();
        if self.wrap(u.act, e, &mut out) {
            for expr in out {
                self.push(u.act, expr, Action::Valid);
            }
            Ok(())
        } else {
            Err(refuse())
        }
    }

    /// One more size of a tuple that is a valid one.
    fn valid_part(&mut self, u: &SizeUse, part: usize, count: usize) {
        let known = self.edits[u.act]
            .iter_mut()
            .filter(|e| e.expr == u.expr)
            .find_map(|e| match &mut e.action {
                Action::ValidParts(_, parts) => Some(parts),
                _ => None,
            });
        match known {
            Some(parts) if parts.contains(&part) => {}
            Some(parts) => parts.push(part),
            None => self.push(u.act, u.expr, Action::ValidParts(count, vec![part])),
        }
    }

    /// Collects the outermost expressions that are multiples of the sequence; false if one is hidden in a variable.
    fn wrap(&self, act: ActId, e: &syn::Expr, out: &mut Vec<u32>) -> bool {
        let a = &self.trace.acts[act];
        let numbers = &self.trace.scope.functions[a.function].numbers;
        let id = numbers.id(e);
        let sequence = self.placed.sequence;
        if let Some(Value::Size(s)) = a.values.get(&id) {
            let poly = self.trace.atoms.normal(&s.poly);
            if !poly.contains(sequence) {
                return true;
            }
            let mut dropped = Vec::new();
            let poly = self.trace.atoms.without_offsets(&poly, &mut dropped);
            let leaf = matches!(
                e,
                syn::Expr::Path(_)
                    | syn::Expr::MethodCall(_)
                    | syn::Expr::Try(_)
                    | syn::Expr::Field(_)
                    | syn::Expr::Index(_)
            );
            if poly.is_multiple_of(sequence) && leaf {
                out.push(id);
                return true;
            }
        }
        match e {
            syn::Expr::Binary(b) => self.wrap(act, &b.left, out) && self.wrap(act, &b.right, out),
            syn::Expr::Paren(p) => self.wrap(act, &p.expr, out),
            syn::Expr::Cast(c) => self.wrap(act, &c.expr, out),
            syn::Expr::Reference(r) => self.wrap(act, &r.expr, out),
            syn::Expr::Range(r) => {
                let mut ends = r.start.iter().chain(&r.end);
                ends.all(|e| self.wrap(act, e, out))
            }
            syn::Expr::Lit(_) => true,
            _ => false,
        }
    }

    fn kind(&self, value: &Value) -> Kind {
        match value {
            Value::Tensor(n) => self.node_kind(*n),
            Value::Option(Presence::Some | Presence::Maybe, inner) => self.kind(inner),
            // One type stands for all tensors of a tuple; where they differ, the compiler of the twin says so.
            Value::Tuple(values) => {
                let holds = |v: &&Value| {
                    let mut tensors = Vec::new();
                    v.tensors(&mut tensors);
                    !tensors.is_empty()
                };
                let mut kinds = values.iter().filter(holds).map(|v| self.kind(v));
                let first = kinds.next().unwrap_or(Kind::Data);
                if kinds.all(|k| k == first) {
                    first
                } else {
                    Kind::Data
                }
            }
            _ => Kind::Data,
        }
    }

    fn node_kind(&self, node: NodeId) -> Kind {
        if self.loss.is_some_and(|loss| loss.tail.lazy.contains(&node)) {
            return Kind::Logits;
        }
        match self.placed.place[node] {
            Place::Scores => Kind::Scores,
            Place::Weights => Kind::Weights,
            Place::Mask => Kind::Mask,
            _ => Kind::Data,
        }
    }

    /// Types written beside variables that hold something else in the twin.
    fn untyped(&mut self, act: ActId) {
        struct Find<'n, 'a>(
            Vec<(u32, bool)>,
            Vec<u32>,
            &'n number::Numbers<'a>,
            Vec<u32>,
        );
        impl<'a> syn::visit::Visit<'a> for Find<'_, 'a> {
            fn visit_local(&mut self, l: &'a syn::Local) {
                if let (syn::Pat::Type(_), Some(init)) = (&l.pat, &l.init) {
                    let id = self.2.id(&init.expr);
                    let rules = number::within(self.2, &init.expr);
                    if self.0.iter().any(|(e, lazy)| *e == id && *lazy)
                        || self.3.iter().any(|r| rules.contains(r))
                    {
                        self.1.push(id);
                    }
                }
                syn::visit::visit_local(self, l);
            }
        }
        let a = &self.trace.acts[act];
        let f = &self.trace.scope.functions[a.function];
        let ruled: Vec<u32> = self.edits[act]
            .iter()
            .filter(|e| matches!(e.action, Action::Rule(_)))
            .map(|e| e.expr)
            .collect();
        let lazy: Vec<(u32, bool)> = a
            .values
            .iter()
            .map(|(e, v)| (*e, self.kind(v) != Kind::Data || ruled.contains(e)))
            .collect();
        let mut find = Find(lazy, Vec::new(), &f.numbers, ruled);
        syn::visit::Visit::visit_block(&mut find, f.block);
        for expr in find.1 {
            self.push(act, expr, Action::Untyped);
        }
    }

    /// Names the twins, callees first, and hands them to the plan.
    fn finish(mut self, plan: &mut Plan) -> Result<usize, Refusal> {
        let mut twin_of: HashMap<ActId, usize> = HashMap::new();
        for act in (0..self.trace.acts.len()).rev() {
            let calls = self.trace.acts[act].calls.clone();
            let mut named: HashMap<u32, Option<usize>> = HashMap::new();
            for (expr, callee) in calls {
                // A call that is evaluated again, in a closure, has one name.
                let twin = twin_of.get(&callee).copied();
                let known = *named.entry(expr).or_insert(twin);
                if let Some(twin) = twin.or(known) {
                    let name = plan.twins[twin].name.clone();
                    if known != twin_of.get(&callee).copied() {
                        return Err(Refusal::new(
                            codes::TWO_WAYS,
                            crate::syntax::span(
                                &self.trace.scope.functions[self.trace.acts[act].function]
                                    .sig
                                    .ident,
                            ),
                            "one call stands for two different evaluations",
                        )
                        .help("call the function in two places"));
                    }
                    self.push(act, expr, Action::Twin(name));
                }
            }
            self.untyped(act);
            let needed = act == 0 || !self.edits[act].is_empty() || self.lazy_signature(act);
            if needed {
                let twin = self.twin(plan, act);
                twin_of.insert(act, twin);
            }
        }
        Ok(twin_of[&0])
    }

    fn lazy_signature(&self, act: ActId) -> bool {
        let a = &self.trace.acts[act];
        a.params.iter().any(|(_, v)| self.kind(v) != Kind::Data)
            || self.kind(&a.result) != Kind::Data
    }

    fn twin(&mut self, plan: &mut Plan, act: ActId) -> usize {
        let a = &self.trace.acts[act];
        let f = &self.trace.scope.functions[a.function];
        let mut edits = std::mem::take(&mut self.edits[act]);
        drop_moved(&mut edits, &f.numbers);
        // A call is renamed before it is put into a scope.
        edits.sort_by_key(|e| {
            (
                e.expr,
                matches!(e.action, Action::Checkpoint(_) | Action::Tiled(_)),
            )
        });
        let params = a
            .params
            .iter()
            .filter(|(n, _)| n != "self")
            .map(|(_, v)| self.kind(v))
            .collect();
        let mut twin = Twin {
            function: f.path.clone(),
            name: String::new(),
            place: f.place,
            params,
            result: self.kind(&a.result),
            edits,
        };
        for (i, other) in plan.twins.iter().enumerate() {
            if (Twin {
                name: String::new(),
                ..other.clone()
            }) == twin
            {
                return i;
            }
        }
        let clashes = |name: &str| {
            let in_plan = plan.twins.iter().any(|t| {
                t.function.rsplit_once("::").map(|x| x.0) == f.path.rsplit_once("::").map(|x| x.0)
                    && t.name == name
            });
            let in_scope = self
                .trace
                .scope
                .functions
                .iter()
                .any(|g| g.owner == f.owner && g.name == name);
            in_plan || in_scope
        };
        let mut base = format!("{}__sp", f.name);
        if self.trace.scope.is_library(a.function) {
            base = format!("{}::{base}", crate::syntax::library::MODULE);
        }
        twin.name.clone_from(&base);
        let mut k = 1;
        while clashes(&twin.name) {
            k += 1;
            twin.name = format!("{base}{k}");
        }
        plan.twins.push(twin);
        plan.twins.len() - 1
    }
}

/// The expression of an operand, for a conversion.
fn operand(n: &Node, input: usize, what: &str) -> Result<u32, Refusal> {
    n.inputs[input].expr.ok_or_else(|| {
        Refusal::new(
            codes::NOT_FOLLOWED,
            n.at.span,
            format!("cannot {what} in `{}`", n.text),
        )
        .help("give each operand as an expression of its own")
    })
}

/// Edits inside an expression that is left out say nothing.
fn drop_moved(edits: &mut Vec<Edit>, numbers: &number::Numbers<'_>) {
    let mut gone: Vec<u32> = Vec::new();
    for edit in edits.iter() {
        let Some(e) = numbers.get(edit.expr) else {
            continue;
        };
        match &edit.action {
            Action::Inner(inner) => {
                let kept = numbers
                    .get(*inner)
                    .map(|e| number::within(numbers, e))
                    .unwrap_or_default();
                gone.extend(
                    number::within(numbers, e)
                        .into_iter()
                        .filter(|id| *id != edit.expr && !kept.contains(id)),
                );
            }
            Action::Drop => gone.extend(
                number::within(numbers, e)
                    .into_iter()
                    .filter(|id| *id != edit.expr),
            ),
            _ => {}
        }
    }
    edits.retain(|e| !gone.contains(&e.expr));
}
