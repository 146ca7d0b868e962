//! One attribute on a Rust model makes it train on sequences that no single device can hold, with the numbers of one device.
//!
//! The model is ordinary candle code and stays as it is. `#[autosp::sequence_parallel]` on its module finds the attention, cuts the
//! sequence among ranks and emits the exchanges; the rest of a program is a closure that runs on every rank:
//!
//! ```
//! use autosp::Settings;
//! use candle_core::Tensor;
//!
//! // Four ranks share one sequence. `autosp::run` takes the mesh from `autosp.toml` and the environment instead.
//! let sums = autosp::run_with(Settings::default().with_sp(4), |sp| {
//!     let mine = Tensor::new(&[sp.rank() as f32], sp.device())?;
//!     let sum = autosp::comm::all_reduce_sum(sp.sp_group(), autosp::comm::Tag::new("example", "sum"), &mine)?;
//!     Ok(sum.to_vec1::<f32>()?[0])
//! })?;
//! assert_eq!(sums, [6.0; 4]);
//! # Ok::<(), autosp::Error>(())
//! ```
//!
//! - **Ranks.** [`run()`] starts dp x sp of them ([`Mesh`]); each gets its [`Sp`]. `sp` ranks share a sequence by tokens, `dp` replicas
//!   share a batch by rows. A rank that fails ends the run with one message; nothing hangs.
//! - **Scopes.** Inside [`Sp::scope`] (and a trainer's step) the model runs its sequence-parallel twin, also on one rank. Outside, it
//!   is the original function: inference and generation are not touched.
//! - **Settings.** [`Settings`] come from flags, variables `AUTOSP_*`, `autosp.toml` and the program, and remember from where.
//! - **Errors.** [`Error`] carries a code that `cargo autosp explain CODE` explains, and converts from and into candle's error.

#[doc(inline)]
pub use autosp_runtime::*;

pub use autosp_macros::sequence_parallel;

/// What most programs need: `use autosp::prelude::*;`.
pub mod prelude {
    pub use autosp_runtime::{Error, Result, Settings, Shard, Sp, load_trainable, run, run_with};
}
