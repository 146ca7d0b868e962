//! What the tests of ranks share.

use std::time::{Duration, Instant};

use autosp_plan::Settings;

use super::{Tag, barrier};
use crate::{Error, Result, Sp, run_with};

/// A deadline that fails a test instead of hanging it, and is never reached in a healthy one.
const LONG: Duration = Duration::from_secs(30);

/// Longer than any failure takes to reach everybody.
const PROMPT: Duration = Duration::from_secs(10);

pub(crate) fn ranks(sp: usize, dp: usize) -> Settings {
    Settings::default()
        .with_sp(sp)
        .with_dp(dp)
        .with_deadline(LONG)
        .with_start_deadline(LONG)
}

pub(crate) const MEET: Tag = Tag::new("meet", "barrier");

/// Waits for the others in the world group.
pub(crate) fn meet(sp: &Sp) -> Result<()> {
    barrier(sp.world_group(), MEET)
}

/// The error of a run that must fail long before its deadline.
pub(crate) fn fails<T: Send + std::fmt::Debug>(
    settings: Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
) -> Error {
    let begin = Instant::now();
    let error = run_with(settings, f).expect_err("the run fails");
    assert!(
        begin.elapsed() < PROMPT,
        "took {:?}: {error}",
        begin.elapsed()
    );
    error
}

pub(crate) fn assert_says(error: &Error, code: autosp_plan::codes::Code, parts: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.code(), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}
