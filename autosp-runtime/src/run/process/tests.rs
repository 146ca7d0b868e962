//! What a launched process refuses before it looks for the others.

use autosp_plan::codes;
use autosp_plan::settings::Device;

use super::*;
use crate::run::launched::tests::launched_as;

fn refused(settings: &Settings, world: usize) -> Error {
    launched_as(0, world, "127.0.0.1:1")
        .fit(settings)
        .unwrap_err()
}

fn fitted(settings: &Settings, world: usize) -> (usize, usize, String) {
    let settings = launched_as(0, world, "127.0.0.1:1").fit(settings).unwrap();
    let source = settings.source("sp").unwrap().to_string();
    (settings.dp(), settings.sp(), source)
}

#[test]
fn what_nobody_has_said_is_what_was_launched() {
    let launched = "variable WORLD_SIZE".to_owned();
    assert_eq!(fitted(&Settings::default(), 4), (1, 4, launched.clone()));
    let replicas = Settings::default().with_dp(2);
    assert_eq!(fitted(&replicas, 4), (2, 2, launched));
    let said = Settings::default().with_dp(2).with_sp(3);
    assert_eq!(fitted(&said, 6), (2, 3, "the program".to_owned()));
}

#[test]
fn another_number_of_ranks_than_was_launched_is_refused() {
    let error = refused(&Settings::default().with_sp(2), 4);
    assert_eq!(error.code(), codes::RANKS_DIFFER);
    assert_eq!(
        error.to_string(),
        "expected dp x sp = 4 ranks, as many as were launched, found dp 1 (default) x sp 2 (the program)\n  \
         help: AUTOSP_SP=4 AUTOSP_DP=1 [AS0409]"
    );
    let error = refused(&Settings::default().with_dp(3), 4);
    assert_eq!(
        error.help(),
        Some("cargo autosp launch --ranks 3 -- PROGRAM")
    );
    let error = refused(&Settings::default().with_device(Device::CudaShared), 2);
    assert_eq!(error.code(), codes::SETTINGS_CONTRADICT);
}

#[test]
fn a_run_without_a_secret_is_refused() {
    assert!(secret(Some("0123456789abcdef")).is_ok());
    for (text, found) in [
        (None, "found none"),
        (Some(""), "found none"),
        (Some("short"), "found 5 bytes"),
    ] {
        let error = secret(text).err().unwrap();
        assert_eq!(error.code(), codes::RENDEZVOUS);
        assert!(error.to_string().contains(found), "{error}");
        assert!(error.to_string().contains("openssl rand"), "{error}");
    }
}

#[test]
fn a_program_is_known_by_its_file() {
    let size = std::fs::metadata(std::env::current_exe().unwrap())
        .unwrap()
        .len();
    let known = program().unwrap();
    assert!(known.ends_with(&format!("({size} bytes)")), "{known}");
    assert_eq!(known, program().unwrap());
}
