//! `cargo autosp estimate`, run as a user runs it.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

fn config(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/configs");
    folder.join(name).display().to_string()
}

fn scratch(name: &str, text: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn estimate(model: &str, flags: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cargo-autosp"))
        .args(["autosp", "estimate", "--model", model])
        .args(flags.split_whitespace())
        .output()
        .unwrap()
}

/// The JSON of an estimate, whose exit code says whether it fits.
fn json(model: &str, flags: &str) -> Value {
    let output = estimate(model, &format!("{flags} --format json"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Value = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr))
    });
    let expected = if found["feasible"] == true { 0 } else { 2 };
    assert_eq!(output.status.code(), Some(expected));
    found
}

/// The message of a refusal.
fn refusal(model: &str, flags: &str) -> String {
    let output = estimate(model, flags);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

const EIGHT: &str = "--gpus 8 --memory 141GiB --host-memory 2TiB";

/// The number of parameters that each model's publisher states.
#[test]
fn parameters_are_counted_to_the_last() {
    for (name, parameters) in [
        ("llama-3-8b.json", 8_030_261_248_u64),
        ("qwen2.5-7b.json", 7_615_616_512),
        ("mistral-7b.json", 7_241_732_096),
    ] {
        let found = json(&config(name), &format!("{EIGHT} --seq 8K"));
        assert_eq!(found["parameters"], parameters, "{name}");
        assert_eq!(
            (&found["feasible"], &found["seq"]),
            (&Value::from(true), &Value::from(8192))
        );
    }
}

#[test]
fn a_million_tokens_need_the_loss_in_tiles() {
    let llama = config("llama-3-8b.json");
    let plain = json(&llama, &format!("{EIGHT} --seq 1M --loss-tiles 1"));
    assert_eq!(plain["feasible"], false);
    assert_eq!(plain["limiter"], "device memory: loss");
    let tiled = json(&llama, &format!("{EIGHT} --seq 1M --assume loss-tiles"));
    assert_eq!(
        (&tiled["feasible"], &tiled["sp"]),
        (&Value::from(true), &Value::from(8))
    );
    assert!(tiled["loss_tiles"].as_u64().unwrap() > 1);
    assert!(tiled["peak_bytes"].as_u64() <= tiled["usable_bytes"].as_u64());
    assert!(tiled["max_seq"].as_u64().unwrap() >= 1 << 20);
    // 95 % of the FLOPs are attention's.
    let (attention, step) = (
        tiled["time"]["attention"].as_f64().unwrap(),
        tiled["step_s"].as_f64().unwrap(),
    );
    assert!(attention / step > 0.85 && attention < step);
    let assumed = json(&llama, &format!("{EIGHT} --seq 1M --assume all"));
    assert!(assumed["step_s"].as_f64() <= tiled["step_s"].as_f64());
    assert!(assumed["max_seq"].as_u64() > tiled["max_seq"].as_u64());
}

#[test]
fn heads_decide_how_many_ranks_share_a_sequence() {
    // 28 query heads on 8 GPUs.
    let found = json(&config("qwen2.5-7b.json"), &format!("{EIGHT} --seq 64K"));
    assert_eq!(
        found["sp"].as_u64().unwrap() * found["dp"].as_u64().unwrap(),
        8
    );
    assert!([1, 2, 4].contains(&found["sp"].as_u64().unwrap()));
    let text = refusal(
        &config("qwen2.5-7b.json"),
        &format!("{EIGHT} --seq 64K --sp 8"),
    );
    assert!(
        text.contains("expected `sp` among 1, 2, 4") && text.contains("AS0604"),
        "{text}"
    );
}

#[test]
fn a_window_spares_attention() {
    let whole = fs::read_to_string(config("mistral-7b.json")).unwrap();
    let whole = scratch(
        "mistral-whole.json",
        &whole.replace("\"sliding_window\": 4096", "\"sliding_window\": null"),
    );
    let flags = "--gpus 2 --seq 64K --policy input --zero 1";
    let attention = |found: Value| found["time"]["attention"].as_f64().unwrap();
    let ratio = attention(json(&config("mistral-7b.json"), flags)) / attention(json(&whole, flags));
    let unseen = 1.0 - 4096.0 / 65_536.0;
    assert!((ratio - (1.0 - unseen * unseen)).abs() < 1e-3, "{ratio}");
}

#[test]
fn flags_and_a_settings_file_are_kept() {
    let llama = config("llama-3-8b.json");
    let plan = scratch(
        "estimate.toml",
        "sp = 4\npolicy = \"attention\"\ngroups = 1\n",
    );
    let flags = format!("{EIGHT} --seq 128K --plan {plan} --groups 8 --zero 0");
    let found = json(&llama, &flags);
    let choice = ["sp", "dp", "policy", "groups", "zero"].map(|name| &found[name]);
    assert_eq!(
        serde_json::json!(choice),
        serde_json::json!([4, 2, "attention", 8, 0])
    );
    let text = String::from_utf8(estimate(&llama, &flags).stdout).unwrap();
    for part in [
        "estimate.toml:1",
        "estimate.toml:2",
        "flag --groups",
        "flag --zero",
        "leave `policy` to the planner",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    let mixed = json(
        &llama,
        &format!("{EIGHT} --seq 64K --policy all*4,input+offload"),
    );
    assert_eq!(mixed["policy"], "all*4, input+offload*28");
    assert_eq!(mixed["needs"], serde_json::json!(["offload"]));
}

#[test]
fn rates_of_a_file_change_the_time() {
    let llama = config("llama-3-8b.json");
    let rates = scratch("rates.toml", "gemm = 384e12\n");
    let flags = "--gpus 8 --seq 16K --sp 8 --zero 1 --policy all";
    let (fast, slow) = (
        json(&llama, flags),
        json(&llama, &format!("{flags} --rates {rates}")),
    );
    let products = |found: &Value| found["time"]["matrix_products"].as_f64().unwrap();
    assert!((products(&slow) / products(&fast) - 2.0).abs() < 1e-9);
    assert_eq!(slow["peak_bytes"], fast["peak_bytes"]);
    let wrong = scratch("wrong-rates.toml", "gem = 1.0\n");
    let text = refusal(&llama, &format!("{flags} --rates {wrong}"));
    assert!(
        text.contains("found `gem`") && text.contains("AS0611"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_read_ends_with_one() {
    let llama = config("llama-3-8b.json");
    let gpt2 = scratch(
        "gpt2.json",
        r#"{"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "layer_norm_epsilon": 1e-5}"#,
    );
    for (model, flags, part) in [
        ("no/such/config.json", "--seq 8K", "AS0501"),
        (
            gpt2.as_str(),
            "--seq 8K",
            "expected `model_type` among `llama`",
        ),
        (llama.as_str(), "--seq 8K --rates no/such.toml", "AS0601"),
        (llama.as_str(), "--seq 8K --plan no/such.toml", "AS0310"),
        (llama.as_str(), "--seq 8K --policy all*33", "--policy: "),
        (
            llama.as_str(),
            "--seq 1Ki",
            "expected a length such as 128K",
        ),
        (
            llama.as_str(),
            "--seq 8K --memory 141G",
            "expected a size such as 141GiB",
        ),
        (llama.as_str(), "--seq 8K --assume tiles", "found `tiles`"),
    ] {
        let text = refusal(model, flags);
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// What people read, of the cases of docs/memory.md.
#[test]
fn the_text_is_what_it_was() {
    let show = |name: &str, flags: &str| {
        let text = String::from_utf8(estimate(&config(name), flags).stdout).unwrap();
        let (_, text) = text.split_once(name).unwrap();
        format!("cargo autosp estimate --model {name} {flags}\n\n{name}{text}")
    };
    let two = "--gpus 2 --memory 141GiB --host-memory 256GiB";
    let shown = [
        show("llama-3-8b.json", &format!("{two} --seq 64K")),
        show("llama-3-8b.json", &format!("{two} --seq 512K --assume all")),
        show("llama-3-8b.json", &format!("{two} --seq 1M --assume all")),
        show("mistral-7b.json", &format!("{EIGHT} --seq 32K")),
    ];
    insta::assert_snapshot!(shown.join("\n"));
}
