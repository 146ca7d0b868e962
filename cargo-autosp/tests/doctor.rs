//! What `doctor` finds on any machine, and that the planner reads it.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use autosp_plan::planner::Rates;

#[test]
fn a_machine_without_gpus_says_so_and_is_measured() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("doctor");
    std::fs::create_dir_all(&folder).unwrap();
    let doctor = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"));
        let command = command.args(["autosp", "doctor"]).args(arguments);
        let output = command.current_dir(&folder).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = doctor(&["--gpus", "0", "--save", "rates.toml"]);
    assert_eq!(code, Some(0), "{text}");
    for part in [
        "processor",
        "GPUs",
        "matrix product",
        "attention 2048",
        "exchange",
        "host link",
        "saved in rates.toml",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let saved = std::fs::read_to_string(folder.join("rates.toml")).unwrap();
    let rates = Rates::read(&saved).unwrap();
    assert!(rates.gemm < Rates::default().gemm, "a processor: {saved}");

    let (code, text) = doctor(&["--gpus", "0", "--save", "nowhere/rates.toml"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("cannot write `nowhere/rates.toml`"), "{text}");
    if !cfg!(feature = "cuda") {
        let (code, text) = doctor(&["--gpus", "2"]);
        assert_eq!(code, Some(1), "{text}");
        assert!(
            text.contains("[AS0410]") && text.contains("feature `cuda`"),
            "{text}"
        );
    }
}
