use autosp_plan::Settings;
use candle_core::{D, Var};

use super::*;
use crate::run_with;

/// Numbers [2, s, 3] that differ from token to token.
fn whole(s: usize) -> Tensor {
    let data: Vec<f32> = (0..2 * s * 3)
        .map(|i| ((i * i) % 17) as f32 - 6.0)
        .collect();
    Tensor::from_vec(data, (2, s, 3), &Device::Cpu).unwrap()
}

/// Weights [2, 3] on the result, so that its gradient is not uniform.
fn weights() -> Tensor {
    Tensor::new(&[[1f32, -2.0, 3.0], [0.5, 4.0, -1.0]], &Device::Cpu).unwrap()
}

type Reduce = fn(&Tensor, usize) -> Result<Tensor>;

/// Value and gradient on ranks (each rank's shard of it, padding behind), each rank weighting the result by its place.
fn on_ranks(size: usize, valid: usize, reduce: Reduce) -> Vec<(Vec<f32>, Vec<f32>, usize)> {
    run_with(Settings::default().with_sp(size), |sp| {
        let shard = Shard::new(valid, sp.sp_rank(), size);
        // Padding holds numbers that would show.
        let padding = Tensor::full(99f32, (2, shard.padded - valid, 3), &Device::Cpu)?;
        let padded = if shard.padded == valid {
            whole(valid)
        } else {
            Tensor::cat(&[whole(valid), padding], 1)?
        };
        let own = padded.narrow(1, shard.start, shard.len)?.contiguous()?;
        sp.register_shard(own.id(), shard)?;
        sp.scope(|| {
            scope::enter("test", &[("x", &own, 1)])?;
            let x = Var::from_tensor(&own)?;
            let y = reduce(x.as_tensor(), 1)?.flatten_from(1)?;
            let share = (weights() * (1.0 + sp.sp_rank() as f64))?;
            let grads = (&y * share)?.sum_all()?.backward()?;
            let grad = grads.get(&x).unwrap();
            Ok((
                y.flatten_all()?.to_vec1::<f32>()?,
                grad.transpose(0, 1)?.flatten_all()?.to_vec1::<f32>()?,
                shard.valid_here(),
            ))
        })
    })
    .unwrap()
}

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!(
            (a - b).abs() <= 1e-5 * (1.0 + b.abs()),
            "{found:?} {expected:?}"
        );
    }
}

#[test]
fn sums_and_means_are_those_of_the_whole_sequence_and_give_every_token_its_gradient() {
    let forms: [(Reduce, bool); 4] = [
        (|x, d| sum(x, d), false),
        (|x, d| sum_keepdim(x, d), false),
        (|x, d| mean(x, d), true),
        (|x, _| mean_keepdim(x, D::Minus2), true),
    ];
    for (size, valid) in [(1, 5), (2, 6), (4, 9), (4, 5), (3, 1)] {
        for (reduce, is_mean) in forms {
            let x = Var::from_tensor(&whole(valid)).unwrap();
            let y = if is_mean { x.mean(1) } else { x.sum(1) }.unwrap();
            // The ranks weight the result 1, 2, .. times.
            let share = (1..=size).sum::<usize>() as f64;
            let loss = (&y * (weights() * share).unwrap())
                .unwrap()
                .sum_all()
                .unwrap();
            let grads = loss.backward().unwrap();
            let expected = grads.get(&x).unwrap().transpose(0, 1).unwrap();
            let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut found = Vec::new();
            for (value, grad, here) in on_ranks(size, valid, reduce) {
                close(&value, &y);
                let (own, padding) = grad.split_at(here * 6);
                found.extend_from_slice(own);
                assert!(padding.iter().all(|g| *g == 0.0), "{padding:?}");
            }
            close(&found, &expected);
        }
    }
}

#[test]
fn a_running_sum_goes_on_from_rank_to_rank() {
    for (size, valid) in [(1, 5), (2, 6), (4, 9), (4, 5), (3, 1)] {
        let tokens: Vec<u32> = (0..2 * valid).map(|i| (i % 3) as u32).collect();
        let tokens = Tensor::from_vec(tokens, (2, valid), &Device::Cpu).unwrap();
        let expected = tokens.to_dtype(DType::F32).unwrap().cumsum(1).unwrap();
        let expected = expected.t().unwrap().to_vec2::<f32>().unwrap();
        let shards = run_with(Settings::default().with_sp(size), |sp| {
            let shard = Shard::new(valid, sp.sp_rank(), size);
            let own = tokens
                .pad_with_zeros(1, 0, shard.padded - valid)?
                .narrow(1, shard.start, shard.len)?
                .contiguous()?;
            sp.register_shard(own.id(), shard)?;
            sp.scope(|| {
                scope::enter("test", &[("x", &own, 1)])?;
                let y = cumsum(&own.to_dtype(DType::F32)?, 1)?;
                assert!(cumsum(Var::from_tensor(&y)?.as_tensor(), 1).is_err() || size == 1);
                Ok(y.t()?.to_vec2::<f32>()?)
            })
        });
        let mut joined = shards.unwrap().concat();
        joined.truncate(valid);
        assert_eq!(joined, expected);
    }
}

#[test]
fn another_length_is_refused() {
    let failed = run_with(Settings::default().with_sp(2), |sp| {
        let shard = Shard::new(6, sp.sp_rank(), 2);
        let own = Tensor::zeros((1, shard.len), DType::F32, &Device::Cpu)?;
        sp.register_shard(own.id(), shard)?;
        sp.scope(|| {
            scope::enter("test", &[("x", &own, 1)])?;
            Ok(sum(&Tensor::zeros((1, 6), DType::F32, &Device::Cpu)?, 1)?)
        })
    });
    assert_eq!(failed.unwrap_err().code(), codes::LOCAL_LENGTH);
}
