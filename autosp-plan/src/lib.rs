//! Settings, plans, error codes and cost formulas. No syn, no candle: both the compiler and the runtime read it.

pub mod codes;
pub mod plan;
pub mod settings;

pub use settings::Settings;
