//! Starting ranks: [`run`], [`run_with`], and the [`Sp`] that each rank gets.

mod launched;
mod panics;
mod place;
mod process;
mod rendezvous;
mod sp;
mod threads;

pub use launched::{Launched, Launcher, launched};
pub use sp::Sp;

use autosp_plan::Settings;

use crate::Result;

/// Runs `f` on every rank of the mesh that [`Settings::load`] says: the file `autosp.toml` of the working folder, if there is one,
/// overridden by `AUTOSP_SP` and `AUTOSP_DP`; one rank if nothing is said, or all ranks that a launcher has started.
///
/// # Errors
/// As [`run_with`] and [`Settings::load`].
pub fn run(f: impl Fn(&Sp) -> Result<()> + Sync) -> Result<()> {
    run_with(Settings::load()?, f).map(drop)
}

/// Runs `f` on dp x sp ranks, and returns what each rank of this process returned, in the order of the ranks.
///
/// A program that is run by itself has all ranks as threads. One that a launcher has started several times (`cargo autosp launch`,
/// torchrun, srun, mpirun: see [`launched`]) is one rank in each process; dp x sp is then the number of processes, and sp is what
/// remains of it if nobody has said it.
///
/// A rank that returns an error or panics takes the others down, in all processes: whoever waits for a collective is woken, and the
/// run returns one error that names the first rank that failed. Threads cannot be killed: should a rank be stuck outside of collectives
/// long after the run has failed (half a minute; among threads the deadline and half a minute), the process prints the error and
/// exits with code 70.
///
/// # Errors
/// The error of the first rank that failed, with its code; AS0401 if it panicked; AS0301 for a mesh that cannot be; AS0302 if a
/// rank of another run calls this. Under a launcher also as [`launched`]; AS0408 if the ranks do not find each other, AS0409 if they are not
/// alike, AS0412 if the process of one is gone.
#[allow(
    clippy::needless_pass_by_value,
    reason = "the settings of a run are its own"
)]
pub fn run_with<T: Send>(
    settings: Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    match launched()? {
        None => threads::run(&settings, &f),
        Some(launched) => process::run(&launched, &settings, &f),
    }
}

/// As [`run_with`], with all ranks as threads of this process, also where a launcher has started several: what a process does by
/// itself, such as a comparison with one rank.
///
/// # Errors
/// As [`run_with`] without a launcher.
#[allow(
    clippy::needless_pass_by_value,
    reason = "the settings of a run are its own"
)]
pub fn run_on_threads<T: Send>(
    settings: Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    threads::run(&settings, &f)
}

#[cfg(test)]
mod tests;
