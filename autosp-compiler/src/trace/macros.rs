//! Macros as expressions.

use super::eval::SPEAKING;
use super::graph::{ActId, At};
use super::value::Value;
use super::{Role, Trace};
use crate::syntax::text;

fn name(mac: &syn::Macro) -> String {
    let last = mac.path.segments.last();
    last.map(|s| s.ident.to_string()).unwrap_or_default()
}

/// Whether nothing after this macro runs.
pub(super) fn never_returns(mac: &syn::Macro) -> bool {
    matches!(
        name(mac).as_str(),
        "bail" | "panic" | "unreachable" | "unimplemented" | "todo"
    )
}

impl<'a> Trace<'_, 'a> {
    pub(super) fn macro_call(&mut self, act: ActId, mac: &'a syn::Macro, at: At) -> Value {
        if never_returns(mac) {
            return Value::Never;
        }
        match name(mac).as_str() {
            "vec" => self.vec_macro(act, mac, at),
            name if SPEAKING.contains(&name) => Value::Opaque,
            _ => Self::lost(&text(mac)),
        }
    }

    /// `vec![a, b]` and `vec![a; n]`. What stands in a macro has no number of its own, so that no edit can reach it.
    pub(super) fn vec_macro(&mut self, act: ActId, mac: &'a syn::Macro, at: At) -> Value {
        let known = self.macros.get(&std::ptr::from_ref(mac)).copied();
        let array = known.or_else(|| {
            let tokens = &mac.tokens;
            let parsed = syn::parse2::<syn::Expr>(quote::quote!([#tokens])).ok()?;
            // Once for each `vec!` of the source; the process ends with the expansion.
            let leaked: &'static syn::Expr = Box::leak(Box::new(parsed));
            self.macros.insert(std::ptr::from_ref(mac), leaked);
            Some(leaked)
        });
        match array {
            Some(array) => {
                let value = self.eval(act, array);
                if let syn::Expr::Repeat(r) = array
                    && let Value::Size(len) = self.eval(act, &r.len)
                {
                    self.use_size(at, &len, Role::Unclassified(text(mac)));
                }
                value
            }
            None => Self::lost(&text(mac)),
        }
    }
}
