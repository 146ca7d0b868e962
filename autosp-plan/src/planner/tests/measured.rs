//! The model against steps that were measured: docs/device-runs/step-2xh200-blocks.json, the table in docs/memory.md.

use super::*;
use crate::settings::Policy;

/// Tokens, GiB, milliseconds.
type Row = (usize, f64, f64);

const ALL: [Row; 4] = [
    (16_384, 13.754, 143.64),
    (32_768, 19.024, 324.68),
    (65_536, 29.564, 856.16),
    (131_072, 50.642, 2619.89),
];

/// Two ranks on one sequence, four blocks alike, two head groups, nothing in tiles.
fn choice(policy: Policy, stage: u8) -> Choice {
    Choice {
        sp: 2,
        dp: 1,
        stage,
        host_optimizer: false,
        layers: Layers::uniform(Keep::on_device(policy), 4),
        groups: 2,
        mlp_tiles: 1,
        loss_tiles: 1,
    }
}

fn predicted(policy: Policy, seq: usize) -> (f64, f64) {
    let model = Model {
        layers: 4,
        vocabulary: 32_000,
        ..llama_8b()
    };
    assert_eq!(
        model.parameters(),
        1_134_596_096,
        "the number that the benchmark reports"
    );
    let job = Job::new(model, h200(2));
    let choice = choice(policy, 1);
    let peak = Memory::of(&job, &choice, seq).peak as f64 / f64::from(1 << 30);
    (peak, 1e3 * Time::of(&job, &choice, seq).total())
}

#[test]
fn measured_steps_are_predicted() {
    let mut table = String::new();
    for (policy, rows) in [(Policy::All, ALL)] {
        for (seq, gib, ms) in rows {
            let (peak, time) = predicted(policy, seq);
            let off = |predicted: f64, measured: f64| 100.0 * (predicted / measured - 1.0);
            let (memory, step) = (off(peak, gib), off(time, ms));
            let row = format!(
                "| `{}` | {}K | {peak:.2} | {gib:.2} | {memory:+.1} % | {time:.0} | {ms:.0} | {step:+.1} % |\n",
                policy.name(),
                seq >> 10
            );
            table.push_str(&row);
            assert!(memory.abs() < 7.0 && step.abs() < 12.0, "\n{table}");
        }
    }
    insta::assert_snapshot!(table);
}

/// Bytes that both ranks of tests/memory.rs hold at most beyond what stays, in MB: tokens, `all`, `attention`.
const CPU: [(usize, f64, f64); 3] = [
    (1024, 15.58, 9.86),
    (2048, 29.36, 17.75),
    (4096, 58.49, 33.11),
];

#[test]
fn what_an_allocator_counts_is_predicted() {
    let model = Model {
        hidden: 64,
        ffn: 128,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        layers: 4,
        vocabulary: 64,
        tied: false,
        vectors: 128,
        window: None,
    };
    let job = Job {
        dtype_bytes: 4,
        ..Job::new(model, h200(2))
    };
    let mut table = String::new();
    for (seq, all, attention) in CPU {
        for (policy, measured) in [(Policy::All, all), (Policy::Attention, attention)] {
            let choice = choice(policy, 0);
            let memory = Memory::of(&job, &choice, seq);
            // The processor's attention has no workspace of cuDNN's size.
            let beyond = memory.peak - memory.fixed - memory.part(Part::Workspace);
            let predicted = 2.0 * beyond as f64 / 1e6;
            let off = 100.0 * (predicted / measured - 1.0);
            let row = format!(
                "| `{}` | {seq} | {predicted:.1} | {measured:.1} | {off:+.1} % | {} |\n",
                policy.name(),
                memory.region
            );
            table.push_str(&row);
            assert!(off.abs() < 10.0, "\n{table}");
        }
    }
    insta::assert_snapshot!(table);
}
