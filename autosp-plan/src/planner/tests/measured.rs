//! The model against steps that were measured: docs/device-runs/step-2xh200.json, the table in docs/memory.md.

use super::*;
use crate::settings::Policy;

/// Tokens, GiB, milliseconds.
type Row = (usize, f64, f64);

const ALL: [Row; 4] = [
    (16_384, 20.581, 194.83),
    (32_768, 30.823, 401.10),
    (65_536, 51.495, 1000.07),
    (131_072, 92.855, 2895.26),
];

const QKV: [Row; 4] = [
    (16_384, 15.487, 229.54),
    (32_768, 20.620, 472.94),
    (65_536, 31.073, 1137.83),
    (131_072, 51.980, 3158.38),
];

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
    let choice = Choice {
        sp: 2,
        dp: 1,
        stage: 1,
        host_optimizer: false,
        layers: Layers::uniform(Keep::on_device(policy), 4),
        groups: 2,
        mlp_tiles: 1,
        loss_tiles: 1,
    };
    let peak = Memory::of(&job, &choice, seq).peak as f64 / f64::from(1 << 30);
    (peak, 1e3 * Time::of(&job, &choice, seq).total())
}

#[test]
fn measured_steps_are_predicted_within_three_percent() {
    let mut table = String::new();
    for (policy, rows) in [(Policy::All, ALL), (Policy::Qkv, QKV)] {
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
            assert!(memory.abs() < 3.0 && step.abs() < 3.0, "\n{table}");
        }
    }
    insta::assert_snapshot!(table);
}
