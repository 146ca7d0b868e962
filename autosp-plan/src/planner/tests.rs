//! Rules of the planner, and how well it does.

mod measured;
mod rules;

use super::*;

/// Llama-3-8B.
pub(super) fn llama_8b() -> Model {
    Model {
        hidden: 4096,
        ffn: 14336,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        layers: 32,
        vocabulary: 128_256,
        tied: false,
        vectors: 2 * 4096,
        window: None,
    }
}

pub(super) fn h200(gpus: usize) -> Machine {
    Machine {
        gpus,
        gpus_per_host: 8,
        device_bytes: 141 << 30,
        host_bytes: 2 << 40,
    }
}

#[test]
fn windows_take_what_they_do_not_see() {
    let window = |keys, layers| Model {
        window: Some(Window { keys, layers }),
        ..llama_8b()
    };
    // A window of all tokens is none; one of a quarter sees 1 - (3/4)^2 of the triangle.
    assert_eq!(
        window(1024, 32).causal_layers(1024).to_bits(),
        32f64.to_bits()
    );
    assert!((window(256, 32).causal_layers(1024) - 32.0 * 7.0 / 16.0).abs() < 1e-9);
    assert!((window(256, 8).causal_layers(1024) - (24.0 + 8.0 * 7.0 / 16.0)).abs() < 1e-9);
}

#[test]
fn flops_are_those_of_the_convention() {
    let model = llama_8b();
    let (s, n) = (131_072.0, 7_504_924_672.0);
    let expected = 6.0 * n * s + 6.0 * 32.0 * s * s * 4096.0;
    assert!((model.flops(131_072) / expected - 1.0).abs() < 1e-12);
    assert_eq!(model.products(), 7_504_924_672);
    // Attention is 70 % of it at 128K and 95 % at 1M.
    let share = |seq: usize| 1.0 - 6.0 * n * seq as f64 / model.flops(seq);
    assert!((share(131_072) - 0.70).abs() < 0.01 && (share(1 << 20) - 0.95).abs() < 0.01);
}

#[test]
fn pins_that_cannot_be_are_refused() {
    let job = |pins| Job {
        pins,
        ..Job::new(llama_8b(), h200(6))
    };
    let none = Pins::default();
    for (pins, part) in [
        (
            Pins {
                sp: Some(3),
                ..none.clone()
            },
            "expected `sp` among 1, 2",
        ),
        (
            Pins {
                stage: Some(4),
                ..none.clone()
            },
            "0 to 3, found 4",
        ),
        (
            Pins {
                groups: Some(0),
                ..none.clone()
            },
            "found 0",
        ),
        (
            Pins {
                layers: Some(Layers::uniform(Keep::ALL[0], 31)),
                ..none.clone()
            },
            "32 blocks, found 31",
        ),
    ] {
        let error = estimate(&job(pins), 4096).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    assert!(estimate(&job(none), 0).is_err());
}

#[test]
fn what_limits_is_named() {
    let limiter = |machine: Machine, abilities, seq| {
        let job = Job {
            abilities,
            ..Job::new(llama_8b(), machine)
        };
        let found = estimate(&job, seq).unwrap();
        (found.feasible, found.limiter.to_string())
    };
    let one = h200(1);
    // Sixteen bytes a parameter are more than a GPU has.
    let small = Machine {
        device_bytes: 80 << 30,
        ..one
    };
    assert_eq!(
        limiter(small, Abilities::TRAINER, 1024),
        (false, "device memory: optimizer".to_owned())
    );
    // Whole logits of 128256 classes.
    let eight = h200(8);
    assert_eq!(
        limiter(eight, Abilities::NONE, 1 << 20),
        (false, "device memory: loss".to_owned())
    );
    let host = Machine {
        host_bytes: 1 << 30,
        device_bytes: 80 << 30,
        ..one
    };
    let job = Job {
        pins: Pins {
            host_optimizer: Some(true),
            ..Pins::default()
        },
        ..Job::new(llama_8b(), host)
    };
    let found = estimate(&job, 1024).unwrap();
    assert_eq!((found.feasible, found.limiter), (false, Limiter::Host));
    let endless = Machine {
        device_bytes: 1 << 50,
        host_bytes: 1 << 50,
        ..one
    };
    let (fits, text) = limiter(endless, Abilities::NONE, 1 << 20);
    assert!(!fits && text.contains("2^31"), "{text}");
}

#[test]
fn advice_leads_further() {
    let job = Job {
        pins: Pins {
            layers: Some(Layers::uniform(Keep::ALL[0], 32)),
            ..Pins::default()
        },
        abilities: Abilities::of(&[Ability::LossTiles]),
        ..Job::new(llama_8b(), h200(8))
    };
    let found = estimate(&job, 1 << 20).unwrap();
    assert!(!found.feasible && found.max_seq < 1 << 20);
    let whats: Vec<&str> = found
        .advice
        .iter()
        .map(|advice| advice.what.as_str())
        .collect();
    assert!(
        whats.contains(&"leave `policy` to the planner"),
        "{whats:?}"
    );
    assert!(whats.contains(&"16 GPUs"), "{whats:?}");
    assert!(
        whats.iter().any(|what| what.ends_with("of device memory")),
        "{whats:?}"
    );
    assert!(
        found
            .advice
            .iter()
            .all(|advice| advice.max_seq > found.max_seq)
    );
    let assumed = found
        .advice
        .iter()
        .find(|advice| advice.what.contains("--assume all"));
    assert!(assumed.is_some_and(|advice| !advice.runs));
}
