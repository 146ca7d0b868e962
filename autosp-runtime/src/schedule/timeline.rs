//! What a rank really did, and when: events of the schedules that it ran.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One verb of a schedule, executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// The rank in the world.
    pub rank: usize,
    /// The site.
    pub site: &'static str,
    /// The verb, such as `send_qkv`.
    pub verb: &'static str,
    /// The head group; 0 for a verb of all groups.
    pub group: usize,
    /// When it began.
    pub start: Instant,
    /// When it ended.
    pub end: Instant,
}

/// Collects events of the ranks that it is attached to; a cheap handle on one collection.
///
/// ```
/// use autosp_runtime::schedule::Timeline;
/// let timeline = Timeline::default();
/// // On a rank, around the step that is looked at:
/// {
///     let _recording = timeline.attach();
/// }
/// assert!(timeline.events().is_empty());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Timeline(Arc<Mutex<Vec<Event>>>);

thread_local! {
    static ATTACHED: RefCell<Option<Timeline>> = const { RefCell::new(None) };
}

/// Records until it is dropped.
#[derive(Debug)]
#[must_use = "recording ends when this is dropped"]
pub struct Recording(Option<Timeline>);

impl Drop for Recording {
    fn drop(&mut self) {
        let before = self.0.take();
        // The thread-local is gone only while the thread itself ends.
        let _ = ATTACHED.try_with(|attached| attached.replace(before));
    }
}

impl Timeline {
    /// Records the sites that this thread, one rank, runs from here on.
    pub fn attach(&self) -> Recording {
        Recording(ATTACHED.replace(Some(self.clone())))
    }

    /// What was recorded so far, in the order in which verbs ended.
    pub fn events(&self) -> Vec<Event> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn push(&self, event: Event) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
    }
}

/// Runs one verb in a span of its own, `attention` or `exchange`, and records it if this thread records.
pub(crate) fn timed<T>(
    rank: usize,
    site: &'static str,
    verb: &'static str,
    group: usize,
    run: impl FnOnce() -> T,
) -> T {
    let _span = if verb.starts_with("attend") {
        tracing::debug_span!("attention", site, verb, group)
    } else {
        tracing::debug_span!("exchange", site, verb, group)
    }
    .entered();
    let Some(timeline) = ATTACHED.with_borrow(Clone::clone) else {
        return run();
    };
    let start = Instant::now();
    let result = run();
    timeline.push(Event {
        rank,
        site,
        verb,
        group,
        start,
        end: Instant::now(),
    });
    result
}

/// One line for each event: rank, start and length in microseconds, verb.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut events = self.events();
        events.sort_by_key(|event| (event.rank, event.start));
        let origin = events.iter().map(|event| event.start).min();
        for Event {
            rank,
            site,
            verb,
            group,
            start,
            end,
        } in events
        {
            let since = origin.map_or(Duration::ZERO, |origin| start - origin);
            let (at, took) = (since.as_micros(), (end - start).as_micros());
            writeln!(
                f,
                "rank {rank}  {at:>9} us  {took:>8} us  {verb}({group})  {site}"
            )?;
        }
        Ok(())
    }
}
