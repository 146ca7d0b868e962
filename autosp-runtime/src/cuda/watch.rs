//! A watchdog over what is in flight on the communication stream: kernels of NCCL wait for a peer for ever.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;

/// How often the watchdog looks.
const PERIOD: Duration = Duration::from_millis(200);

/// A collective on the communication stream.
struct Entry {
    what: String,
    start: CudaEvent,
    done: Arc<CudaEvent>,
    /// When it was first seen running.
    since: Option<Instant>,
}

#[derive(Default)]
struct State {
    entries: VecDeque<Entry>,
    stop: bool,
}

/// Looks at the collectives of one rank from a thread of its own.
pub(crate) struct Watch {
    state: Arc<(Mutex<State>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Calls `late` with the first collective that has run on the GPU for longer than `deadline` says, once. `broken` is asked at every
    /// look for an error that the library reports on its own.
    pub(crate) fn new(
        deadline: impl Fn() -> Duration + Send + 'static,
        broken: impl Fn() -> Option<String> + Send + 'static,
        late: impl Fn(String) + Send + 'static,
    ) -> std::io::Result<Self> {
        let state = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let shared = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("nccl watchdog".to_owned())
            .spawn(move || {
                let (mutex, bell) = &*shared;
                let mut state = lock(mutex);
                while !state.stop {
                    let found = look(&mut state.entries, deadline());
                    if found.is_some() || !state.entries.is_empty() {
                        drop(state);
                        if let Some(what) = found.or_else(&broken) {
                            late(what);
                            return;
                        }
                        state = lock(mutex);
                    }
                    state = bell
                        .wait_timeout(state, PERIOD)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
            })?;
        Ok(Self {
            state,
            thread: Some(thread),
        })
    }

    /// Watches a collective: `start` and `done` are recorded before and after it on the communication stream.
    pub(crate) fn add(&self, what: String, start: CudaEvent, done: Arc<CudaEvent>) {
        lock(&self.state.0).entries.push_back(Entry {
            what,
            start,
            done,
            since: None,
        });
    }
}

/// Forgets what is complete; the first collective that is late. The stream runs them in order, so only the first can be running.
fn look(entries: &mut VecDeque<Entry>, deadline: Duration) -> Option<String> {
    while entries
        .front()
        .is_some_and(|entry| entry.done.is_complete())
    {
        entries.pop_front();
    }
    let entry = entries.front_mut()?;
    if entry.since.is_none() && entry.start.is_complete() {
        entry.since = Some(Instant::now());
    }
    let running = entry.since?.elapsed();
    (running > deadline).then(|| {
        format!(
            "{} has run on the GPU for {:.0} s",
            entry.what,
            running.as_secs_f64()
        )
    })
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.state.0).stop = true;
        self.state.1.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}
