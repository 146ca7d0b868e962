//! The fastest choice that fits, and the longest sequence.

use super::advice::{self, Advice};
use super::case::Case;
use super::memory::Numbers;
use super::time::Costs;
use super::{
    Abilities, Ability, Choice, Coefficients, Keep, Layers, Limiter, Machine, Memory, Model, Pins,
    Rates, Time,
};

/// Numbers of head groups, the usual one first.
const GROUPS: [usize; 4] = [2, 1, 4, 8];

/// What is to be trained, on what.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::exhaustive_structs, reason = "written with `..Job::new(..)`")]
pub struct Job {
    /// The model.
    pub model: Model,
    /// The machine.
    pub machine: Machine,
    /// How fast it is.
    pub rates: Rates,
    /// How much traffic the runtime makes.
    pub coefficients: Coefficients,
    /// Bytes of an element of parameters and activations.
    pub dtype_bytes: usize,
    /// Rows of a batch on each replica.
    pub batch: usize,
    /// What may be chosen.
    pub abilities: Abilities,
    /// What is chosen already.
    pub pins: Pins,
}

impl Job {
    /// In bf16, one row a replica, on an H200's rates, with what the trainer of this version does.
    pub fn new(model: Model, machine: Machine) -> Self {
        Self {
            model,
            machine,
            rates: Rates::default(),
            coefficients: Coefficients::default(),
            dtype_bytes: 2,
            batch: 1,
            abilities: Abilities::TRAINER,
            pins: Pins::default(),
        }
    }

    /// Numbers of ranks that can share a sequence: divisors of the GPUs that divide the heads.
    pub fn meshes(&self) -> Vec<usize> {
        let gpus = self.machine.gpus;
        (1..=gpus)
            .filter(|&sp| gpus.is_multiple_of(sp) && self.model.divides(sp))
            .collect()
    }

    /// Whether the pins can be: the ranks, and as many blocks as the model has.
    ///
    /// # Errors
    /// What was expected and found.
    pub fn check(&self) -> Result<(), String> {
        let meshes = self.meshes();
        if let Some(sp) = self.pins.sp.filter(|sp| !meshes.contains(sp)) {
            let known: Vec<String> = meshes.iter().map(ToString::to_string).collect();
            return Err(format!(
                "expected `sp` among {}, which divide {} GPUs and {} query and {} kv heads, found {sp}",
                known.join(", "),
                self.machine.gpus,
                self.model.heads,
                self.model.kv_heads
            ));
        }
        if let Some(stage) = self.pins.stage.filter(|&stage| stage > 3) {
            return Err(format!("expected a ZeRO stage of 0 to 3, found {stage}"));
        }
        let zero = [self.pins.groups, self.pins.mlp_tiles, self.pins.loss_tiles];
        if zero.contains(&Some(0)) || self.batch == 0 || self.machine.gpus == 0 {
            return Err("expected GPUs, rows, groups and tiles of at least 1, found 0".to_owned());
        }
        let pinned = self.pins.layers.as_ref();
        let count: Option<usize> = pinned.map(|layers| layers.runs().iter().map(|(_, n)| n).sum());
        match count {
            Some(count) if count != self.model.layers => Err(format!(
                "expected a policy for {} blocks, found {count}",
                self.model.layers
            )),
            _ => Ok(()),
        }
    }

    /// What is said of every choice of one kind: the pin, or all values; beyond what the trainer does only what is pinned.
    fn options<T: Clone>(pin: Option<&T>, plain: &[T], more: &[T], able: bool) -> Vec<T> {
        match pin {
            Some(pin) => vec![pin.clone()],
            None => plain
                .iter()
                .chain(if able { more } else { &[] })
                .cloned()
                .collect(),
        }
    }

