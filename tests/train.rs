//! The example program as a user runs it: what it does, and what it says to wrong input.
#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

/// Builds the example beside this test (usually it is there already) and returns its path.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).unwrap();
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args([
            "build",
            "--quiet",
            "--workspace",
            "--example",
            "train",
            "--target-dir",
        ]);
        build
            .arg(profile.parent().unwrap())
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
        profile
            .join("examples")
            .join("train")
            .with_extension(env::consts::EXE_EXTENSION)
    })
}

fn train(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(program())
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

/// A folder of its own, with a text in it.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    let text = "a line of a text that a model can learn\n".repeat(200);
    fs::write(folder.join("text.txt"), text).unwrap();
    fs::write(folder.join("empty.txt"), "").unwrap();
    folder
}

#[test]
fn wrong_input_is_one_clear_line() {
    let folder = folder("wrong-input");
    let small = [
        "--data",
        "text.txt",
        "--seq-len",
        "32",
        "--batch",
        "2",
        "--steps",
        "1",
    ];
    for (arguments, expected) in [
        (&["--data", "nowhere.txt"][..], "nowhere.txt"),
        (&["--data", "empty.txt"], "found none"),
        (&["--data", "text.txt", "--seq-len", "100000"], "--seq-len"),
        (&["--data", "text.txt", "--sp", "3", "--seq-len", "32"], "3"),
        (&["--data", "text.txt", "--sp", "0"], "--sp"),
        (&["--data", "text.txt", "--lr", "-1"], "--lr"),
        (&["--data", "text.txt", "--lr", "fast"], "--lr"),
        (&["--data", "text.txt", "--steps", "0"], "--steps"),
        (&["--data", "text.txt", "--frobnicate"], "--frobnicate"),
        (&["--data", "text.txt", "--log", "."], "`.`"),
        (
            &["--data", "text.txt", "--log", "text.txt/log"],
            "text.txt/log",
        ),
        (
            &["--data", "text.txt", "--save", "text.txt/model"],
            "text.txt/model",
        ),
    ] {
        // What a case names overrides nothing: flags that are given twice are refused, so only missing ones are added.
        let mut all = arguments.to_vec();
        for pair in small.chunks(2) {
            if !arguments.contains(&pair[0]) {
                all.extend(pair);
            }
        }
        let output = train(&folder, &all);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(
            text.starts_with("error: ") && text.contains(expected),
            "{arguments:?}: {text}"
        );
    }
}
