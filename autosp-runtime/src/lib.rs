//! The runtime of AutoSP: ranks, collectives, exchanges, attention and training, on candle tensors.
//!
//! Users name it as `autosp`; the code that the attribute emits names [`rt`].

pub mod attention;
pub mod comm;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod doctor;
pub mod error;
#[cfg(any(feature = "cuda", test))]
mod kernel_cache;
pub mod layout;
pub mod ledger;
pub mod library;
pub mod loss;
pub mod mask;
pub mod memory;
pub mod mesh;
pub mod ops;
pub mod parameters;
mod random;
pub mod rt;
pub mod run;
pub mod schedule;
pub mod scope;
pub mod scores;
pub mod site;
pub mod testing;
pub mod train;

pub use autosp_plan::{Settings, codes, io_reason, planner, settings};
pub use config::ModelConfig;
pub use data::{Batch, Packing, Rows, TextData, TextReader, Tokenizer};
pub use error::{Error, Result};
pub use ledger::{Bytes, Ledger, Purpose};
pub use mesh::Mesh;
pub use parameters::{Parameters, load_trainable};
pub use run::{Launched, Launcher, Sp, launched, run, run_on_threads, run_with};
pub use scope::{Scope, Shard};
pub use train::{Decay, Group, Optimizer, Schedule, StepReport, TrainSettings, Trainer};
