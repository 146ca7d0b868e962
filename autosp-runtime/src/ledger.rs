//! The byte ledger: what each rank hands to its peers.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the bytes of one rank, where a buffer is handed to a peer. What a rank hands to itself is not sent.
#[derive(Debug, Default)]
pub struct Ledger {
    sent: AtomicU64,
    exchange: AtomicU64,
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
