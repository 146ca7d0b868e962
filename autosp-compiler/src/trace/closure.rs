//! Closures: their calls, and what they have from outside.

use super::Trace;
use super::call::Arg;
use super::graph::{ActId, At, Input};
use super::value::{Cond, Value};

impl<'a> Trace<'_, 'a> {
    /// A call of a closure or of something that is held in a variable or field.
    pub(super) fn call_value(
        &mut self,
        act: ActId,
        callee: Value,
        args: Vec<Arg<'a>>,
        what: &str,
        at: At,
    ) -> Value {
        if let Value::Closure(closure) = callee {
            return self
                .call_closure(act, &closure, args.into_iter().map(|a| a.0).collect())
                .unwrap_or_else(|| Self::lost(what));
        }
        self.unknown_call(what, &args, at)
    }

    /// Evaluates a closure's body with its own variables.
    pub(super) fn call_closure(
        &mut self,
        act: ActId,
        closure: &super::value::Closure,
        args: Vec<Value>,
    ) -> Option<Value> {
        let function = self.acts[act].function;
        let syn::Expr::Closure(c) = self.scope.functions[function].numbers.get(closure.expr)?
        else {
            return None;
        };
        if self.depth > super::DEPTH {
            return None;
        }
        self.depth += 1;
        let mut given = Vec::new();
        for value in &args {
            let mut sizes = Vec::new();
            value.sizes(&mut sizes);
            sizes.retain(|s| self.atoms.anchored(&s.poly));
            given.push(sizes.iter().map(|s| self.atoms.normal(&s.poly)).collect());
        }
        self.closure_calls.push((act, closure.expr, given));
        let outside = std::mem::replace(&mut self.call, self.closure_calls.len() as u32);
        let outer = std::mem::replace(&mut self.acts[act].scopes, closure.env.to_vec());
        self.acts[act].scopes.push(std::collections::HashMap::new());
        for (pat, value) in c.inputs.iter().zip(args) {
            self.bind(act, pat, value, false);
        }
        // What the closure returns from its middle is its own value, not its function's.
        let returned = std::mem::take(&mut self.acts[act].returns);
        self.closures += 1;
        let mut value = self.eval(act, &c.body);
        self.closures -= 1;
        let at = self.at(act, &c.body);
        for other in std::mem::replace(&mut self.acts[act].returns, returned) {
            value = self.join(value, other, &Cond::Unknown, at);
        }
        self.acts[act].scopes = outer;
        self.call = outside;
        self.depth -= 1;
        Some(value)
    }

    /// The names of what a closure calls.
    pub(super) fn calls_in(&self, act: ActId, closure: &super::value::Closure) -> Vec<String> {
        let numbers = &self.scope.functions[self.acts[act].function].numbers;
        let inside = numbers.get(closure.expr);
        let inside = inside.map(|e| crate::syntax::number::within(numbers, e));
        let called = inside.into_iter().flatten().filter_map(|id| {
            Some(match numbers.get(id)? {
                syn::Expr::MethodCall(m) if m.method == "apply" => "forward".to_string(),
                syn::Expr::MethodCall(m) => m.method.to_string(),
                syn::Expr::Path(p) => p.path.segments.last()?.ident.to_string(),
                _ => return None,
            })
        });
        called.collect()
    }

    /// The tensors that a closure names and has from outside.
    pub(super) fn captured(&self, act: ActId, closure: &super::value::Closure) -> Vec<Input> {
        let mut tensors = Vec::new();
        for value in self.captures(act, closure) {
            value.tensors(&mut tensors);
        }
        tensors
            .into_iter()
            .map(|node| Input { node, expr: None })
            .collect()
    }

    /// What a closure names and has from outside.
    fn captures<'c>(&self, act: ActId, closure: &'c super::value::Closure) -> Vec<&'c Value> {
        let numbers = &self.scope.functions[self.acts[act].function].numbers;
        let inside = numbers.get(closure.expr);
        let inside = inside.map(|e| crate::syntax::number::within(numbers, e));
        let named = inside.into_iter().flatten().filter_map(|id| {
            let Some(syn::Expr::Path(p)) = numbers.get(id) else {
                return None;
            };
            let name = p.path.get_ident()?.to_string();
            closure.env.iter().rev().find_map(|scope| scope.get(&name))
        });
        named.map(|binding| &binding.value).collect()
    }

    pub(super) fn captures_size(&self, act: ActId, closure: &super::value::Closure) -> bool {
        self.captures(act, closure).iter().any(|v| self.sized(v))
    }
}
