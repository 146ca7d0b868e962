//! The schedules of the sites, in the runtime's verbs.

use autosp_plan::plan::{HeadMap, Plan, Site};
use proc_macro2::TokenStream;
use quote::{format_ident, quote};

/// A module `autosp_sites` with one unit type for each site.
pub(super) fn sites(plan: &Plan, facade: &TokenStream) -> TokenStream {
    if plan.sites.is_empty() {
        return TokenStream::new();
    }
    let types = plan
        .sites
        .iter()
        .enumerate()
        .map(|(id, site)| one(id, site));
    quote! {
        /// The attention sites of this module: what is exchanged when, forward and backward.
        #[allow(unused, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
        pub(crate) mod autosp_sites {
            use #facade::rt;
            #(#types)*
        }
    }
}

fn one(id: usize, site: &Site) -> TokenStream {
    let ty = format_ident!("Site{id}");
    let (name, line) = (&site.function, u32::try_from(site.line).unwrap_or(u32::MAX));
    let (q, k, v) = (&site.layout.q, &site.layout.k, &site.layout.v);
    let heads = match site.heads {
        HeadMap::Blocked => quote!(Blocked),
        HeadMap::Interleaved => quote!(Interleaved),
    };
    let doc = format!(
        " Attention in `{}`, line {}; mask: {}.",
        site.function, site.line, site.mask
    );
    quote! {
        #[doc = #doc]
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct #ty;

        impl rt::Site for #ty {
            const LINE: u32 = #line;
            const LAYOUT: rt::Layout = rt::Layout { q: #q, k: #k, v: #v };
            const HEADS: rt::HeadMap = rt::HeadMap::#heads;
        }

        impl rt::Schedule<rt::Ulysses> for #ty {
            const NAME: &'static str = #name;

            /// Sequence shards become head shards, head group by head group, and come back the same way.
            fn forward(io: &mut impl rt::Forward) -> rt::Result<()> {
                io.send_qkv(0)?;
                for g in 0..io.groups() {
                    if g + 1 < io.groups() {
                        io.send_qkv(g + 1)?;
                    }
                    io.wait_qkv(g)?;
                    io.attend(g)?;
                    io.send_out(g)?;
                }
                io.wait_out()
            }

            /// Where the result was kept and the block is computed again: what was not kept is exchanged once more, nothing is attended.
            fn replay(io: &mut impl rt::Forward) -> rt::Result<()> {
                for g in 0..io.groups() {
                    io.send_qkv(g)?;
                    io.send_out(g)?;
                }
                for g in 0..io.groups() {
                    io.wait_qkv(g)?;
                }
                io.wait_out()
            }

            /// The transpose: the gradient of the result comes in, those of queries, keys and values go out.
            fn backward(io: &mut impl rt::Backward) -> rt::Result<()> {
                io.send_grad_out(0)?;
                for g in 0..io.groups() {
                    if g + 1 < io.groups() {
                        io.send_grad_out(g + 1)?;
                    }
                    io.wait_grad_out(g)?;
                    io.attend_backward(g)?;
                    io.send_grad_qkv(g)?;
                }
                io.wait_grad_qkv()
            }
        }
    }
}
