//! Logits that are not computed yet.
//!
//! In the twin of a loss, the product of hidden states with the vocabulary yields [`Logits`]: a handle that notes what the model does to
//! them afterwards (a scale, a soft cap, casts). The loss computes them for some tokens at a time and keeps none.

use std::fmt;
use std::ops::{Add, Div, Mul, Sub};
use std::sync::Arc;

use autosp_plan::codes;
use candle_core::shape::Dim;
use candle_core::{D, DType, Module, Result, Shape, Tensor};
use candle_nn::Linear;

use super::{classes, tiled};
use crate::Error;

/// What makes logits of hidden states.
#[derive(Clone)]
pub(super) enum Head {
    /// `x Wᵀ + b`.
    Weight {
        /// `[V, h]`, or `[h, V]` if `columns` says that a class is a column.
        weight: Tensor,
        columns: bool,
        bias: Option<Tensor>,
    },
    /// A layer whose weights are not seen.
    Layer(Arc<Layer>),
}

type Layer = dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync;

/// What is done to logits after the product, element by element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Step {
    /// `a z + b`.
    Affine(f64, f64),
    /// `tanh z`.
    Tanh,
    /// The nearest value of another type.
    Cast(DType),
}

/// Logits `[.., V]` of hidden states `[.., h]`, with what is to be done to them: a cheap handle that holds no logits.
///
/// It has those of a tensor's methods and operators that work on each logit alone; [`cross_entropy`](Self::cross_entropy) is what they
/// are for.
///
/// ```
/// # use autosp_runtime::loss::Logits;
/// # use candle_core::{DType, Device, Tensor};
/// let hidden = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// let vocabulary = Tensor::randn(0f32, 1.0, (100, 8), &Device::Cpu)?;
/// let labels = Tensor::zeros((2, 5), DType::U32, &Device::Cpu)?;
/// // A soft cap of 30.
/// let logits = Logits::new(&hidden, &vocabulary, None)?;
/// let logits = ((logits / 30.0)?.tanh()? * 30.0)?;
/// let loss = logits.cross_entropy(&labels)?;
/// # assert!(loss.to_scalar::<f32>()? > 0.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Logits {
    pub(super) x: Tensor,
    pub(super) head: Head,
    pub(super) steps: Vec<Step>,
    /// The dims before the classes.
    leading: Vec<usize>,
}

impl Logits {
    /// `x Wᵀ + b` with x `[.., h]`, W `[V, h]` and b `[V]`.
    ///
    /// # Errors
    /// AS0509 if the shapes do not fit.
    pub fn new(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        Self::weighted(x, weight, false, bias)
    }

    fn weighted(x: &Tensor, weight: &Tensor, columns: bool, bias: Option<&Tensor>) -> Result<Self> {
        let (class, hidden) = if columns { (1, 0) } else { (0, 1) };
        let fits = weight.rank() == 2
            && x.rank() >= 1
            && x.dim(D::Minus1)? == weight.dim(hidden)?
            && bias.is_none_or(|bias| *bias.dims() == [weight.dims()[class]]);
        if !fits {
            let text = format!(
                "expected hidden states [.., h] and a weight {}, found {:?} and {:?}{}",
                if columns { "[h, V]" } else { "[V, h]" },
                x.dims(),
                weight.dims(),
                bias.map_or_else(String::new, |bias| format!(
                    " with a bias {:?}",
                    bias.dims()
                ))
            );
            return Err(Error::new(codes::BATCH_SHAPE, text).into());
        }
        let head = Head::Weight {
            weight: weight.clone(),
            columns,
            bias: bias.cloned(),
        };
        Ok(Self::of(x, head))
    }

    fn of(x: &Tensor, head: Head) -> Self {
        Self {
            x: x.clone(),
            head,
            steps: Vec::new(),
            leading: x.dims()[..x.rank().saturating_sub(1)].to_vec(),
        }
    }

    /// The mean cross-entropy, as [`cross_entropy`](super::cross_entropy) of these logits with the labels `[..]`: the same value, and the
    /// same gradients of hidden states, weight and bias, which are computed with the loss. At most the setting `loss_bytes` of logits
    /// exist at a time; the gradient of the weight is added in `f32` (`f64` for `f64`). Where there will be no backward, as in
    /// `Trainer::evaluate`, no gradient is computed.
    ///
    /// # Errors
    /// As [`cross_entropy`](super::cross_entropy).
    pub fn cross_entropy(&self, labels: &Tensor) -> Result<Tensor> {
        let width = self.width()?;
        let classes = classes(&self.leading, width, labels)?;
        tiled::mean(self, classes, width)
    }

    /// Number of classes; a layer that is not seen into is asked with one token.
    fn width(&self) -> Result<usize> {
        match &self.head {
            Head::Weight {
                weight, columns, ..
            } => weight.dim(usize::from(*columns)),
            Head::Layer(_) if self.x.elem_count() == 0 => Ok(0),
            Head::Layer(forward) => {
                let x = self.x.detach().flatten_to(self.x.rank() - 2)?;
                forward(&x.narrow(0, 0, 1)?)?.dim(D::Minus1)
            }
        }
    }

    fn then(&self, step: Step) -> Self {
        let mut then = self.clone();
        then.steps.push(step);
        then
    }

    fn shape(&self) -> Shape {
        let mut dims = self.leading.clone();
        dims.push(0);
        Shape::from(dims)
    }

