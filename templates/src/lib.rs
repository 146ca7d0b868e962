//! Everything that AutoSP writes as text from a template: one type per template, one folder per kind.
//!
//! The crate knows no other part of the project. Who wants a text fills in plain data and prints it.

pub mod kernels;
pub mod report;
