//! The documents that are made from the code table are up to date.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, process::Command};

#[test]
fn errors_page_is_what_explain_prints() {
    let output = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(["explain", "--markdown"])
        .output()
        .unwrap();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    assert!(output.status.success());
    assert!(
        fs::read(page).unwrap() == output.stdout,
        "docs/errors.md is stale; run: cargo run -p cargo-autosp -- explain --markdown > docs/errors.md"
    );
}

/// Files of candle-transformers that are planned; this may only grow.
const PLANNED: usize = 39;

#[test]
fn models_page_is_what_survey_prints_and_gets_no_worse() {
    let output = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(["survey", "candle-transformers", "--markdown"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/models.md");
    let survey = String::from_utf8(output.stdout).unwrap();
    assert!(
        fs::read_to_string(page).unwrap() == survey,
        "docs/models.md is stale; run: cargo run -p cargo-autosp -- survey candle-transformers --markdown > docs/models.md"
    );
    let planned = survey
        .lines()
        .find_map(|line| line.strip_prefix("| planned | "));
    let planned: usize = planned.unwrap().trim_end_matches(" |").parse().unwrap();
    assert!(planned >= PLANNED, "expected {PLANNED}, found {planned}");
}
