//! Attention scores that are not computed yet.
//!
//! In a twin, q k^T at a site yields [`Scores`]: a handle that follows what the model does to the scores until softmax makes them
//! [`Weights`], whose product with the values runs the site. Its sizes are global, [b, H, S, S] with S the valid sequence length.
//! What is followed is what has an exact form without the scores: factors, one soft cap, then masks, and casts.

mod operators;
mod recipe;
mod view;

use std::borrow::Borrow;
use std::sync::Arc;

use autosp_plan::codes;
use candle_core::shape::{Dim, ShapeWithOneHole};
use candle_core::{DType, Device, Result, Shape, Tensor};

use crate::error::Error;
use crate::layout::{Axes, Known};
use crate::mask::{Action, Mask};
use crate::ops::{Recorded, tape};
use crate::schedule::Site;
use crate::scope::{self, Scope, Shard};
use crate::site::{self, SiteRef};
pub use operators::{AsMask, Choice};
use recipe::Recipe;
pub(crate) use view::View;

/// What q k^T was made from.
#[derive(Debug)]
struct Origin {
    site: SiteRef,
    scope: Scope,
    shard: Shard,
    /// q [b, H, len, d] and k [b, G, len, d].
    q: Tensor,
    k: Tensor,
    values: Axes,
    /// Whether q and k are the operands of a matrix product, which says in which dims the output comes.
    product: bool,
}

/// Scores q k^T of a site, with what was done to them since; a cheap handle.
#[derive(Debug, Clone)]
pub struct Scores {
    origin: Arc<Origin>,
    recipe: Recipe,
    view: View,
    shape: Shape,
    dtype: DType,
}

/// q k^T at site `S`: `q` and `k` as the model passes them to `q.matmul(k)`, but with the kv heads not repeated.
///
/// # Errors
/// AS0305 outside a sharded scope, AS0322 for a layout that cannot be followed, AS0323 for shapes that do not fit the site or this
/// rank's shard.
pub fn scores<S: Site>(q: &Tensor, k: &Tensor) -> Result<Scores> {
    let site = SiteRef::new::<S>();
    let scope = scope::require(site.name)?;
    let shard = scope.shard()?;
    let layout = site.layout;
    let dtype = q.dtype();
    let (q, k) = (&before_cast(q)?, &before_cast(k)?);
    let known = Known {
        batch: scope.batch(),
        len: shard.len,
    };
    let queries = Axes::parse(layout.q)?;
    let q = queries.normalise("q", q, known)?;
    let k = Axes::parse(layout.k)?.normalise("k", k, known)?;
    let values = Axes::parse(layout.v)?;
    let (batch, heads, len, d) = q.dims4()?;
    let (kv_batch, kv_heads, kv_len, kv_d) = k.dims4()?;
    if (kv_batch, kv_len, kv_d) != (batch, len, d)
        || len != shard.len
        || kv_heads == 0
        || heads % kv_heads != 0
    {
        let text = format!(
            "`{}`: expected q and k of one batch and width with {} tokens on this rank, and kv heads that divide the query heads, \
             found q {:?} and k {:?} as (batch, heads, sequence, width)",
            site.name,
            shard.len,
            q.dims(),
            k.dims()
        );
        return Err(Error::new(codes::SITE_SHAPE, text).into());
    }
    let viewed = View::of(&queries, [batch, heads, shard.valid, shard.valid]);
    let product = viewed.is_some();
    let view = viewed.unwrap_or_else(|| View::plain(batch, heads, shard.valid));
    let shape = Shape::from(view.dims());
    let origin = Origin {
        site,
        scope,
        shard,
        q,
        k,
        values,
        product,
    };
    Ok(Scores {
        origin: Arc::new(origin),
        recipe: Recipe::default(),
        view,
        shape,
        dtype,
    })
}

/// Softmax over the keys.
///
/// # Errors
/// None; the form is candle's.
pub fn softmax(scores: impl Borrow<Scores>) -> Result<Weights> {
    let scores = scores.borrow();
    Ok(Weights {
        scores: scores.clone(),
        dtype: scores.dtype,
    })
}

