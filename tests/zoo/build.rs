//! Finds candle-transformers where cargo keeps it and writes two modules of every model of the table into the build's output:
//! `NAME.rs` with the attribute, `NAME_slow.rs` without it on candle's slow, differentiable operations.

mod mutants;

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let source = source();
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("OUT_DIR"));
    println!("cargo::rerun-if-changed=models.txt");
    println!("cargo::rerun-if-changed=mutants.rs");
    println!("cargo::rustc-check-cfg=cfg(feature, values(\"flash-attn\", \"cuda\", \"metal\"))");
    let table = std::fs::read_to_string("models.txt").expect("the table of models");
    let mut files = std::collections::HashMap::new();
    for line in table
        .lines()
        .filter(|l| !l.trim().is_empty() && !l.starts_with('#'))
    {
        let (name, file) = line.split_once(' ').expect("`name file`");
        let path = source.join(file.trim());
        let text = std::fs::read_to_string(&path).expect("a model file");
        write(&out, name, &annotated(name, &text));
        write(&out, &format!("{name}_slow"), &plain(name, &text));
        files.insert(name.to_string(), file.trim().to_string());
    }
    mutants::write(&source, &files, &out);
    for file in ["with_tracing", "utils"] {
        let folder = if file == "utils" {
            source.parent().expect("src")
        } else {
            &source
        };
        let text =
            std::fs::read_to_string(folder.join(format!("{file}.rs"))).expect("a shared file");
        // Quantised layers are not trained.
        let text = text.replace(
            "crate::quantized_var_builder",
            "candle_transformers::quantized_var_builder",
        );
        let module = format!(
            "#[allow(warnings, clippy::all, clippy::pedantic)]\npub mod {file} {{\n{}\n}}\n",
            slow(&text)
        );
        write(&out, &format!("{file}_slow"), &module);
    }
}

/// A module of that text under the attribute.
fn annotated(name: &str, text: &str) -> String {
    format!("#[autosp::sequence_parallel(loss)]\n#[allow(warnings, clippy::all, clippy::pedantic)]\npub mod {name} {{\n{text}\n}}\n")
}

/// A module of that text on the slow operations.
fn plain(name: &str, text: &str) -> String {
    let text = slow(text);
    format!("#[allow(warnings, clippy::all, clippy::pedantic)]\npub mod {name} {{\n{text}\n}}\n")
}

/// The same text on the slow operations, its own crate's paths below `crate::slow`.
fn slow(text: &str) -> String {
    text.replace("candle_nn", "slow_nn")
        .replace("crate::", "crate::slow::")
}

fn write(out: &Path, name: &str, text: &str) {
    std::fs::write(out.join(name).with_extension("rs"), text).expect("a file in OUT_DIR");
}

/// `src/models` of the candle-transformers that this crate depends on.
fn source() -> PathBuf {
    let output = Command::new(std::env::var("CARGO").expect("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline"])
        .output()
        .expect("cargo metadata");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = json["packages"].as_array().expect("packages");
    let package = packages
        .iter()
        .find(|p| p["name"] == "candle-transformers")
        .expect("candle-transformers");
    let manifest = package["manifest_path"].as_str().expect("a path");
    Path::new(manifest).with_file_name("src").join("models")
}
