//! Starting ranks, and what a run leaves behind.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use autosp_plan::{Settings, codes};
use candle_core::{Device, Tensor};

use super::threads::run_watched;
use crate::comm::all_reduce_sum;
use crate::comm::testing::{MEET, assert_says, fails, meet, ranks};
use crate::{Result, Sp, run_with, scope};

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
fn a_rank_that_never_returns_is_reported_after_the_grace() {
    let release = AtomicBool::new(false);
    let stuck = |sp: &Sp| {
        while sp.rank() == 1 && !release.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        meet(sp)
    };
    let seen = std::sync::Mutex::new(None);
    let settings = ranks(2, 1)
        .with_deadline(Duration::from_millis(100))
        .with_start_deadline(Duration::from_millis(100));
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

#[test]
fn a_mesh_without_threads_for_it_is_refused() {
    let error = run_with(Settings::default().with_sp(1 << 20), |_| Ok(())).unwrap_err();
    assert_says(&error, codes::MESH, &["sp 1048576"]);
}
