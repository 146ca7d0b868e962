//! The example Llama and edits of it.

// Each test file uses what it needs.
#![allow(dead_code)]

pub(crate) mod packages;

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

/// The model with this in front of a block, where `x` is `[b, s, h]`, and with these items at its end.
pub(crate) fn with(before: &str, items: &str) -> String {
    let block = "let residual = x;";
    let source = llama();
    assert!(source.contains(block));
    source.replacen(block, &format!("{before} {block}"), 1) + "\n" + items
}

/// Why a source is refused, if it is.
pub(crate) fn refusals(source: &str) -> Vec<String> {
    let analysis = autosp_compiler::analyse(source).expect("Rust");
    analysis.refusals.iter().map(|r| r.text(None)).collect()
}

/// On a thread with the stack that rustc's own threads have, 8 MB.
pub(crate) fn as_in_rustc(run: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    let thread = thread.spawn(run).expect("a thread");
    thread.join().expect("no panic");
}
