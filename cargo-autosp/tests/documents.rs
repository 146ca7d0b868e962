//! The documents that are made from code and from candle-transformers are up to date.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, process::Command};

fn printed(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn page(name: &str) -> String {
    fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../docs")
            .join(name),
    )
    .unwrap()
}

#[test]
fn errors_page_is_what_explain_prints() {
    assert!(
        page("errors.md") == printed(&["explain", "--markdown"]),
        "docs/errors.md is stale; run: cargo run -p cargo-autosp -- explain --markdown > docs/errors.md"
    );
}

/// Files of candle-transformers that are planned; this may only grow.
const PLANNED: usize = 38;

#[test]
fn models_page_is_what_survey_prints_and_gets_no_worse() {
    let survey = printed(&["survey", "candle-transformers", "--markdown"]);
    assert!(
        page("models.md") == survey,
        "docs/models.md is stale; run: cargo run -p cargo-autosp -- survey candle-transformers --markdown > docs/models.md"
    );
    let planned = survey
        .lines()
        .find_map(|line| line.strip_prefix("| planned | "));
    let planned: usize = planned.unwrap().trim_end_matches(" |").parse().unwrap();
    assert!(
        planned >= PLANNED,
        "expected at least {PLANNED} planned files, found {planned}"
    );
    // What runs along the tokens without attention is refused for that, at its line.
    for file in [
        "mamba.rs",
        "mamba2.rs",
        "rwkv_v5.rs",
        "rwkv_v6.rs",
        "recurrent_gemma.rs",
        "lfm2.rs",
        "t5.rs",
        "debertav2.rs",
    ] {
        let line = survey
            .lines()
            .find(|line| line.starts_with(&format!("| {file} | ")))
            .unwrap();
        let cells: Vec<&str> = line.split(" | ").collect();
        let at: usize = cells[1].parse().unwrap();
        assert!(
            at > 1 && cells[2].starts_with("AS02") && cells[3].contains('`'),
            "{line}"
        );
    }
}
