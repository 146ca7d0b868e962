//! Operations that draw numbers, and those that begin with nothing.

use super::*;

#[test]
fn random_operations_differ_from_rank_to_rank() {
    for path in ["candle_nn::ops::dropout", "candle_nn::Dropout::forward"] {
        let case = nn_op(path, 5).expect("an operation");
        let (a, b) = (
            (case.run)(&case.inputs).expect("a draw"),
            (case.run)(&case.inputs).expect("a draw"),
        );
        assert_ne!(
            bits(&a).expect("numbers"),
            bits(&b).expect("numbers"),
            "{path}"
        );
    }
    let x = random(1, &[64]);
    for draw in [
        |x: &Tensor| x.rand_like(0.0, 1.0),
        |x: &Tensor| x.randn_like(0.0, 1.0),
    ] {
        assert_ne!(
            bits(&draw(&x).expect("a draw")).expect("numbers"),
            bits(&draw(&x).expect("a draw")).expect("numbers")
        );
    }
    let d = &Device::Cpu;
    assert_ne!(
        bits(&Tensor::rand(0f32, 1.0, 64, d).expect("a draw")).expect("numbers"),
        bits(&Tensor::rand(0f32, 1.0, 64, d).expect("a draw")).expect("numbers")
    );
    assert_ne!(
        bits(&Tensor::randn(0f32, 1.0, 64, d).expect("a draw")).expect("numbers"),
        bits(&Tensor::randn(0f32, 1.0, 64, d).expect("a draw")).expect("numbers")
    );
}

#[test]
fn an_empty_cache_gives_what_it_is_given() -> Result<()> {
    use candle_nn::kv_cache::{ConcatKvCache, KvCache, RotatingKvCache};
    let (k, v) = (random(1, &[2, 3, N, 4]), random(2, &[2, 3, N, 5]));
    let rows = candle()
        .rows()
        .iter()
        .filter(|r| r.shape == ShapeRule::Each);
    for row in rows {
        let (a, b) = match row.path.as_str() {
            "candle_nn::kv_cache::KvCache::append" => KvCache::new(2, 3).append(&k, &v)?,
            "candle_nn::kv_cache::ConcatKvCache::append" => ConcatKvCache::new(2).append(&k, &v)?,
            // Shorter than the sequence: what does not fit is still given back.
            "candle_nn::kv_cache::RotatingKvCache::append" => {
                RotatingKvCache::new(2, 3).append(&k, &v)?
            }
            other => panic!("{other} has no proof"),
        };
        for (found, given) in [(a, &k), (b, &v)] {
            assert_eq!(found.dims(), given.dims(), "{}", row.path);
            assert_eq!(bits(&found)?, bits(given)?, "{}", row.path);
        }
    }
    Ok(())
}
