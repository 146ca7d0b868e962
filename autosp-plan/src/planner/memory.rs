//! Memory of a choice, by purpose.

use std::fmt;

use super::case::Case;
use super::time::index;
use super::{Choice, Job, Keep};
use crate::settings::Policy;

/// What memory is used for, or what else there is not enough of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// The parameters.
    Parameters,
    /// Their gradients.
    Gradients,
    /// Moments and master weights.
    Optimizer,
    /// What blocks keep from their forward to their backward.
    Kept,
    /// Logits, and the gradient of them.
    Loss,
    /// A block's recomputed graph, and what its backward holds for a moment.
    Working,
    /// Buffers that travel between ranks.
    Exchange,
    /// What attention's kernel needs.
    Workspace,
}

impl Part {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Kept => "kept by blocks",
            Self::Loss => "loss",
            Self::Working => "working set of a block",
            Self::Exchange => "exchange",
            Self::Workspace => "workspace",
        }
    }
}

/// What stops a longer sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limiter {
    /// The device; the part that takes most of it and grows with the length, or else that takes most.
    Device(Part),
    /// The host.
    Host,
    /// Tensors of more than 2^31 elements, which kernels do not take.
    Index,
}

impl fmt::Display for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(part) => write!(f, "device memory: {}", part.name()),
            Self::Host => write!(f, "host memory"),
            Self::Index => write!(f, "kernels: tensors of more than 2^31 elements"),
        }
    }
}

/// Bytes of one rank at its peak, by purpose, and of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// Bytes on the device at the moment of the peak.
    pub parts: Vec<(Part, u64)>,
    /// Where in the step the peak is.
    pub region: &'static str,
    /// The sum of the parts.
    pub peak: u64,
    /// What stays from step to step: parameters and optimizer.
    pub fixed: u64,
    /// The most bytes at any moment of what the runtime's ledger counts: parameters, optimizer, gradients, kept by blocks.
    pub most: [(Part, u64); 4],
    /// Bytes of a host, for all its ranks together.
    pub host: u64,
    /// Elements of the largest tensor.
    pub largest: u64,
    index_fits: bool,
}

impl Memory {
    /// The memory of a choice at `seq` tokens.
    pub fn of(job: &Job, choice: &Choice, seq: usize) -> Self {
        Numbers::new(&Case::new(job, choice, seq)).memory(choice.layers.runs())
    }

    /// Bytes of a part at the peak.
    pub fn part(&self, part: Part) -> u64 {
        let found = self.parts.iter().find(|(one, _)| *one == part);
        found.map_or(0, |(_, bytes)| *bytes)
    }

    /// What does not fit into the machine, if anything.
    pub fn limiter(&self, job: &Job) -> Option<Limiter> {
        if self.peak > job.machine.usable() {
            return Some(Limiter::Device(self.largest_part(job)));
        }
        if self.host > job.machine.host_bytes {
            return Some(Limiter::Host);
        }
        (!self.index_fits).then_some(Limiter::Index)
    }

    /// The part to speak of: what takes most; where what stays from step to step fits, of what grows with the length.
    fn largest_part(&self, job: &Job) -> Part {
        let grows = |part: Part| {
            self.fixed > job.machine.usable()
                || !matches!(part, Part::Parameters | Part::Optimizer | Part::Gradients)
        };
        let growing = self.parts.iter().filter(|(part, _)| grows(*part));
        let most = growing.max_by_key(|(_, bytes)| *bytes);
        match most {
            Some((part, bytes)) if *bytes > 0 => *part,
            _ => Part::Gradients,
        }
    }
}

/// The terms of a case, of which what the blocks keep makes a peak.
pub(super) struct Numbers {
    /// Of a block under each of [`Keep::ALL`].
    kept: [u64; 8],
    again: [u64; 8],
    parameters: u64,
    optimizer: u64,
    gradients: u64,
    /// The same where they are divided while the backward runs.
    divided: Option<u64>,
    /// Gradients of a block.
    block: u64,
    sums: u64,
    buckets: u64,
    /// Gradient of the output projection, which comes first.
    table: u64,
    head: u64,
    loss_moment: u64,
    mlp_moment: u64,
    attention_moment: [u64; 3],
    host: u64,
    ranks_of_host: u64,
    largest: u64,
    pub(super) index_fits: bool,
}

