//! `cargo autosp adopt`, run in a crate with a dependency that holds models.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const MODEL: &str = "// Copyright of somebody, kept.\n//! A small model.\nuse super::layers::scale;\nuse crate::other::three;\nuse candle::{Result, Tensor};\n\npub struct Attention;\n\nimpl Attention {\n    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {\n        let (_b, _h, _s, _d) = x.dims4()?;\n        let w = candle_nn::ops::softmax_last_dim(&(x.matmul(&x.t()?)? * 0.5)?)?;\n        w.matmul(x)\n    }\n}\n";

/// A crate `mine` that depends on a crate `some-models`, both without anything to download.
fn workspace(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&root);
    for folder in ["mine/src", "models/src/zoo", "candle/src"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let write = |path: &str, text: &str| fs::write(root.join(path), text).unwrap();
    write(
        "Cargo.toml",
        "[workspace]\nmembers = [\"mine\", \"models\", \"candle\"]\nresolver = \"2\"\n",
    );
    write(
        "candle/Cargo.toml",
        "[package]\nname = \"candle-core\"\nversion = \"0.1.0\"\nedition = \"2021\"\n",
    );
    write("candle/src/lib.rs", "");
    write(
        "models/Cargo.toml",
        "[package]\nname = \"some-models\"\nversion = \"1.2.3\"\nedition = \"2021\"\nlicense = \"MIT\"\n[dependencies]\ncandle = { package = \"candle-core\", path = \"../candle\" }\n",
    );
    write("models/src/lib.rs", "pub mod zoo;\npub mod other;\n");
    write("models/src/other.rs", "");
    write(
        "models/src/zoo/mod.rs",
        "pub mod tiny;\npub mod layers;\npub mod recurrent;\n",
    );
    write("models/src/zoo/layers.rs", "");
    write(
        "models/src/zoo/recurrent.rs",
        "use candle::{Result, Tensor};\npub fn forward(x: &Tensor) -> Result<Tensor> {\n    let (_b, _s) = x.dims2()?;\n    x.cumsum(1)\n}\n",
    );
    write("models/src/zoo/tiny.rs", MODEL);
    write(
        "mine/Cargo.toml",
        "[package]\nname = \"mine\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\nsome-models = { path = \"../models\" }\n",
    );
    write("mine/src/lib.rs", "");
    root.join("mine")
}

fn adopt(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(["autosp", "adopt", "some-models"])
        .args(arguments)
        .current_dir(folder)
        .env_remove("CARGO_TARGET_DIR")
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_model_becomes_an_annotated_module_of_ones_own() {
    let mine = workspace("adopted");
    let output = adopt(&mine, &["tiny", "--out", "src/tiny.rs"]);
    let words = said(&output);
    assert_eq!(output.status.code(), Some(0), "{words}");
    for part in [
        "some-models 1.2.3 (MIT), 1 attention site",
        "`crate` became `some_models`, 1 times",
        "`candle` became `candle_core`, 1 times",
        "cargo add candle-core",
        "mod tiny;",
    ] {
        assert!(words.contains(part), "{part}: {words}");
    }
    let text = fs::read_to_string(mine.join("src/tiny.rs")).unwrap();
    for part in [
        "// Copyright of somebody, kept.",
        "#[autosp::sequence_parallel]",
        "use some_models::zoo::layers::scale;",
        "use some_models::other::three;",
        "use candle_core::{Result, Tensor};",
        "pub use self::tiny::*;",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // A file that may have been changed since is not written over.
    let again = adopt(&mine, &["tiny", "--out", "src/tiny.rs"]);
    assert!(
        again.status.code() == Some(1) && said(&again).contains("AS0606"),
        "{}",
        said(&again)
    );
    assert_eq!(
        adopt(&mine, &["tiny", "--out", "src/tiny.rs", "--force"])
            .status
            .code(),
        Some(0)
    );
}

#[test]
fn what_is_not_there_or_cannot_be_sharded_is_said() {
    let mine = workspace("not_adopted");
    let missing = adopt(&mine, &["huge", "--out", "src/huge.rs"]);
    assert!(
        said(&missing).contains("`some-models` has no module `huge`")
            && said(&missing).contains("AS0605"),
        "{}",
        said(&missing)
    );
    let refused = adopt(&mine, &["recurrent", "--out", "src/recurrent.rs"]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(
        said(&refused).contains("cumsum") && !mine.join("src/recurrent.rs").exists(),
        "{}",
        said(&refused)
    );
    let elsewhere = adopt(&mine, &["zoo", "--out", "src/zoo.rs"]);
    assert!(
        said(&elsewhere).contains("in a file of its own"),
        "{}",
        said(&elsewhere)
    );
}
