//! No input makes the analyser panic, hang or run out of stack: it plans, refuses or says that it is no Rust.
//!
//! An input is a program for damaging one of the example models: its first byte chooses the model, or says that the rest is a source
//! itself; four bytes at a time then cut, move, double or exchange words. So most inputs are Rust that means something.

#![no_main]

use libfuzzer_sys::fuzz_target;

const MODELS: [&str; 3] = [
    include_str!("../../examples/models/llama.rs"),
    include_str!("../../examples/models/gpt2.rs"),
    include_str!("../../examples/models/encoder.rs"),
];

/// Words that go where others were.
const WORDS: [&str; 40] = [
    "0", "1", "7", "()", "x", "self", "None", "Some(x)", "vec![]", "D::Minus1", "seq_len", "q", "k", "mut", "&", "*", "?", "..", "for",
    "loop", "match", "if", "|x|", "return", "fn", "impl", "transpose(1, 2)", "reshape(())", "narrow(1, 0, 1)", "squeeze(9)", "flip(&[1])",
    "cumsum(1)", "chunk(0, 0)", "permute((3, 3))", "i((.., 1..))", "to_vec2::<f32>()", "dims2()", "softmax_last_dim", "matmul", "cat",
];

fuzz_target!(|data: &[u8]| {
    let Some((which, program)) = data.split_first() else {
        return;
    };
    let source = match MODELS.get(usize::from(*which) % (MODELS.len() + 1)) {
        Some(model) => damaged(model, program),
        None => String::from_utf8_lossy(program).into_owned(),
    };
    // The stack that rustc gives to an attribute, many times over: a sanitizer's frames are larger.
    let analyse = move || {
        if let Ok(analysis) = autosp_compiler::analyse(&source) {
            for refusal in &analysis.refusals {
                assert!(!refusal.text(Some("model.rs")).is_empty());
            }
            let _ = autosp_compiler::expand(&source);
        }
    };
    let thread = std::thread::Builder::new().stack_size(64 << 20).spawn(analyse);
    if thread.is_ok_and(|thread| thread.join().is_err()) {
        std::process::abort();
    }
});

/// The model after the edits of a program: kind, place (two bytes), and how far or which word.
fn damaged(model: &str, program: &[u8]) -> String {
    // Names and numbers, and everything else sign by sign.
    let mut words: Vec<&str> = Vec::new();
    let mut start = 0;
    for (at, c) in model.char_indices() {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        if !word(c) || !model[..at].chars().next_back().is_some_and(word) {
            words.push(&model[start..at]);
            start = at;
        }
    }
    words.push(&model[start..]);
    for edit in program.chunks_exact(4).take(64) {
        let [kind, high, low, how] = edit else {
            continue;
        };
        if words.is_empty() {
            break;
        }
        let at = usize::from(u16::from_be_bytes([*high, *low])) % words.len();
        let how = usize::from(*how);
        let end = (at + 1 + how).min(words.len());
        match kind % 5 {
            0 => words[at] = WORDS[how % WORDS.len()],
            1 => drop(words.drain(at..end)),
            2 => words.insert(at, WORDS[how % WORDS.len()]),
            3 => {
                let part = words[at..end].to_vec();
                words.splice(at..at, part);
            }
            _ => words.swap(at, (at + how) % words.len().max(1)),
        }
    }
    words.concat()
}
