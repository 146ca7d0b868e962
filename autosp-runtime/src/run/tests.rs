//! Starting ranks, and every way in which one can let the others down.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use autosp_plan::{Settings, codes};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};

use super::threads::run_watched;
use crate::comm::{Tag, all_gather, all_reduce_sum, barrier};
use crate::{Error, Result, Sp, run_with, scope};

/// A deadline that fails a test instead of hanging it, and is never reached in a healthy one.
const LONG: Duration = Duration::from_secs(30);

/// Longer than any failure takes to reach everybody.
const PROMPT: Duration = Duration::from_secs(10);

fn ranks(sp: usize, dp: usize) -> Settings {
    Settings::default()
        .with_sp(sp)
        .with_dp(dp)
        .with_deadline(LONG)
}

const MEET: Tag = Tag::new("meet", "barrier");

/// Waits for the others in the world group.
fn meet(sp: &Sp) -> Result<()> {
    barrier(sp.world_group(), MEET)
}

/// The error of a run that must fail long before its deadline.
fn fails<T: Send + std::fmt::Debug>(
    settings: Settings,
    f: impl Fn(&Sp) -> Result<T> + Sync,
) -> Error {
    let begin = Instant::now();
    let error = run_with(settings, f).expect_err("the run fails");
    assert!(
        begin.elapsed() < PROMPT,
        "took {:?}: {error}",
        begin.elapsed()
    );
    error
}

fn assert_says(error: &Error, code: autosp_plan::codes::Code, parts: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.code(), code, "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn results_come_in_the_order_of_the_ranks() {
    let places = run_with(ranks(3, 2), |sp| {
        meet(sp)?;
        Ok((
            sp.rank(),
            sp.dp_rank(),
            sp.sp_rank(),
            std::thread::current().name().map(str::to_owned),
        ))
    });
    let expected: Vec<_> = (0..6)
        .map(|r| (r, r / 3, r % 3, Some(format!("rank {r}"))))
        .collect();
    assert_eq!(places.unwrap(), expected);
}

#[test]
fn a_rank_has_room_for_deep_recursion() {
    #[inline(never)]
    fn depth(n: usize) -> usize {
        let frame = std::hint::black_box([n; 128]);
        if n == 0 {
            0
        } else {
            depth(frame[n % 128] - 1) + 1
        }
    }
    // 1 KiB a frame: 60 MiB.
    assert_eq!(
        run_with(ranks(2, 1), |_| Ok(depth(60_000))).unwrap(),
        [60_000; 2]
    );
}

#[test]
fn a_panic_wakes_everybody_and_is_named() {
    let error = fails(ranks(4, 1), |sp| {
        assert!(sp.rank() != 2, "the tokens of rank {} ran out", sp.rank());
        meet(sp)
    });
    assert_says(
        &error,
        codes::RANK_FAILED,
        &[
            "rank 2 of 4 failed: panicked at ",
            "the tokens of rank 2 ran out",
        ],
    );
}

#[test]
fn a_panic_during_a_wait_of_the_others_wakes_them() {
    let error = fails(ranks(3, 1), |sp| {
        meet(sp)?;
        if sp.rank() == 1 {
            // The others are asleep by now.
            std::thread::sleep(Duration::from_millis(100));
            std::panic::panic_any(17);
        }
        meet(sp)
    });
    assert_says(
        &error,
        codes::RANK_FAILED,
        &["rank 1 of 3 failed", "a value that is no text"],
    );
}

#[test]
fn a_panic_of_the_only_rank_is_named_too() {
    let error = fails(ranks(1, 1), |_| -> Result<()> { panic!("no tokens") });
    assert_says(
        &error,
        codes::RANK_FAILED,
        &["rank 0 of 1 failed: panicked at", "no tokens"],
    );
}

