//! Ranks of the same run in other processes: what goes to them, and what they say.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use autosp_plan::codes;

use super::Envelope;
use super::mail::Key;
use super::world::{Deadlines, Fault, SHOWN, World, lock};
use crate::Error;
use crate::comm::Tag;
use crate::comm::process::{Frame, Queue};
use crate::comm::ring::short;

/// The other processes, as the process of the rank `me` sees them.
#[derive(Debug)]
pub(super) struct Away {
    pub(super) me: usize,
    peers: Vec<Mutex<Peer>>,
}

/// A rank in another process.
#[derive(Debug)]
struct Peer {
    queue: Sender<Option<Frame>>,
    /// When it was last heard.
    heard: Instant,
    /// The latest collective that it has started with this rank.
    last: Option<(&'static str, u64, Tag)>,
    /// Its last collectives, as it says.
    history: String,
}

impl Away {
    pub(super) fn send(&self, to: usize, frame: Frame) {
        // A queue without a writer belongs to a rank that is gone.
        let _ = lock(&self.peers[to]).queue.send(Some(frame));
    }

    pub(super) fn tell_all(&self, frame: impl Fn() -> Frame) {
        for to in (0..self.peers.len()).filter(|&to| to != self.me) {
            self.send(to, frame());
        }
    }

    /// What is known of the last collectives of `rank`.
    pub(super) fn history(&self, rank: usize) -> String {
        let peer = lock(&self.peers[rank]);
        let ago = short(peer.heard.elapsed());
        format!(" (last heard {ago} ago){}", peer.history)
    }
}

impl World {
    /// A world of which only the rank `me` runs in this process, and the queues of what is to go to the others.
    pub(crate) fn of_process(
        size: usize,
        deadlines: Deadlines,
        me: usize,
    ) -> (Self, Vec<Option<Queue>>) {
        let (peers, queues) = (0..size)
            .map(|rank| {
                let (queue, end) = channel();
                let peer = Peer {
                    queue,
                    heard: Instant::now(),
                    last: None,
                    history: "\n    no collective yet".to_owned(),
                };
                (Mutex::new(peer), (rank != me).then_some(end))
            })
            .unzip();
        let mut world = Self::new(size, deadlines);
        world.away = Some(Away { me, peers });
        (world, queues)
    }

    /// How long a rank in another process may say nothing.
    pub(crate) fn silence(&self) -> Duration {
        self.deadlines.usual
    }

    /// The last collectives of this process's rank.
    pub(crate) fn own_history(&self) -> String {
        let own = self.away.as_ref().map_or(0, |away| away.me);
        lock(&self.rings[own]).last(SHOWN, Instant::now())
    }

    /// Ends the queues: whatever is in them is still written.
    pub(crate) fn hang_up(&self) {
        for peer in self.away.iter().flat_map(|away| &away.peers) {
            let _ = lock(peer).queue.send(None);
        }
    }

    /// Takes what the rank `from` of another process says.
    pub(crate) fn hear(&self, from: usize, frame: Frame) {
        let Some(away) = &self.away else { return };
        {
            let mut peer = lock(&away.peers[from]);
            peer.heard = Instant::now();
            match &frame {
                Frame::Letter(kind, sequence, envelope) => {
                    peer.last = Some((kind, *sequence, envelope.tag));
                }
                Frame::Beat(history) => peer.history.clone_from(history),
                Frame::Fault(_) | Frame::Returned => {}
            }
        }
        match frame {
            Frame::Letter(kind, sequence, envelope) => {
                self.post(away.me, (kind, from, sequence), envelope);
            }
            Frame::Beat(_) => {}
            Frame::Fault(Fault { rank, error }) => {
                self.record(rank, error);
            }
            Frame::Returned => self.has_left(from),
        }
    }

    /// Takes note that nothing more will be heard of the rank `from`; it is a failure of the run unless the rank has returned, or the run
    /// has failed already.
    pub(crate) fn lost(&self, from: usize, how: &str) {
        let Some(away) = &self.away else { return };
        if !self.returned[from].load(Ordering::SeqCst) && !self.has_failed() {
            let mut text = how.to_owned();
            if let Some((kind, sequence, tag)) = lock(&away.peers[from]).last {
                let _ = write!(
                    text,
                    "; it was last in {tag}, collective #{sequence} of the {kind} group"
                );
            }
            let asleep = lock(&self.mailboxes[away.me].content)
                .asleep
                .as_ref()
                .map(|missing| missing.tag);
            if let Some(tag) = asleep {
                let _ = write!(text, "; rank {} waits in {tag}", away.me);
            }
            let _ = write!(
                text,
                "\n  the last collectives were:{}",
                self.history(&[from, away.me])
            );
            self.raise(from, Error::new(codes::RANK_LOST, text));
        }
        self.has_left(from);
    }

    /// Where an envelope of this process goes: into a mailbox here, or to another process.
    pub(super) fn deliver(&self, to: usize, key: Key, envelope: Envelope) {
        match &self.away {
            Some(away) if to != away.me => {
                away.send(to, Frame::Letter(key.0, key.2, envelope));
            }
            _ => self.post(to, key, envelope),
        }
    }
}
