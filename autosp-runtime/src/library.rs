//! Helpers that models share, as the compiler takes them: before a helper that a twin leaves out or makes anew is relied on, the
//! one that the model really calls is compared with its definition at small sizes, once for each thread.

use std::cell::RefCell;
use std::collections::HashSet;

use autosp_plan::codes;
use candle_core::{DType, Device, Result, Tensor};

use crate::Error;

thread_local! {
    static KNOWN: RefCell<HashSet<&'static str>> = RefCell::default();
}

/// Runs the comparison once for each helper and thread.
fn once<F>(name: &str, _: &F, same: impl FnOnce() -> Result<bool>) -> Result<()> {
    let ty = std::any::type_name::<F>();
    if KNOWN.with_borrow(|known| known.contains(ty)) {
        return Ok(());
    }
    if !same()? {
        let text = format!(
            "`{ty}`: expected what `candle_transformers::utils::{name}` computes, found something else"
        );
        return Err(Error::new(codes::HELPER, text)
            .with_help("move the helper into the annotated module")
            .into());
    }
    KNOWN.with_borrow_mut(|known| known.insert(ty));
    Ok(())
}

fn values(t: &Tensor) -> Result<(Vec<usize>, Vec<f32>)> {
    Ok((
        t.dims().to_vec(),
        t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
    ))
}

/// Each head of `[b, heads, s, d]` `n` times in a row.
///
/// # Errors
/// AS0331 if the helper does something else.
pub fn repeat_kv<F: Fn(Tensor, usize) -> Result<Tensor>>(f: F) -> Result<()> {
    once("repeat_kv", &f, || {
        let (b, heads, s, d) = (2, 3, 2, 2);
        let x = Tensor::arange(0f32, (b * heads * s * d) as f32, &Device::Cpu)?
            .reshape((b, heads, s, d))?;
        for n in 1..4 {
            let rows: Vec<u32> = (0..(heads * n) as u32).map(|h| h / n as u32).collect();
            let expected = x.index_select(&Tensor::new(rows, &Device::Cpu)?, 1)?;
            if values(&f(x.clone(), n)?)? != values(&expected)? {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// `[s, offset + s]`, 1 where a key lies after the query.
///
/// # Errors
/// AS0331 if the helper does something else.
pub fn build_causal_mask<F: Fn(usize, usize, &Device) -> Result<Tensor>>(f: F) -> Result<()> {
    once("build_causal_mask", &f, || {
        let expected: Vec<f32> = (0..16)
            .map(|k| f32::from(u8::from(k % 4 > k / 4)))
            .collect();
        let found = f(4, 0, &Device::Cpu)?;
        Ok(!found.dtype().is_float() && values(&found)? == (vec![4, 4], expected))
    })
}

/// `[1, 1, s, offset + s]`, 0 where a key is seen and minus infinity elsewhere.
///
/// # Errors
/// AS0331 if the helper does something else.
pub fn build_additive_causal_mask<F>(f: F) -> Result<()>
where
    F: Fn(usize, usize, Option<usize>, &Device, DType) -> Result<Tensor>,
{
    once("build_additive_causal_mask", &f, || {
        for window in [None, Some(0), Some(1), Some(2)] {
            let value = |i: usize, j: usize| {
                let seen = j <= i && window.is_none_or(|w| j + w >= i);
                if seen { 0.0 } else { f32::NEG_INFINITY }
            };
            let expected: Vec<f32> = (0..25).map(|k| value(k / 5, k % 5)).collect();
            let found = f(5, 0, window, &Device::Cpu, DType::F32)?;
            if values(&found)? != (vec![1, 1, 5, 5], expected) {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_order_of_heads_is_found() {
        let tiled = |x: Tensor, n: usize| Tensor::cat(&vec![&x; n], 1);
        let error = repeat_kv(tiled).expect_err("heads in another order");
        assert!(error.to_string().contains("AS0331"), "{error}");
        let right = |x: Tensor, n: usize| {
            let (b, h, s, d) = x.dims4()?;
            Tensor::cat(&vec![&x; n], 2)?.reshape((b, h * n, s, d))
        };
        repeat_kv(right).expect("heads in a row");
    }

    #[test]
    fn a_mask_on_the_other_side_is_found() {
        let wrong = |s: usize, _: usize, device: &Device| {
            let mask: Vec<u8> = (0..s * s).map(|k| u8::from(k % s < k / s)).collect();
            Tensor::from_vec(mask, (s, s), device)
        };
        assert!(build_causal_mask(wrong).is_err());
    }
}
