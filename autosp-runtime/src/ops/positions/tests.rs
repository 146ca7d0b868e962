use autosp_plan::Settings;
use candle_core::{DType, Device, Var};

use super::*;
use crate::{Result, run_with};

/// Runs `f` on `size` ranks that share a sequence of `valid` tokens, in a scope that it has entered.
fn sharded<T: Send>(
    size: usize,
    valid: usize,
    f: impl Fn(&Sp, Shard) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    run_with(Settings::default().with_sp(size), |sp| {
        let shard = Shard::new(valid, sp.sp_rank(), size);
        let tokens = Tensor::zeros((1, shard.len), DType::U32, &Device::Cpu)?;
        sp.register_shard(tokens.id(), shard)?;
        sp.scope(|| {
            scope::enter("test", &[("tokens", &tokens, 1)])?;
            f(sp, shard)
        })
    })
}

fn table(rows: usize) -> Tensor {
    Tensor::arange(0f32, (rows * 2) as f32, &Device::Cpu)
        .unwrap()
        .reshape((rows, 2))
        .unwrap()
}

#[test]
fn slices_join_to_the_table_and_padding_has_position_zero() {
    for (size, valid) in [(1, 5), (2, 6), (4, 9), (4, 5), (3, 1)] {
        for spare in [0, 3] {
            let shards = sharded(size, valid, |_, shard| {
                assert_eq!(slice(&table(valid + spare).t()?, 1)?.dims(), [2, shard.len]);
                Ok(slice(&table(valid + spare), 0)?.to_vec2::<f32>()?)
            });
            let mut joined = shards.unwrap().concat();
            let padding = joined.split_off(valid);
            assert_eq!(joined, table(valid).to_vec2::<f32>().unwrap());
            assert!(padding.iter().all(|row| row == &[0.0, 1.0]), "{padding:?}");
        }
    }
}

#[test]
fn a_trained_table_gets_its_gradient() {
    let grads = sharded(4, 6, |_, shard| {
        let table = Var::from_tensor(&table(7))?;
        let rows = slice(&table, 0)?;
        let weights: Vec<f32> = (0..shard.len)
            .map(|i| if i < shard.valid_here() { 1.0 } else { 0.0 })
            .collect();
        let weights = Tensor::from_vec(weights, (shard.len, 1), &Device::Cpu)?;
        let grads = rows.broadcast_mul(&weights)?.sum_all()?.backward()?;
        Ok(grads
            .get(&table)
            .unwrap()
            .narrow(1, 0, 1)?
            .squeeze(1)?
            .to_vec1::<f32>()?)
    });
    let sum = grads
        .unwrap()
        .into_iter()
        .reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect())
        .unwrap();
    assert_eq!(sum, [1., 1., 1., 1., 1., 1., 0.]);
}

#[test]
fn a_picked_token_is_everywhere_and_its_gradient_goes_home() {
    for (size, valid, index) in [(1, 5, 3), (2, 6, 5), (4, 9, 0), (4, 9, 8), (3, 4, 2)] {
        let found = sharded(size, valid, |sp, shard| {
            let whole = table(shard.padded);
            let x = Var::from_tensor(&whole.narrow(0, shard.start, shard.len)?)?;
            let token = pick(&x, 0, index)?;
            assert_eq!(token.to_vec1::<f32>()?, whole.get(index)?.to_vec1::<f32>()?);
            assert_eq!(
                pick(&x.detach(), 0, index)?.to_vec1::<f32>()?,
                token.to_vec1::<f32>()?
            );
            // Each rank weighs the token by 1, 2, ..: the sum comes back.
            let loss = (token * (sp.rank() + 1) as f64)?.sum_all()?;
            Ok(loss
                .backward()?
                .get(&x)
                .unwrap()
                .narrow(1, 1, 1)?
                .squeeze(1)?
                .to_vec1::<f32>()?)
        });
        let mut expected = vec![0.0; valid.div_ceil(size) * size];
        expected[index] = (size * (size + 1) / 2) as f32;
        assert_eq!(found.unwrap().concat(), expected);
    }
}

#[test]
fn tables_too_short_and_tokens_out_of_range_are_refused() {
    let code = |error: candle_core::Error| Error::from(error).code();
    sharded(2, 5, |_, shard| {
        assert_eq!(code(slice(&table(4), 0).unwrap_err()), codes::TABLE_SHORT);
        assert_eq!(
            code(pick(&table(shard.len), 0, 5).unwrap_err()),
            codes::POSITION
        );
        assert_eq!(
            code(pick(&table(shard.len + 1), 0, 1).unwrap_err()),
            codes::LOCAL_LENGTH
        );
        Ok(())
    })
    .unwrap();
}

#[test]
fn outside_a_scope_they_are_plain_operations() {
    assert_eq!(slice(&table(4), 0).unwrap().dims(), [4, 2]);
    assert_eq!(
        pick(&table(4), 0, 2).unwrap().to_vec1::<f32>().unwrap(),
        [4., 5.]
    );
}