    /// As `Tensor::affine`: `mul z + add`.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn affine(&self, mul: f64, add: f64) -> Result<Self> {
        Ok(self.then(Step::Affine(mul, add)))
    }

    /// As `Tensor::tanh`.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn tanh(&self) -> Result<Self> {
        Ok(self.then(Step::Tanh))
    }

    /// As `Tensor::to_dtype`.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(self.then(Step::Cast(dtype)))
    }

    /// As `Tensor::contiguous`: nothing to do.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn contiguous(&self) -> Result<Self> {
        Ok(self.clone())
    }

    /// As `Tensor::squeeze`, for a dim before the classes.
    ///
    /// # Errors
    /// Candle's error for a dim that is not there.
    #[allow(clippy::needless_pass_by_value, reason = "candle's argument form")]
    pub fn squeeze<I: Dim>(&self, dim: I) -> Result<Self> {
        let dim = dim.to_index(&self.shape(), "squeeze")?;
        let mut squeezed = self.clone();
        if squeezed.leading.get(dim) == Some(&1) {
            squeezed.leading.remove(dim);
        }
        Ok(squeezed)
    }

    /// As `Tensor::unsqueeze`, before the classes.
    ///
    /// # Errors
    /// Candle's error for a dim that is not there; AS0509 for one behind the classes.
    #[allow(clippy::needless_pass_by_value, reason = "candle's argument form")]
    pub fn unsqueeze<I: Dim>(&self, dim: I) -> Result<Self> {
        let dim = dim.to_index_plus_one(&self.shape(), "unsqueeze")?;
        let mut unsqueezed = self.clone();
        if dim > unsqueezed.leading.len() {
            let text = "expected logits with the classes as their last dim, found a dim behind it";
            return Err(Error::new(codes::BATCH_SHAPE, text).into());
        }
        unsqueezed.leading.insert(dim, 1);
        Ok(unsqueezed)
    }
}

impl fmt::Debug for Logits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logits")
            .field("leading", &self.leading)
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}

macro_rules! operators {
    ($($trait:ident, $function:ident, |$x:ident| ($mul:expr, $add:expr);)*) => {$(
        impl $trait<f64> for Logits {
            type Output = Result<Logits>;

            fn $function(self, $x: f64) -> Result<Logits> {
                self.affine($mul, $add)
            }
        }

        impl $trait<f64> for &Logits {
            type Output = Result<Logits>;

            fn $function(self, $x: f64) -> Result<Logits> {
                self.affine($mul, $add)
            }
        }
    )*};
}

operators!(
    Add, add, |x| (1.0, x);
    Sub, sub, |x| (1.0, -x);
    Mul, mul, |x| (x, 0.0);
    Div, div, |x| (1.0 / x, 0.0);
);

/// What a linear layer gives for `x` `[.., h]`, in a twin.
///
/// # Errors
/// As [`Logits::new`].
pub fn linear(layer: &Linear, x: &Tensor) -> Result<Logits> {
    Logits::weighted(x, layer.weight(), false, layer.bias())
}

/// What a layer of another library gives, which is asked for some tokens at a time; see [`crate::ops::layer`].
///
/// # Errors
/// None here; those of the layer when the loss is taken.
pub fn layer<M>(layer: &M, x: &Tensor) -> Result<Logits>
where
    M: Module + Clone + Send + Sync + 'static,
{
    let layer = layer.clone();
    let forward = move |x: &Tensor| crate::ops::layer(&layer, x);
    Ok(Logits::of(x, Head::Layer(Arc::new(forward))))
}

/// The product of `x` `[.., h]` with a matrix `[h, V]`.
///
/// # Errors
/// AS0509 if the shapes do not fit.
pub fn matmul(x: &Tensor, weight: &Tensor) -> Result<Logits> {
    Logits::weighted(x, weight, true, None)
}

/// What [`fold`] takes.
pub trait Rows {
    /// What it gives.
    type Folded;

    /// As [`crate::ops::fold`].
    ///
    /// # Errors
    /// Those of candle.
    fn fold(&self, dim: usize, keep: bool) -> Result<Self::Folded>;
}

impl Rows for Tensor {
    type Folded = Self;

    fn fold(&self, dim: usize, keep: bool) -> Result<Self> {
        crate::ops::fold(self, dim, keep)
    }
}

impl Rows for Logits {
    type Folded = Self;

    fn fold(&self, dim: usize, keep: bool) -> Result<Self> {
        let mut dims = self.leading.clone();
        dims.push(self.x.dim(D::Minus1)?);
        // Each token has its own logits, so that rows of the one are rows of the other.
        let x = self.x.reshape(dims)?.fold(dim, keep)?;
        Ok(Self {
            leading: x.dims()[..x.rank() - 1].to_vec(),
            x,
            ..self.clone()
        })
    }
}

impl<T: Rows> Rows for &T {
    type Folded = T::Folded;

    fn fold(&self, dim: usize, keep: bool) -> Result<T::Folded> {
        T::fold(self, dim, keep)
    }
}

/// All tokens as rows of the batch; see [`crate::ops::fold`].
///
/// # Errors
/// Those of candle.
pub fn fold<T: Rows>(x: &T, dim: usize, keep: bool) -> Result<T::Folded> {
    x.fold(dim, keep)
}

/// The mean cross-entropy of a shard's tokens, in the order of the labels `[b, s]`, whatever the dims of the logits.
///
/// # Errors
/// As [`Logits::cross_entropy`].
pub fn loss(logits: &Logits, labels: &Tensor) -> Result<Tensor> {
    let rows = Logits {
        leading: vec![logits.leading.iter().product()],
        ..logits.clone()
    };
    rows.cross_entropy(&labels.flatten_all()?)
}
