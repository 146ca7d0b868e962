//! Starting ranks: [`run`], [`run_with`], and the [`Sp`] that each rank gets.

mod panics;
mod place;
mod sp;
mod threads;

pub use sp::Sp;

use autosp_plan::Settings;

use crate::Result;

/// Runs `f` on every rank of the mesh that [`Settings::load`] says: the file `autosp.toml` of the working folder, if there is one,
/// overridden by `AUTOSP_SP` and `AUTOSP_DP`; one rank if nothing is said.
///
/// # Errors
/// As [`run_with`] and [`Settings::load`].
pub fn run(f: impl Fn(&Sp) -> Result<()> + Sync) -> Result<()> {
    run_with(Settings::load()?, f).map(drop)
}

/// Runs `f` on dp x sp threads, one a rank, and returns what each returned, in the order of the ranks.
///
/// A rank that returns an error or panics takes the others down: whoever waits for a collective is woken, and the run returns one
/// error that names the first rank that failed. Threads cannot be killed: should a rank be stuck outside of collectives long after
/// the run has failed (the deadline and half a minute), the process prints the error and exits with code 70.
///
/// # Errors
/// The error of the first rank that failed, with its code; AS0401 if it panicked; AS0301 for a mesh that cannot be; AS0302 if a
/// rank of another run calls this.
#[allow(
    clippy::needless_pass_by_value,
    reason = "the settings of a run are its own"
)]
pub fn run_with<T: Send>(
    settings: Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    threads::run(&settings, &f)
}

#[cfg(test)]
mod tests;