    /// Everything that may be chosen but what blocks keep; `frugal` leaves out groups and tiles between none and the most, which save
    /// less memory.
    fn skeletons(&self, frugal: bool) -> Vec<Choice> {
        let able = |ability| self.abilities.has(ability);
        let pins = &self.pins;
        let mut all = Vec::new();
        for sp in Self::options(pins.sp.as_ref(), &self.meshes(), &[], false) {
            let dp = self.machine.gpus / sp;
            let local = self.model.heads / sp;
            let mut groups: Vec<usize> = GROUPS.into_iter().filter(|&g| g <= local).collect();
            if sp == 1 {
                groups = vec![1];
            } else if frugal {
                groups = groups.iter().copied().max().into_iter().collect();
            }
            let (mlp, loss): (&[usize], &[usize]) = if frugal {
                (&[64], &[256])
            } else {
                (&[2, 4, 8, 16, 32, 64], &[4, 16, 64, 256])
            };
            let mut stages = vec![0];
            if self.machine.gpus > 1 {
                stages.push(1);
                stages.extend(able(Ability::Zero2).then_some(2));
                stages.extend(able(Ability::Zero3).then_some(3));
            }
            let stages = Self::options(pins.stage.as_ref(), &stages, &[], false);
            let groups = Self::options(pins.groups.as_ref(), &groups, &[], false);
            let mlp = Self::options(pins.mlp_tiles.as_ref(), &[1], mlp, able(Ability::MlpTiles));
            let loss = Self::options(
                pins.loss_tiles.as_ref(),
                &[1],
                loss,
                able(Ability::LossTiles),
            );
            let host = Self::options(
                pins.host_optimizer.as_ref(),
                &[false],
                &[true],
                able(Ability::HostOptimizer),
            );
            for &stage in &stages {
                for &host_optimizer in &host {
                    for &groups in &groups {
                        for &mlp_tiles in &mlp {
                            for &loss_tiles in &loss {
                                all.push(Choice {
                                    sp,
                                    dp,
                                    stage,
                                    host_optimizer,
                                    layers: Layers::uniform(Keep::ALL[0], self.model.layers),
                                    groups,
                                    mlp_tiles,
                                    loss_tiles,
                                });
                            }
                        }
                    }
                }
            }
        }
        all
    }

    /// Everything that blocks may keep: all alike, then two kinds in every proportion.
    fn keeps(&self) -> Vec<Layers> {
        if let Some(pin) = &self.pins.layers {
            return vec![pin.clone()];
        }
        let layers = self.model.layers;
        let kinds = if self.abilities.has(Ability::Offload) {
            8
        } else {
            4
        };
        let kinds = &Keep::ALL[..kinds];
        let mut all: Vec<Layers> = kinds
            .iter()
            .map(|&keep| Layers::uniform(keep, layers))
            .collect();
        if self.abilities.has(Ability::Mixed) {
            // The order matters: blocks that walk back first free what their tape keeps before others fill the gradients.
            for &a in kinds {
                for &b in kinds.iter().filter(|&&b| b != a) {
                    all.extend((1..layers).map(|n| Layers::two(a, n, b, layers - n)));
                }
            }
        }
        all
    }

    fn fits(&self, numbers: &Numbers, layers: &Layers) -> bool {
        let [device, host] = numbers.peak(layers.runs());
        numbers.index_fits && device <= self.machine.usable() && host <= self.machine.host_bytes
    }

    /// The choice with the most tokens a second that fits at `seq` tokens.
    fn fastest(&self, seq: usize) -> Option<Choice> {
        let keeps = self.keeps();
        let mut best: Option<(f64, Choice)> = None;
        for skeleton in self.skeletons(false) {
            let case = Case::new(self, &skeleton, seq);
            let numbers = Numbers::new(&case);
            if !numbers.index_fits {
                continue;
            }
            let costs = Costs::new(&case);
            for layers in &keeps {
                // Replicas each have a batch of their own.
                let seconds = costs.over(layers.runs()).total() / skeleton.dp as f64;
                let better = best
                    .as_ref()
                    .is_none_or(|(least, _)| seconds < least * (1.0 - 1e-9));
                if better && self.fits(&numbers, layers) {
                    let layers = layers.clone();
                    best = Some((
                        seconds,
                        Choice {
                            layers,
                            ..skeleton.clone()
                        },
                    ));
                }
            }
        }
        best.map(|(_, choice)| choice)
    }

