//! The byte ledger: what each rank hands to its peers, and what it holds from the forward to the backward.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the bytes of one rank, where a buffer is handed to a peer. What a rank hands to itself is not sent. Counts also the bytes that
/// checkpoint scopes hold, and how often attention runs.
#[derive(Debug, Default)]
pub struct Ledger {
    sent: AtomicU64,
    exchange: AtomicU64,
    held: AtomicU64,
    attentions: AtomicU64,
}

/// Bytes handed to peers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bytes {
    /// All collectives together.
    pub sent: u64,
    /// The part of the attention sites.
    pub exchange: u64,
}

impl Ledger {
    /// Counts one buffer of `bytes` bytes, handed to one peer.
    pub fn count(&self, bytes: u64, exchange: bool) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        if exchange {
            self.exchange.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// What was sent so far.
    pub fn snapshot(&self) -> Bytes {
        Bytes {
            sent: self.sent.load(Ordering::Relaxed),
            exchange: self.exchange.load(Ordering::Relaxed),
        }
    }

    /// Bytes that the checkpoint scopes of this rank hold now: inputs of blocks, and what the policy keeps of the sites in them.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// How often attention was computed on this rank, once for each head group; backwards are not counted.
    pub fn attentions(&self) -> u64 {
        self.attentions.load(Ordering::Relaxed)
    }

    pub(crate) fn hold(&self, bytes: u64) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn release(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn attended(&self) {
        self.attentions.fetch_add(1, Ordering::Relaxed);
    }

    /// What was sent since an earlier [`snapshot`](Self::snapshot), for one step.
    pub fn since(&self, earlier: Bytes) -> Bytes {
        self.snapshot() - earlier
    }
}

impl Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            exchange: self.exchange + other.exchange,
        }
    }
}

/// Saturates: an earlier snapshot is never larger.
impl Sub for Bytes {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            sent: self.sent.saturating_sub(other.sent),
            exchange: self.exchange.saturating_sub(other.exchange),
        }
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
        items.fold(Self::default(), Add::add)
    }
}
