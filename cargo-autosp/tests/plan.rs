//! `cargo autosp plan` and `expand`, run as a user runs them.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

fn autosp(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(arguments)
        .output()
        .unwrap()
}

fn llama() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples/models/llama.rs")
        .display()
        .to_string()
}

fn scratch(name: &str, text: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// The 1-based line of the first occurrence in the Llama.
fn line_of(text: &str) -> usize {
    fs::read_to_string(llama())
        .unwrap()
        .lines()
        .position(|line| line.contains(text))
        .unwrap()
        + 1
}

#[test]
fn the_llama_has_one_site_and_one_checkpoint_scope() {
    let output = autosp(&["autosp", "plan", &llama(), "--format", "json"]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["file"], llama());
    assert_eq!(plan["refusals"].as_array().unwrap().len(), 0);
    let sites = plan["sites"].as_array().unwrap();
    assert_eq!(sites.len(), 1);
    let site = &sites[0];
    assert!(
        site["function"]
            .as_str()
            .unwrap()
            .ends_with("Attention::forward"),
        "{site}"
    );
    assert_eq!(site["line"], line_of("q.matmul("));
    for (operand, axes) in [("q", "b h s d"), ("k", "b g d s"), ("v", "b g s d")] {
        let found = site["layout"][operand].as_str().unwrap();
        assert!(
            found == axes || operand == "k" && found == "b g s d",
            "{operand}: {found}"
        );
    }
    assert_eq!(site["strategies"][0], "ulysses");
    assert_eq!(site["heads"], "blocked");
    assert!(!site["bytes"].as_str().unwrap().is_empty());
    let blocks = plan["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 1);
    assert!(blocks[0]["scope"].is_string(), "{}", blocks[0]);
}

#[test]
fn text_says_the_same() {
    let text = String::from_utf8(autosp(&["plan", &llama()]).stdout).unwrap();
    assert!(
        text.starts_with(&format!(
            "{}: 1 attention site, 1 checkpoint scope, no refusal\n",
            llama()
        )),
        "{text}"
    );
    for part in [
        "Attention::forward, line ",
        "\n  q  ",
        "\n  heads  ",
        "\n  mask  ",
        "ulysses",
        "\n  bytes  ",
    ] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
}

#[test]
fn a_model_that_is_refused_ends_with_two() {
    let mixed = fs::read_to_string(llama()).unwrap().replace(
        "let x = self.norm.forward(&x)?;",
        "let x = self.norm.forward(&x)?;\n        let x = x.cumsum(1)?;",
    );
    let file = scratch("mixed.rs", &mixed);
    let output = autosp(&["plan", &file, "--format", "json"]);
    assert_eq!(output.status.code(), Some(2));
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    let refusal = &plan["refusals"][0];
    assert_eq!(
        refusal["line"],
        line_of("let x = self.norm.forward(&x)?;") + 1,
        "{refusal}"
    );
    assert!(autosp_plan::codes::find(refusal["code"].as_str().unwrap()).is_some());
    assert!(
        refusal["message"].as_str().unwrap().contains("cumsum"),
        "{refusal}"
    );
    assert_eq!(autosp(&["expand", &file]).status.code(), Some(2));
}

#[test]
fn no_attention_is_a_refusal() {
    let file = scratch("empty.rs", "pub fn f(x: u32) -> u32 { x }\n");
    let output = autosp(&["plan", &file]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("no attention site") && text.contains("[AS02"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_read_or_parsed_ends_with_one() {
    let broken = scratch("broken.rs", "fn f() {\n    let = 3;\n}\n");
    for command in ["plan", "expand"] {
        let output = autosp(&[command, &broken]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains("broken.rs`: 2:9: ") && text.ends_with("[AS0602]\n"),
            "{text}"
        );
        let output = autosp(&[command, "nowhere.rs"]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains("nowhere.rs") && text.ends_with("[AS0601]\n"),
            "{text}"
        );
    }
}

#[test]
fn the_expansion_is_rust_and_holds_originals_and_twins() {
    let output = autosp(&["expand", &llama()]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "forward__sp",
        "softmax_last_dim",
        "Schedule",
        "rt::checkpoint",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    assert!(text.lines().count() > fs::read_to_string(llama()).unwrap().lines().count());
    // Printing is all that a second pass may add: the expansion parses.
    let again = scratch("expansion.rs", &text);
    assert_ne!(autosp(&["plan", &again]).status.code(), Some(1));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(["expand", &llama()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A program whose annotated module includes the model's file: the file that is meant is the model's.
#[test]
fn an_included_model_is_followed() {
    let model = llama();
    let name = scratch("included_model.rs", &fs::read_to_string(&model).unwrap());
    let program = scratch(
        "program.rs",
        "#[autosp::sequence_parallel]\nmod llama {\n    include!(\"included_model.rs\");\n}\nfn main() {}\n",
    );
    let output = autosp(&["plan", &program, "--format", "json"]);
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["file"], name.as_str());
    assert_eq!(plan["sites"].as_array().unwrap().len(), 1);
    let missing = scratch(
        "missing.rs",
        "#[sequence_parallel]\nmod m { include!(\"nowhere.rs\"); }\n",
    );
    let output = autosp(&["plan", &missing]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere.rs"));
}

/// Runs `plan` in a folder of its own that holds this `autosp.toml`.
fn plan_with(name: &str, file: &str, variable: Option<&str>) -> Output {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("autosp.toml"), file).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"));
    command.args(["plan", &llama()]).current_dir(folder);
    if let Some(value) = variable {
        command.env("AUTOSP_SP", value);
    }
    command.output().unwrap()
}

#[test]
fn settings_are_printed_with_where_they_came_from() {
    let output = plan_with("settings", "# mesh\nsp = 2\ngroups = 1\n", Some("4"));
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "sp             = 4            variable AUTOSP_SP",
        "groups         = 1            autosp.toml:3",
        "dp             = 1            default",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}

#[test]
fn settings_that_cannot_be_are_one_line() {
    for (name, file, parts) in [
        (
            "unknown",
            "spp = 2\n",
            &[
                "unknown setting `spp` (autosp.toml:1:1)",
                "`sp`",
                "did you mean",
                "[AS0308]",
            ][..],
        ),
        (
            "malformed",
            "sp = 2\ndp = = 3\n",
            &["autosp.toml:2:6", "[AS0310]"],
        ),
        (
            "type",
            "\n  sp = \"two\"\n",
            &["autosp.toml:2:3", "[AS0309]"],
        ),
    ] {
        let output = plan_with(name, file, None);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), text.lines().count()),
            (Some(1), 1),
            "{text}"
        );
        for part in parts {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
    }
}
