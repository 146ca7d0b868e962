//! The example program as a user runs it: what it does, and what it says to wrong input.
#![allow(clippy::unwrap_used)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use serde_json::Value;

/// The program, which `cargo test` has built; built here if it is missing or older than what it was built from.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).unwrap();
        let program = profile.join("examples").join("train");
        let sources = program.with_extension("d");
        let program = program.with_extension(env::consts::EXE_EXTENSION);
        if !is_fresh(&program, &sources) {
            let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            build.args(["build", "--quiet", "--example", "train", "--target-dir"]);
            build
                .arg(profile.parent().unwrap())
                .current_dir(env!("CARGO_MANIFEST_DIR"));
            if profile.ends_with("release") {
                build.arg("--release");
            }
            assert!(build.status().unwrap().success());
        }
        program
    })
}

/// Whether the program is newer than every source that cargo lists beside it.
fn is_fresh(program: &Path, sources: &Path) -> bool {
    let changed = |path: &Path| fs::metadata(path).and_then(|file| file.modified());
    let (Ok(built), Ok(list)) = (changed(program), fs::read_to_string(sources)) else {
        return false;
    };
    let files = list.split_once(": ").map_or("", |(_, files)| files);
    files
        .split_whitespace()
        .all(|file| changed(Path::new(file)).is_ok_and(|time| time <= built))
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
    fs::write(folder.join("odd.bin"), [1, 2, 3]).unwrap();
    let sentence = "a word of a text that a model can learn ".repeat(3);
    let line = |times| serde_json::json!({"text": sentence.repeat(times)}).to_string() + "\n";
    fs::write(folder.join("lines.jsonl"), line(1) + &line(5)).unwrap();
    folder
}

/// A Llama of Hugging Face transformers, with its config.json.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama-tiny");

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
        (&["--data", "text.txt", "--dp", "3"], "--batch"),
        (&["--data", "text.txt", "--lr", "-1"], "--lr"),
        (&["--data", "text.txt", "--lr", "fast"], "--lr"),
        (&["--data", "text.txt", "--steps", "0"], "--steps"),
        (&["--data", "text.txt", "--frobnicate"], "--frobnicate"),
        (&["--data", "text.txt", "--tokenizer", "nowhere"], "nowhere"),
        (
            &["--data", "text.txt", "--tokenizer", "text.txt"],
            "[AS0545]",
        ),
        (&["--data", "text.txt", "--model", "nowhere"], "nowhere"),
        // Bytes are beyond the vocabulary of the model.
        (&["--data", "text.txt", "--model", MODEL], "below 96"),
        (&["--data", "lines.jsonl"], "--json-field"),
        (
            &["--data", "lines.jsonl", "--json-field", "body"],
            "lines.jsonl:1",
        ),
        (
            &["--data", "text.txt", "--token-width", "8"],
            "--token-width",
        ),
        (&["--data", "odd.bin", "--token-width", "16"], "odd.bin"),
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

