//! Every file of candle-core, candle-nn and candle-transformers, as it stands, cut short and damaged: each is planned, refused or
//! no Rust, and none makes the analyser panic, hang or run out of stack. `tests/zoo/mutants.rs` has edits that mean something.

mod common;

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use common::{as_in_rustc, packages};
use proptest::prelude::*;

const PACKAGES: [&str; 3] = ["candle-core", "candle-nn", "candle-transformers"];

/// Path and text of every file, a list for each package.
static SOURCES: LazyLock<[Vec<(String, String)>; 3]> =
    LazyLock::new(|| PACKAGES.map(packages::sources));

#[test]
fn every_file_comes_back() {
    as_in_rustc(every_file);
}

fn every_file() {
    let all = SOURCES.iter().flatten();
    assert!(SOURCES.iter().all(|files| files.len() >= 20));
    assert!(all.clone().count() >= 300);
    for (name, text) in all {
        let start = Instant::now();
        let analysis = autosp_compiler::analyse(text);
        assert!(analysis.is_ok(), "{name}: {:?}", analysis.err());
        // Without optimisation and beside other tests; the benchmark says what it takes.
        assert!(
            start.elapsed() < Duration::from_mins(1),
            "{name}: {:?}",
            start.elapsed()
        );
    }
}

/// `cargo test --release -p autosp-compiler --test registry -- --ignored --nocapture`, on a machine that does nothing else.
#[test]
#[ignore = "measures, in release alone"]
#[allow(clippy::print_stdout)]
fn the_whole_crate_takes_little_time() {
    as_in_rustc(|| {
        let (mut whole, mut slowest) = (Duration::ZERO, (Duration::ZERO, ""));
        for (name, text) in &SOURCES[2] {
            let once = || {
                let start = Instant::now();
                assert!(autosp_compiler::analyse(text).is_ok());
                start.elapsed()
            };
            // What else runs only adds.
            let taken = (0..5).map(|_| once()).min().unwrap_or_default();
            whole += taken;
            slowest = slowest.max((taken, name));
        }
        println!("{} files", SOURCES[2].len());
        println!("{whole:?} for all files, {:?} for {}", slowest.0, slowest.1);
        assert!(whole < Duration::from_secs(3) && slowest.0 < Duration::from_millis(100));
    });
}

/// Words that stand where others stood.
const WORDS: [&str; 16] = [
    "0",
    "7",
    "()",
    "self",
    "None",
    "vec![]",
    "D::Minus1",
    "|x| x",
    "transpose(1, 2)",
    "reshape(())",
    "flip(&[1])",
    "cumsum(1)",
    "chunk(0, 0)",
    "permute((3, 3))",
    "i((.., 1..))",
    "matmul",
];

/// Where a source can be cut: nearest to a share of it, between two characters.
fn place(text: &str, share: usize) -> usize {
    (0..=share * text.len() / 1_000)
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or_default()
}

/// A source after one accident, of which `kind` says what it is.
fn damaged(text: &str, kind: usize, a: usize, b: usize) -> String {
    let (from, to) = (place(text, a.min(b)), place(text, a.max(b)));
    let mut lines: Vec<&str> = text.lines().collect();
    let line = |share: usize| share * lines.len().saturating_sub(1) / 1_000;
    let (one, other) = (line(a), line(b));
    match kind {
        // Truncated anywhere, also within a word.
        0 => return text[..from].to_string(),
        1 => return text[from..].to_string(),
        2 => return format!("{}{}", &text[..from], &text[to..]),
        // Doubled: not more than what is there, so that it ends.
        3 => return format!("{}{}", &text[..to], &text[from..]),
        4 => lines.swap(one, other),
        5 => drop(lines.drain(one.min(other)..one.max(other))),
        // The first word of a line, or its last call.
        6 | 7 => {
            let word = WORDS[b % WORDS.len()];
            let old = lines.get(one).copied().unwrap_or_default();
            let mut words = old.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_');
            let part = if kind == 6 {
                words.find(|w| w.len() > 1)
            } else {
                words.rfind(|w| w.len() > 1)
            };
            return text.replace(part.unwrap_or("let"), word);
        }
        _ => {
            if let Some(line) = lines.get(one).copied() {
                lines.insert(other, line);
            }
        }
    }
    lines.join("\n")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_sources_come_back(
        package in 0..PACKAGES.len(),
        which in any::<prop::sample::Index>(),
        kind in 0..9usize,
        a in 0..=1_000usize,
        b in 0..=1_000usize,
    ) {
        let files = &SOURCES[package];
        let (name, text) = &files[which.index(files.len())];
        let text = damaged(text, kind, a, b);
        let start = Instant::now();
        as_in_rustc(move || {
            // What is no Rust has a line, what is refused has a code, and what is planned can be written.
            match autosp_compiler::analyse(&text) {
                Err(error) => assert!(error.code.id.starts_with("AS01"), "{error}"),
                Ok(analysis) => {
                    for refusal in &analysis.refusals {
                        assert!(refusal.text(Some("model.rs")).contains("[AS0"));
                    }
                    let expanded = autosp_compiler::expand(&text).expect("Rust again");
                    assert_eq!(expanded.is_ok(), analysis.refusals.is_empty());
                }
            }
        });
        prop_assert!(start.elapsed() < Duration::from_mins(1), "{name}: {:?}", start.elapsed());
    }
}

#[test]
fn sources_that_nest_deeply_come_back() {
    as_in_rustc(nest_deeply);
}

fn nest_deeply() {
    for n in [10, 25, 60, 1_000, 20_000] {
        let wrap = |inner: &str| {
            format!(
                "use candle_core::{{Result, Tensor}}; pub fn f(x: &Tensor) -> Result<Tensor> {{ let y = {inner}; Ok(y.clone()) }}"
            )
        };
        for inner in [
            format!("{}x{}", "(".repeat(n), ")".repeat(n)),
            format!("{}x{}", "{ ".repeat(n), " }".repeat(n)),
            format!("x{}", ".t()?".repeat(n)),
            format!("x{}", " + x".repeat(n)),
            format!("{}x", "!".repeat(n)),
            format!("{}{{ x }}", "if a { x } else ".repeat(n)),
            format!("{}x", "|a| ".repeat(n)),
        ] {
            let _ = autosp_compiler::analyse(&wrap(&inner));
        }
        let _ = autosp_compiler::analyse(&format!(
            "type T = {}u8{};",
            "Vec<".repeat(n),
            ">".repeat(n)
        ));
    }
}
