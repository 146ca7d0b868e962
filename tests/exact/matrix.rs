//! Every mesh, number of head groups, key-value heads, length and label pattern against the plain model.

use autosp::Settings;
use autosp_plan::settings::Policy;

use crate::job::{Job, assert_contract, tiny};

/// Rows of the global batch: every replica of a dp 2 mesh gets one or two.
const BATCH: usize = 2;

#[derive(Debug, Clone, Copy)]
enum Labels {
    /// Every position has a target.
    Equal,
    /// Ever more targets towards the end.
    Unequal,
    /// None on the first quarter, so that the first of four ranks has no target.
    EmptyShard,
}

fn valid(labels: Labels, position: usize, s: usize) -> bool {
    match labels {
        Labels::Equal => true,
        Labels::Unequal => (position * position) % s < position,
        Labels::EmptyShard => position >= s.div_ceil(4),
    }
}

/// Runs all meshes and group counts on one model and batch.
fn meshes(kv_heads: usize, s: usize, labels: Labels) {
    let job = Job::random(tiny(kv_heads), BATCH, s, 3, |position| {
        valid(labels, position, s)
    });
    let expected = job.expected();
    for (sp, dp) in [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)] {
        // With one rank a sequence there is no exchange whose groups could matter, and a rank of four has two heads.
        for groups in 1..=[1, 4, 2][sp / 2] {
            let what = format!("sp {sp} dp {dp} groups {groups} kv {kv_heads} s {s} {labels:?}");
            let settings = Settings::default()
                .with_sp(sp)
                .with_dp(dp)
                .with_groups(groups);
            let found = job.on_ranks(settings);
            for rank in &found {
                assert_contract(&what, rank, &expected);
            }
            let exchanged: u64 = found.iter().map(|rank| rank.bytes.exchange).sum();
            assert_eq!(
                exchanged,
                formula(&job, sp),
                "{what}: exchanged bytes of all ranks"
            );
        }
    }
}

/// The plan's formula for all ranks, layers and both directions: `2 (q + k') bytes B (S / P) (P - 1)` each way, at the padded S, where
/// q is the width of all query heads and k' that of the key heads, of which there are at least P after replication.
fn formula(job: &Job, sp: usize) -> u64 {
    let config = &job.config;
    let (b, s) = job.tokens.dims2().unwrap();
    let q = config.num_attention_heads * config.head_dim();
    let k = config.num_key_value_heads.max(sp) * config.head_dim();
    (config.num_hidden_layers * 2 * 2 * (q + k) * 4 * b * s.div_ceil(sp) * (sp - 1)) as u64
}

macro_rules! matrix {
    ($($name:ident: $kv_heads:literal, $s:literal, $labels:ident;)*) => {
        $(
            #[test]
            fn $name() {
                meshes($kv_heads, $s, Labels::$labels);
            }
        )*
    };
}

matrix! {
    kv_1_divisible_equal: 1, 64, Equal;
    kv_1_divisible_unequal: 1, 64, Unequal;
    kv_1_divisible_empty: 1, 64, EmptyShard;
    kv_1_odd_equal: 1, 61, Equal;
    kv_1_odd_unequal: 1, 61, Unequal;
    kv_1_odd_empty: 1, 61, EmptyShard;
    kv_2_divisible_equal: 2, 64, Equal;
    kv_2_divisible_unequal: 2, 64, Unequal;
    kv_2_divisible_empty: 2, 64, EmptyShard;
    kv_2_odd_equal: 2, 61, Equal;
    kv_2_odd_unequal: 2, 61, Unequal;
    kv_2_odd_empty: 2, 61, EmptyShard;
    kv_4_divisible_equal: 4, 64, Equal;
    kv_4_divisible_unequal: 4, 64, Unequal;
    kv_4_divisible_empty: 4, 64, EmptyShard;
    kv_4_odd_equal: 4, 61, Equal;
    kv_4_odd_unequal: 4, 61, Unequal;
    kv_4_odd_empty: 4, 61, EmptyShard;
}

/// A length of several attention tiles that no mesh divides.
#[test]
fn a_thousand_and_three_tokens() {
    let job = Job::random(tiny(2), 1, 1003, 5, |_| true);
    let expected = job.expected();
    for (sp, groups) in [(2, 3), (4, 2)] {
        for found in job.on_ranks(Settings::default().with_sp(sp).with_groups(groups)) {
            assert_contract(&format!("sp {sp} groups {groups}"), &found, &expected);
        }
    }
}

/// Sequences so short that some ranks hold nothing but padding.
#[test]
fn shorter_than_the_ranks() {
    for s in [1, 2, 3, 5] {
        let job = Job::random(tiny(2), 1, s, 5, |_| true);
        let expected = job.expected();
        for found in job.on_ranks(Settings::default().with_sp(4)) {
            assert_contract(&format!("s {s}"), &found, &expected);
        }
    }
}

/// What is kept for the backward and how attention is computed change nothing.
#[test]
fn every_policy_and_attention_has_the_same_numbers() {
    let job = Job::random(tiny(2), 2, 61, 3, |_| true);
    let expected = job.expected();
    for policy in Policy::ALL {
        for attention in ["tiled", "reference"] {
            let settings = Settings::default().with_sp(4).with_policy(policy);
            let settings = settings.with("attention", attention).unwrap();
            for found in job.on_ranks(settings) {
                assert_contract(
                    &format!("policy {policy:?}, attention {attention}"),
                    &found,
                    &expected,
                );
            }
        }
    }
}