/// Runs the program and returns its log, one object a step.
fn log(folder: &Path, name: &str, mesh: &[&str]) -> Vec<Value> {
    let (log, model) = (format!("{name}.jsonl"), format!("{name}.safetensors"));
    let mut arguments = vec![
        "--data",
        "text.txt",
        "--seq-len",
        "30",
        "--batch",
        "2",
        "--steps",
        "3",
        "--seed",
        "5",
    ];
    arguments.extend(["--log", &log, "--save", &model]);
    arguments.extend(mesh);
    let output = train(folder, &arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{mesh:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        text.contains("against one: loss") && text.contains("loaded back"),
        "{text}"
    );
    let lines = fs::read_to_string(folder.join(log)).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// A tokenizer whose words the model's 96 tokens can hold.
fn words(folder: &Path) -> String {
    let words = [
        "<unk>", "a", "word", "of", "text", "that", "model", "can", "learn",
    ];
    let vocabulary: serde_json::Map<String, Value> = words
        .iter()
        .enumerate()
        .map(|(i, word)| ((*word).to_owned(), i.into()))
        .collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "post_processor": null,
        "decoder": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    let path = folder.join("tokenizer.json");
    fs::write(&path, tokenizer.to_string()).unwrap();
    path.display().to_string()
}

#[test]
fn a_model_and_a_tokenizer_of_others_go_on_training() {
    let folder = folder("others");
    let tokenizer = words(&folder);
    let arguments = [
        "--model",
        MODEL,
        "--tokenizer",
        &tokenizer,
        "--data",
        "lines.jsonl",
        "--json-field",
        "text",
        "--seq-len",
        "40",
        "--batch",
        "2",
        "--steps",
        "3",
        "--sp",
        "2",
        "--log",
        "log",
        "--save",
        "model.safetensors",
    ];
    let output = train(&folder, &arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // The shorter document has 30 words and is padded; attention crosses nothing, so nothing is warned of.
    assert!(
        text.contains("180 tokens of text in 2 documents") && output.stderr.is_empty(),
        "{text}"
    );
    assert!(text.contains("settings: sp = 2 (flag --sp)"), "{text}");
    let lines: Vec<Value> = fs::read_to_string(folder.join("log"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    // The model knows nothing of these words yet: ln 96 = 4.56.
    assert!(
        (lines[0]["loss"].as_f64().unwrap() - 4.56).abs() < 0.5,
        "{}",
        lines[0]
    );
    assert!(lines[2]["loss"].as_f64() < lines[0]["loss"].as_f64());
    let valid: Vec<u64> = lines
        .iter()
        .map(|line| line["valid_tokens"].as_u64().unwrap())
        .collect();
    assert!(
        valid.iter().all(|n| [2 * 29, 29 + 39, 2 * 39].contains(n)),
        "{valid:?}"
    );

    let crossing = [&arguments[..], &["--documents", "cross"]].concat();
    let output = train(&folder, &crossing);
    let warning = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success()
            && warning.starts_with("warning: attention crosses the 2 documents"),
        "{warning}"
    );
}

#[test]
fn a_settings_file_is_found_and_a_flag_is_stronger() {
    let folder = folder("settings");
    fs::write(folder.join("autosp.toml"), "sp = 2\ngroups = 1\n").unwrap();
    let small = [
        "--data",
        "text.txt",
        "--seq-len",
        "32",
        "--steps",
        "1",
        "--save",
        "model.safetensors",
        "--groups",
        "2",
    ];
    let output = train(&folder, &small);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("sp = 2 (autosp.toml:1), groups = 2 (flag --groups)")
            && text.contains("dp 1 x sp 2"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::write(folder.join("autosp.toml"), "sp = 2\ngrups = 1\n").unwrap();
    let output = train(&folder, &small);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("`grups` (autosp.toml:2:1)") && text.contains("did you mean `groups`?"),
        "{text}"
    );
}

#[test]
fn every_mesh_trains_the_same_model() {
    let folder = folder("meshes");
    let alone = log(&folder, "alone", &["--sp", "1"]);
    assert_eq!(alone.len(), 3);
    for (step, line) in alone.iter().enumerate() {
        let mut keys: Vec<_> = line
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        let expected = [
            "bytes_sent",
            "exchange_bytes",
            "grad_norm",
            "loss",
            "step",
            "tokens_per_s",
            "valid_tokens",
        ];
        assert_eq!(keys, expected);
        assert_eq!(line["step"], step + 1);
        // The last token of each of the two rows predicts nothing.
        assert_eq!(line["valid_tokens"], 2 * 29);
        assert_eq!(
            (&line["bytes_sent"], &line["exchange_bytes"]),
            (&0.into(), &0.into())
        );
    }
    for (name, mesh) in [
        ("sp2", &["--sp", "2"][..]),
        ("default", &[]),
        ("sp2-dp2", &["--sp", "2", "--dp", "2", "--groups", "1"]),
    ] {
        let ranks = log(&folder, name, mesh);
        assert_eq!(ranks.len(), 3);
        // Later steps follow AdamW, which turns the noise of gradients near zero into whole steps.
        for (key, tolerance) in [("loss", 1e-5), ("grad_norm", 1e-5)] {
            let (found, expected) = (
                ranks[0][key].as_f64().unwrap(),
                alone[0][key].as_f64().unwrap(),
            );
            assert!(
                (found - expected).abs() <= tolerance * expected,
                "{name}: {key}: {found}, {expected}"
            );
        }
        for line in &ranks {
            let (sent, exchanged) = (
                line["bytes_sent"].as_u64().unwrap(),
                line["exchange_bytes"].as_u64().unwrap(),
            );
            assert!(0 < exchanged && exchanged < sent, "{line}");
            assert_eq!(line["valid_tokens"], 2 * 29);
        }
    }
}

#[test]
fn a_run_goes_on_from_its_checkpoint() {
    let folder = folder("resume");
    let base = [
        "--data",
        "text.txt",
        "--seq-len",
        "30",
        "--sp",
        "2",
        "--save-every",
        "2",
    ];
    let run = |more: &[&str]| {
        let output = train(&folder, &[&base, more].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), text + &errors)
    };
    let (good, text) = run(&["--save", "none.safetensors", "--steps", "2", "--resume"]);
    assert!(
        !good && text.contains("none.checkpoints") && text.contains("AS0604"),
        "{text}"
    );
    let flags = ["--accumulate", "2", "--policy", "attention", "--zero", "1"];
    let losses = |name: &str| {
        let log = fs::read_to_string(folder.join(format!("{name}.jsonl"))).unwrap();
        let step = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            (
                line["step"].as_u64().unwrap(),
                line["loss"].as_f64().unwrap(),
            )
        };
        log.lines().map(step).collect::<Vec<_>>()
    };
    let start = |name: &str, more: &[&str]| {
        let (save, log) = (format!("{name}.safetensors"), format!("{name}.jsonl"));
        let own = ["--save", save.as_str(), "--log", log.as_str()];
        let (good, text) = run(&[&flags[..], &own[..], more].concat());
        assert!(good, "{text}");
        text
    };
    let text = start("whole", &["--steps", "5"]);
    assert!(text.contains("against one: loss"), "{text}");
    // As if it had been interrupted after the fourth step: what it wrote later is gone.
    start("parts", &["--steps", "5"]);
    let checkpoints = folder.join("parts.checkpoints");
    fs::remove_dir_all(checkpoints.join("step-00000005")).unwrap();
    let text = start("parts", &["--steps", "5", "--resume"]);
    assert!(text.contains("went on with step 5"), "{text}");
    let (whole, parts) = (losses("whole"), losses("parts"));
    assert_eq!(whole, parts[..5]);
    assert_eq!(whole[4], parts[5]);
    let model = |name| fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
    assert!(model("whole") == model("parts"));
}

#[test]
fn the_same_command_writes_the_same_model() {
    let folder = folder("twice");
    let (first, second) = (log(&folder, "first", &[]), log(&folder, "second", &[]));
    for (first, second) in first.iter().zip(&second) {
        assert_eq!(
            (&first["loss"], &first["grad_norm"]),
            (&second["loss"], &second["grad_norm"])
        );
    }
    let model = |name: &str| fs::read(folder.join(name)).unwrap();
    assert!(model("first.safetensors") == model("second.safetensors"));
}

#[test]
fn help_is_no_error() {
    let output = train(&folder("help"), &["--help"]);
    assert!(output.status.success() && output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).unwrap();
    for flag in [
        "--data",
        "--tokenizer",
        "--json-field",
        "--token-width",
        "--documents",
        "--model",
        "--sp",
        "--dp",
        "--seq-len",
        "--batch",
        "--steps",
        "--seed",
        "--lr",
        "--groups",
        "--log",
        "--save",
    ] {
        assert!(text.contains(flag), "{flag} is missing in\n{text}");
    }
}

/// The program once for each of two ranks, as a launcher starts it.
fn launched(folder: &Path, arguments: &[&str]) -> Vec<Output> {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let ranks = ["0", "1"].map(|rank| {
        Command::new(program())
            .args(arguments)
            .current_dir(folder)
            .envs([("RANK", rank), ("LOCAL_RANK", rank)])
            .envs([("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")])
            .envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)])
            .env("AUTOSP_SECRET", "the secret of this test")
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    });
    ranks
        .into_iter()
        .map(|rank| rank.wait_with_output().unwrap())
        .collect()
}

