//! Checkpoint policies around sites: the same bits, no attention in the backward where it was kept, and bytes equal to the formulas.

use autosp_plan::cost;
use autosp_plan::settings::{Keep, Policies, Policy};
use candle_core::{Result, Tensor, Var};
use proptest::prelude::*;

use super::{Plain, SCALE, enter, noise};
use crate::memory::checkpoint;
use crate::schedule::Timeline;
use crate::scope::Shard;
use crate::scores::{scores, softmax};
use crate::{Error, Purpose, Settings, run_with};

const BLOCKS: usize = 3;
const HEADS: usize = 4;
const WIDTH: usize = 6;

#[derive(Debug, Clone, Copy)]
struct Case {
    sp: usize,
    kv_heads: usize,
    groups: usize,
    valid: usize,
    batch: usize,
}

/// What one rank found.
#[derive(Debug)]
struct Found {
    /// The bits of the result, the gradient of the input, and that of the weight that all blocks share.
    bits: Vec<u32>,
    /// Bytes that the scopes held after the forward, at most, and after all was dropped.
    held: [u64; 3],
    /// The same on the host, and the memory that was allocated there.
    host: [u64; 4],
    /// Exchanged bytes of forward and backward.
    exchanged: [u64; 2],
    /// Computed attentions of forward and backward.
    attentions: [u64; 2],
}

/// A block over `x` [b, H + 2G, len, d], which holds queries, keys and values: its q becomes the attention's result.
fn block(x: &Tensor, weight: &Tensor, kv_heads: usize) -> Result<Tensor> {
    let x = x.broadcast_mul(weight)?;
    let q = x.narrow(1, 0, HEADS)?;
    let k = x.narrow(1, HEADS, kv_heads)?;
    let v = x.narrow(1, HEADS + kv_heads, kv_heads)?;
    let out = softmax(&(scores::<Plain>(&q, &k.t()?)? * SCALE)?)?.matmul(&v)?;
    Tensor::cat(&[&(out + q)?, &k, &v], 1)
}

fn run(case: Case, keep: Keep) -> Vec<Found> {
    let settings = Settings::default()
        .with_sp(case.sp)
        .with_groups(case.groups)
        .with_policies(Policies::uniform(keep));
    run_with(settings, |sp| {
        let shard = Shard::new(case.valid, sp.sp_rank(), case.sp);
        let all = HEADS + 2 * case.kv_heads;
        let x = noise(3, &[case.batch, all, shard.padded, WIDTH]);
        let x = Var::from_tensor(&x.narrow(2, shard.start, shard.len)?.contiguous()?)?;
        let weight = Var::from_tensor(&noise(4, &[1, all, 1, WIDTH]))?;
        let ledger = sp.ledger();
        let marks = || (ledger.snapshot().exchange, ledger.attentions());
        let start = marks();
        let out = sp.scope(|| -> std::result::Result<Tensor, Error> {
            enter(sp, shard)?;
            let mut y = x.as_tensor().clone();
            for _ in 0..BLOCKS {
                let (weight, kv_heads) = (weight.as_tensor().clone(), case.kv_heads);
                y = checkpoint(&y, move |y| block(y, &weight, kv_heads))?;
            }
            Ok(y)
        })?;
        let (middle, held) = (marks(), ledger.held());
        let host = ledger.bytes(Purpose::Host);
        let mut grads = out.sqr()?.sum_all()?.backward()?;
        crate::memory::collect(&mut grads)?;
        let end = marks();
        let found = [&out, grads.get(&x).unwrap(), grads.get(&weight).unwrap()]
            .map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        drop((out, grads));
        Ok(Found {
            bits: found.concat().into_iter().map(f32::to_bits).collect(),
            held: [held, ledger.most(Purpose::Kept), ledger.held()],
            host: [
                host,
                ledger.most(Purpose::Host),
                ledger.bytes(Purpose::Host),
                if keep.offload {
                    sp.shelf()?.allocated()
                } else {
                    0
                },
            ],
            exchanged: [middle.0 - start.0, end.0 - middle.0],
            attentions: [middle.1 - start.1, end.1 - middle.1],
        })
    })
    .unwrap()
}

