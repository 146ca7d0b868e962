//! The example Llama and edits of it.

// Each test file uses what it needs.
#![allow(dead_code)]

/// The model as its user writes it.
pub(crate) fn llama() -> String {
    std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/models/llama.rs"
    ))
    .expect("the example model")
}

/// Replaces text that stands in the source exactly `count` times.
pub(crate) fn edit_n(source: &str, count: usize, from: &str, to: &str) -> String {
    assert_eq!(source.matches(from).count(), count, "`{from}` in the model");
    source.replace(from, to)
}

/// Replaces text that stands in the source once.
pub(crate) fn edit(source: &str, from: &str, to: &str) -> String {
    edit_n(source, 1, from, to)
}