#[test]
fn launched_ranks_have_the_numbers_of_threads() {
    let folder = folder("launched");
    let arguments = |name: &'static str| {
        let text = format!(
            "--data text.txt --seq-len 32 --batch 2 --steps 4 --zero 1 --save {name}.safetensors --log {name}.jsonl"
        );
        text.split(' ').map(str::to_owned).collect::<Vec<_>>()
    };
    let threads = arguments("threads");
    let threads = threads.iter().map(String::as_str).chain(["--sp", "2"]);
    let threads: Vec<&str> = threads.collect();
    let output = train(&folder, &threads);
    assert!(output.status.success(), "{output:?}");
    // Nobody says how many ranks there are.
    let processes = arguments("processes");
    let processes: Vec<&str> = processes.iter().map(String::as_str).collect();
    let ranks = launched(&folder, &processes);
    for rank in &ranks {
        assert!(rank.status.success(), "{rank:?}");
    }
    let said = String::from_utf8_lossy(&ranks[0].stdout);
    assert!(said.contains("2 ranks: dp 1 x sp 2"), "{said}");
    assert!(said.contains("sp = 2 (variable WORLD_SIZE)"), "{said}");
    assert!(said.contains("first step on 2 ranks against one"), "{said}");
    assert!(ranks[1].stdout.is_empty(), "one rank speaks: {ranks:?}");

    let steps = |name: &str| -> Vec<Vec<Value>> {
        let log = fs::read_to_string(folder.join(name).with_extension("jsonl")).unwrap();
        let step = |line: &str| {
            let step: Value = serde_json::from_str(line).unwrap();
            ["step", "loss", "grad_norm", "bytes_sent", "exchange_bytes"]
                .map(|key| step[key].clone())
                .to_vec()
        };
        log.lines().map(step).collect()
    };
    let expected = steps("threads");
    assert_eq!(expected.len(), 4);
    assert_eq!(steps("processes"), expected);
    let model = |name: &str| fs::read(folder.join(name).with_extension("safetensors")).unwrap();
    assert!(model("processes") == model("threads"), "the same bits");
}
