//! Every collective against a plain computation on one thread, for random group sizes, shapes and types.

use std::time::Duration;

use autosp_plan::{Settings, codes};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::*;
use crate::{Bytes, Error, Sp, run_with};

const TAG: Tag = Tag::new("test", "sum");

fn on<T: Send>(size: usize, f: impl Fn(&Sp) -> Result<T> + Sync) -> Result<Vec<T>> {
    run_with(
        Settings::default()
            .with_sp(size)
            .with_deadline(Duration::from_secs(20)),
        f,
    )
}

/// Small whole numbers: every sum is exact in every type, bf16 too.
fn values(rank: usize, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let numbers: Vec<f32> = (0..n).map(|i| ((i * 7 + rank * 3) % 11) as f32).collect();
    Ok(Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

fn numbers(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64)
        .and_then(|x| x.flatten_all()?.to_vec1())
        .unwrap()
}

/// The sum over all ranks, without any collective.
fn plain_sum(size: usize, shape: &[usize]) -> Vec<f64> {
    let all: Vec<Vec<f64>> = (0..size)
        .map(|rank| numbers(&values(rank, shape, DType::F64).unwrap()))
        .collect();
    (0..all[0].len())
        .map(|i| all.iter().map(|x| x[i]).sum())
        .collect()
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop_oneof![
        Just(DType::F32),
        Just(DType::F64),
        Just(DType::BF16),
        Just(DType::F16),
        Just(DType::U32),
        Just(DType::I64)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chunks_cover_everything_once(n in 0usize..200, size in 1usize..17) {
        let chunks: Vec<_> = (0..size).map(|rank| chunk(n, size, rank)).collect();
        let joined: Vec<usize> = chunks.iter().cloned().flatten().collect();
        prop_assert_eq!(joined, (0..n).collect::<Vec<_>>());
        prop_assert!(chunks.iter().all(|c| c.len() == n / size || c.len() == n.div_ceil(size)));
    }

    #[test]
    fn all_reduce_is_the_sum(size in 1usize..6, shape in prop::collection::vec(0usize..5, 0..4), dtype in dtypes()) {
        let sums = on(size, |sp| all_reduce_sum(sp.world_group(), TAG, &values(sp.rank(), &shape, dtype)?)).unwrap();
        for sum in sums {
            prop_assert_eq!((sum.dims(), sum.dtype()), (shape.as_slice(), dtype));
            prop_assert_eq!(numbers(&sum), plain_sum(size, &shape));
        }
    }

    #[test]
    fn reduce_scatter_gives_each_rank_its_part_of_the_sum(size in 1usize..6, a in 1usize..4, n in 0usize..12, b in 1usize..4, dtype in dtypes()) {
        let parts = on(size, |sp| reduce_scatter(sp.world_group(), TAG, &values(sp.rank(), &[a, n, b], dtype)?, 1)).unwrap();
        let whole = Tensor::from_vec(plain_sum(size, &[a, n, b]), (a, n, b), &Device::Cpu).unwrap();
        for (rank, part) in parts.iter().enumerate() {
            let range = chunk(n, size, rank);
            prop_assert_eq!(part.dtype(), dtype);
            prop_assert_eq!(part.dims(), &[a, range.len(), b]);
            prop_assert_eq!(numbers(part), numbers(&whole.narrow(1, range.start, range.len()).unwrap()));
        }
    }

    #[test]
    fn all_gather_joins_uneven_parts(lengths in prop::collection::vec(0usize..5, 1..6), a in 1usize..4, dtype in dtypes()) {
        let (size, lengths) = (lengths.len(), &lengths);
        let joined = on(size, |sp| all_gather(sp.world_group(), TAG, &values(sp.rank(), &[a, lengths[sp.rank()]], dtype)?, 1)).unwrap();
        let total: usize = lengths.iter().sum();
        for x in joined {
            prop_assert_eq!((x.dims(), x.dtype()), (&[a, total][..], dtype));
            let mut start = 0;
            for (rank, &n) in lengths.iter().enumerate() {
                let part = numbers(&x.narrow(1, start, n).unwrap());
                prop_assert_eq!(part, numbers(&values(rank, &[a, n], dtype).unwrap()));
                start += n;
            }
        }
    }

    #[test]
    fn broadcast_gives_all_the_roots_tensor(size in 1usize..6, root in 0usize..6, n in 0usize..9, dtype in dtypes()) {
        let root = root % size;
        let got = on(size, |sp| broadcast(sp.world_group(), TAG, &values(sp.rank(), &[n], dtype)?, root)).unwrap();
        for x in got {
            prop_assert_eq!(numbers(&x), numbers(&values(root, &[n], dtype).unwrap()));
        }
    }

    /// A part for everybody, for nobody, or for some: what arrives is what was sent, from whom, and nothing else.
    #[test]
    fn all_to_all_delivers(size in 1usize..6, present in any::<u64>()) {
        let sent = |from: usize, to: usize| present >> (from * size + to) & 1 == 1;
        let part = |from: usize, to: usize| values(from * size + to, &[2, from + 1], DType::F32);
        let received = on(size, |sp| {
            let me = sp.rank();
            let parts = (0..size).map(|to| sent(me, to).then(|| part(me, to)).transpose()).collect::<Result<Vec<_>>>()?;
            all_to_all(sp.world_group(), TAG, parts)
        }).unwrap();
        for (to, parts) in received.iter().enumerate() {
            for (from, got) in parts.iter().enumerate() {
                let expected = sent(from, to).then(|| numbers(&part(from, to).unwrap()));
                prop_assert_eq!(got.as_ref().map(numbers), expected, "{} to {}", from, to);
            }
        }
    }

    /// Bytes follow from the shapes: an all-reduce of n elements sends each element from all ranks but its owner, and back.
    #[test]
    fn bytes_are_counted_where_they_are_handed_over(size in 1usize..6, n in 0usize..40, exchange in any::<bool>()) {
        let counted = on(size, |sp| {
            let before = sp.ledger().snapshot();
            all_reduce_sum(sp.world_group(), Tag { exchange, ..TAG }, &values(sp.rank(), &[n], DType::F64)?)?;
            let own = sp.ledger().since(before);
            Ok((own, sp.sum_bytes(own)?))
        }).unwrap();
        let expected = (2 * (size - 1) * n * 8) as u64;
        let total: Bytes = counted.iter().map(|(own, _)| *own).sum();
        prop_assert_eq!((total.sent, total.exchange), (expected, if exchange { expected } else { 0 }));
        prop_assert!(counted.iter().all(|(_, summed)| *summed == total));
    }
}

#[test]
fn sums_are_taken_in_the_order_of_the_ranks() {
    // In f32 1e8 + 1 is 1e8: each of the six orders of these terms gives 0 or 1.
    for (terms, sum) in [([1.0, 1e8, -1e8], 0f32), ([1e8, -1e8, 1.0], 1.0)] {
        for _ in 0..20 {
            let sums = on(3, |sp| {
                let x = Tensor::new(&[terms[sp.rank()] as f32; 5], &Device::Cpu)?;
                Ok(all_reduce_sum(sp.world_group(), TAG, &x)?.to_vec1::<f32>()?)
            });
            assert_eq!(sums.unwrap(), vec![vec![sum; 5]; 3]);
        }
    }
}

#[test]
fn half_precision_sums_are_rounded_once() {
    // In bf16 256 + 1 is 256, so that adding 1 eight times in bf16 would stay there.
    let sums = on(9, |sp| {
        let x = Tensor::new(&[if sp.rank() == 0 { 256f32 } else { 1.0 }], &Device::Cpu)?
            .to_dtype(DType::BF16)?;
        Ok(numbers(&all_reduce_sum(sp.world_group(), TAG, &x)?))
    });
    assert_eq!(sums.unwrap(), vec![vec![264.0]; 9]);
}

#[test]
fn a_view_is_sent_as_its_elements_and_detached() {
    let received = on(2, |sp| {
        let x = candle_core::Var::from_tensor(&values(sp.rank(), &[4, 6], DType::F32)?)?;
        let view = x.t()?.narrow(0, 1, 2)?;
        let parts = all_to_all(sp.world_group(), TAG, vec![Some(view.clone()); 2])?;
        let peer = parts[1 - sp.rank()].clone().expect("a part from the peer");
        assert!(peer.is_contiguous() && !peer.track_op());
        assert!(
            parts[sp.rank()]
                .as_ref()
                .is_some_and(|own| own.id() == view.id()),
            "the own part is as it was"
        );
        Ok((numbers(&peer), sp.ledger().snapshot().sent))
    });
    let expected = |rank| {
        numbers(
            &values(rank, &[4, 6], DType::F32)
                .unwrap()
                .t()
                .unwrap()
                .narrow(0, 1, 2)
                .unwrap(),
        )
    };
    assert_eq!(received.unwrap(), [(expected(1), 32), (expected(0), 32)]);
}

#[test]
fn a_variable_may_change_after_it_was_sent() {
    let received = on(2, |sp| {
        let engine = sp.world_group();
        let var = candle_core::Var::from_tensor(&values(sp.rank(), &[3], DType::F32)?)?;
        let results = [
            broadcast(engine, TAG, &var, 0)?,
            all_gather(engine, TAG, &var, 0)?.narrow(0, 0, 3)?,
            all_to_all(engine, TAG, vec![Some(var.as_tensor().clone()); 2])?[0]
                .clone()
                .filter(|_| sp.rank() == 1)
                .map_or_else(|| values(0, &[3], DType::F32), Ok)?,
        ];
        sp.barrier()?;
        var.set(&var.affine(0.0, 100.0)?)?;
        barrier(engine, TAG)?;
        Ok(results.iter().map(numbers).collect::<Vec<_>>())
    });
    let expected = vec![numbers(&values(0, &[3], DType::F32).unwrap()); 3];
    assert_eq!(received.unwrap(), vec![expected; 2]);
}

#[test]
fn one_rank_sends_nothing_and_copies_nothing() {
    let kept = on(1, |sp| {
        let x = values(0, &[3, 4], DType::F32)?;
        let results = [
            all_reduce_sum(sp.world_group(), TAG, &x)?,
            all_gather(sp.world_group(), TAG, &x, 1)?,
            reduce_scatter(sp.world_group(), TAG, &x, 1)?,
            broadcast(sp.world_group(), TAG, &x, 0)?,
        ];
        barrier(sp.world_group(), TAG)?;
        let storage = |x: &Tensor| std::ptr::from_ref(&*x.storage_and_layout().0).cast::<()>();
        Ok((
            results.iter().all(|y| storage(y) == storage(&x)),
            sp.sum_bytes(sp.ledger().snapshot())?,
        ))
    });
    assert_eq!(kept.unwrap(), [(true, Bytes::default())]);
}

#[test]
fn collectives_may_be_waited_for_in_any_order() {
    let received = on(3, |sp| {
        let engine = sp.world_group();
        let start = |name: &'static str, n: usize| {
            let x = values(sp.rank(), &[n], DType::F32)?;
            engine.start(Tag::new(name, "parts"), vec![Some(x); 3])
        };
        let (first, second) = (start("first", 1)?, start("second", 2)?);
        barrier(engine, TAG)?;
        let second = engine.wait(second)?;
        let first = engine.wait(first)?;
        let lengths = |parts: Vec<Option<Tensor>>| {
            parts
                .into_iter()
                .flatten()
                .map(|x| x.elem_count())
                .collect::<Vec<_>>()
        };
        Ok((lengths(first), lengths(second)))
    });
    assert_eq!(received.unwrap(), vec![(vec![1; 3], vec![2; 3]); 3]);
}

#[test]
fn groups_do_not_hear_each_other() {
    let settings = Settings::default()
        .with_sp(2)
        .with_dp(3)
        .with_deadline(Duration::from_secs(20));
    let sums = run_with(settings, |sp| {
        let x = Tensor::new(&[sp.rank() as u32], &Device::Cpu)?;
        let sum = |engine: &dyn Engine| {
            Ok::<_, Error>(all_reduce_sum(engine, TAG, &x)?.to_vec1::<u32>()?[0])
        };
        Ok((
            sum(sp.sp_group())?,
            sum(sp.dp_group())?,
            sum(sp.world_group())?,
        ))
    });
    let expected: Vec<_> = (0..6)
        .map(|r: u32| (r / 2 * 4 + 1, 6 + 3 * (r % 2), 15))
        .collect();
    assert_eq!(sums.unwrap(), expected);
}

#[test]
fn shapes_that_differ_are_refused_with_both() {
    let refused = |f: &(dyn Fn(&Sp, &Tensor) -> Result<Tensor> + Sync)| {
        let error = on(2, |sp| f(sp, &values(0, &[2, 3 + sp.rank()], DType::F32)?)).unwrap_err();
        assert_eq!(error.code(), codes::COLLECTIVE_ARGUMENT, "{error}");
        let text = error.to_string();
        assert!(
            text.contains("on rank 0") && text.contains("on rank 1"),
            "{text}"
        );
    };
    refused(&|sp, x| all_gather(sp.world_group(), TAG, x, 0));
    refused(&|sp, x| broadcast(sp.world_group(), TAG, x, 0));
    refused(&|sp, x| reduce_scatter(sp.world_group(), TAG, x, 0));
    refused(&|sp, x| all_reduce_sum(sp.world_group(), TAG, x));

    let types = on(2, |sp| {
        let dtype = if sp.rank() == 0 {
            DType::F32
        } else {
            DType::F64
        };
        all_reduce_sum(sp.world_group(), TAG, &values(0, &[4], dtype)?)
    });
    assert!(types.unwrap_err().to_string().contains("F64 on rank 1"));
}

#[test]
fn an_all_reduce_of_other_lengths_is_refused_even_where_chunks_agree() {
    // 1 and 2 elements on 4 ranks: chunks of 0, 0, 0, 1 and of 0, 1, 0, 1.
    for (a, b) in [(1, 2), (2, 3), (5, 6), (3, 7)] {
        let error = on(4, |sp| {
            let n = if sp.rank() == 3 { a } else { b };
            all_reduce_sum(sp.world_group(), TAG, &values(0, &[n], DType::F32)?)
        });
        assert_eq!(
            error.unwrap_err().code(),
            codes::COLLECTIVE_ARGUMENT,
            "{a} and {b}"
        );
    }
}

#[test]
fn the_number_of_parts_is_the_size_of_the_group() {
    let error = on(2, |sp| all_to_all(sp.world_group(), TAG, vec![None; 3])).unwrap_err();
    assert_eq!(error.code(), codes::COLLECTIVE_ARGUMENT);
    assert!(error.message().contains("found 3"), "{error}");
    let error = on(2, |sp| {
        broadcast(sp.world_group(), TAG, &values(0, &[1], DType::F32)?, 2)
    })
    .unwrap_err();
    assert!(
        error.message().contains("expected a root below 2, found 2"),
        "{error}"
    );
}

/// Latency of a collective, for `cargo test -p autosp-runtime --lib latency -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn latency() {
    for size in [2, 4, 8] {
        let times = on(size, |sp| {
            let begin = std::time::Instant::now();
            for _ in 0..5000 {
                sp.barrier()?;
            }
            Ok(begin.elapsed() / 5000)
        });
        dbg!(size, times.unwrap()[0]);
    }
}