fn check(case: Case) {
    let shard = Shard::new(case.valid, 0, case.sp);
    let site = cost::Site {
        batch: case.batch,
        heads: HEADS,
        kv_heads: case.kv_heads,
        key_width: WIDTH,
        value_width: WIDTH,
        padded: shard.padded,
        ranks: case.sp,
        element: 4,
        lse_element: 4,
    };
    let input = cost::input_bytes(
        case.batch,
        shard.len,
        (HEADS + 2 * case.kv_heads) * WIDTH,
        4,
    );
    let blocks = BLOCKS as u64;
    let all = run(case, Keep::on_device(Policy::All));
    for keep in Keep::ALL {
        let policy = keep.policy;
        for (found, all) in run(case, keep).iter().zip(&all) {
            assert!(found.bits == all.bits, "{case:?} {keep}");
            let of_block = match policy {
                // What the tape has of its own: what was exchanged, or what attention made; the rest is in candle's graph.
                Policy::All if case.sp > 1 => site.kept_bytes(Policy::Qkv),
                Policy::All => site.kept_bytes(Policy::Attention),
                _ => input + site.kept_bytes(policy),
            };
            if keep.offload {
                // Two of the blocks are on the device, all are on the host.
                let host = blocks * of_block;
                assert_eq!(
                    found.held,
                    [2 * of_block, 2 * of_block, 0],
                    "{case:?} {keep}"
                );
                assert_eq!(found.host, [host, host, 0, host], "{case:?} {keep}");
            } else {
                let held = blocks * of_block;
                assert_eq!(found.held, [held, held, 0], "{case:?} {keep}");
                assert_eq!(found.host, [0; 4], "{case:?} {keep}");
            }
            let exchanged = [site.forward_bytes(), site.backward_bytes(policy)];
            assert_eq!(
                found.exchanged,
                exchanged.map(|bytes| bytes * blocks),
                "{case:?} {keep}"
            );
            let again = if policy == Policy::Input {
                all.attentions[0]
            } else {
                0
            };
            assert_eq!(
                found.attentions,
                [all.attentions[0], again],
                "{case:?} {keep}"
            );
            assert!(all.attentions[0] >= blocks);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn policies_have_the_same_bits_and_the_bytes_of_the_formulas(
        sp in prop::sample::select(vec![1usize, 2, 4]), kv_heads in prop::sample::select(vec![1usize, 2, 4]),
        groups in 1usize..4, valid in 1usize..40, batch in 1usize..3,
    ) {
        check(Case { sp, kv_heads, groups, valid, batch });
    }
}

#[test]
fn a_replay_runs_its_schedule() {
    let timeline = Timeline::default();
    let settings = Settings::default()
        .with_sp(2)
        .with_groups(2)
        .with_policy(Policy::Attention);
    run_with(settings, |sp| {
        let shard = Shard::new(8, sp.sp_rank(), 2);
        let x = Var::from_tensor(&noise(3, &[1, HEADS + 2, shard.len, WIDTH]))?;
        let _recording = timeline.attach();
        sp.scope(|| {
            enter(sp, shard)?;
            let weight = Tensor::ones((1, HEADS + 2, 1, WIDTH), x.dtype(), x.device())?;
            let y = checkpoint(&x, move |x| block(x, &weight, 1))?;
            Ok::<_, Error>(y.sum_all()?.backward()?)
        })
        .map(drop)
    })
    .unwrap();
    let events = timeline.events();
    let verbs: Vec<(&str, usize)> = events
        .iter()
        .filter(|event| event.rank == 0)
        .map(|event| (event.verb, event.group))
        .collect();
    let replay = [
        ("send_qkv", 0),
        ("send_out", 0),
        ("send_qkv", 1),
        ("send_out", 1),
        ("wait_qkv", 0),
        ("wait_qkv", 1),
        ("wait_out", 0),
        ("send_grad_out", 0),
    ];
    assert!(verbs.windows(8).any(|part| part == replay), "{verbs:?}");
    assert_eq!(
        verbs.iter().filter(|(verb, _)| *verb == "attend").count(),
        2
    );
}

#[test]
fn a_block_that_takes_another_way_the_second_time_is_refused() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    // Two sites the first time, then one, or three.
    for (first, then) in [(2, 1), (2, 3)] {
        let settings = Settings::default().with_policy(Policy::Attention);
        let error = run_with(settings, |sp| {
            let shard = Shard::new(8, 0, 1);
            let x = Var::from_tensor(&noise(3, &[1, HEADS + 2, shard.len, WIDTH]))?;
            sp.scope(|| {
                enter(sp, shard)?;
                let weight = Tensor::ones((1, HEADS + 2, 1, WIDTH), x.dtype(), x.device())?;
                let sites = Arc::new(AtomicUsize::new(first));
                let y = checkpoint(&x, move |x| {
                    let mut y = x.clone();
                    for _ in 0..sites.swap(then, Ordering::Relaxed) {
                        y = block(&y, &weight, 1)?;
                    }
                    Ok(y)
                })?;
                Ok::<_, Error>(y.sum_all()?.backward()?)
            })
            .map(drop)
        })
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("AS0351") && text.contains(&format!("found {then}")),
            "{text}"
        );
    }
}
