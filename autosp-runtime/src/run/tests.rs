use std::time::{Duration, Instant};

use autosp_plan::{Settings, codes};
use candle_core::{Device, Tensor};

use crate::comm::{Tag, all_reduce_sum, barrier};
use crate::{Error, Result, Sp, run_with};

/// A deadline that fails a test instead of hanging it, and is never reached in a healthy one.
fn ranks(sp: usize, dp: usize) -> Settings {
    Settings::default().with_sp(sp).with_dp(dp).with_deadline(Duration::from_secs(20))
}

/// Waits for the others in the world group.
fn meet(sp: &Sp) -> Result<()> {
    barrier(sp.world_group(), Tag::new("meet", "barrier"))
}

#[test]
fn results_come_in_the_order_of_the_ranks() {
    let places = run_with(ranks(3, 2), |sp| {
        meet(sp)?;
        Ok((sp.rank(), sp.dp_rank(), sp.sp_rank(), std::thread::current().name().map(str::to_owned)))
    });
    let expected: Vec<_> = (0..6).map(|r| (r, r / 3, r % 3, Some(format!("rank {r}")))).collect();
    assert_eq!(places.unwrap(), expected);
}

#[test]
fn a_panic_wakes_everybody_and_is_named() {
    let begin = Instant::now();
    let error = run_with(ranks(4, 1), |sp| {
        assert!(sp.rank() != 2, "the tokens of rank {} ran out", sp.rank());
        meet(sp)
    })
    .unwrap_err();
    assert_eq!(error.code(), codes::RANK_FAILED);
    let text = error.to_string();
    assert!(text.contains("rank 2 of 4 failed: panicked at ") && text.contains("the tokens of rank 2 ran out"), "{text}");
    assert!(begin.elapsed() < Duration::from_secs(10));
}
