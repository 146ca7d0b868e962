//! Ranks as processes that a launcher has started: this process is one of them.

use std::fs::File;
use std::hash::Hasher;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use autosp_plan::settings::SECRET_VARIABLE;
use autosp_plan::{Settings, codes};

use super::launched::Launched;
use super::place::Place;
use super::rendezvous::proof::Secret;
use super::rendezvous::{Identity, meet};
use super::sp::Sp;
use super::threads::{Crew, exit, expect_no_run};
use crate::comm::World;
use crate::comm::process::Links;
use crate::{Error, Mesh, Result};

/// How long the rank may run on outside of collectives when the run has failed.
const GRACE: Duration = Duration::from_secs(30);

/// Runs of this process so far: all processes are in the same one.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// Runs the rank of this process, with the secret that the environment has.
pub(super) fn run<T: Send>(
    launched: &Launched,
    settings: &Settings,
    f: &(impl Fn(&Sp) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    expect_no_run()?;
    let secret = secret(std::env::var(SECRET_VARIABLE).ok().as_deref())?;
    let run = RUNS.fetch_add(1, Ordering::SeqCst);
    run_as(launched, settings, &secret, run, f)
}

/// Runs the rank of this process in the `run`-th run of the program.
fn run_as<T: Send>(
    launched: &Launched,
    settings: &Settings,
    secret: &Secret,
    run: u64,
    f: &(impl Fn(&Sp) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    let settings = &launched.fit(settings)?;
    let mesh = Mesh::from_settings(settings)?;
    let rank = launched.rank;
    let place = Place::of_process(settings, rank, launched.gpu)?;
    let identity = Identity::new(settings, program()?, run);
    let sockets = meet(launched, secret, &identity, settings.start_deadline())?;
    tracing::info!(rank, world = launched.world, by = %launched.by, "all ranks are here");

    let (world, queues) = World::of_process(mesh.world(), settings.into(), rank);
    let world = Arc::new(world);
    let links = Links::start(&world, queues, sockets).map_err(|error| {
        Error::new(
            codes::RENDEZVOUS,
            format!("rank {rank} cannot talk to the other ranks: {error}"),
        )
    })?;
    let crew = Crew {
        mesh,
        world,
        ranks: rank..rank + 1,
        place,
        settings,
    };
    let results = crew.run(f, GRACE.min(settings.deadline()), &exit);
    // The others get this process's last words.
    drop(links);
    results
}

/// What only the ranks of this run know.
///
/// # Errors
/// AS0408 if there is none, or it is too short to keep anybody out.
fn secret(text: Option<&str>) -> Result<Secret> {
    let found = match text {
        None | Some("") => "none".to_owned(),
        Some(text) => format!("{} bytes", text.len()),
    };
    text.and_then(Secret::new).ok_or_else(|| {
        Error::new(
            codes::RENDEZVOUS,
            format!("expected a secret of at least 16 bytes in {SECRET_VARIABLE}, found {found}"),
        )
        .with_help(format!(
            "export {SECRET_VARIABLE}=$(openssl rand -hex 16) before the launcher; `cargo autosp launch` makes one by itself"
        ))
    })
}

/// Size and hash of the file of this program.
///
/// # Errors
/// AS0408 if it cannot be read.
fn program() -> Result<String> {
    let read = || -> io::Result<String> {
        let mut file = File::open(std::env::current_exe()?)?;
        // Equal on all ranks that run this file, and that is all it is for.
        let mut hash = std::collections::hash_map::DefaultHasher::new();
        let mut part = vec![0; 1 << 20];
        let mut size = 0;
        loop {
            match file.read(&mut part)? {
                0 => break,
                n => {
                    hash.write(&part[..n]);
                    size += n;
                }
            }
        }
        Ok(format!("{:016x} ({size} bytes)", hash.finish()))
    };
    read().map_err(|error| {
        let reason = autosp_plan::io_reason(&error);
        Error::new(
            codes::RENDEZVOUS,
            format!("cannot read this program's file: {reason}"),
        )
    })
}

#[cfg(test)]
mod linked;
#[cfg(test)]
mod tests;
