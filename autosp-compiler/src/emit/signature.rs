//! The signature of a twin: no exclusive borrow of the model, and the runtime's types for scores, weights, masks and logits.

use autosp_plan::plan::{Kind, Twin};
use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::visit_mut::{self, VisitMut};

pub(super) fn twin(sig: &syn::Signature, twin: &Twin, rt: &TokenStream) -> syn::Signature {
    let mut sig = sig.clone();
    let name = twin.name.rsplit("::").next().unwrap_or(&twin.name);
    sig.ident = format_ident!("{name}", span = sig.ident.span());
    let mut kinds = twin.params.iter();
    for input in &mut sig.inputs {
        match input {
            syn::FnArg::Receiver(r) => {
                // The twin keeps nothing between calls.
                if let syn::ReceiverKind::Reference(..) = &r.kind {
                    *input = syn::parse_quote!(&self);
                }
            }
            syn::FnArg::Typed(t) => {
                if let Some(kind) = kinds.next() {
                    retype(&mut t.ty, *kind, rt);
                }
                Shared.visit_type_mut(&mut t.ty);
            }
        }
    }
    if let syn::ReturnType::Type(_, ty) = &mut sig.output {
        retype(ty, twin.result, rt);
    }
    sig
}

/// Writes the runtime's type in the place of `Tensor`.
fn retype(ty: &mut syn::Type, kind: Kind, rt: &TokenStream) {
    struct Retype(syn::Type);
    impl VisitMut for Retype {
        fn visit_type_mut(&mut self, ty: &mut syn::Type) {
            if let syn::Type::Path(p) = ty
                && p.path.segments.last().is_some_and(|s| s.ident == "Tensor")
            {
                *ty = self.0.clone();
                return;
            }
            visit_mut::visit_type_mut(self, ty);
        }
    }
    let name = match kind {
        Kind::Data => return,
        Kind::Scores => quote!(Scores),
        Kind::Weights => quote!(Weights),
        Kind::Mask => quote!(Mask),
        Kind::Logits => quote!(Logits),
    };
    Retype(syn::parse_quote!(#rt::#name)).visit_type_mut(ty);
}

/// `&mut T` becomes `&T`.
struct Shared;

impl VisitMut for Shared {
    fn visit_type_reference_mut(&mut self, r: &mut syn::TypeReference) {
        r.mutability = None;
        visit_mut::visit_type_reference_mut(self, r);
    }
}
