use std::time::Duration;

use autosp_plan::Settings;
use candle_core::DType;
use proptest::prelude::*;

use super::*;
use crate::{rt, run_with};

fn on<T: Send>(sp: usize, dp: usize, f: impl Fn(&Sp) -> Result<T> + Sync) -> Result<Vec<T>> {
    run_with(
        Settings::default()
            .with_sp(sp)
            .with_dp(dp)
            .with_deadline(Duration::from_secs(20)),
        f,
    )
}

fn tensor(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
}

/// Cuts a sequence of `valid` tokens: this rank's part, registered.
fn cut(sp: &Sp, valid: usize) -> Result<Tensor> {
    let shard = Shard::new(valid, sp.sp_rank(), sp.mesh().sp);
    let tokens = tensor(&[2, shard.len])?;
    sp.register_shard(tokens.id(), shard)?;
    Ok(tokens)
}

fn valid_now() -> Result<usize> {
    Ok(require("test")?.shard()?.valid)
}

proptest! {
    #[test]
    fn shards_tile_the_padded_sequence(valid in 0usize..200, size in 1usize..9) {
        let shards: Vec<Shard> = (0..size).map(|rank| Shard::new(valid, rank, size)).collect();
        for (rank, shard) in shards.iter().enumerate() {
            prop_assert_eq!((shard.start, shard.rank, shard.size), (rank * shard.len, rank, size));
            prop_assert_eq!(shard.padded, shard.len * size);
            prop_assert!(shard.padded >= valid && shard.padded < valid + size);
        }
        prop_assert_eq!(shards.iter().map(Shard::valid_here).sum::<usize>(), valid);
    }
}

#[test]
fn outside_of_a_scope_nothing_happens() {
    assert!(!rt::sharded());
    assert_eq!(rt::valid(12), 12);
    rt::enter("m::f", &[("x", &tensor(&[2, 3]).unwrap(), 1)]).unwrap();
    assert_eq!(require("rt::pick").unwrap_err().code(), codes::NO_SCOPE);
}

#[test]
fn a_registered_tensor_brings_its_shard() {
    let seen = on(4, 1, |sp| {
        let tokens = cut(sp, 10)?;
        sp.scope(|| {
            assert!(rt::sharded());
            let early = require("test")?.shard().unwrap_err();
            assert_eq!(early.code(), codes::NO_SCOPE);
            assert_eq!(rt::valid(3), 3, "no forward yet");
            rt::enter("m::f", &[("tokens", &tokens, 1)])?;
            let shard = require("test")?.shard()?;
            Ok((shard, rt::valid(3), rt::valid(2 * 3), rt::valid(4)))
        })
    });
    for (rank, (shard, one, two, other)) in seen.unwrap().into_iter().enumerate() {
        assert_eq!(
            shard,
            Shard {
                valid: 10,
                padded: 12,
                len: 3,
                start: 3 * rank,
                rank,
                size: 4
            }
        );
        assert_eq!(
            (one, two, other),
            (10, 20, 4),
            "multiples of the local length, and another size"
        );
    }
}

#[test]
fn a_tensor_made_from_the_tokens_is_found_by_its_length() {
    let seen = on(2, 1, |sp| {
        cut(sp, 7)?;
        cut(sp, 9)?;
        sp.scope(|| {
            rt::enter("m::f", &[("x", &tensor(&[2, 4, 8])?, 1)])?;
            valid_now()
        })
    });
    assert_eq!(
        seen.unwrap(),
        [7, 7],
        "9 tokens are 5 a rank, 7 tokens are 4"
    );
}

#[test]
fn a_length_that_no_shard_has_is_refused() {
    let refused = |f: &(dyn Fn(&Sp) -> Result<Tensor> + Sync)| {
        on(2, 1, |sp| {
            let x = f(sp)?;
            sp.scope(|| Ok(rt::enter("llama::Llama::forward", &[("x", &x, 1)])?))
        })
        .unwrap_err()
    };
    let error = refused(&|sp| {
        cut(sp, 7)?;
        tensor(&[2, 7])
    });
    assert_eq!(
        error.to_string(),
        "all 2 ranks failed: `llama::Llama::forward`, `x`: expected length 4 (this rank's shard), found length 7\n  \
         help: let tokens = sp.shard(&tokens)? [AS0303]"
    );
    let error = refused(&|_| tensor(&[2, 7]));
    assert!(
        error
            .message()
            .contains("expected a tensor that `sp.shard` returned, found length 7"),
        "{error}"
    );
    // A registered tensor whose sequence dim is not where the model looks.
    let error = refused(&|sp| {
        let shard = Shard::new(8, sp.sp_rank(), 2);
        let x = tensor(&[4, 6])?;
        sp.register_shard(x.id(), shard)?;
        Ok(x)
    });
    assert_eq!(error.code(), codes::LOCAL_LENGTH);
    assert!(
        error
            .message()
            .contains("expected length 4 along dim 1 (this rank's shard), found 6"),
        "{error}"
    );
}