#[test]
fn an_error_of_a_rank_keeps_its_code_and_help() {
    let refuse = || {
        Error::new(codes::LOCAL_LENGTH, "expected length 4, found 5")
            .with_help("sp.shard(&tokens)?")
    };
    let error = fails(ranks(4, 1), |sp| {
        if sp.rank() == 3 {
            Err(refuse())
        } else {
            meet(sp)
        }
    });
    assert_says(
        &error,
        codes::LOCAL_LENGTH,
        &["rank 3 of 4 failed: expected length 4, found 5\n  help: sp.shard(&tokens)?"],
    );

    let error = fails(ranks(1, 1), |_| -> Result<()> { Err(refuse()) });
    assert_eq!(
        error.to_string(),
        refuse().to_string(),
        "one rank needs no name"
    );
}

#[test]
fn an_error_that_all_ranks_report_is_reported_once() {
    // Whoever is first, all four say the same.
    let together = std::sync::Barrier::new(4);
    let error = fails(ranks(4, 1), |_| -> Result<()> {
        together.wait();
        Err(Error::new(codes::MESH, "6 heads do not divide by 4"))
    });
    assert_says(
        &error,
        codes::MESH,
        &["all 4 ranks failed: 6 heads do not divide by 4"],
    );
}

#[test]
fn the_first_failure_is_reported_not_its_consequences() {
    // Ranks 0 and 2 fail only because rank 1 did; through candle, as the sites of a model do.
    let error = fails(ranks(3, 1), |sp| {
        let through_candle = || -> candle_core::Result<()> {
            meet(sp)?;
            Ok(())
        };
        if sp.rank() == 1 {
            return Err(Error::new(codes::CACHE_OFFSET, "the first"));
        }
        Ok(through_candle().map_err(|error| error.context("layer 3"))?)
    });
    assert_says(
        &error,
        codes::CACHE_OFFSET,
        &["rank 1 of 3 failed: the first"],
    );
}

#[test]
fn a_failure_that_the_closure_swallows_still_fails_the_run() {
    let error = fails(ranks(2, 1), |sp| {
        let _ = if sp.rank() == 0 {
            meet(sp)
        } else {
            barrier(sp.world_group(), Tag::new("other", "barrier"))
        };
        Ok(())
    });
    assert_says(&error, codes::MISMATCH, &["meet", "other"]);
}

#[test]
fn another_collective_is_named_with_both_ranks() {
    let error = fails(ranks(3, 1), |sp| {
        meet(sp)?;
        match sp.rank() {
            2 => barrier(
                sp.world_group(),
                Tag {
                    step: 7,
                    ..Tag::new("loss", "sum")
                },
            ),
            _ => meet(sp),
        }
    });
    assert_says(
        &error,
        codes::MISMATCH,
        &[
            "`meet` barrier (step 0)",
            "`loss` sum (step 7)",
            "on rank 2",
            "the world group (ranks 0 to 2)",
            "#1",
        ],
    );
}

#[test]
fn every_part_of_a_tag_is_compared() {
    let usual = Tag::new("site", "qkv");
    let others = [
        Tag {
            name: "other",
            ..usual
        },
        Tag {
            direction: "out",
            ..usual
        },
        Tag { group: 1, ..usual },
        Tag { step: 1, ..usual },
        Tag {
            exchange: true,
            ..usual
        },
    ];
    for other in others {
        let error = fails(ranks(2, 1), |sp| {
            barrier(sp.sp_group(), if sp.rank() == 0 { usual } else { other })
        });
        assert_says(&error, codes::MISMATCH, &[]);
    }
}

#[test]
fn ranks_that_wait_in_different_groups_do_not_wait_for_the_deadline() {
    let error = fails(ranks(2, 2), |sp| match sp.rank() {
        0 => barrier(sp.dp_group(), Tag::new("gradients", "sum")),
        _ => barrier(sp.world_group(), Tag::new("norm", "sum")),
    });
    assert_says(
        &error,
        codes::MISMATCH,
        &[
            "every rank waiting",
            "rank 0 in `gradients` sum (step 0) of the dp group, for rank 2",
            "rank 3 in `norm` sum (step 0) of the world group, for rank",
        ],
    );
}

