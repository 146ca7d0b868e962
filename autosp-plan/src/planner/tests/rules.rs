//! What holds for every model and machine.

use proptest::prelude::*;

use super::*;
use crate::cost::{Site, input_bytes};
use crate::settings::Policy;

fn models() -> impl Strategy<Value = Model> {
    let sizes = (1usize..5, 1usize..3, 1usize..4, 1usize..7, 1usize..9);
    (sizes, any::<bool>(), prop::option::of(1usize..3000)).prop_map(
        |((kv, repeat, width, layers, ffn), tied, window)| {
            let (heads, head_dim) = (8 * kv * repeat, 8 * width);
            let hidden = heads * head_dim;
            Model {
                hidden,
                ffn: 32 * ffn,
                heads,
                kv_heads: 8 * kv,
                head_dim,
                layers,
                vocabulary: 100 * ffn,
                tied,
                vectors: 2 * hidden,
                window: window.map(|keys| Window { keys, layers: 1 }),
            }
        },
    )
}

fn abilities() -> impl Strategy<Value = Abilities> {
    prop::collection::vec(0usize..7, 0..7).prop_map(|list| {
        list.iter()
            .fold(Abilities::NONE, |set, &i| set.with(Ability::ALL[i]))
    })
}

/// Of 1 to 8 GPUs with 1.5 to 4 GiB each, most of which the context takes.
fn jobs() -> impl Strategy<Value = Job> {
    let machine = (0u32..4, 1_600u64..4_000, 0u64..4_000);
    (
        models(),
        machine,
        abilities(),
        1usize..3,
        prop::sample::select(vec![2, 4]),
    )
        .prop_map(
            |(model, (gpus, device, host), abilities, batch, dtype_bytes)| Job {
                dtype_bytes,
                batch,
                abilities,
                ..Job::new(
                    model,
                    Machine {
                        gpus: 1 << gpus,
                        gpus_per_host: 4,
                        device_bytes: device << 20,
                        host_bytes: host << 20,
                    },
                )
            },
        )
}

