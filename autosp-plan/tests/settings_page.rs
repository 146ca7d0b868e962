//! The page of settings is made from the table that reads them.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

const HEAD: &str = "# Settings

A setting is taken from a flag of the program, else from its variable, else from `autosp.toml` in the working folder, else from
the program, else it has its default; `Settings` remembers which. This page is made from the table in
`autosp-plan/src/settings/keys.rs`.

";

#[test]
fn the_settings_page_is_up_to_date() {
    let expected = format!("{HEAD}{}", autosp_plan::settings::reference());
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/settings.md");
    let fresh = Path::new(env!("CARGO_TARGET_TMPDIR")).join("settings.md");
    fs::write(&fresh, &expected).unwrap();
    assert!(
        fs::read_to_string(&page).is_ok_and(|found| found == expected),
        "docs/settings.md is stale; run: cp {} docs/settings.md",
        fresh.display()
    );
}
