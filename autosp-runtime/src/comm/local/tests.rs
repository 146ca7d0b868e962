//! Every way in which a rank can let the others down: each ends the run, with the reason, long before the deadline.

use std::time::Duration;

use autosp_plan::codes;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};

use crate::comm::testing::{MEET, assert_says, fails, meet, ranks};
use crate::comm::{Tag, all_gather, all_reduce_sum, barrier};
use crate::{Error, Result, Sp, run_with};

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
fn ranks_that_wait_in_different_groups_are_found_when_the_last_other_one_returns() {
    // Rank 0 waits for 3, which waits for 4, which waits for 1, which waits for 0; nobody waits for rank 8.
    let error = fails(ranks(3, 3), |sp| match sp.rank() {
        0 | 4 | 6 | 7 => barrier(sp.dp_group(), MEET),
        1 | 2 | 3 | 5 => barrier(sp.sp_group(), MEET),
        _ => {
            std::thread::sleep(Duration::from_millis(100));
            Ok(())
        }
    });
    assert_says(
        &error,
        codes::MISMATCH,
        &[
            "rank 0 of 9 failed: expected the same collectives",
            "rank 4 in `meet` barrier (step 0) of the dp group, for rank 1",
            "rank 8 has returned",
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
    let settings = ranks(3, 1)
        .with_deadline(Duration::from_millis(200))
        .with_start_deadline(Duration::from_millis(200));
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