#[test]
fn two_batches_of_one_local_length_are_told_apart_or_refused() {
    let seen = on(2, 1, |sp| {
        let (first, second) = (cut(sp, 7)?, cut(sp, 8)?);
        sp.scope(|| {
            rt::enter("m::f", &[("x", &first, 1)])?;
            let a = valid_now()?;
            rt::enter("m::f", &[("x", &second, 1)])?;
            let b = valid_now()?;
            let guess = rt::enter("m::f", &[("x", &tensor(&[2, 4])?, 1)]).map_err(Error::from);
            Ok((a, b, guess.unwrap_err().code()))
        })
    });
    assert_eq!(seen.unwrap(), [(7, 8, codes::AMBIGUOUS_SHARD); 2]);
}

#[test]
fn inputs_of_one_call_are_one_sequence() {
    let error = on(2, 1, |sp| {
        let (x, y) = (cut(sp, 7)?, cut(sp, 8)?);
        sp.scope(|| Ok(rt::enter("m::f", &[("x", &x, 1), ("y", &y, 1)])?))
    });
    let error = error.unwrap_err();
    assert_eq!(error.code(), codes::LOCAL_LENGTH);
    assert!(
        error
            .message()
            .contains("found `x` of length 7 and `y` of length 8"),
        "{error}"
    );
}

#[test]
fn one_rank_needs_no_shard_and_no_collective() {
    let seen = on(1, 1, |sp| {
        let shard = sp.scope(|| {
            rt::enter("m::f", &[("x", &tensor(&[2, 9, 4])?, 1)])?;
            require("test")?.shard()
        })?;
        let registered = cut(sp, 5)?;
        sp.scope(|| rt::enter("m::f", &[("x", &registered, 1)]))?;
        Ok((shard, sp.ledger().snapshot()))
    });
    assert_eq!(
        seen.unwrap(),
        [(Shard::new(9, 0, 1), crate::Bytes::default())]
    );
}

#[test]
fn ranks_of_one_sequence_agree_on_its_length() {
    let error = on(3, 2, |sp| {
        cut(sp, if sp.rank() == 4 { 11 } else { 10 }).map(drop)
    })
    .unwrap_err();
    assert_eq!(error.code(), codes::RANKS_DISAGREE);
    let text = error.to_string();
    assert!(
        text.contains("10 on rank 3, 11 on rank 4, 10 on rank 5") && text.contains("sp.dp_rank()"),
        "{text}"
    );

    // Replicas may differ.
    assert!(on(3, 2, |sp| cut(sp, 10 + sp.dp_rank()).map(drop)).is_ok());
}

#[test]
fn agreement_holds_for_any_values() {
    assert!(on(3, 1, |sp| sp.agree("tokens", "digest", &[u64::MAX, 3])).is_ok());
    let error = on(2, 1, |sp| {
        sp.agree("tokens", "digest", &[u64::MAX - sp.rank() as u64])
    })
    .unwrap_err();
    assert!(error.to_string().contains("the same digest"), "{error}");
    let error = on(2, 1, |sp| {
        sp.agree("tokens", "sizes", &vec![1; 1 + sp.rank()])
    })
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("found 1 on rank 0, [1, 1] on rank 1"),
        "{error}"
    );
}

#[test]
fn an_offset_is_refused() {
    rt::no_offset("llama::Llama::forward", "index_pos", 0).unwrap();
    let error = Error::from(rt::no_offset("llama::Llama::forward", "index_pos", 3).unwrap_err());
    assert_eq!(error.code(), codes::CACHE_OFFSET);
    assert_eq!(
        error.message(),
        "`llama::Llama::forward`: expected `index_pos` = 0 inside a sharded scope, found 3"
    );
}

#[test]
fn a_scope_ends_with_its_closure_and_counts_up() {
    let steps = on(2, 1, |sp| {
        let first = sp.scope(|| require("test").map(|scope| scope.step()))?;
        let second = sp.scope(|| require("test").map(|scope| scope.step()))?;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            sp.scope(|| panic!("in the scope"))
        }));
        Ok((first, second, panicked.is_err(), rt::sharded()))
    });
    assert_eq!(steps.unwrap(), [(0, 1, true, false); 2]);
}

#[test]
fn a_kept_scope_runs_again_with_its_shard() {
    let seen = on(2, 1, |sp| {
        let (first, second) = (cut(sp, 7)?, cut(sp, 12)?);
        let kept = sp.scope(|| {
            rt::enter("m::f", &[("x", &first, 1)])?;
            let kept = require("test")?;
            rt::enter("m::f", &[("x", &second, 1)])?;
            let again = kept.run(valid_now)?;
            Ok::<_, Error>((kept, again, valid_now()?))
        })?;
        let (scope, again, after) = kept;
        Ok((again, after, scope.run(valid_now)?, rt::sharded()))
    });
    assert_eq!(seen.unwrap(), [(7, 12, 7, false); 2]);
}

#[test]
fn old_shards_are_forgotten() {
    let error = on(1, 1, |sp| {
        let old = cut(sp, 5)?;
        for valid in 0..16 {
            cut(sp, 100 + valid)?;
        }
        assert!(sp.shard_of(old.id()).is_none());
        sp.shard_of_length(5).map(drop)
    });
    assert_eq!(error.unwrap_err().code(), codes::LOCAL_LENGTH);
}