/// Gradients, kept, loss, working set, exchange and workspace of a moment of the step.
type Moment = (&'static str, [u64; 6]);

impl Numbers {
    pub(super) fn new(case: &Case<'_>) -> Self {
        Self {
            kept: Keep::ALL.map(|keep| case.kept(keep.policy)),
            again: Keep::ALL.map(|keep| case.again(keep.policy)),
            parameters: case.parameters(),
            optimizer: case.optimizer(),
            gradients: case.gradients(),
            divided: (case.choice.stage >= 2).then(|| case.gradients()),
            block: case.model().block_parameters() * case.e,
            sums: case.sums(),
            buckets: case.buckets(),
            table: case.model().embedding() * case.e,
            head: case.head(),
            loss_moment: case.loss_moment(),
            mlp_moment: case.mlp_moment(),
            attention_moment: case.attention_moment(),
            host: case.host(),
            ranks_of_host: case.job.machine.ranks_of_host(),
            largest: case.largest(),
            index_fits: case.index_fits(),
        }
    }

    /// Bytes that stay on the device, and that go to the host, of what blocks keep. Of those that go, the device has the last two that ran.
    fn kept(&self, runs: &[(Keep, usize)]) -> [u64; 2] {
        let (mut kept, mut staged, mut hosted, mut previous) = (0, 0, 0, 0);
        for &(keep, count) in runs {
            let block = self.kept[index(keep)];
            if keep.offload {
                hosted += block * count as u64;
                let two = if count > 1 { 2 * block } else { block };
                staged = staged.max(two).max(previous + block);
                previous = block;
            } else {
                kept += block * count as u64;
            }
        }
        [kept + staged, hosted]
    }

    /// The loss at the turn from forward to backward; the feed-forward and the attention of the first and of the last block of each run
    /// that walks back; the update. Between the first and the last of a run memory grows or falls evenly. candle holds on to its graph until its
    /// backward ends, and with it to what blocks keep under all policies but `all`; what a tape keeps is freed when it has walked back.
    fn moments(&self, kept: u64, runs: &[(Keep, usize)]) -> Vec<Moment> {
        let head = self.head;
        let mut moments = vec![(
            "the loss",
            [self.table, kept, head + self.loss_moment, 0, 0, 0],
        )];
        let [attention, exchange, workspace] = self.attention_moment;
        let (mut walked, mut left) = (0, kept);
        for &(keep, count) in runs.iter().rev() {
            let (again, block) = (self.again[index(keep)], self.kept[index(keep)]);
            let freed = match keep {
                Keep {
                    policy: Policy::All,
                    offload: false,
                } => block,
                _ => 0,
            };
            for before in [0, count as u64 - 1] {
                let found = self.table + (walked + before + 1) * self.block;
                let grads = self.divided.unwrap_or(found.min(self.gradients));
                let kept = left - before * freed;
                let mlp = again + self.mlp_moment;
                moments.push((
                    "the backward of a feed-forward",
                    [grads, kept, head, mlp, 0, 0],
                ));
                let attention = again + attention;
                moments.push((
                    "the backward of an attention",
                    [grads, kept, head, attention, exchange, workspace],
                ));
            }
            walked += count as u64;
            left -= count as u64 * freed;
        }
        moments.push(("the update", [self.sums, 0, 0, 0, self.buckets, 0]));
        moments
    }

    /// Peak of a device and bytes of a host.
    pub(super) fn peak(&self, runs: &[(Keep, usize)]) -> [u64; 2] {
        let [kept, hosted] = self.kept(runs);
        let moments = self.moments(kept, runs);
        let moment = moments
            .iter()
            .map(|(_, parts)| parts.iter().sum::<u64>())
            .max();
        [
            self.parameters + self.optimizer + moment.unwrap_or(0),
            (self.host + hosted) * self.ranks_of_host,
        ]
    }

    pub(super) fn memory(&self, runs: &[(Keep, usize)]) -> Memory {
        let [kept, hosted] = self.kept(runs);
        let moments = self.moments(kept, runs);
        let mut largest = &moments[0];
        for moment in &moments[1..] {
            if moment.1.iter().sum::<u64>() > largest.1.iter().sum() {
                largest = moment;
            }
        }
        let (region, [gradients, kept, loss, working, exchange, workspace]) = *largest;
        let parts = vec![
            (Part::Parameters, self.parameters),
            (Part::Optimizer, self.optimizer),
            (Part::Gradients, gradients),
            (Part::Kept, kept),
            (Part::Loss, loss),
            (Part::Working, working),
            (Part::Exchange, exchange),
            (Part::Workspace, workspace),
        ];
        Memory {
            peak: parts.iter().map(|(_, bytes)| bytes).sum(),
            parts,
            region,
            fixed: self.parameters + self.optimizer,
            most: [
                (Part::Parameters, self.parameters),
                (Part::Optimizer, self.optimizer),
                (Part::Gradients, self.gradients.max(self.sums)),
                (Part::Kept, self.kept(runs)[0]),
            ],
            host: (self.host + hosted) * self.ranks_of_host,
            largest: self.largest,
            index_fits: self.index_fits,
        }
    }
}

/// Whether a policy computes a block again.
pub(super) fn recomputes(policy: Policy) -> bool {
    policy != Policy::All
}
