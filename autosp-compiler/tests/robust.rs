//! No input makes the analyser panic, hang or overflow the stack: cut, shuffled and repeated pieces of a model are planned,
//! refused or reported as no Rust.

mod common;

use common::llama;
use proptest::prelude::*;

/// Analysing and expanding must come back; what they say is another test's matter.
fn survive(source: &str) {
    if let Ok(analysis) = autosp_compiler::analyse(source) {
        let _ = analysis
            .refusals
            .iter()
            .map(|r| r.text(Some("model.rs")))
            .collect::<Vec<_>>();
        let _ = autosp_compiler::expand(source);
    }
}

/// The model as lines.
fn lines() -> Vec<String> {
    llama().lines().map(String::from).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lines_left_out(at in any::<prop::sample::Index>(), count in 1usize..4) {
        let mut lines = lines();
        let start = at.index(lines.len());
        let end = (start + count).min(lines.len());
        lines.drain(start..end);
        survive(&lines.join("\n"));
    }

    #[test]
    fn lines_that_change_places(a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
        let mut lines = lines();
        let (a, b) = (a.index(lines.len()), b.index(lines.len()));
        lines.swap(a, b);
        survive(&lines.join("\n"));
    }

    #[test]
    fn numbers_and_names_exchanged(pick in any::<prop::sample::Index>(), with in prop::sample::select(vec!["0", "7", "x", "self", "seq_len", "q", "()", "D::Minus1", "vec![]", "None"])) {
        let source = llama();
        let words: Vec<(usize, &str)> = source.match_indices(|c: char| c.is_ascii_digit()).collect();
        let (at, old) = words[pick.index(words.len())];
        let mut changed = source.clone();
        changed.replace_range(at..at + old.len(), with);
        survive(&changed);
    }

    #[test]
    fn operations_exchanged(
        from in prop::sample::select(vec!["transpose(1, 2)", "contiguous()", "unsqueeze(2)", "t()", "reshape(", "narrow(0,", "dims3()", "dims4()", "dims2()", "softmax_last_dim(", "i((", "to_dtype(", "matmul("]),
        to in prop::sample::select(vec!["squeeze(7)", "flatten(3, 1)", "flatten_all()", "permute((3, 3))", "sum(9)", "chunk(0, 0)", "reshape((", "cat(", "expand(", "stack(", "i(", "dims5()", "broadcast_as(", "narrow(9,"]),
    ) {
        survive(&llama().replace(from, to));
    }
}

#[test]
fn a_model_cut_short() {
    let lines = lines();
    for end in (0..lines.len()).step_by(7) {
        survive(&lines[..end].join("\n"));
    }
}

#[test]
fn functions_that_call_themselves() {
    survive(
        "use candle_core::{Result, Tensor}; pub fn f(x: &Tensor) -> Result<Tensor> { f(&f(x)?) }",
    );
    survive(
        "use candle_core::{Result, Tensor}; pub fn f(x: &Tensor) -> Result<Tensor> { g(x) } pub fn g(x: &Tensor) -> Result<Tensor> { f(&g(x)?) }",
    );
    survive(
        "const A: usize = B; const B: usize = A; pub fn f(x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> { x.narrow(0, A, B) }",
    );
}

#[test]
fn a_deep_expression() {
    let source = format!(
        "use candle_core::{{Result, Tensor}}; pub fn f(x: &Tensor) -> Result<Tensor> {{ let y = {}x{}; Ok(y.clone()) }}",
        "(".repeat(60),
        ")".repeat(60)
    );
    survive(&source);
}
