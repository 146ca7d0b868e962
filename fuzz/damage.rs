//! What the fuzzer makes of its bytes. The same file is a module of `autosp-compiler/tests/fuzz.rs`, so that it is built and run
//! where nobody fuzzes.
//!
//! An input that begins with 0, 1 or 2 is a program for damaging that example model: four bytes at a time cut, move, double or
//! exchange words, so that most of it is Rust that means something. Any other input is a source itself.

/// The models that are damaged.
pub(crate) const MODELS: [&str; 3] = [
    include_str!("../examples/models/llama.rs"),
    include_str!("../examples/models/gpt2.rs"),
    include_str!("../examples/models/encoder.rs"),
];

/// Words that go where others were.
pub(crate) const WORDS: [&str; 40] = [
    "0",
    "1",
    "7",
    "()",
    "x",
    "self",
    "None",
    "Some(x)",
    "vec![]",
    "D::Minus1",
    "seq_len",
    "q",
    "k",
    "mut",
    "&",
    "*",
    "?",
    "..",
    "for",
    "loop",
    "match",
    "if",
    "|x|",
    "return",
    "fn",
    "impl",
    "transpose(1, 2)",
    "reshape(())",
    "narrow(1, 0, 1)",
    "squeeze(9)",
    "flip(&[1])",
    "cumsum(1)",
    "chunk(0, 0)",
    "permute((3, 3))",
    "i((.., 1..))",
    "to_vec2::<f32>()",
    "dims2()",
    "softmax_last_dim",
    "matmul",
    "cat",
];

/// The source that an input stands for.
pub(crate) fn source(data: &[u8]) -> String {
    match data.split_first() {
        Some((which, program)) if usize::from(*which) < MODELS.len() => {
            damaged(MODELS[usize::from(*which)], program)
        }
        _ => String::from_utf8_lossy(data).into_owned(),
    }
}

/// Analysing and expanding come back, and a refusal says something.
pub(crate) fn survive(source: &str) {
    if let Ok(analysis) = autosp_compiler::analyse(source) {
        for refusal in &analysis.refusals {
            assert!(!refusal.text(Some("model.rs")).is_empty());
        }
        let _ = autosp_compiler::expand(source);
    }
}

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
            _ => {
                let other = (at + how) % words.len();
                words.swap(at, other);
            }
        }
    }
    words.concat()
}
