//! Masks from tensors that a caller gives: one number a key, of which each rank holds its part.

use std::cell::RefCell;

use autosp_plan::codes;
use candle_core::{Tensor, TensorId};

use super::Mask;
use crate::comm::{Tag, all_gather};
use crate::error::Error;
use crate::scope;

/// Masks that a rank remembers, since every layer asks for the same one.
const KNOWN: usize = 4;

thread_local! {
    static MASKS: RefCell<Vec<(TensorId, bool, Mask)>> = const { RefCell::new(Vec::new()) };
}

/// The mask that a tensor is, whose last dim is the keys: `[.., len]` with this rank's part of them, which is gathered from all ranks
/// (padding left out), or `[.., S]` as every rank holds it. The dim before, the queries, is of size 1 or S.
///
/// Every rank of the sequence calls this at the same place. On one rank, and for a mask that is whole, nothing is exchanged.
///
/// # Errors
/// AS0305 outside a sharded scope, AS0325 for a tensor that carries a gradient or whose queries are this rank's, as
/// [`Mask::dense`], and an error of the collectives if the run fails.
pub fn mask(x: &Tensor) -> candle_core::Result<Mask> {
    given(x, false)
}

/// As [`mask`], for a tensor that is the same for all queries, whatever the size of their dim.
///
/// # Errors
/// As [`mask`].
pub fn key_mask(x: &Tensor) -> candle_core::Result<Mask> {
    given(x, true)
}

fn given(x: &Tensor, all_queries: bool) -> candle_core::Result<Mask> {
    let known = MASKS.with_borrow(|known| {
        let fits = |(id, all, _): &&(TensorId, bool, Mask)| *id == x.id() && *all == all_queries;
        known.iter().find(fits).map(|(_, _, mask)| mask.clone())
    });
    if let Some(mask) = known {
        return Ok(mask);
    }
    let mask = whole(x, all_queries)?;
    MASKS.with_borrow_mut(|known| {
        if known.len() == KNOWN {
            known.remove(0);
        }
        known.push((x.id(), all_queries, mask.clone()));
    });
    Ok(mask)
}

fn whole(x: &Tensor, all_queries: bool) -> candle_core::Result<Mask> {
    let refused = |text: String| Error::new(codes::SITE_MASK, text);
    let scope = scope::require("attention mask")?;
    let shard = scope.shard()?;
    if x.track_op() {
        return Err(refused(
            "a mask that is computed from variables would lose its gradient".to_owned(),
        )
        .with_help("`.detach()` the tensor if it is a constant")
        .into());
    }
    let mut x = if x.rank() == 1 {
        x.unsqueeze(0)?
    } else {
        x.clone()
    };
    let rank = x.rank();
    let (queries, keys) = (x.dim(rank - 2)?, x.dim(rank - 1)?);
    if all_queries && queries > 1 {
        x = x.narrow(rank - 2, 0, 1)?;
    } else if shard.size > 1 && queries > 1 && queries != shard.valid {
        let text = format!(
            "expected a mask over keys, [.., 1, {}], or over the whole sequence, [.., {s}, {s}], found {:?}",
            shard.len,
            x.dims(),
            s = shard.valid
        );
        return Err(refused(text)
            .with_help("mask the keys, and weight the tokens where they are pooled")
            .into());
    }
    if shard.size > 1 && keys == shard.len {
        let tag = Tag::new("attention mask", "keys").at(scope.step());
        let engine = scope.sp().sp_group();
        x = all_gather(engine, tag, &x.contiguous()?, rank - 1)?.narrow(
            rank - 1,
            0,
            shard.valid,
        )?;
    }
    Mask::dense(&x)
}

#[cfg(test)]
mod tests {
    use autosp_plan::Settings;
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::scope::Shard;
    use crate::{Result, Sp, run_with};

    /// Runs `f` on `size` ranks with this rank's part of 0, 1, .. `valid` as [1, len]; padding is 99.
    fn with_keys<T: Send>(
        size: usize,
        valid: usize,
        f: impl Fn(&Sp, &Tensor) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        run_with(Settings::default().with_sp(size), |sp| {
            let shard = Shard::new(valid, sp.sp_rank(), size);
            let at = |i: usize| if i < valid { i as f32 } else { 99.0 };
            let own: Vec<f32> = (shard.start..shard.start + shard.len).map(at).collect();
            let own = Tensor::from_vec(own, (1, shard.len), &Device::Cpu)?;
            sp.register_shard(own.id(), shard)?;
            sp.scope(|| {
                scope::enter("test", &[("x", &own, 1)])?;
                f(sp, &own)
            })
        })
    }

    fn keys(mask: &Mask) -> Vec<f64> {
        match &mask.source {
            super::super::Source::Dense { data, .. } => data.to_vec(),
            super::super::Source::Rule { .. } => Vec::new(),
        }
    }

    #[test]
    fn the_keys_of_all_ranks_without_padding() {
        for (size, valid) in [(1, 5), (2, 6), (4, 9), (4, 5), (3, 1)] {
            let expected: Vec<f64> = (0..valid).map(|i| i as f64).collect();
            for (dims, found) in with_keys(size, valid, |_, own| {
                let four = own.unsqueeze(1)?.unsqueeze(1)?;
                let first = mask(&four)?;
                let repeated = own
                    .unsqueeze(1)?
                    .broadcast_as((1, own.dim(1)?, own.dim(1)?))?;
                assert_eq!(keys(&key_mask(&repeated)?), keys(&first));
                Ok((first.dims().to_vec(), keys(&mask(&four)?)))
            })
            .unwrap()
            {
                assert_eq!((dims, &found), (vec![1, 1, 1, valid], &expected));
            }
        }
    }

    #[test]
    fn a_mask_that_is_whole_is_taken_as_it_is() {
        let whole = Tensor::arange(0f32, 36.0, &Device::Cpu)
            .unwrap()
            .reshape((6, 6))
            .unwrap();
        for found in with_keys(3, 6, |_, _| Ok(keys(&mask(&whole)?))).unwrap() {
            assert_eq!(found, (0..36).map(f64::from).collect::<Vec<_>>());
        }
    }

    #[test]
    fn gradients_and_local_queries_are_refused() {
        let failed = with_keys(2, 6, |_, own| {
            Ok(mask(&(Var::from_tensor(own)?.as_tensor() * 2.0)?)?.rank())
        });
        assert_eq!(failed.unwrap_err().code(), codes::SITE_MASK);
        let failed = with_keys(2, 6, |_, _| {
            Ok(mask(&Tensor::zeros((1, 3, 3), DType::F32, &Device::Cpu)?)?.rank())
        });
        assert_eq!(failed.unwrap_err().code(), codes::SITE_MASK);
    }
}
