//! Every kernel against what it is the kernel of, in f64: the operations of the runtime on the processor, or a formula.
#![cfg_attr(no_compiler, allow(dead_code, unused_imports))]
#![allow(clippy::unwrap_used)]

mod elementwise;
mod optimizer;
mod rows;
mod support;
