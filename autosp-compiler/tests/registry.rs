//! Every file of candle-core, candle-nn and candle-transformers, as it stands, cut short and damaged: each is planned, refused or
//! no Rust, and none makes the analyser panic, hang or run out of stack. Small edits of their models keep their plan or lose it.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use autosp_compiler::Analysis;
use proptest::prelude::*;

/// The source folders of the three packages, where cargo keeps them.
fn folders() -> Vec<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            "--manifest-path",
        ])
        .arg(manifest)
        .output()
        .expect("cargo metadata");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let found: Vec<PathBuf> = ["candle-core-0", "candle-nn-0", "candle-transformers-0"]
        .iter()
        .map(|name| {
            let mut manifests = text.split("\"manifest_path\":\"").skip(1);
            let manifest = manifests.find(|m| {
                m.split('"')
                    .next()
                    .is_some_and(|m| m.contains(&format!("/{name}")))
            });
            let path = manifest.and_then(|m| m.split('"').next()).expect(name);
            Path::new(path).with_file_name("src")
        })
        .collect();
    assert!(found.iter().all(|f| f.is_dir()), "{found:?}");
    found
}

fn files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn sources() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for folder in folders() {
        files(&folder, &mut all);
    }
    all.sort();
    let read = |path: PathBuf| {
        Some((
            path.display().to_string(),
            std::fs::read_to_string(path).ok()?,
        ))
    };
    all.into_iter().filter_map(read).collect()
}

fn model(name: &str) -> String {
    let path = folders()[2].join("models").join(name);
    std::fs::read_to_string(path).expect("a model")
}

#[test]
fn every_file_comes_back() {
    as_in_rustc(every_file);
}

fn every_file() {
    let all = sources();
    assert!(all.len() >= 300, "{} files", all.len());
    for (name, text) in all {
        let start = Instant::now();
        let analysis = autosp_compiler::analyse(&text);
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
        let models = sources()
            .into_iter()
            .filter(|(name, _)| name.contains("/models/"));
        let (mut whole, mut slowest) = (Duration::ZERO, (Duration::ZERO, String::new()));
        for (name, text) in models {
            let once = || {
                let start = Instant::now();
                assert!(autosp_compiler::analyse(&text).is_ok());
                start.elapsed()
            };
            // What else runs only adds.
            let taken = (0..5).map(|_| once()).min().unwrap_or_default();
            whole += taken;
            slowest = slowest.max((taken, name));
        }
        println!("{whole:?} for all files, {:?} for {}", slowest.0, slowest.1);
        assert!(whole < Duration::from_secs(3) && slowest.0 < Duration::from_millis(100));
    });
}

/// What a plan says of the model, without names and lines.
fn shape(analysis: &Analysis) -> Vec<String> {
    assert!(
        analysis.refusals.is_empty(),
        "{}",
        analysis.refusals[0].text(None)
    );
    let sites = &analysis.plan.sites;
    let site = |s: &autosp_plan::plan::Site| {
        format!(
            "{} {} {} {} {}",
            s.layout.q, s.layout.k, s.layout.v, s.heads, s.unrepeated
        )
    };
    sites
        .iter()
        .map(site)
        .chain([format!("{} roots", analysis.plan.roots.len())])
        .collect()
}

const TEN: [&str; 10] = [
    "llama.rs",
    "qwen2.rs",
    "gemma.rs",
    "phi3.rs",
    "falcon.rs",
    "mpt.rs",
    "chatglm.rs",
    "stable_lm.rs",
    "bert.rs",
    "distilbert.rs",
];

/// Replaces whole words.
fn rename(text: &str, from: &str, to: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(from) {
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let whole =
            !word(rest[..at].chars().last()) && !word(rest[at + from.len()..].chars().next());
        out += &rest[..at];
        out += if whole { to } else { from };
        rest = &rest[at + from.len()..];
    }
    out + rest
}

#[test]
fn names_order_and_helpers_do_not_matter() {
    as_in_rustc(names_and_order);
}

