//! Layers of other libraries, whose weights are not seen: they run as they are, and what was assumed of them is checked.

use std::cell::RefCell;
use std::collections::HashSet;

use autosp_plan::codes;
use candle_core::{D, DType, Module, Result, Tensor};

use crate::Error;

/// The layer's own forward; the first time, one token alone has to give what it gives among the others.
///
/// # Errors
/// AS0331 if the layer mixes tokens; else the layer's own.
pub fn layer<M: Module>(layer: &M, x: &Tensor) -> Result<Tensor> {
    let y = layer.forward(x)?;
    checked(layer, x, &y)?;
    Ok(y)
}

/// As [`layer`], for a norm whose forward on contiguous tensors has no backward: candle's norms compute strided ones with
/// operations that have one, and give the same numbers.
///
/// # Errors
/// As [`layer`]; AS0331 also if there is no backward either way.
pub fn norm_layer<M: Module>(layer: &M, x: &Tensor) -> Result<Tensor> {
    let doubled = Tensor::stack(&[x, x], D::Minus1)?;
    let strided = doubled.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?;
    let y = layer.forward(&strided)?;
    if super::tracked(x) && !super::tracked(&y) {
        let text = format!(
            "`{}`: expected a norm with a backward, found none",
            name::<M>()
        );
        return Err(Error::new(codes::HELPER, text)
            .with_help("use `candle_nn`'s norm in its place")
            .into());
    }
    checked(layer, x, &y)?;
    Ok(y)
}

/// The same as methods, for layers behind references.
#[allow(non_snake_case)]
pub trait Layer: Module {
    /// As [`layer`].
    ///
    /// # Errors
    /// As [`layer`].
    fn layer__sp(&self, x: &Tensor) -> Result<Tensor>;

    /// As [`norm_layer`].
    ///
    /// # Errors
    /// As [`norm_layer`].
    fn norm_layer__sp(&self, x: &Tensor) -> Result<Tensor>;
}

#[allow(non_snake_case)]
impl<M: Module> Layer for M {
    fn layer__sp(&self, x: &Tensor) -> Result<Tensor> {
        layer(self, x)
    }

    fn norm_layer__sp(&self, x: &Tensor) -> Result<Tensor> {
        norm_layer(self, x)
    }
}

fn name<M>() -> &'static str {
    std::any::type_name::<M>()
}

thread_local! {
    static KNOWN: RefCell<HashSet<&'static str>> = RefCell::default();
}

/// Holds the last token's result against the layer on that token alone, once for each type and thread.
fn checked<M: Module>(layer: &M, x: &Tensor, y: &Tensor) -> Result<()> {
    let name = name::<M>();
    if x.elem_count() == 0 || KNOWN.with_borrow(|known| known.contains(name)) {
        return Ok(());
    }
    // Indices have no width of their own.
    let wide = usize::from(x.dtype().is_float());
    let last = |t: &Tensor, wide: usize| -> Result<Tensor> {
        let mut t = t.detach();
        for d in 0..t.rank() - wide {
            t = t.narrow(d, t.dim(d)? - 1, 1)?;
        }
        t.contiguous()
    };
    let (alone, among) = (layer.forward(&last(x, wide)?)?, last(y, 1)?);
    let flat = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (alone, among) = (flat(&alone)?, flat(&among)?);
    let size = among.iter().fold(0.0, |size: f64, a| size.max(a.abs()));
    // Rounding of the input's type, in another order of sums.
    let allowed = if x.dtype() == DType::F64 {
        1e-9
    } else if y.dtype() == DType::F32 {
        1e-4
    } else {
        5e-2
    } * size
        + 1e-12;
    let same = alone.len() == among.len()
        && alone
            .iter()
            .zip(&among)
            .all(|(a, b)| (a - b).abs() <= allowed || (a - b).is_nan());
    if !same {
        let text = format!(
            "`{name}`: expected a layer that computes each token by itself, found one that mixes tokens"
        );
        return Err(Error::new(codes::HELPER, text)
            .with_help("move its forward into the annotated module")
            .into());
    }
    KNOWN.with_borrow_mut(|known| known.insert(name));
    Ok(())
}

/// What a cache of keys and values gives that nothing was put into before: a sharded scope starts at position 0 and keeps nothing.
///
/// # Errors
/// None; the type is that of the operation it stands for.
pub fn no_cache<C>(_: &C, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((k.clone(), v.clone()))
}