/// Every choice of a small space, whatever it needs.
fn every_choice(job: &Job) -> Vec<Choice> {
    let mut all = Vec::new();
    let layers = job.model.layers;
    let mut keeps = Vec::new();
    for a in Keep::ALL {
        for b in Keep::ALL {
            keeps.extend((0..layers).map(|n| Layers::two(a, n, b, layers - n)));
        }
    }
    for sp in job.meshes() {
        let local = job.model.heads / sp;
        for stage in 0..4u8 {
            for host_optimizer in [false, true] {
                for groups in [1, 2, 4, 8].into_iter().filter(|&g| g <= local) {
                    for mlp_tiles in [1, 2, 16, 64] {
                        for loss_tiles in [1, 4, 256] {
                            for layers in &keeps {
                                all.push(Choice {
                                    sp,
                                    dp: job.machine.gpus / sp,
                                    stage,
                                    host_optimizer,
                                    layers: layers.clone(),
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
    }
    let able = |choice: &Choice| {
        choice.needs().without(job.abilities) == Abilities::NONE
            && job.pins.allow(choice)
            && (job.machine.gpus > 1 || choice.stage == 0)
    };
    all.retain(able);
    all
}

fn fits(job: &Job, choice: &Choice, seq: usize) -> bool {
    Memory::of(job, choice, seq).limiter(job).is_none()
}

/// One of the choices of a job, by a number.
fn some_choice(job: &Job, pick: usize) -> Choice {
    let all = every_choice(&Job {
        abilities: Abilities::ALL,
        ..job.clone()
    });
    all[pick % all.len()].clone()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// If any choice fits, the planner's does, needs nothing that it may not use, and is as fast.
    #[test]
    fn the_pick_fits_whenever_any_choice_does(job in jobs(), seq in 1usize..40_000) {
        let found = estimate(&job, seq).unwrap();
        let all = every_choice(&job);
        let fitting: Vec<&Choice> = all.iter().filter(|choice| fits(&job, choice, seq)).collect();
        prop_assert_eq!(found.feasible, !fitting.is_empty());
        prop_assert_eq!(found.choice.needs().without(job.abilities), Abilities::NONE);
        prop_assert_eq!(found.feasible, fits(&job, &found.choice, seq));
        prop_assert_eq!(found.feasible, seq.next_multiple_of(found.choice.sp) <= found.max_seq || seq <= found.max_seq);
        let rate = |choice: &Choice| Time::of(&job, choice, seq).total() / choice.dp as f64;
        for choice in fitting {
            prop_assert!(rate(&found.choice) <= rate(choice) * (1.0 + 1e-6), "{:?}", choice);
        }
    }

    /// The longest sequence fits, and a longer one by a rank's token does not.
    #[test]
    fn the_longest_sequence_is_the_longest(job in jobs()) {
        let longest = job.longest();
        let any = |seq: usize| every_choice(&job).iter().any(|choice| fits(&job, choice, seq));
        prop_assert!(longest == 0 || any(longest));
        prop_assert!(!any(longest + job.machine.gpus));
        if longest > 0 {
            prop_assert!(estimate(&job, longest).unwrap().feasible);
        }
    }

    /// Memory and time of a choice grow with the length, and the longest sequence with the memory of device and host and with the ranks.
    #[test]
    fn longer_needs_more_and_more_takes_longer(job in jobs(), pick in any::<usize>(), seq in 1usize..30_000, more in 1usize..30_000) {
        let choice = some_choice(&job, pick);
        let (short, long) = (Memory::of(&job, &choice, seq), Memory::of(&job, &choice, seq + more));
        prop_assert!(short.peak <= long.peak && short.host <= long.host);
        prop_assert_eq!(short.peak, short.parts.iter().map(|(_, bytes)| bytes).sum::<u64>());
        prop_assert!(Time::of(&job, &choice, seq).total() <= Time::of(&job, &choice, seq + more).total());
        let longest = job.longest();
        let with = |machine| Job { machine, ..job.clone() }.longest();
        let machine = job.machine;
        let added = (more << 14) as u64;
        let larger = with(Machine { device_bytes: machine.device_bytes + added, ..machine });
        prop_assert!(larger >= longest);
        let larger = with(Machine { host_bytes: machine.host_bytes + added, ..machine });
        prop_assert!(larger >= longest);
        let ranks = machine.gpus * 2;
        if ranks <= 8 && machine.gpus_per_host >= ranks {
            // More ranks on one host have less of it each, and hold less each.
            let larger = with(Machine { gpus: ranks, ..machine });
            prop_assert!(larger >= longest, "{} < {}", larger, longest);
        }
    }

    /// What is pinned stays, whether it fits or not.
    #[test]
    fn pins_are_kept(job in jobs(), pick in any::<usize>(), mask in 0u8..128, seq in 1usize..20_000) {
        let choice = some_choice(&job, pick);
        let bit = |i: u8| mask & 1 << i != 0;
        let pins = Pins {
            sp: bit(0).then_some(choice.sp),
            stage: bit(1).then_some(choice.stage),
            host_optimizer: bit(2).then_some(choice.host_optimizer),
            layers: bit(3).then(|| choice.layers.clone()),
            groups: bit(4).then_some(choice.groups),
            mlp_tiles: bit(5).then_some(choice.mlp_tiles),
            loss_tiles: bit(6).then_some(choice.loss_tiles),
        };
        let found = estimate(&Job { pins: pins.clone(), ..job }, seq).unwrap();
        prop_assert!(pins.allow(&found.choice), "{:?} {:?}", pins, found.choice);
    }

    /// What is kept is what the runtime's formula says.
    #[test]
    fn kept_bytes_are_those_of_the_runtime(job in jobs(), seq in 1usize..10_000, layers in 0usize..8) {
        for sp in job.meshes() {
            let policy = Policy::ALL[1 + layers % 3];
            let choice = Choice {
                sp,
                dp: job.machine.gpus / sp,
                stage: 0,
                host_optimizer: false,
                layers: Layers::uniform(Keep::on_device(policy), job.model.layers),
                groups: 1,
                mlp_tiles: 1,
                loss_tiles: 256,
            };
            let model = &job.model;
            let padded = seq.next_multiple_of(sp);
            let site = Site {
                batch: job.batch,
                heads: model.heads,
                kv_heads: model.kv_heads,
                key_width: model.head_dim,
                value_width: model.head_dim,
                padded,
                ranks: sp,
                element: job.dtype_bytes,
                lse_element: 4,
            };
            let block = input_bytes(job.batch, padded / sp, model.hidden, job.dtype_bytes) + site.kept_bytes(policy);
            let memory = Memory::of(&job, &choice, seq);
            if memory.region != "the update" {
                prop_assert_eq!(memory.part(Part::Kept), model.layers as u64 * block);
            }
        }
    }
}