    /// The choice that needs least of what there is too little of.
    fn closest(&self, seq: usize) -> Choice {
        let keeps = self.keeps();
        let mut best: Option<(f64, Choice)> = None;
        for skeleton in self.skeletons(true) {
            let numbers = Numbers::new(&Case::new(self, &skeleton, seq));
            for layers in &keeps {
                let [device, host] = numbers.peak(layers.runs());
                let over = |bytes: u64, limit: u64| bytes as f64 / limit.max(1) as f64;
                let over = over(device, self.machine.usable())
                    .max(over(host, self.machine.host_bytes))
                    + if numbers.index_fits { 0.0 } else { 1e6 };
                if best.as_ref().is_none_or(|(least, _)| over < *least) {
                    let layers = layers.clone();
                    best = Some((
                        over,
                        Choice {
                            layers,
                            ..skeleton.clone()
                        },
                    ));
                }
            }
        }
        let nothing = || Choice {
            sp: 1,
            dp: self.machine.gpus,
            stage: 0,
            host_optimizer: false,
            layers: Layers::uniform(Keep::ALL[0], self.model.layers),
            groups: 1,
            mlp_tiles: 1,
            loss_tiles: 1,
        };
        best.map_or_else(nothing, |(_, choice)| choice)
    }

    /// The longest sequence that any choice takes; 0 if not even one token a rank fits.
    pub fn longest(&self) -> usize {
        let keeps = self.keeps();
        let mut best = 0;
        for skeleton in self.skeletons(true) {
            let fits = |tokens: usize| {
                let numbers = Numbers::new(&Case::new(self, &skeleton, tokens * skeleton.sp));
                keeps.iter().any(|layers| self.fits(&numbers, layers))
            };
            // In tokens of a rank: `low` fits, `high` does not.
            let mut low = best / skeleton.sp;
            let mut high = low + 1;
            if !fits(high) {
                continue;
            }
            while fits(high) && high < 1 << 40 {
                (low, high) = (high, 2 * high);
            }
            while high - low > 1 {
                let middle = low.midpoint(high);
                if fits(middle) {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            best = best.max(low * skeleton.sp);
        }
        best
    }
}

/// What [`estimate`] finds.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Estimate {
    /// Tokens of the sequence that was asked for.
    pub seq: usize,
    /// The fastest choice that fits, or the one that comes closest.
    pub choice: Choice,
    /// Its memory.
    pub memory: Memory,
    /// Its time.
    pub time: Time,
    /// Whether it fits.
    pub feasible: bool,
    /// What does not fit, or else what stops a longer sequence.
    pub limiter: Limiter,
    /// The longest sequence that any choice takes.
    pub max_seq: usize,
    /// What would make it longer, the most helpful first.
    pub advice: Vec<Advice>,
}

impl Estimate {
    /// Model FLOP/s of a GPU: `6 Nm S + 6 L S^2 q` over the time and the ranks.
    pub fn flops(&self, job: &Job) -> f64 {
        job.model.flops(self.seq) * job.batch as f64 / self.choice.sp as f64 / self.time.total()
    }

    /// Tokens a second of all GPUs together.
    pub fn tokens_per_second(&self, job: &Job) -> f64 {
        (self.seq * job.batch * self.choice.dp) as f64 / self.time.total()
    }
}

/// The fastest choice for sequences of `seq` tokens, or the one that comes closest; and whether it fits.
///
/// # Errors
/// As [`Job::check`]; if `seq` is 0.
pub fn choose(job: &Job, seq: usize) -> Result<(Choice, bool), String> {
    job.check()?;
    if seq == 0 {
        return Err("expected a sequence of at least 1 token, found 0".to_owned());
    }
    Ok(match job.fastest(seq) {
        Some(choice) => (choice, true),
        None => (job.closest(seq), false),
    })
}

/// Finds the fastest choice for sequences of `seq` tokens, the longest sequence, and what would let it be longer.
///
/// # Errors
/// As [`Job::check`]; if `seq` is 0.
pub fn estimate(job: &Job, seq: usize) -> Result<Estimate, String> {
    let (choice, feasible) = choose(job, seq)?;
    let memory = Memory::of(job, &choice, seq);
    let max_seq = job.longest();
    let limiter = memory.limiter(job).or_else(|| {
        let longer = max_seq + choice.sp;
        Memory::of(job, &job.closest(longer), longer).limiter(job)
    });
    Ok(Estimate {
        seq,
        time: Time::of(job, &choice, seq),
        feasible,
        // A closest choice at a length that is too long has one.
        limiter: limiter.unwrap_or(Limiter::Index),
        max_seq,
        advice: advice::advice(job, seq, max_seq),
        choice,
        memory,
    })
}
