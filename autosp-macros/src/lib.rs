//! The attribute of AutoSP. It converts tokens and reports; `autosp-compiler` does the work.

use proc_macro::{Span, TokenStream};

/// Makes the model in an inline module train on sequences that are sharded over ranks.
///
/// The functions of the module stay as they are; inside a sharded scope (a trainer's step, `sp.scope(|| ..)`) they run a
/// twin that exchanges heads for tokens at every attention. `cargo autosp expand FILE.rs` shows the emitted code,
/// `cargo autosp plan FILE.rs` what was decided and why, `cargo autosp explain CODE` an error.
///
/// ```ignore
/// #[autosp::sequence_parallel]
/// mod llama {
///     include!("llama.rs"); // or the model itself
/// }
/// ```
///
/// An `impl` or a function is accepted too, if everything that the decisions need is inside it.
///
/// Arguments:
/// - `crate = path` names the facade where it is not `::autosp`;
/// - `loss` gives a language model's `forward`, also one that keeps one token for generation, a companion `forward_loss` with one more
///   parameter, the labels of the shard: the mean cross-entropy over all tokens of all ranks, computed for some tokens at a time, so
///   that logits are never whole;
/// - `plan = "autosp.toml"` names a settings file, of which `[build]` is read now and the rest when the program runs; it is looked
///   for in the package, then beside the source file;
/// - `tokenwise(Type::function, Type::field)`, `replicated(..)` and `sharded(..)` say what the analysis cannot see: that every token is
///   computed by itself (the result has the dimensions of the first tensor but the last), that every rank gets the same, that a
///   function's callers know that they get one rank's tokens. `#[tokenwise]`, `#[replicated]` and `#[sharded]` on the function or field
///   say the same. What is said wrongly or in vain is an error.
#[proc_macro_attribute]
pub fn sequence_parallel(args: TokenStream, item: TokenStream) -> TokenStream {
    let source = Span::call_site().local_file();
    autosp_compiler::sequence_parallel(args.into(), &item.into(), source.as_deref()).into()
}
