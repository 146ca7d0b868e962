//! One attribute on a Rust model makes it train on sequences that no single device can hold, with the numbers of one device.
//!
//! The model is ordinary candle code and stays as it is. [`macro@sequence_parallel`] on its module finds the attention, cuts the
//! sequence among ranks and emits the exchanges; what to train on is a closure that runs on every rank:
//!
//! ```
//! use autosp::prelude::*;
//! use candle_core::{DType, Module};
//!
//! // Two replicas; `with_sp(4)` would spread each sequence of a model under the attribute over four ranks.
//! // `autosp::run` takes the mesh from `autosp.toml` and `AUTOSP_*` instead.
//! let losses = autosp::run_with(Settings::default().with_dp(2), |sp| {
//!     let parameters = Parameters::init(7, DType::F32, sp.device());
//!     let embed = candle_nn::embedding(256, 8, parameters.builder().pp("embed"))?;
//!     let head = candle_nn::linear(8, 256, parameters.builder().pp("head"))?;
//!     let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
//!     let text = TextData::from_text("the same eight words, again and again and again");
//!     let mut losses = Vec::new();
//!     for step in 0..20 {
//!         let batch = sp.shard(&text.batch(1, step, 4, 16)?)?;
//!         let report = trainer.step(|| {
//!             let logits = head.forward(&embed.forward(&batch.tokens)?)?;
//!             autosp::loss::cross_entropy(&logits, &batch.labels)
//!         })?;
//!         losses.push(report.loss);
//!     }
//!     Ok(losses)
//! })?;
//! assert_eq!(losses[0], losses[1], "all ranks see the loss of the whole batch");
//! assert!(losses[0][19] < losses[0][0]);
//! # Ok::<(), autosp::Error>(())
//! ```
//!
//! - **Ranks.** [`run()`] starts dp x sp of them ([`Mesh`]); each gets its [`Sp`]. `sp` ranks share a sequence by tokens, `dp` replicas
//!   share a batch by rows. A rank that fails ends the run with one message; nothing hangs.
//! - **Scopes.** Inside [`Sp::scope`] and the steps of a [`Trainer`] a model runs its sequence-parallel twin, also on one rank.
//!   Outside, it is the original function: inference and generation are not touched.
//! - **Weights.** [`load_trainable`] reads the safetensors of a Hugging Face folder, [`ModelConfig`] its `config.json`; [`Parameters`]
//!   are named variables, frozen ones among them.
//! - **Text.** [`TextReader`] reads text, JSON lines and files of tokens, by a [`Tokenizer`]. A row of a batch is one document unless
//!   the crossing is asked for ([`data::Packing`]).
//! - **Loops.** [`Trainer`] takes whole steps. A loop of one's own needs [`Sp::shard`], [`Sp::scope`], [`loss::cross_entropy`] and
//!   [`Sp::reduce_gradients`], and any optimizer of candle. [`testing::assert_equivalent`] holds a model to the numbers of one rank.
//! - **Settings.** [`Settings`] come from flags, variables `AUTOSP_*`, `autosp.toml` and the program, and remember from where.
//! - **Errors.** [`Error`] carries a code that `cargo autosp explain CODE` explains, and converts from and into candle's error.
//! - **Watching.** Nothing is printed. The library speaks through `tracing` to whatever subscriber the program has: spans `rank`, `step`,
//!   `evaluation`, `reduction`, `optimizer` (info), `attention`, `exchange`, `recomputation` (debug), and events for settings, finished
//!   steps, saved files and failed ranks. Ranks are watched as the thread is that called [`run()`].
//! - **Features.** None by default. `cuda` adds GPUs: NCCL between ranks and cuDNN attention. It needs the CUDA toolkit to build; the
//!   setting `device` chooses at run time.

pub use autosp_macros::sequence_parallel;
#[doc(inline)]
pub use autosp_runtime::*;

/// What most programs need: `use autosp::prelude::*;`.
pub mod prelude {
    pub use autosp_macros::sequence_parallel;
    pub use autosp_runtime::{
        Batch, Error, ModelConfig, Optimizer, Parameters, Result, Schedule, Settings, Sp, TextData,
        TextReader, Tokenizer, TrainSettings, Trainer, load_trainable, run, run_with,
    };
}