macro_rules! looks_like_a_tensor {
    ($($field:ident)?) => {
        /// The global shape: [b, H, S, S], with the dims merged or in the order in which the model has them.
        pub fn shape(&self) -> &Shape {
            &self$(.$field)?.shape
        }

        /// The global dims.
        pub fn dims(&self) -> &[usize] {
            self.shape().dims()
        }

        /// The size of one dim.
        ///
        /// # Errors
        /// Candle's error for a dim that is not there.
        pub fn dim<D: Dim>(&self, dim: D) -> Result<usize> {
            Ok(self.dims()[dim.to_index(self.shape(), "dim")?])
        }

        /// The four dims.
        ///
        /// # Errors
        /// Candle's error for another number of dims.
        pub fn dims4(&self) -> Result<(usize, usize, usize, usize)> {
            self.shape().dims4()
        }

        /// The three dims.
        ///
        /// # Errors
        /// Candle's error for another number of dims.
        pub fn dims3(&self) -> Result<(usize, usize, usize)> {
            self.shape().dims3()
        }

        /// Number of dims.
        pub fn rank(&self) -> usize {
            self.dims().len()
        }

        /// The element type that the model asked for last.
        pub fn dtype(&self) -> DType {
            self.dtype
        }

        /// The device of q and k.
        pub fn device(&self) -> &Device {
            self$(.$field)?.origin.q.device()
        }

        /// There is no storage whose order could matter.
        ///
        /// # Errors
        /// None; the form is candle's.
        pub fn contiguous(&self) -> Result<Self> {
            Ok(self.clone())
        }

        /// Notes the element type. The site computes in `f32` (`f64` for `f64` inputs) whatever the model asks for.
        ///
        /// # Errors
        /// None; the form is candle's.
        pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
            Ok(Self { dtype, ..self.clone() })
        }
    };
}

impl Scores {
    looks_like_a_tensor!();

    fn with(&self, recipe: std::result::Result<Recipe, String>) -> Result<Self> {
        match recipe {
            Ok(recipe) => Ok(Self {
                recipe,
                ..self.clone()
            }),
            Err(why) => Err(Error::new(
                codes::SCORES,
                format!("scores of `{}`: {why}", self.origin.site.name),
            )
            .into()),
        }
    }

    /// `x * mul + add`.
    ///
    /// # Errors
    /// AS0324 for another summand than 0, or a factor after a mask that is not -inf.
    pub fn affine(&self, mul: f64, add: f64) -> Result<Self> {
        self.with(self.recipe.scaled(mul, add))
    }

    /// The soft cap's tanh.
    ///
    /// # Errors
    /// AS0324 for a second one, or after a mask.
    pub fn tanh(&self) -> Result<Self> {
        self.with(self.recipe.capped())
    }

    /// Merges or splits dims other than the keys.
    ///
    /// # Errors
    /// AS0324 for dims that do not hold whole axes; candle's error for another element count.
    pub fn reshape<S: ShapeWithOneHole>(&self, shape: S) -> Result<Self> {
        let shape = shape.into_shape(self.shape.elem_count())?;
        let Some(view) = self.view.reshape(shape.dims()) else {
            let text = format!(
                "scores of `{}`: expected dims of whole axes with the keys at the end, found {shape:?} from {:?}",
                self.origin.site.name, self.shape
            );
            return Err(Error::new(codes::SCORES, text).into());
        };
        Ok(Self {
            view,
            shape,
            ..self.clone()
        })
    }

    /// Takes out a dim of size one; another one stays.
    ///
    /// # Errors
    /// As [`reshape`](Self::reshape).
    #[expect(clippy::needless_pass_by_value, reason = "as candle's")]
    pub fn squeeze<D: Dim>(&self, dim: D) -> Result<Self> {
        let at = dim.to_index(&self.shape, "squeeze")?;
        let mut dims = self.dims().to_vec();
        if dims[at] == 1 {
            dims.remove(at);
        }
        self.reshape(dims)
    }

