//! What ranks write, line by line with the rank before it, and the last of it.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Lines that are kept of each rank.
const KEPT: usize = 20;

/// A line that is longer is cut in two.
const LONGEST: u64 = 64 << 10;

/// The last lines of a rank, of both its streams.
pub(super) type Last = Arc<Mutex<VecDeque<String>>>;

/// Where a stream of a rank goes to.
#[derive(Clone, Copy)]
pub(super) enum To {
    Output,
    Errors,
}

pub(super) fn lines(last: &Last) -> MutexGuard<'_, VecDeque<String>> {
    last.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes every line of `from` with `prefix` before it, on a thread of its own, until the stream ends.
pub(super) fn forward(
    from: impl Read + Send + 'static,
    to: To,
    prefix: String,
    last: Last,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = from.by_ref().take(LONGEST).read_until(b'\n', &mut line);
            if !read.is_ok_and(|bytes| bytes > 0) {
                return;
            }
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            let text = String::from_utf8_lossy(&line);
            let mut kept = lines(&last);
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(text.clone().into_owned());
            drop(kept);
            let text = format!("{prefix}{text}\n");
            // Whoever reads may have seen enough: the run goes on.
            let _ = match to {
                To::Output => io::stdout().lock().write_all(text.as_bytes()),
                To::Errors => io::stderr().lock().write_all(text.as_bytes()),
            };
        }
    })
}

/// Says something of the launcher's own.
pub(super) fn say(text: &str) {
    let _ = io::stderr()
        .lock()
        .write_all(format!("{text}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that are kept of `text`.
    fn kept(text: Vec<u8>) -> Vec<String> {
        let last = Last::default();
        let own = Arc::clone(&last);
        let thread = forward(io::Cursor::new(text), To::Errors, String::new(), own);
        thread.unwrap().join().unwrap();
        lines(&last).iter().cloned().collect()
    }

    #[test]
    fn the_last_lines_are_kept_whatever_is_in_them() {
        let mut text = Vec::new();
        for n in 0..30 {
            text.extend_from_slice(format!("line {n}\n").as_bytes());
        }
        text.extend_from_slice(b"not \xff text");
        let last = kept(text);
        assert_eq!(last.len(), KEPT);
        assert_eq!(last[0], "line 11");
        assert_eq!(last[KEPT - 1], "not \u{fffd} text");
    }

    #[test]
    fn a_line_without_an_end_is_cut() {
        let lengths: Vec<usize> = kept(vec![b'x'; 2 * LONGEST as usize + 1])
            .iter()
            .map(String::len)
            .collect();
        assert_eq!(lengths, [LONGEST as usize, LONGEST as usize, 1]);
    }
}
