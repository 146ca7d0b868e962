//! The page of settings is made from the table that reads them.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

const HEAD: &str = "# Settings

A setting is taken from a flag of the program, else from its variable, else from the settings file, else from the program, else it
has its default; `Settings` remembers which, `cargo autosp plan` prints it, and a run logs it. The file is the one that the variable
`AUTOSP_SETTINGS` names, else `autosp.toml` in the working folder if there is one; it has lines such as `sp = 4`. An unknown
setting is refused, and so are two sources of the same strength that say different things. `AUTOSP_SECRET` and `AUTOSP_RENDEZVOUS` are
no settings: they are what the processes of a launched run share ([launch.md](launch.md)). This page is made from the table in
`autosp-plan/src/settings/keys.rs`.

";

#[test]
fn the_settings_page_is_up_to_date() {
    let expected = format!(
        "{HEAD}{}{}",
        autosp_plan::settings::reference(),
        autosp_plan::settings::build_reference()
    );
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/settings.md");
    let fresh = Path::new(env!("CARGO_TARGET_TMPDIR")).join("settings.md");
    fs::write(&fresh, &expected).unwrap();
    assert!(
        fs::read_to_string(&page).is_ok_and(|found| found == expected),
        "docs/settings.md is stale; run: cp {} docs/settings.md",
        fresh.display()
    );
}
