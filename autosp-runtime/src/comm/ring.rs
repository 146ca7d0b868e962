//! The last collectives of a rank, printed when something hangs.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::Tag;

/// Collectives that a ring remembers.
const KEPT: usize = 16;

/// One collective of one rank.
#[derive(Debug, Clone, Copy)]
struct Entry {
    group: &'static str,
    tag: Tag,
    sequence: u64,
    started: Instant,
    /// When everything had arrived.
    done: Option<Instant>,
}

/// The last collectives of one rank, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Ring(VecDeque<Entry>);

impl Ring {
    /// Notes that a collective was started.
    pub(crate) fn start(&mut self, group: &'static str, tag: Tag, sequence: u64) {
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(Entry {
            group,
            tag,
            sequence,
            started: Instant::now(),
            done: None,
        });
    }

    /// Notes that it is complete.
    pub(crate) fn done(&mut self, group: &'static str, sequence: u64) {
        let entry = self
            .0
            .iter_mut()
            .rev()
            .find(|entry| entry.group == group && entry.sequence == sequence);
        if let Some(entry) = entry {
            entry.done = Some(Instant::now());
        }
    }

    /// The last `count` collectives, newest first, one a line.
    pub(crate) fn last(&self, count: usize, now: Instant) -> String {
        let mut text = String::new();
        for entry in self.0.iter().rev().take(count) {
            let Entry {
                group,
                tag,
                sequence,
                started,
                done,
            } = entry;
            let state = match done {
                Some(at) => format!("complete {} ago", short(now.duration_since(*at))),
                None => format!(
                    "started {} ago, not complete",
                    short(now.duration_since(*started))
                ),
            };
            let _ = write!(text, "\n    {group} #{sequence} {tag}: {state}");
        }
        if text.is_empty() {
            "\n    no collective yet".to_owned()
        } else {
            text
        }
    }
}

/// A time with as many digits as one wants to read.
pub(crate) fn short(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 10.0 => format!("{s:.1} s"),
        s => format!("{s:.0} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_collectives_are_kept_and_shown_newest_first() {
        let mut ring = Ring::default();
        assert_eq!(ring.last(4, Instant::now()), "\n    no collective yet");
        for sequence in 0..KEPT as u64 + 5 {
            ring.start("sp", Tag::new("site", "qkv").at(sequence), sequence);
            ring.done("dp", sequence);
            if sequence % 2 == 0 {
                ring.done("sp", sequence);
            }
        }
        assert_eq!(ring.0.len(), KEPT);
        let text = ring.last(2, Instant::now() + Duration::from_secs(30));
        let lines: Vec<&str> = text.trim_start().lines().map(str::trim).collect();
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].starts_with("sp #20 `site` qkv (step 20): complete "),
            "{text}"
        );
        assert!(
            lines[1].starts_with("sp #19 `site` qkv (step 19): started "),
            "{text}"
        );
        assert!(lines[1].ends_with(" s ago, not complete"), "{text}");
    }

    #[test]
    fn times_are_short() {
        let shown: Vec<String> = [0.0421, 1.25, 120.4]
            .map(|s| short(Duration::from_secs_f64(s)))
            .into();
        assert_eq!(shown, ["42 ms", "1.2 s", "120 s"]);
    }
}
