//! One attribute on a Rust model makes it train on sequences that no single device can hold, with the numbers of one device.

pub use autosp_runtime::*;