#[test]
fn ranks_that_wait_in_different_groups_are_found_when_the_last_one_returns() {
    // Rank 2 and 3 form a group of their own and leave; 0 and 1 wait for each other in different groups.
    let error = fails(ranks(2, 2), |sp| match sp.rank() {
        0 => barrier(sp.sp_group(), MEET),
        1 => {
            let pending = sp.sp_group().start(MEET, vec![None; 2])?;
            barrier(sp.sp_group(), Tag::new("second", "barrier"))?;
            sp.sp_group().wait(pending).map(drop)
        }
        _ => {
            std::thread::sleep(Duration::from_millis(50));
            Ok(())
        }
    });
    // Rank 0 leaves after its only barrier, while rank 1 still waits for a second.
    assert_says(
        &error,
        codes::RANK_RETURNED,
        &[
            "rank 1 waits in `second` barrier",
            "rank 0, which has returned",
        ],
    );
}

#[test]
fn a_rank_that_returns_early_does_not_hang_the_others() {
    let error = fails(ranks(3, 1), |sp| {
        meet(sp)?;
        if sp.rank() == 1 { Ok(()) } else { meet(sp) }
    });
    assert_says(
        &error,
        codes::RANK_RETURNED,
        &[
            "waits in `meet` barrier (step 0) for rank 1, which has returned",
            "help: run the same number of steps",
        ],
    );
}

#[test]
fn what_a_rank_sent_before_it_returned_still_arrives() {
    let sums = run_with(ranks(2, 1), |sp| {
        let sum = all_reduce_sum(
            sp.world_group(),
            MEET,
            &Tensor::new(&[1u32, 2], &Device::Cpu)?,
        )?;
        if sp.rank() == 1 {
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(all_gather(sp.world_group(), MEET, &sum, 0)?.to_vec1::<u32>()?)
    });
    assert_eq!(sums.unwrap(), vec![vec![2, 4, 2, 4]; 2]);
}

#[test]
fn a_stalled_rank_is_missed_after_the_deadline() {
    let settings = ranks(3, 1).with_deadline(Duration::from_millis(200));
    let error = fails(settings, |sp| {
        meet(sp)?;
        if sp.rank() == 2 {
            std::thread::sleep(Duration::from_millis(600));
        }
        barrier(
            sp.world_group(),
            Tag::new("llama::Attention::forward", "qkv"),
        )
    });
    assert_says(
        &error,
        codes::DEADLINE,
        &[
            "waited 200 ms in `llama::Attention::forward` qkv",
            "missing: rank 2",
            "rank 2\n    world #0 `meet` barrier (step 0): complete ",
            "world #1 `llama::Attention::forward` qkv (step 0): started ",
            "AUTOSP_DEADLINE=600",
        ],
    );
}

#[test]
fn a_rank_that_never_returns_is_reported_after_the_grace() {
    let release = AtomicBool::new(false);
    let stuck = |sp: &Sp| {
        while sp.rank() == 1 && !release.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        meet(sp)
    };
    let seen = std::sync::Mutex::new(None);
    let settings = ranks(2, 1).with_deadline(Duration::from_millis(100));
    let result = run_watched(
        &settings,
        &stuck,
        Duration::from_millis(100),
        &|error, ranks| {
            *seen.lock().unwrap() = Some((error.code(), ranks.to_vec()));
            release.store(true, Ordering::SeqCst);
        },
    );
    assert_eq!(result.unwrap_err().code(), codes::DEADLINE);
    assert_eq!(seen.into_inner().unwrap(), Some((codes::DEADLINE, vec![1])));
}

#[test]
fn a_collective_that_nobody_waits_for_is_an_error() {
    let error = fails(ranks(2, 1), |sp| {
        let pending = sp.sp_group().start(MEET, vec![None; 2])?;
        drop(pending);
        // So that every envelope is in its mailbox.
        barrier(sp.world_group(), Tag::new("end", "barrier"))
    });
    assert_says(&error, codes::UNFINISHED, &["`meet` barrier"]);
}

/// An operation whose backward is a collective on rank 0, and a panic on the others.
struct PanicsInBackward(Sp);

impl CustomOp1 for PanicsInBackward {
    fn name(&self) -> &'static str {
        "panics-in-backward"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((storage.clone(), layout.shape().clone()))
    }

    fn bwd(
        &self,
        _arg: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        assert!(self.0.rank() == 0, "no gradient on rank {}", self.0.rank());
        Ok(Some(all_reduce_sum(
            self.0.world_group(),
            Tag::new("grad", "sum"),
            grad,
        )?))
    }
}

