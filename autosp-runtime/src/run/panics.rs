//! Panics of rank threads: kept for the one message of the run instead of printed by each thread.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::PanicHookInfo;
use std::sync::Once;

thread_local! {
    static IS_RANK: Cell<bool> = const { Cell::new(false) };
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes panics of threads that called [`mark_rank`] silent; all others are reported as before.
pub(super) fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if is_rank() {
                keep_place(info);
            } else {
                previous(info);
            }
        }));
    });
}

/// Says that this thread is a rank, for as long as it lives.
pub(super) fn mark_rank() {
    IS_RANK.set(true);
}

/// Whether this thread is a rank.
pub(super) fn is_rank() -> bool {
    IS_RANK.get()
}

fn keep_place(info: &PanicHookInfo<'_>) {
    let place = info.location().map(ToString::to_string);
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        tracing::error!(place, %backtrace, "a rank panicked");
    }
    PLACE.set(place);
}

/// `panicked at src/model.rs:10:5: index out of bounds`, for what a thread's panic carried.
pub(super) fn describe(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a value that is no text");
    match PLACE.take() {
        Some(place) => format!("panicked at {place}: {text}"),
        None => format!("panicked: {text}"),
    }
}