fn names_and_order() {
    for name in TEN {
        let text = model(name);
        let plan = shape(&autosp_compiler::analyse(&text).expect("Rust"));
        // Renamed.
        let mut renamed = text.clone();
        for word in [
            "xs",
            "query_states",
            "key_states",
            "attn_weights",
            "attention_mask",
            "seq_len",
            "b_sz",
            "mask",
            "query_layer",
        ] {
            renamed = rename(&renamed, word, &format!("renamed_{word}"));
        }
        assert_eq!(
            shape(&autosp_compiler::analyse(&renamed).expect("Rust")),
            plan,
            "{name}, renamed"
        );
        // Reordered.
        let mut file = syn::parse_file(&text).expect("Rust");
        let (uses, mut items): (Vec<_>, Vec<_>) = file
            .items
            .into_iter()
            .partition(|i| matches!(i, syn::Item::Use(_)));
        items.reverse();
        file.items = uses.into_iter().chain(items).collect();
        let reordered = prettyplease::unparse(&file);
        assert_eq!(
            shape(&autosp_compiler::analyse(&reordered).expect("Rust")),
            plan,
            "{name}, reordered"
        );
        // Outlined: the softmax in a function of its own.
        let outlined = text.replace("candle_nn::ops::softmax_last_dim(", "outlined_softmax(")
            + "\nfn outlined_softmax(scores: &Tensor) -> Result<Tensor> { let kept = scores; candle_nn::ops::softmax_last_dim(kept) }\n";
        assert_eq!(
            shape(&autosp_compiler::analyse(&outlined).expect("Rust")),
            plan,
            "{name}, outlined"
        );
    }
}

#[test]
fn edits_that_change_the_meaning_are_seen() {
    as_in_rustc(changed_meaning);
}

fn changed_meaning() {
    let refused = |name: &str, from: &str, to: &str| {
        let text = model(name);
        assert!(text.contains(from), "{name}: {from}");
        let changed = text.replacen(from, to, 1);
        let analysis = autosp_compiler::analyse(&changed).expect("Rust");
        assert!(!analysis.refusals.is_empty(), "{name}: accepted {to}");
    };
    refused(
        "qwen2.rs",
        "candle_nn::ops::softmax_last_dim(&attn_weights)",
        "candle_nn::ops::softmax(&attn_weights, 2)",
    );
    refused(
        "bert.rs",
        "candle_nn::ops::softmax(&attention_scores, candle::D::Minus1)",
        "candle_nn::ops::softmax(&attention_scores, 1)",
    );
    refused(
        "gemma.rs",
        "let residual = xs;",
        "let xs = &xs.flip(&[1])?; let residual = xs;",
    );
    refused(
        "llama.rs",
        "let residual = x;",
        "let x = &x.cumsum(1)?; let residual = x;",
    );
    refused(
        "stable_lm.rs",
        "let residual = xs;",
        "let xs = &xs.roll(1, 1)?; let residual = xs;",
    );
    refused(
        "phi3.rs",
        ".reshape((b_sz, q_len, self.num_kv_heads, self.head_dim))?\n            .transpose(1, 2)?",
        ".reshape((b_sz, self.num_kv_heads, q_len, self.head_dim))?",
    );
    refused(
        "mpt.rs",
        ".permute((0, 2, 3, 1))?",
        ".permute((0, 2, 1, 3))?",
    );
    // Another comparison or window is another mask, and the plan says so.
    let masks = |text: &str| -> Vec<String> {
        let analysis = autosp_compiler::analyse(text).expect("Rust");
        assert!(
            analysis.refusals.is_empty(),
            "{}",
            analysis.refusals[0].text(None)
        );
        analysis.plan.sites.into_iter().map(|s| s.mask).collect()
    };
    for (name, from, to) in [
        ("mpt.rs", "u8::from(j > i)", "u8::from(j >= i)"),
        ("falcon.rs", "u8::from(j > i)", "u8::from(j + 3 > i)"),
        (
            "qwen2.rs",
            "if i < j || j + self.sliding_window < i {",
            "if i < j || j + self.sliding_window < i + 1 {",
        ),
        ("gemma.rs", "if i < j {", "if i + 1 < j {"),
    ] {
        let text = model(name);
        if text.contains(from) {
            assert_ne!(
                masks(&text),
                masks(&text.replacen(from, to, 1)),
                "{name}: {to}"
            );
        } else {
            assert_eq!(name, "qwen2.rs", "{name}: {from}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_models_come_back(which in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(), paste in any::<prop::sample::Index>(), kind in 0..4) {
        let name = TEN[which.index(TEN.len())];
        let text = model(name);
        let mut lines: Vec<&str> = text.lines().collect();
        let (a, b) = (cut.index(lines.len()), paste.index(lines.len()));
        match kind {
            0 => lines.truncate(a),
            1 => lines.swap(a, b),
            2 => { let line = lines.remove(a); lines.insert(b.min(lines.len()), line); }
            _ => { lines.drain(a.min(b)..a.max(b)); }
        }
        let text = lines.join("\n");
        as_in_rustc(move || drop(autosp_compiler::analyse(&text)));
    }
}

#[test]
fn sources_that_nest_deeply_come_back() {
    as_in_rustc(nest_deeply);
}

/// On a thread with the stack that rustc's own threads have.
fn as_in_rustc(run: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    thread
        .spawn(run)
        .expect("a thread")
        .join()
        .expect("no panic");
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