    /// Puts in a dim of size one.
    ///
    /// # Errors
    /// As [`reshape`](Self::reshape).
    #[expect(clippy::needless_pass_by_value, reason = "as candle's")]
    pub fn unsqueeze<D: Dim>(&self, dim: D) -> Result<Self> {
        let at = dim.to_index_plus_one(&self.shape, "unsqueeze")?;
        let mut dims = self.dims().to_vec();
        dims.insert(at, 1);
        self.reshape(dims)
    }

    /// Adds a mask; see [`AsMask`].
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn broadcast_add<M: AsMask + ?Sized>(&self, mask: &M) -> Result<Self> {
        self.add_mask(&mask.as_mask()?)
    }

    /// Adds a mask; see [`AsMask`].
    ///
    /// # Errors
    /// AS0325 for an integer mask or one that does not broadcast to the scores.
    #[allow(
        clippy::should_implement_trait,
        reason = "the method of a tensor; the operator is there too"
    )]
    pub fn add<M: AsMask + ?Sized>(&self, mask: &M) -> Result<Self> {
        self.add_mask(&mask.as_mask()?)
    }

    /// Subtracts a mask; see [`AsMask`].
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn broadcast_sub<M: AsMask + ?Sized>(&self, mask: &M) -> Result<Self> {
        self.add_mask(&mask.as_mask()?.affine(-1.0, 0.0)?)
    }

    /// Subtracts a mask; see [`AsMask`].
    ///
    /// # Errors
    /// As [`add`](Self::add).
    #[allow(
        clippy::should_implement_trait,
        reason = "the method of a tensor; the operator is there too"
    )]
    pub fn sub<M: AsMask + ?Sized>(&self, mask: &M) -> Result<Self> {
        self.broadcast_sub(mask)
    }

    /// Multiplies by a scalar tensor.
    ///
    /// # Errors
    /// AS0330 for a tensor of several values; as [`affine`](Self::affine).
    pub fn broadcast_mul(&self, factor: &Tensor) -> Result<Self> {
        self.affine(operators::scalar(factor)?, 0.0)
    }

    /// Divides by a scalar tensor.
    ///
    /// # Errors
    /// AS0330 for a tensor of several values; as [`affine`](Self::affine).
    pub fn broadcast_div(&self, divisor: &Tensor) -> Result<Self> {
        self.affine(1.0 / operators::scalar(divisor)?, 0.0)
    }

    fn add_mask(&self, mask: &Mask) -> Result<Self> {
        self.masked(mask, Action::Add)
    }

    /// Applies a mask after checking that it fits.
    pub(crate) fn masked(&self, mask: &Mask, action: Action) -> Result<Self> {
        let term = crate::mask::Term::aligned(mask, action, &self.view).map_err(|error| {
            error.context(format_args!("scores of `{}`", self.origin.site.name))
        })?;
        Ok(Self {
            recipe: self.recipe.masked(term, action),
            ..self.clone()
        })
    }
}

/// Attention weights that are not computed yet: the softmax of [`Scores`].
#[derive(Debug, Clone)]
pub struct Weights {
    scores: Scores,
    dtype: DType,
}

impl Weights {
    looks_like_a_tensor!(scores);

    /// As [`Scores::reshape`].
    ///
    /// # Errors
    /// As [`Scores::reshape`].
    pub fn reshape<S: ShapeWithOneHole>(&self, shape: S) -> Result<Self> {
        Ok(Self {
            scores: self.scores.reshape(shape)?,
            dtype: self.dtype,
        })
    }

    /// As [`Scores::squeeze`].
    ///
    /// # Errors
    /// As [`Scores::reshape`].
    pub fn squeeze<D: Dim>(&self, dim: D) -> Result<Self> {
        Ok(Self {
            scores: self.scores.squeeze(dim)?,
            dtype: self.dtype,
        })
    }

    /// As [`Scores::unsqueeze`].
    ///
    /// # Errors
    /// As [`Scores::reshape`].
    pub fn unsqueeze<D: Dim>(&self, dim: D) -> Result<Self> {
        Ok(Self {
            scores: self.scores.unsqueeze(dim)?,
            dtype: self.dtype,
        })
    }

