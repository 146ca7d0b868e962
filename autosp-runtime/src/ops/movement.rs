//! candle's methods that move or cast the elements of a tensor, as a block's tape takes them.

use candle_core::shape::{Dim, Dims, ShapeWithOneHole};
use candle_core::{DType, Result, Tensor};

use super::tape::{self, Gradient, Hint};
use super::{cast, taken};

/// The methods of candle's tensors under their names with `__sp`. Outside a block they are candle's own.
#[allow(non_snake_case, missing_docs, clippy::missing_errors_doc)]
pub trait Recorded {
    fn reshape__sp<S: ShapeWithOneHole>(&self, shape: S) -> Result<Tensor>;
    fn flatten_from__sp<D: Dim>(&self, dim: D) -> Result<Tensor>;
    fn flatten_to__sp<D: Dim>(&self, dim: D) -> Result<Tensor>;
    fn flatten_all__sp(&self) -> Result<Tensor>;
    fn squeeze__sp<D: Dim>(&self, dim: D) -> Result<Tensor>;
    fn unsqueeze__sp<D: Dim>(&self, dim: D) -> Result<Tensor>;
    fn transpose__sp<D1: Dim, D2: Dim>(&self, dim1: D1, dim2: D2) -> Result<Tensor>;
    fn t__sp(&self) -> Result<Tensor>;
    fn permute__sp<D: Dims>(&self, dims: D) -> Result<Tensor>;
    fn contiguous__sp(&self) -> Result<Tensor>;
    fn to_dtype__sp(&self, dtype: DType) -> Result<Tensor>;
}

#[allow(non_snake_case)]
impl Recorded for Tensor {
    fn reshape__sp<S: ShapeWithOneHole>(&self, shape: S) -> Result<Tensor> {
        let shape = shape.into_shape(self.elem_count())?;
        if !tape::holds(self) {
            return self.reshape(shape);
        }
        let dims = shape.dims().to_vec();
        view(
            &self.contiguous__sp()?,
            move |x| x.reshape(dims.as_slice()),
            Back::Shape,
        )
    }

    fn flatten_from__sp<D: Dim>(&self, dim: D) -> Result<Tensor> {
        let dim = dim.to_index(self.shape(), "flatten")?;
        let (kept, flat) = self.dims().split_at(dim);
        let dims: Vec<usize> = kept
            .iter()
            .copied()
            .chain([flat.iter().product()])
            .collect();
        self.reshape__sp(dims)
    }

    fn flatten_to__sp<D: Dim>(&self, dim: D) -> Result<Tensor> {
        let dim = dim.to_index(self.shape(), "flatten")?;
        let (flat, kept) = self.dims().split_at(dim + 1);
        let dims: Vec<usize> = std::iter::once(flat.iter().product())
            .chain(kept.iter().copied())
            .collect();
        self.reshape__sp(dims)
    }

    fn flatten_all__sp(&self) -> Result<Tensor> {
        self.reshape__sp(self.elem_count())
    }

    fn squeeze__sp<D: Dim>(&self, dim: D) -> Result<Tensor> {
        let dim = dim.to_index(self.shape(), "squeeze")?;
        view(self, move |x| x.squeeze(dim), Back::Shape)
    }

    fn unsqueeze__sp<D: Dim>(&self, dim: D) -> Result<Tensor> {
        let dim = dim.to_index_plus_one(self.shape(), "unsqueeze")?;
        view(self, move |x| x.unsqueeze(dim), Back::Shape)
    }

    fn transpose__sp<D1: Dim, D2: Dim>(&self, dim1: D1, dim2: D2) -> Result<Tensor> {
        let first = dim1.to_index(self.shape(), "transpose")?;
        let second = dim2.to_index(self.shape(), "transpose")?;
        let turned = move |x: &Tensor| x.transpose(first, second);
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.swap(first, second);
        view(self, turned, Back::Order(order))
    }

    fn t__sp(&self) -> Result<Tensor> {
        match self.rank() {
            0 | 1 => self.t(),
            rank => self.transpose__sp(rank - 2, rank - 1),
        }
    }

    fn permute__sp<D: Dims>(&self, dims: D) -> Result<Tensor> {
        let dims = dims.to_indexes(self.shape(), "permute")?;
        let mut back = vec![0; dims.len()];
        for (to, &from) in dims.iter().enumerate() {
            if let Some(place) = back.get_mut(from) {
                *place = to;
            }
        }
        view(self, move |x| x.permute(dims.as_slice()), Back::Order(back))
    }

    fn contiguous__sp(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        if !tape::holds(self) {
            return self.contiguous();
        }
        let copy = contiguous(self)?;
        let copy = tape::result((taken(&copy)?, self.shape().clone()), None);
        let hint = tape::hint(self).filter(|hint| matches!(hint, Hint::Cast(_)));
        tape::push(&[self], &copy, (hint, true), |grad| Ok(vec![Some(grad)]));
        Ok(copy)
    }

    fn to_dtype__sp(&self, dtype: DType) -> Result<Tensor> {
        let from = self.dtype();
        if dtype == from || !tape::holds(self) || !from.is_float() || !dtype.is_float() {
            return self.to_dtype(dtype);
        }
        if let Some(Hint::Cast(narrow)) = tape::hint(self)
            && narrow.dtype() == dtype
        {
            return Ok(narrow);
        }
        let cast = tape::result((taken(&cast(self, dtype)?)?, self.shape().clone()), None);
        let wider = dtype.size_in_bytes() > from.size_in_bytes();
        let hint = wider.then(|| Hint::Cast(self.clone()));
        tape::push(&[self], &cast, (hint, true), move |grad| {
            Ok(vec![Some(Gradient {
                tensor: super::cast(&grad.tensor, from)?,
                fresh: true,
            })])
        });
        Ok(cast)
    }
}

/// A contiguous tensor with the same values, detached.
fn contiguous(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return Ok(crate::cuda::ops::contiguous(x)?);
    }
    x.detach().contiguous()
}

/// How the gradient of a view is seen as one of what is viewed.
#[derive(Clone)]
enum Back {
    /// In that shape.
    Shape,
    /// With the dims in this order.
    Order(Vec<usize>),
}

/// The same memory in another way. What was cast before is known to be so after.
fn view(x: &Tensor, see: impl Fn(&Tensor) -> Result<Tensor>, back: Back) -> Result<Tensor> {
    if !tape::holds(x) {
        return see(x);
    }
    let hint = match tape::hint(x) {
        Some(Hint::Cast(narrow)) => {
            let back = back.clone();
            Some(Hint::Cast(pushed(&narrow, &see, back, None)?))
        }
        _ => None,
    };
    pushed(x, &see, back, hint)
}

fn pushed(
    x: &Tensor,
    see: &impl Fn(&Tensor) -> Result<Tensor>,
    back: Back,
    hint: Option<Hint>,
) -> Result<Tensor> {
    // To candle this is an operation on a variable, whatever the tape makes of it.
    let y = see(x)?;
    if y.id() == x.id() {
        return Ok(y);
    }
    let dims = x.dims().to_vec();
    tape::push(&[x], &y, (hint, false), move |grad| {
        let seen = grad.viewed(|grad| match &back {
            Back::Shape => contiguous(grad)?.reshape(dims.as_slice()),
            Back::Order(order) => grad.permute(order.as_slice()),
        })?;
        Ok(vec![Some(seen)])
    });
    Ok(y)
}
