use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use autosp_plan::Settings;
use autosp_plan::settings::Policies;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage};

use super::*;
use crate::{Parameters, run_with};

/// The identity; counts how many of it a graph holds.
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CustomOp1 for Held {
    fn name(&self) -> &'static str {
        "held"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((storage.clone(), layout.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

const BLOCKS: usize = 4;

type Found = (Vec<f32>, Vec<(String, Vec<f32>)>, usize);

/// A small network with one weight that all blocks share and whose first input is a constant or a variable.
fn network(policies: &str, input_is_tracked: bool) -> Found {
    let settings = Settings::default().with_policies(policies.parse().unwrap());
    let results = run_with(settings, |sp| {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let vb = parameters.builder();
        let shared = candle_nn::linear(8, 8, vb.pp("shared"))?;
        let count = Arc::new(AtomicUsize::new(0));
        let input = vb.get_with_hints(
            (3, 8),
            "input",
            candle_nn::Init::Randn {
                mean: 0.0,
                stdev: 1.0,
            },
        )?;
        sp.scope(|| {
            let mut x = if input_is_tracked {
                input.clone()
            } else {
                input.detach()
            };
            for i in 0..BLOCKS {
                let own = candle_nn::linear(8, 8, vb.pp(i))?;
                let (shared, count) = (shared.clone(), Arc::clone(&count));
                x = checkpoint(&x, move |x| {
                    let x = x.apply_op1(Held::new(&count))?;
                    x.apply(&own)?.silu()?.apply(&shared)? + x
                })?;
            }
            let held = count.load(Ordering::Relaxed);
            // The transposed view is contiguous nowhere: the result of a block is copied as it is seen.
            let loss = x.t()?.sqr()?.sum_all()?;
            let mut grads = loss.backward()?;
            collect(&mut grads)?;
            let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
            let mut found = Vec::new();
            for (name, var) in parameters.named() {
                if let Some(grad) = grads.get(&var) {
                    found.push((name, values(grad)?));
                }
            }
            Ok((values(&x)?, found, held))
        })
    });
    results.unwrap().remove(0)
}

#[test]
fn recomputing_gives_the_same_bits_and_holds_nothing() {
    for tracked in [true, false] {
        let (y, grads, held) = network("all", tracked);
        assert_eq!(grads.len(), 2 * BLOCKS + 2 + usize::from(tracked));
        // A block whose input is a constant has nothing to keep for it.
        assert_eq!(held, if tracked { BLOCKS } else { BLOCKS - 1 });
        for (policies, kept) in [
            ("input", 0),
            ("all+offload", held),
            ("qkv+offload", 0),
            ("attention*1, all*1, input+offload*2", 1),
            ("attention+offload*2, input", 0),
            ("input+offload*1, all*2, input+offload", 2),
        ] {
            let (y_again, grads_again, held_again) = network(policies, tracked);
            assert_eq!(y, y_again, "{policies}");
            assert_eq!(grads, grads_again, "{policies}");
            assert_eq!(held_again, kept, "{policies}");
        }
    }
}

#[test]
fn a_block_may_return_a_view_of_its_input() {
    let grads = run_with(Settings::default().with_policy(Policy::Input), |sp| {
        let x = Var::from_tensor(&Tensor::arange(0f32, 12., &Device::Cpu)?.reshape((3, 4))?)?;
        sp.scope(|| {
            let y = checkpoint(&x, |x| x.narrow(0, 1, 2)?.t())?;
            assert_eq!(
                y.to_vec2::<f32>()?,
                [[4., 8.], [5., 9.], [6., 10.], [7., 11.]]
            );
            assert_eq!(
                checkpoint(&x, |x| Ok(x.clone()))?.to_vec2::<f32>()?,
                x.to_vec2::<f32>()?
            );
            Ok(y.sqr()?
                .sum_all()?
                .backward()?
                .get(&x)
                .unwrap()
                .to_vec2::<f32>()?)
        })
    });
    assert_eq!(
        grads.unwrap()[0],
        [[0., 0., 0., 0.], [8., 10., 12., 14.], [16., 18., 20., 22.]]
    );
}

#[test]
fn outside_a_scope_the_block_just_runs() {
    let x = Var::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let held = Arc::clone(&count);
    let y = checkpoint(&x, move |x| x.apply_op1(Held::new(&held))).unwrap();
    assert_eq!(count.load(Ordering::Relaxed), 1);
    assert!(y.sum_all().unwrap().backward().unwrap().get(&x).is_some());
}

/// The gradients of one block by name, and the most tokens that its inner part has had at once.
fn block_of_tiles(keep: Keep, tile: usize) -> Found {
    let policies = Policies::uniform(keep);
    let settings = Settings::default().with_policies(policies).with_tile(tile);
    let results = run_with(settings, |sp| {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let vb = parameters.builder();
        let init = candle_nn::Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        };
        let x = vb.get_with_hints((2, 11, 8), "input", init)?;
        let (up, down) = (
            candle_nn::linear(8, 12, vb.pp("up"))?,
            candle_nn::linear(12, 8, vb.pp("down"))?,
        );
        let most = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&most);
        sp.scope(|| {
            let y = checkpoint(&x, move |x| {
                let (up, down, seen) = (up.clone(), down.clone(), Arc::clone(&seen));
                let y = tiled(x, 1, move |x| {
                    seen.fetch_max(x.dim(1)?, Ordering::Relaxed);
                    let wide = crate::ops::linear(&up, x)?;
                    crate::ops::linear(&down, &crate::ops::mul(crate::ops::silu(&wide), &wide)?)
                })?;
                crate::ops::add(x, y)
            })?;
            let mut grads = y.sqr()?.sum_all()?.backward()?;
            collect(&mut grads)?;
            let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
            let mut found = Vec::new();
            for (name, var) in parameters.named() {
                found.push((name, values(grads.get(&var).expect("a gradient"))?));
            }
            Ok((values(&y)?, found, most.load(Ordering::Relaxed)))
        })
    });
    results.unwrap().remove(0)
}

#[test]
fn tiles_change_nothing_but_how_many_tokens_run_at_once() {
    let (y, gradients, most) = block_of_tiles(Keep::on_device(Policy::Attention), 100);
    assert_eq!((gradients.len(), most), (5, 11));
    // Everything is kept: nothing would be saved.
    let kept = (y.clone(), gradients.clone(), 11);
    for keep in [Keep::on_device(Policy::All), Keep::offloaded(Policy::All)] {
        assert_eq!(block_of_tiles(keep, 4), kept);
    }
    for keep in [
        Keep::on_device(Policy::Attention),
        Keep::on_device(Policy::Input),
        Keep::offloaded(Policy::Input),
    ] {
        for (tile, largest) in [(4, 4), (6, 6), (1, 1)] {
            let (found, tiles, most) = block_of_tiles(keep, tile);
            assert_eq!(most, largest);
            // Products of fewer rows add up in another order.
            let near = |name: &str, found: &[f32], expected: &[f32]| {
                for (a, b) in found.iter().zip(expected) {
                    let apart = (a - b).abs();
                    assert!(apart <= 1e-4 * (1.0 + b.abs()), "{name}: {a} for {b}");
                }
            };
            near("result", &found, &y);
            for ((name, found), (_, expected)) in tiles.iter().zip(&gradients) {
                near(name, found, expected);
            }
        }
    }
}

/// A block whose input nobody else reads takes its memory, once.
#[test]
fn the_memory_of_a_blocks_input_is_taken_where_nobody_reads_it() {
    for keep in Keep::ALL {
        let policy = keep.policy;
        let settings = Settings::default().with_policies(Policies::uniform(keep));
        run_with(settings, |sp| {
            let x = Var::from_tensor(&Tensor::arange(0f32, 12., &Device::Cpu)?.reshape((3, 4))?)?;
            sp.scope(|| {
                let double = |x: &Tensor| crate::ops::add(x, x);
                // The variable is no block's result: it stays.
                let a = checkpoint_last(&x, double)?;
                let b = checkpoint_last(&a, double)?;
                let c = checkpoint(&b, double)?;
                assert_eq!(x.sum_all()?.to_vec0::<f32>()?.to_bits(), 66f32.to_bits());
                assert!(matches!(
                    &*a.storage_and_layout().0,
                    Storage::Cpu(CpuStorage::U8(rest)) if rest.is_empty()
                ));
                assert_eq!(b.sum_all()?.to_vec0::<f32>()?.to_bits(), 264f32.to_bits());
                let loss = c.sum_all()?;
                for round in 0..2 {
                    match loss.backward() {
                        Ok(grads) => {
                            let grad = grads.get(&x).expect("a gradient").to_vec2::<f32>()?;
                            assert_eq!(grad, [[8.0; 4]; 3]);
                            assert!(round == 0 || policy != Policy::All);
                        }
                        Err(error) => {
                            assert!((round, policy) == (1, Policy::All), "{error}");
                            assert!(error.to_string().contains("second"), "{error}");
                        }
                    }
                }
                Ok(())
            })
        })
        .unwrap();
    }
}

/// An own loop that forgets the gradients of blocks is told before it goes on.
#[test]
fn gradients_that_nobody_collects_are_an_error_of_the_next_scope() {
    run_with(Settings::default(), |sp| {
        let w = Var::from_tensor(&Tensor::arange(0f32, 4., &Device::Cpu)?)?;
        let step = || {
            sp.scope(|| {
                let (x, w) = (Tensor::ones(4, DType::F32, &Device::Cpu)?, w.clone());
                let y = checkpoint(&x, move |x| crate::ops::mul(x, w.as_tensor()))?;
                y.sum_all()?.backward()
            })
        };
        let mut grads = step()?;
        assert!(grads.get(&w).is_none());
        sp.reduce_gradients(&mut grads, std::slice::from_ref(&w))?;
        assert!(grads.get(&w).is_some());
        step()?;
        let error = step().expect_err("gradients were left behind");
        assert!(error.to_string().contains("AS0518"), "{error}");
        step()?;
        Ok(())
    })
    .unwrap();
}

/// What a run of `BLOCKS` blocks under some policies ends in.
fn error_of(policies: &str, evaluate: bool) -> String {
    let settings = Settings::default().with_policies(policies.parse().unwrap());
    let found = run_with(settings, |sp| {
        let x = Var::from_tensor(&Tensor::arange(0f32, 12., &Device::Cpu)?)?;
        sp.scope(|| {
            let forward = || {
                let mut y = x.as_tensor().clone();
                for _ in 0..BLOCKS {
                    // A block in a block is part of it.
                    y = checkpoint(&y, |y| checkpoint(y, |y| crate::ops::add(y, y)))?;
                }
                y.sum_all()
            };
            if evaluate {
                forward_only(forward)?;
            } else {
                forward()?.backward()?;
            }
            Ok(())
        })
    });
    found
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default()
}

#[test]
fn policies_are_for_as_many_blocks_as_there_are() {
    for evaluate in [false, true] {
        for fitting in [
            "input",
            "all*2, qkv",
            "all*4",
            "input+offload*2, all*2",
            "all*3, input",
        ] {
            assert_eq!(error_of(fitting, evaluate), "", "{fitting}");
        }
        let text = error_of("all*2, qkv*1", evaluate);
        let found = text.contains("expected 3 blocks") && text.contains("found 4 or more");
        assert!(found && text.contains("AS0352"), "{text}");
    }
    for (policies, expected) in [
        ("all*5", "expected 5 blocks"),
        ("all*4, input", "expected at least 5 blocks"),
    ] {
        let text = error_of(policies, false);
        let found = text.contains(expected) && text.contains("found 4 in the forward");
        assert!(found && text.contains("AS0352"), "{text}");
    }
}

#[test]
fn a_host_without_room_is_an_error_before_anything_is_lost() {
    let settings = Settings::default()
        .with_policies("input+offload".parse().unwrap())
        .with_host_memory(100);
    let error = run_with(settings, |sp| {
        let x = Var::from_tensor(&Tensor::arange(0f32, 12., &Device::Cpu)?)?;
        sp.scope(|| {
            let y = checkpoint(&x, |y| crate::ops::add(y, y))?;
            let y = checkpoint(&y, |y| crate::ops::add(y, y))?;
            checkpoint(&y, |y| crate::ops::add(y, y))
        })?;
        Ok(())
    })
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("AS0353") && text.contains("AUTOSP_HOST_MEMORY=288B"),
        "{text}"
    );
}
