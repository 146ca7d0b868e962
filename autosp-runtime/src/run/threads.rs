//! Ranks as threads of this process: all of a run, or the one that a launched process is.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use autosp_plan::{Settings, codes};
use tracing::Span;
use tracing::dispatcher::{self, Dispatch};
use tracing::subscriber::NoSubscriber;

use super::panics;
use super::place::Place;
use super::sp::Sp;
use crate::comm::{Fault, World, list};
use crate::{Error, Mesh, Result};

/// Stack of a rank: candle's backward recurses once an operation. Pages that are not touched cost nothing.
const STACK_BYTES: usize = 256 << 20;

/// Exit code of a process with a rank that cannot be stopped: `EX_SOFTWARE` of `sysexits.h`.
const EXIT_STUCK: i32 = 70;

/// How long a failed run waits, beyond the deadline, for ranks that are stuck outside of collectives.
const GRACE: Duration = Duration::from_secs(30);

/// What happens when a rank does not return although the run has failed: `(error, ranks)`.
type OnStuck<'a> = &'a dyn Fn(&Error, &[usize]);

/// Runs all ranks of the settings in this process.
pub(super) fn run<T: Send>(
    settings: &Settings,
    f: &(impl Fn(&Sp) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    run_watched(settings, f, settings.deadline() + GRACE, &exit)
}

/// A thread cannot be killed and borrows from the caller, so there is no way back: the process ends, as a job that hangs costs more.
#[allow(clippy::print_stderr, reason = "the last words of the process")]
pub(super) fn exit(error: &Error, ranks: &[usize]) {
    eprintln!(
        "error: {error}\nexiting: {} did not return after the run had failed",
        list(ranks)
    );
    std::process::exit(EXIT_STUCK);
}

/// As [`run`]; `on_stuck` is called if some do not return within `grace` after a failure.
pub(super) fn run_watched<T: Send>(
    settings: &Settings,
    f: &(impl Fn(&Sp) -> Result<T> + Sync),
    grace: Duration,
    on_stuck: OnStuck<'_>,
) -> Result<Vec<T>> {
    expect_no_run()?;
    let mesh = Mesh::from_settings(settings)?;
    let crew = Crew {
        mesh,
        world: Arc::new(World::new(mesh.world(), settings.into())),
        ranks: 0..mesh.world(),
        place: Place::of(settings)?,
        settings,
    };
    crew.run(f, grace, on_stuck)
}

/// # Errors
/// AS0302 if this thread is a rank.
pub(super) fn expect_no_run() -> Result<()> {
    if panics::is_rank() {
        return Err(Error::new(
            codes::NESTED_RUN,
            "expected one run at a time, found a run started by a rank of another",
        )
        .with_help("call the inner closure directly"));
    }
    Ok(())
}

/// The ranks of a run that are in this process.
pub(super) struct Crew<'a> {
    pub(super) mesh: Mesh,
    pub(super) world: Arc<World>,
    pub(super) ranks: Range<usize>,
    pub(super) place: Place,
    pub(super) settings: &'a Settings,
}

impl Crew<'_> {
    /// Runs `f` on a thread for each rank of this process, and returns what each returned.
    ///
    /// # Errors
    /// The first failure of any rank of the run, in this process or another.
    pub(super) fn run<T: Send>(
        &self,
        f: &(impl Fn(&Sp) -> Result<T> + Sync),
        grace: Duration,
        on_stuck: OnStuck<'_>,
    ) -> Result<Vec<T>> {
        panics::install_hook();
        let size = self.mesh.world();
        for (key, value, source) in self.settings.entries() {
            tracing::info!(setting = key.name, %value, %source, "setting");
        }
        let observer = Observer::of_caller();
        let results: Vec<Option<T>> = std::thread::scope(|scope| {
            let mut threads = Vec::with_capacity(self.ranks.len());
            for rank in self.ranks.clone() {
                let observer = observer.clone();
                let thread = std::thread::Builder::new()
                    .name(format!("rank {rank}"))
                    .stack_size(STACK_BYTES);
                match thread.spawn_scoped(scope, move || {
                    observer.observe(rank, || self.rank_main(rank, f))
                }) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        let text = format!("could not start a thread for rank {rank}: {error}");
                        self.world.raise(rank, Error::new(codes::MESH, text));
                        (rank..self.ranks.end).for_each(|rank| self.world.leave(rank));
                        break;
                    }
                }
            }
            let stuck = self.world.wait_for_all(grace);
            if let (false, Some(error)) = (stuck.is_empty(), report(self.world.faults(), size)) {
                on_stuck(&error, &stuck);
            }
            threads
                .into_iter()
                .map(|thread| thread.join().ok().flatten())
                .collect()
        });
        match report(self.world.take_faults(), size) {
            Some(error) => Err(error),
            None => results.into_iter().collect::<Option<_>>().ok_or_else(|| {
                Error::new(
                    codes::RANK_FAILED,
                    "a rank ended without a result and without an error",
                )
            }),
        }
    }

    /// The life of one rank. Whatever ends it, the others hear of it.
    fn rank_main<T>(&self, rank: usize, f: &impl Fn(&Sp) -> Result<T>) -> Option<T> {
        panics::mark_rank();
        let world = &self.world;
        let _leave = Leave(world, rank);
        let life = || {
            self.place
                .connect(world, self.mesh, rank, self.settings)
                .and_then(|sp| f(&sp))
        };
        match catch_unwind(AssertUnwindSafe(life)) {
            Ok(Ok(value)) => Some(value),
            Ok(Err(error)) => {
                if error.code() != codes::STOPPED {
                    world.raise(rank, error);
                }
                None
            }
            Err(payload) => {
                world.raise(
                    rank,
                    Error::new(codes::RANK_FAILED, panics::describe(&*payload)),
                );
                None
            }
        }
    }
}

/// Who watches the run, if anybody does: ranks are threads of their own, and are watched as their caller is.
#[derive(Clone)]
struct Observer {
    dispatch: Option<Dispatch>,
    caller: Span,
}

impl Observer {
    fn of_caller() -> Self {
        Self {
            dispatch: dispatcher::get_default(|found| {
                (!found.is::<NoSubscriber>()).then(|| found.clone())
            }),
            caller: Span::current(),
        }
    }

    fn observe<T>(self, rank: usize, f: impl FnOnce() -> T) -> T {
        let in_span = || tracing::info_span!(parent: &self.caller, "rank", rank).in_scope(f);
        match &self.dispatch {
            Some(dispatch) => dispatcher::with_default(dispatch, in_span),
            None => in_span(),
        }
    }
}

/// Says that a rank has returned, whatever ended it.
struct Leave<'a>(&'a World, usize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

/// One error for all: the first that happened, and which rank it was if there are several.
fn report(faults: Vec<Fault>, size: usize) -> Option<Error> {
    let mut faults = faults.into_iter();
    let Fault { rank, error } = faults.next()?;
    if size == 1 && error.code() != codes::RANK_FAILED {
        return Some(error);
    }
    let same = faults
        .filter(|other| other.error.to_string() == error.to_string())
        .count();
    Some(match same + 1 {
        all if all == size && size > 1 => error.context(format_args!("all {size} ranks failed")),
        _ => error.context(format_args!("rank {rank} of {size} failed")),
    })
}
