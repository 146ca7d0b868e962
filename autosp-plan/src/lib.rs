//! Settings, plans, error codes and cost formulas. No syn, no candle: both the compiler and the runtime read it.

pub mod codes;
pub mod cost;
pub mod plan;
mod reason;
pub mod settings;

pub use reason::io_reason;
pub use settings::Settings;
