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
