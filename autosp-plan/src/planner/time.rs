//! Time of a step, by part.

use super::case::Case;
use super::memory::recomputes;
use super::{Choice, Job, Keep};
use crate::settings::Policy;

/// Seconds of a step on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Time {
    /// Matrix products.
    pub products: f64,
    /// Attention.
    pub attention: f64,
    /// Everything that moves bytes: norms, rotary positions, activations, sums of gradients, loss.
    pub elementwise: f64,
    /// The part of the exchanges that nothing hides.
    pub exchange: f64,
    /// The part of copies to and from the host that nothing hides.
    pub offload: f64,
    /// Reduction of gradients, update, gathering of parameters.
    pub update: f64,
}

impl Time {
    /// The time of a choice at `seq` tokens.
    pub fn of(job: &Job, choice: &Choice, seq: usize) -> Self {
        let costs = Costs::new(&Case::new(job, choice, seq));
        costs.over(choice.layers.runs())
    }

    /// The whole step.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// Each part with its name.
    pub fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("matrix products", self.products),
            ("attention", self.attention),
            ("elementwise", self.elementwise),
            ("exchange, exposed", self.exchange),
            ("offload, exposed", self.offload),
            ("reduction and update", self.update),
        ]
    }
}

/// What a step costs apart from its blocks, and what a block costs under each choice of what it keeps.
pub(super) struct Costs {
    apart: Time,
    blocks: [Time; 8],
}

impl Costs {
    pub(super) fn new(case: &Case<'_>) -> Self {
        Self {
            apart: apart(case),
            blocks: Keep::ALL.map(|keep| block(case, keep)),
        }
    }

    /// The step whose blocks keep what `runs` says.
    pub(super) fn over(&self, runs: &[(Keep, usize)]) -> Time {
        let mut sum = self.apart;
        for &(keep, count) in runs {
            let block = &self.blocks[index(keep)];
            let n = count as f64;
            sum.products += n * block.products;
            sum.attention += n * block.attention;
            sum.elementwise += n * block.elementwise;
            sum.exchange += n * block.exchange;
            sum.offload += n * block.offload;
        }
        sum
    }
}

/// The place of `keep` in [`Keep::ALL`].
pub(super) fn index(keep: Keep) -> usize {
    Keep::ALL.iter().position(|one| *one == keep).unwrap_or(0)
}

/// The head's products, and reduction and update.
fn apart(case: &Case<'_>) -> Time {
    let (job, rates) = (case.job, &case.job.rates);
    let model = case.model();
    let outside = model.products() - model.layers as u64 * model.block_products();
    let n = model.parameters() as f64;
    let world = case.world as f64;
    let stage = case.choice.stage;
    let sent = |bytes: f64| bytes * n * (world - 1.0) / world / rates.link;
    // A reduce-scatter in the type of the parameters; the sums go back in f32, updated parameters in their own type.
    let back = if stage == 0 { 4.0 } else { case.e as f64 };
    // Stage 3 gathers parameters for the forward and for the backward.
    let gathers = if stage == 3 { 2.0 } else { 1.0 };
    let travel = sent(case.e as f64) + gathers * sent(back);
    let share = if stage == 0 { n } else { n / world };
    let update = if case.choice.host_optimizer {
        // Gradients go down and parameters up; the processors read and write state, gradients and parameters of all ranks of a host.
        let copies = share * (4.0 + case.e as f64) / rates.host_link;
        let ranks = job.machine.ranks_of_host() as f64;
        copies.max(share * ranks * 30.0 / rates.host_memory)
    } else {
        0.0
    };
    Time {
        products: 6.0 * outside as f64 * case.tokens as f64 / rates.gemm,
        update: travel + update + n * job.coefficients.update / rates.copy,
        ..Time::default()
    }
}

/// One block.
fn block(case: &Case<'_>, keep: Keep) -> Time {
    let (job, rates, model) = (case.job, &case.job.rates, case.model());
    let policy = keep.policy;
    let again = f64::from(u8::from(recomputes(policy)));
    let tokens = case.tokens as f64;

    let n = model.block_products() as f64;
    // A product of few rows is slower: measured rates are those of 32768 rows, and one of 512 has about half of it.
    let tiles = case.choice.mlp_tiles as f64;
    let slower = |tiles: f64| 1.0 + 512.0 * tiles / tokens;
    let ffn = 3.0 * (model.hidden * model.ffn) as f64;
    let tiled = if tiles > 1.0 {
        // The tiles of a backward are computed once more, and all their products are smaller.
        2.0 * ffn + (6.0 + 2.0 * again) * ffn * (slower(tiles) / slower(1.0) - 1.0)
    } else {
        0.0
    };
    let products =
        [2.0 * n, 4.0 * n + 2.0 * n * again + tiled].map(|flops| flops * tokens / rates.gemm);

    let seq = case.site.padded as f64;
    let pairs = model.causal_layers(case.site.padded) / model.layers.max(1) as f64 * seq * seq;
    let flops = pairs * (model.queries() * job.batch / case.site.ranks) as f64;
    let [forward, backward] = rates.attention(seq);
    let narrow = narrowness(case);
    let attend = [2.0 * flops / forward, 5.0 * flops / backward].map(|seconds| seconds * narrow);
    let attended = if policy == Policy::Input {
        attend[0]
    } else {
        0.0
    };
    let attention = [attend[0], attend[1] + attended];

    let traffic = case.traffic_bytes() as f64 / rates.copy;
    let coefficients = job.coefficients;
    let elementwise = [
        traffic * coefficients.forward,
        traffic * (coefficients.backward + coefficients.forward * again),
    ];

    // With g groups all but a g-th of an exchange runs beside attention.
    let groups = case.groups() as f64;
    let exchange = [case.site.forward_bytes(), case.site.backward_bytes(policy)].map(|bytes| {
        let seconds = bytes as f64 / rates.link;
        seconds / groups + seconds * (1.0 - 1.0 / groups) * coefficients.beside
    });

    let copied = if keep.offload {
        case.kept(policy) as f64 / rates.host_link
    } else {
        0.0
    };
    let offload = [0, 1].map(|way| {
        let compute = products[way] + attention[way] + elementwise[way];
        (copied - compute).max(0.0) + copied.min(compute) * coefficients.beside
    });

    Time {
        products: products.iter().sum(),
        attention: attention.iter().sum(),
        elementwise: elementwise.iter().sum(),
        exchange: exchange.iter().sum(),
        offload: offload.iter().sum(),
        update: 0.0,
    }
}

/// How much longer attention takes in groups of few heads: measured at 32K with 16, 8, 4 and 2 query heads a group,
/// where only the last is slower; at 128K none is. One head is a guess.
fn narrowness(case: &Case<'_>) -> f64 {
    let heads = case.site.heads / case.site.ranks / case.groups();
    let slower: f64 = match heads {
        0..=1 => 1.25,
        2 => 1.11,
        3 => 1.05,
        _ => 1.0,
    };
    let short = (2.0 - (case.site.padded as f64 / 32_768.0).log2()) / 2.0;
    1.0 + (slower - 1.0) * short.clamp(0.0, 1.0)
}