#[test]
fn a_panic_inside_backward_wakes_everybody() {
    let error = fails(ranks(2, 1), |sp| {
        sp.scope(|| {
            let x = Var::zeros(4, DType::F32, &Device::Cpu)?;
            x.apply_op1(PanicsInBackward(sp.clone()))?
                .sum_all()?
                .backward()?;
            Ok(())
        })
    });
    assert_says(
        &error,
        codes::RANK_FAILED,
        &["rank 1 of 2 failed: panicked at", "no gradient on rank 1"],
    );
}

#[test]
fn a_run_inside_a_run_is_refused() {
    let error = fails(ranks(2, 1), |_| {
        run_with(Settings::default(), |_| Ok(())).map(drop)
    });
    assert_says(
        &error,
        codes::NESTED_RUN,
        &["help: call the inner closure directly"],
    );
}

#[test]
fn runs_leave_nothing_behind() {
    assert!(scope::current().is_none());
    for _ in 0..3 {
        let steps = run_with(ranks(2, 1), |sp| {
            assert!(
                scope::current().is_none(),
                "a rank starts outside of any scope"
            );
            Ok(sp.scope(|| scope::current().map(|scope| scope.step())))
        });
        assert_eq!(steps.unwrap(), [Some(0); 2]);
        let _ = fails(ranks(2, 1), |sp| {
            sp.scope(|| -> Result<()> { panic!("inside a scope") })
        });
    }
    assert!(scope::current().is_none());
}

#[test]
fn runs_of_different_threads_do_not_disturb_each_other() {
    std::thread::scope(|threads| {
        for size in 1..5 {
            threads.spawn(move || {
                for _ in 0..10 {
                    let sums = run_with(ranks(size, 1), |sp| {
                        let one = Tensor::new(&[1u32; 7], &Device::Cpu)?;
                        Ok(all_reduce_sum(sp.sp_group(), MEET, &one)?.to_vec1::<u32>()?)
                    });
                    assert_eq!(sums.unwrap(), vec![vec![size as u32; 7]; size]);
                }
            });
        }
    });
}

/// Many small collectives in random order of arrival: no wake-up is lost, and healthy runs are never taken for stuck ones.
#[test]
fn a_long_healthy_run_stays_healthy() {
    let last = run_with(ranks(3, 2), |sp| {
        let mut x = Tensor::new(&[sp.rank() as f64; 5], &Device::Cpu)?;
        for step in 0..300u64 {
            if (step * 7 + sp.rank() as u64 * 3).is_multiple_of(11) {
                std::thread::yield_now();
            }
            let group = if step % 3 == 0 {
                sp.dp_group()
            } else {
                sp.sp_group()
            };
            let scale = 1.0 / group.size() as f64;
            x = (all_reduce_sum(group, MEET.at(step), &x)? * scale)?;
        }
        meet(sp)?;
        Ok(x.to_vec1::<f64>()?)
    })
    .unwrap();
    // The mean of the ranks, 0 to 5.
    assert!(
        last.iter().flatten().all(|x| (x - 2.5).abs() < 1e-9),
        "{last:?}"
    );
}

#[test]
fn a_mesh_without_threads_for_it_is_refused() {
    let error = run_with(Settings::default().with_sp(1 << 20), |_| Ok(())).unwrap_err();
    assert_says(&error, codes::MESH, &["sp 1048576"]);
}
