//! `cargo autosp explain`, run as a user runs it.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn autosp(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn every_code_is_explained() {
    for code in autosp_plan::codes::ALL {
        let output = autosp(&["autosp", "explain", &code.id.to_lowercase()]);
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.starts_with(&format!("{}: {}\n", code.id, code.title)),
            "{text}"
        );
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }
}

#[test]
fn wrong_usage_ends_with_one() {
    for arguments in [
        &["explain", "AS9999"][..],
        &["explain", "AS0101", "more"],
        &["dance"],
        &[],
    ] {
        let output = autosp(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty());
    }
    let text = String::from_utf8(autosp(&["explain", "AS9999"]).stderr).unwrap();
    assert!(
        text.starts_with("error: unknown error code `AS9999`") && text.contains("help:"),
        "{text}"
    );
}

#[test]
fn help_and_version_end_with_zero() {
    assert_eq!(autosp(&["--help"]).status.code(), Some(0));
    assert_eq!(autosp(&["--version"]).status.code(), Some(0));
}
