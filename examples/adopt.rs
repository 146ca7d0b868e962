//! A model file of another crate, trained without an edit: `cargo run --release --example adopt`.
//!
//! What a user does by hand, done in `target/adopt`: a crate is made there, whose program is [`adopt/train.rs`](adopt/train.rs);
//! `cargo autosp adopt candle-transformers qwen2` brings the model into it; and the program is built and run. It trains 100 steps on
//! this repository's own documents, on one rank and on four, and ends with an error unless both learn the same. A number in the
//! place of the 100 is another number of steps. What is copied stays below `target`.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// The text that is learnt.
const TEXT: &[&str] = &["README.md", "docs"];

fn main() -> ExitCode {
    let steps = env::args().nth(1).unwrap_or_else(|| "100".into());
    match run(&steps) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(steps: &str) -> Result<(), String> {
    if !steps.parse::<u64>().is_ok_and(|steps| steps >= 5) {
        return Err(format!("expected 5 steps or more, found `{steps}`"));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = target(root)?;
    let folder = target.join("adopt");
    make_crate(root, &folder)
        .map_err(|error| format!("cannot make the crate `{}`: {error}", folder.display()))?;
    let (manifest, model) = (folder.join("Cargo.toml"), folder.join("src/qwen2.rs"));

    println!("$ cargo autosp adopt candle-transformers qwen2 --out src/qwen2.rs");
    let mut adopt = cargo(root, "run");
    adopt.args(["--package", "cargo-autosp", "--", "adopt"]);
    adopt.args(["candle-transformers", "qwen2", "--force"]);
    adopt.arg("--manifest-path").arg(&manifest);
    adopt.arg("--out").arg(&model);
    succeed(adopt)?;

    println!("$ cargo run");
    let mut train = cargo(root, "run");
    train.arg("--manifest-path").arg(&manifest);
    // One folder with the workspace, so that candle is built once.
    train.arg("--target-dir").arg(&target);
    train.arg("--").arg(steps);
    train.args(TEXT.iter().map(|text| root.join(text)));
    succeed(train)
}

/// A crate of its own, with the versions and the optimisation of this workspace.
fn make_crate(root: &Path, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder.join("src"))?;
    fs::copy(
        root.join("examples/adopt/train.rs"),
        folder.join("src/main.rs"),
    )?;
    fs::copy(root.join("Cargo.lock"), folder.join("Cargo.lock"))?;
    let workspace = fs::read_to_string(root.join("Cargo.toml"))?;
    // From the first profile on there is nothing else.
    let profiles = workspace
        .find("[profile.")
        .map_or("", |at| &workspace[at..]);
    // A literal string of TOML, where a backslash is one.
    let path = format!("'{}'", root.display());
    let manifest = format!(
        "[package]\nname = \"adopted\"\nversion = \"0.0.0\"\nedition = \"2021\"\npublish = false\n\n\
         [dependencies]\nautosp = {{ path = {path} }}\ncandle-core = \"0.11.1\"\ncandle-nn = \"0.11.1\"\n\
         candle-transformers = \"=0.11.1\"\nserde = {{ version = \"1\", features = [\"derive\"] }}\n\n\
         [workspace]\n\n{profiles}"
    );
    fs::write(folder.join("Cargo.toml"), manifest)
}

/// Cargo, in the workspace and in the profile of this program.
fn cargo(root: &Path, command: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([command, "--quiet"]).current_dir(root);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo
}

fn succeed(mut command: Command) -> Result<(), String> {
    let status = command
        .status()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cargo ended with {status}"))
    }
}

/// The workspace's target folder, as cargo says.
fn target(root: &Path) -> Result<PathBuf, String> {
    let mut metadata = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    metadata.args(["metadata", "--no-deps", "--format-version", "1"]);
    let output = metadata
        .current_dir(root)
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cannot read `cargo metadata`: {error}"))?;
    said["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .ok_or_else(|| "`cargo metadata` names no target folder".into())
}

#[test]
fn four_ranks_learn_what_one_learns() -> Result<(), String> {
    run("10")
}
