//! What to change to go further.

use super::{Abilities, Job, Machine, Pins};
use crate::units::show_size;

/// A change, and how far it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Advice {
    /// What to change, in words.
    pub what: String,
    /// The longest sequence then.
    pub max_seq: usize,
    /// Whether the trainer of this version does it.
    pub runs: bool,
}

/// How much longer the longest sequence has to become for a change to be worth saying.
const WORTH: f64 = 1.02;

/// Changes that let the longest sequence be longer than `max_seq`, or that make `seq` fit, the most helpful first.
pub(super) fn advice(job: &Job, seq: usize, max_seq: usize) -> Vec<Advice> {
    let mut all = Vec::new();
    let mut consider = |what: String, changed: &Job, runs: bool| {
        let longest = changed.longest();
        if longest as f64 > max_seq as f64 * WORTH {
            all.push(Advice {
                what,
                max_seq: longest,
                runs,
            });
        }
    };
    for name in job.pins.names() {
        let changed = Job {
            pins: without(&job.pins, name),
            ..job.clone()
        };
        consider(format!("leave `{name}` to the planner"), &changed, true);
    }
    let missing = Abilities::ALL.without(job.abilities);
    for ability in missing.iter() {
        let changed = Job {
            abilities: job.abilities.with(ability),
            ..job.clone()
        };
        let what = format!("{} (`--assume {ability}`)", ability.meaning());
        consider(what, &changed, Abilities::TRAINER.has(ability));
    }
    if missing.iter().count() > 1 {
        let changed = Job {
            abilities: Abilities::ALL,
            ..job.clone()
        };
        consider("all of these (`--assume all`)".to_owned(), &changed, false);
    }
    let machine = job.machine;
    let twice = Job {
        machine: Machine {
            gpus: 2 * machine.gpus,
            ..machine
        },
        ..job.clone()
    };
    consider(format!("{} GPUs", 2 * machine.gpus), &twice, true);
    let device = |bytes: u64| Machine {
        device_bytes: bytes,
        ..machine
    };
    let host = |bytes: u64| Machine {
        host_bytes: bytes,
        ..machine
    };
    if seq > max_seq {
        let enough = [
            (enough(job, seq, machine.device_bytes, device), "device"),
            (enough(job, seq, machine.host_bytes, host), "host"),
        ];
        for (bytes, place) in enough {
            all.extend(bytes.map(|bytes| Advice {
                what: format!("{} of {place} memory", show_size(bytes)),
                max_seq: seq,
                runs: true,
            }));
        }
    }
    all.sort_by_key(|advice| (!advice.runs, std::cmp::Reverse(advice.max_seq)));
    all
}

/// The memory with which `seq` tokens fit, of a machine that `with` makes, if any does: what it does not change has limits of its own.
fn enough(job: &Job, seq: usize, now: u64, with: impl Fn(u64) -> Machine) -> Option<u64> {
    let fits = |bytes: u64| {
        let machine = with(bytes);
        Job {
            machine,
            ..job.clone()
        }
        .longest()
            >= seq
    };
    let (mut low, mut high) = (0, now.max(1 << 30));
    while !fits(high) {
        low = high;
        high = high.checked_mul(2).filter(|bytes| *bytes < 1 << 50)?;
    }
    // To a GiB.
    while high - low > 1 << 30 {
        let middle = low.midpoint(high);
        if fits(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Some(high.next_multiple_of(1 << 30))
}

/// All pins but one.
fn without(pins: &Pins, name: &str) -> Pins {
    let mut pins = pins.clone();
    match name {
        "sp" => pins.sp = None,
        "zero" => pins.stage = None,
        "host_optimizer" => pins.host_optimizer = None,
        "policy" => pins.layers = None,
        "groups" => pins.groups = None,
        "mlp_tiles" => pins.mlp_tiles = None,
        _ => pins.loss_tiles = None,
    }
    pins
}
