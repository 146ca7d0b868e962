//! Runs whose ranks are processes as far as they can see: each has a world of its own, and sockets to the others.

use std::time::{Duration, Instant};

use autosp_plan::codes;
use candle_core::{Device, Tensor};

use super::*;
use crate::comm::testing::{MEET, assert_says, meet as meet_all};
use crate::comm::{Tag, all_gather, all_reduce_sum, all_to_all, barrier};
use crate::run::launched::tests::launched_as;
use crate::run::rendezvous::tests::place;
use crate::run_on_threads;

const LONG: Duration = Duration::from_secs(30);

fn ranks(sp: usize, dp: usize, deadline: Duration) -> Settings {
    Settings::default()
        .with_sp(sp)
        .with_dp(dp)
        .with_deadline(deadline)
        .with_start_deadline(deadline)
}

/// What each rank's process finds.
fn on_processes<T: Send>(
    settings: &Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let place = place();
    let (world, f) = (settings.sp() * settings.dp(), &f);
    std::thread::scope(|threads| {
        let all: Vec<_> = (0..world)
            .map(|rank| {
                let place = &place;
                threads.spawn(move || {
                    let secret = Secret::new("a secret of these tests").unwrap();
                    let mut own =
                        run_as(&launched_as(rank, world, place), settings, &secret, 0, f)?;
                    assert_eq!(own.len(), 1, "the result of the own rank alone");
                    Ok(own.remove(0))
                })
            })
            .collect();
        all.into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Collectives of all groups and types, with what the ledger counts.
fn collectives(sp: &Sp) -> Result<(Vec<Vec<f64>>, u64, u64)> {
    let before = sp.ledger().snapshot();
    let x = Tensor::arange(0f32, 7.0, &Device::Cpu)?.affine(1.5, sp.rank() as f64)?;
    let numbers = |x: Tensor| -> Result<Vec<f64>> {
        Ok(x.to_dtype(candle_core::DType::F64)?
            .flatten_all()?
            .to_vec1()?)
    };
    let mut found = Vec::new();
    for step in 0..20 {
        let tag = MEET.at(step);
        found.push(numbers(all_reduce_sum(sp.world_group(), tag, &x)?)?);
        found.push(numbers(all_gather(
            sp.sp_group(),
            tag,
            &x.to_dtype(candle_core::DType::BF16)?,
            0,
        )?)?);
        let parts = (0..sp.dp_group().size()).map(|to| (to != 1).then(|| x.clone()));
        let exchange = Tag {
            exchange: true,
            ..tag
        };
        for part in all_to_all(sp.dp_group(), exchange, parts.collect())? {
            found.push(part.map_or_else(|| Ok(Vec::new()), numbers)?);
        }
    }
    let bytes = sp.ledger().since(before);
    Ok((found, bytes.sent, bytes.exchange))
}

#[test]
fn processes_find_what_threads_find_and_count_the_same_bytes() {
    let settings = ranks(2, 2, LONG);
    let expected = run_on_threads(settings.clone(), collectives).unwrap();
    let found = on_processes(&settings, collectives);
    for (rank, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert_eq!(found.unwrap(), expected, "rank {rank}");
    }
}

/// That every process fails with the same code and words, long before the deadline.
fn all_fail<T: Send + std::fmt::Debug>(
    settings: &Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
    code: codes::Code,
    parts: &[&str],
) {
    let begin = Instant::now();
    for found in on_processes(settings, f) {
        assert_says(&found.unwrap_err(), code, parts);
    }
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn a_panic_is_named_by_all_processes() {
    all_fail(
        &ranks(3, 1, LONG),
        |sp| {
            meet_all(sp)?;
            assert!(sp.rank() != 1, "the tokens ran out");
            meet_all(sp)
        },
        codes::RANK_FAILED,
        &["rank 1 of 3 failed: panicked at ", "the tokens ran out"],
    );
}

#[test]
fn an_error_keeps_its_code_and_help_in_all_processes() {
    all_fail(
        &ranks(3, 1, LONG),
        |sp| match sp.rank() {
            2 => Err(Error::new(codes::LOCAL_LENGTH, "expected 4, found 5").with_help("do x")),
            _ => meet_all(sp),
        },
        codes::LOCAL_LENGTH,
        &["rank 2 of 3 failed: expected 4, found 5\n  help: do x"],
    );
}

#[test]
fn another_collective_is_named_by_all_processes() {
    all_fail(
        &ranks(2, 1, LONG),
        |sp| match sp.rank() {
            0 => meet_all(sp),
            _ => barrier(sp.world_group(), Tag::new("other", "sum")),
        },
        codes::MISMATCH,
        &["`meet` barrier", "`other` sum", "on rank 0", "on rank 1"],
    );
}

#[test]
fn a_rank_that_returns_early_is_named_by_all_processes() {
    all_fail(
        &ranks(3, 1, LONG),
        |sp| {
            meet_all(sp)?;
            if sp.rank() == 1 { Ok(()) } else { meet_all(sp) }
        },
        codes::RANK_RETURNED,
        &["waits in `meet` barrier", "for rank 1, which has returned"],
    );
}

#[test]
fn a_rank_that_is_late_is_missed_by_all_processes_with_what_it_does() {
    let settings = ranks(3, 1, Duration::from_millis(1500));
    all_fail(
        &settings,
        |sp| {
            meet_all(sp)?;
            if sp.rank() == 2 {
                std::thread::sleep(Duration::from_millis(2200));
            }
            barrier(sp.world_group(), Tag::new("layer 3", "qkv"))
        },
        codes::DEADLINE,
        &[
            "waited 1.5 s in `layer 3` qkv",
            "missing: rank 2",
            "rank 2 (last heard ",
            "world #0 `meet` barrier (step 0): complete ",
        ],
    );
}

#[test]
fn the_first_step_has_a_deadline_of_its_own() {
    let settings = ranks(2, 1, Duration::from_millis(800)).with_start_deadline(LONG);
    let slow = |sp: &Sp, when: u64| -> Result<()> {
        for step in 0..3 {
            sp.scope(|| {
                if sp.rank() == 1 && step == when {
                    std::thread::sleep(Duration::from_millis(1200));
                }
                meet_all(sp)
            })?;
        }
        Ok(())
    };
    for found in on_processes(&settings, |sp| slow(sp, 0)) {
        found.unwrap();
    }
    for found in on_processes(&settings, |sp| slow(sp, 2)) {
        assert_says(
            &found.unwrap_err(),
            codes::DEADLINE,
            &["waited 800 ms", "missing: rank 1"],
        );
    }
}

#[test]
fn a_run_ends_when_all_ranks_have_returned() {
    let ends = on_processes(&ranks(2, 1, LONG), |sp| {
        if sp.rank() == 1 {
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(Instant::now())
    });
    let last = *ends[1].as_ref().unwrap();
    assert!(ends[0].as_ref().unwrap() < &last && Instant::now() >= last);
}
