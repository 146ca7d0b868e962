//! Settings, plans, error codes, cost formulas, and the planner of memory and time. No syn, no candle: both the compiler and the runtime
//! read it.

pub mod codes;
#[cfg(feature = "config")]
pub mod config;
pub mod cost;
pub mod plan;
pub mod planner;
mod reason;
pub mod settings;
pub mod units;

pub use reason::io_reason;
pub use settings::Settings;
