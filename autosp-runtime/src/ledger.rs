//! The byte ledger: what each rank hands to its peers, and what it holds, by purpose.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Counts the bytes of one rank, where a buffer is handed to a peer. What a rank hands to itself is not sent. Counts also the bytes that
/// checkpoint scopes hold, and how often attention runs.
#[derive(Debug, Default)]
pub struct Ledger {
    sent: AtomicU64,
    exchange: AtomicU64,
    gauges: [Gauge; Purpose::ALL.len()],
    attentions: AtomicU64,
    /// The most bytes on the device; 0 for no limit.
    limit: AtomicU64,
    /// What was held first beyond the limit, and how much there was then.
    breach: Mutex<Option<(Purpose, u64)>>,
}

/// What memory that this crate allocates is for. The rest of what a rank uses is activations in candle's graph and what operations hold
/// for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Purpose {
    /// The variables, frozen ones included.
    Parameters,
    /// Gradients of variables between a block's backward and the update, and their sums.
    Gradients,
    /// Moments and master weights.
    Optimizer,
    /// What checkpoint scopes hold on the device.
    Kept,
    /// What a block that is computed again holds on its tape until it has walked back.
    Working,
    /// What checkpoint scopes hold in memory of the host, and the optimizer's state where it lies there.
    Host,
}

impl Purpose {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Parameters,
        Self::Gradients,
        Self::Optimizer,
        Self::Kept,
        Self::Working,
        Self::Host,
    ];

    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Kept => "kept",
            Self::Working => "working",
            Self::Host => "host",
        }
    }
}

/// Bytes that there are, and the most that there were.
#[derive(Debug, Default)]
struct Gauge {
    now: AtomicU64,
    most: AtomicU64,
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

    /// Bytes that the checkpoint scopes of this rank hold now: inputs of blocks, and what the policy keeps of the sites in them. Of
    /// those that keep on the host the two at most that the device has as well.
    pub fn held(&self) -> u64 {
        self.bytes(Purpose::Kept)
    }

    /// Bytes that this rank holds now for a purpose.
    pub fn bytes(&self, purpose: Purpose) -> u64 {
        self.gauges[purpose as usize].now.load(Ordering::Relaxed)
    }

    /// The most bytes that this rank has held for a purpose since it was started, or since the mark was
    /// [taken back](Self::forget_most).
    pub fn most(&self, purpose: Purpose) -> u64 {
        self.gauges[purpose as usize].most.load(Ordering::Relaxed)
    }

    /// The most bytes are what there are now.
    pub fn forget_most(&self) {
        for gauge in &self.gauges {
            let now = gauge.now.load(Ordering::Relaxed);
            gauge.most.store(now, Ordering::Relaxed);
        }
    }

    /// How often attention was computed on this rank, once for each head group; backwards are not counted.
    pub fn attentions(&self) -> u64 {
        self.attentions.load(Ordering::Relaxed)
    }

    pub(crate) fn hold(&self, purpose: Purpose, bytes: u64) {
        let gauge = &self.gauges[purpose as usize];
        let now = gauge.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        gauge.most.fetch_max(now, Ordering::Relaxed);
        self.watch(purpose);
    }

    /// As [`hold`](Self::hold), until what is returned is dropped.
    pub(crate) fn holding(self: &Arc<Self>, purpose: Purpose, bytes: u64) -> Holding {
        self.hold(purpose, bytes);
        Holding(Arc::clone(self), purpose, bytes)
    }

    pub(crate) fn release(&self, purpose: Purpose, bytes: u64) {
        self.gauges[purpose as usize]
            .now
            .fetch_sub(bytes, Ordering::Relaxed);
    }

    /// There are so many bytes for a purpose now.
    pub(crate) fn set(&self, purpose: Purpose, bytes: u64) {
        let gauge = &self.gauges[purpose as usize];
        gauge.now.store(bytes, Ordering::Relaxed);
        gauge.most.fetch_max(bytes, Ordering::Relaxed);
        self.watch(purpose);
    }

    /// Bytes that this rank holds now on its device, for all purposes that are counted.
    pub fn on_device(&self) -> u64 {
        let all = Purpose::ALL.into_iter();
        all.filter(|purpose| *purpose != Purpose::Host)
            .map(|purpose| self.bytes(purpose))
            .sum()
    }

    /// Watches from now on that no more than `bytes` are held on the device.
    pub(crate) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// What was held first beyond the limit, and all bytes at that time; then forgets it.
    pub(crate) fn take_breach(&self) -> Option<(Purpose, u64)> {
        self.breach
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn watch(&self, purpose: Purpose) {
        let limit = self.limit.load(Ordering::Relaxed);
        if limit == 0 || purpose == Purpose::Host {
            return;
        }
        let now = self.on_device();
        if now > limit {
            self.breach
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert((purpose, now));
        }
    }

    pub(crate) fn attended(&self) {
        self.attentions.fetch_add(1, Ordering::Relaxed);
    }

    /// What was sent since an earlier [`snapshot`](Self::snapshot), for one step.
    pub fn since(&self, earlier: Bytes) -> Bytes {
        self.snapshot() - earlier
    }
}

/// Bytes that are held until this is dropped.
#[derive(Debug)]
pub(crate) struct Holding(Arc<Ledger>, Purpose, u64);

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.release(self.1, self.2);
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