    /// The product with the values, which runs the site: exchange, attention, exchange back. `v` is this rank's shard as the model
    /// passes it to `weights.matmul(v)`, with the kv heads not repeated; the output has its axes, with query heads for kv heads.
    ///
    /// # Errors
    /// AS0321 if heads and ranks do not fit, AS0323 for shapes, AS0328 for a wrong schedule, an error of the collectives if the run fails.
    pub fn matmul(&self, v: &Tensor) -> Result<Tensor> {
        let Scores {
            origin,
            recipe,
            view,
            ..
        } = &self.scores;
        let known = Known {
            batch: Some(view.sizes()[0]),
            len: origin.shard.len,
        };
        let dtype = v.dtype();
        let v = &before_cast(v)?;
        let v = origin.values.normalise("v", v, known)?;
        let [q, k, v] = one_type([&origin.q, &origin.k, &v])?;
        let (heads, kv_heads) = (q.dim(1)?, k.dim(1)?);
        let spec = recipe.spec(origin.shard.valid, heads, kv_heads);
        let out = site::run(
            origin.site,
            origin.scope.clone(),
            origin.shard,
            spec,
            (&q, &k, &v),
        )?;
        let out = if out.dtype() == v.dtype() {
            out.to_dtype__sp(dtype)?
        } else {
            out
        };
        let axes = if origin.product {
            view.output()
        } else {
            origin.values.clone()
        };
        Ok(axes.restore(&out)?)
    }

    /// As [`matmul`](Self::matmul).
    ///
    /// # Errors
    /// As [`matmul`](Self::matmul).
    pub fn broadcast_matmul(&self, v: &Tensor) -> Result<Tensor> {
        self.matmul(v)
    }
}

/// On a GPU, the half-precision tensor that `x` was cast to `f32` from: models that compute their scores in `f32` for accuracy
/// lose none, since attention adds up in `f32` anyway, and what is exchanged is half as large. Otherwise `x`.
///
/// The graph shows the cast: where the type changes from one node to the next and nothing else does, the node is a cast.
pub(crate) fn before_cast(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cuda() || x.dtype() != DType::F32 {
        return Ok(x.clone());
    }
    let is_half = |node: &Tensor| matches!(node.dtype(), DType::BF16 | DType::F16);
    match tape::hint(x) {
        Some(tape::Hint::Cast(half)) if is_half(&half) => return Ok(half),
        _ => {}
    }
    let found = match x.sorted_nodes().as_slice() {
        [_, half, ..] if is_half(half) && half.dims() == x.dims() => (*half).clone(),
        [_, cast, half, ..]
            if is_half(half) && half.dims() == cast.dims() && is_transposed(x, cast)? =>
        {
            half.t()?
        }
        _ => x.clone(),
    };
    Ok(found)
}

/// Whether `x` is `y` with the last two dims exchanged, in the same memory.
#[cfg_attr(
    not(feature = "cuda"),
    allow(clippy::unnecessary_wraps, reason = "only a GPU has addresses")
)]
fn is_transposed(x: &Tensor, y: &Tensor) -> Result<bool> {
    #[cfg(feature = "cuda")]
    if y.rank() >= 2 && y.dtype() == x.dtype() {
        let turned = y.t()?;
        let same = turned.dims() == x.dims() && turned.stride() == x.stride();
        return Ok(same && crate::cuda::address(x)? == crate::cuda::address(y)?);
    }
    let _ = (x, y);
    Ok(false)
}

/// q, k and v in the widest of their types: a model may cast only the scores or only the values.
fn one_type(tensors: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    let types = tensors.map(Tensor::dtype);
    if types.iter().all(|dtype| *dtype == types[0]) {
        return Ok(tensors.map(Clone::clone));
    }
    let wide = if types.contains(&DType::F64) {
        DType::F64
    } else {
        DType::F32
    };
    let [q, k, v] = tensors.map(|x| x.to_dtype__sp(wide));
    Ok([q?, k?, v?])
}

#[cfg(test)]
mod tests;
