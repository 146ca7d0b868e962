//! Attention masks that are never S x S in memory.
//!
//! In a twin a mask is a [`Mask`]: what the user's builder computes on the host stays a rule ([`mask_rule`]), and candle's methods
//! (`broadcast_as`, `unsqueeze`, `to_dtype`, ..) change what the mask looks like without making it. It is applied to
//! [`Scores`](crate::scores::Scores) by `where_cond` (a select mask, of an integer type) or by addition (a float mask), and evaluated
//! block by block inside the attention kernel. A tensor that the user computed himself can be a mask through [`Mask::dense`].

mod keys;
mod rule;
mod shape;
mod term;

use std::sync::Arc;

use autosp_plan::codes;
use candle_core::shape::{Dim, ShapeWithOneHole};
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use half::{bf16, f16};

use crate::error::Error;
pub use keys::{key_mask, mask};
pub use rule::{Band, HostMask, mask_rule};
pub(crate) use rule::{Declared, Rule};
pub(crate) use term::{Action, Block, Prepared, Term};

/// Elements of a dense mask up to which it may be kept whole on every rank.
const DENSE_LIMIT: usize = 1 << 24;

/// An elementwise change that the user made to a mask.
#[derive(Debug, Clone, PartialEq)]
enum Change {
    Cast(DType),
    Affine(f64, f64, DType),
    /// The first number where the mask is non-zero, else the second.
    Select(f64, f64),
    /// `value` where the mask after the first changes is non-zero (or zero), else the mask after the others.
    Fill {
        condition: Arc<[Change]>,
        nonzero: bool,
        value: f64,
        other: Arc<[Change]>,
    },
}

impl Change {
    fn apply(&self, x: f64) -> f64 {
        match self {
            Self::Cast(dtype) => cast(x, *dtype),
            Self::Affine(mul, add, dtype) => cast(x * mul + add, *dtype),
            Self::Select(nonzero, zero) => {
                if x == 0.0 {
                    *zero
                } else {
                    *nonzero
                }
            }
            Self::Fill {
                condition,
                nonzero,
                value,
                other,
            } => {
                if (Self::all(condition, x) != 0.0) == *nonzero {
                    *value
                } else {
                    Self::all(other, x)
                }
            }
        }
    }

    /// One after the other.
    fn all(changes: &[Self], x: f64) -> f64 {
        changes.iter().fold(x, |x, change| change.apply(x))
    }
}

/// The value of `x` in a tensor of type `dtype`.
fn cast(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::U8 => f64::from(x as u8),
        DType::U32 => f64::from(x as u32),
        DType::I64 => x as i64 as f64,
        DType::F32 => f64::from(x as f32),
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        _ => x,
    }
}

#[derive(Clone)]
enum Source {
    Rule {
        rule: Arc<dyn Rule>,
        declared: Option<Declared>,
        rows: usize,
        cols: usize,
    },
    /// Values that were read once, and a view of them whose strides are those of the mask's shape.
    Dense { data: Arc<Vec<f64>>, view: Tensor },
}

impl Source {
    /// Reads a tensor; dims along which it is broadcast are read once.
    fn read(tensor: &Tensor) -> candle_core::Result<Self> {
        let mut core = tensor.clone();
        for dim in 0..core.rank() {
            if core.stride()[dim] == 0 && core.dim(dim)? > 1 {
                core = core.narrow(dim, 0, 1)?;
            }
        }
        let core = core.force_contiguous()?;
        let data = core.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
        Ok(Self::Dense {
            data: Arc::new(data),
            view: core.broadcast_as(tensor.shape())?,
        })
    }
}

/// A mask over (query, key), a cheap handle with the methods that candle users call on a mask tensor.
///
/// Its sizes are global: `[.., S, S]` with S the valid sequence length.
#[derive(Clone)]
pub struct Mask {
    source: Source,
    changes: Vec<Change>,
    /// The dim of the queries of a rule, counted from the end.
    query: usize,
    shape: Shape,
    dtype: DType,
    device: Device,
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.source {
            Source::Rule {
                declared: Some(declared),
                ..
            } => format!("{:?}", declared.band),
            Source::Rule { .. } => "rule".to_owned(),
            Source::Dense { .. } => "dense".to_owned(),
        };
        write!(f, "Mask[{:?}; {:?}; {kind}]", self.dtype, self.shape.dims())
    }
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(codes::SITE_MASK, message)
}

impl Mask {
    /// As `Tensor::from_slice`, from a rule instead of values; a declared band is compared with the rule here.
    ///
    /// # Errors
    /// `AS0326` if a declared band differs from the rule, `AS0325` if the last two dims are not the rule's queries and keys, and
    /// candle's error for a shape of another element count.
    pub fn from_slice<T: WithDType, S: ShapeWithOneHole>(
        host: &HostMask<T>,
        shape: S,
        device: &Device,
    ) -> candle_core::Result<Self> {
        let shape = shape.into_shape(host.len())?;
        let dims = shape.dims();
        if dims.len() < 2 || dims[dims.len() - 2..] != [host.rows, host.cols] {
            return Err(refused(format!(
                "a mask of {} queries by {} keys: expected these as the last two dims, found {dims:?}",
                host.rows, host.cols
            ))
            .into());
        }
        host.check()?;
        Ok(Self {
            source: Source::Rule {
                rule: host.rule.clone(),
                declared: host.declared,
                rows: host.rows,
                cols: host.cols,
            },
            changes: Vec::new(),
            query: 2,
            shape,
            dtype: T::DTYPE,
            device: device.clone(),
        })
    }

    /// As `Tensor::from_vec`, from a rule instead of values; see [`from_slice`](Self::from_slice).
    ///
    /// # Errors
    /// As [`from_slice`](Self::from_slice).
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the argument forms of Tensor::from_vec"
    )]
    pub fn from_vec<T: WithDType, S: ShapeWithOneHole>(
        host: HostMask<T>,
        shape: S,
        device: &Device,
    ) -> candle_core::Result<Self> {
        Self::from_slice(&host, shape, device)
    }

    /// A mask from a tensor that every rank holds whole: `[S, S]`, or `[b|1, h|1, S|1, S]` with leading dims left out.
    ///
    /// The tensor is read once; gradients do not flow into it.
    ///
    /// # Errors
    /// `AS0327` above 2^24 elements, `AS0325` for a tensor that carries a gradient or has more than four dims.
    pub fn dense(tensor: &Tensor) -> candle_core::Result<Self> {
        if tensor.track_op() {
            return Err(
                refused("a mask that is computed from variables would lose its gradient")
                    .with_help("`.detach()` the tensor if it is a constant")
                    .into(),
            );
        }
        if !(2..=4).contains(&tensor.rank()) {
            return Err(refused(format!(
                "expected a mask of 2 to 4 dims, found {:?}",
                tensor.dims()
            ))
            .into());
        }
        if tensor.elem_count() > DENSE_LIMIT {
            return Err(Error::new(
                codes::DENSE_MASK,
                format!(
                    "a dense mask of {} elements {:?}, expected at most {DENSE_LIMIT}",
                    tensor.elem_count(),
                    tensor.dims()
                ),
            )
            .with_help("build the mask on the host from (query, key), so that it can stay a rule")
            .into());
        }
        Ok(Self {
            source: Source::read(tensor)?,
            changes: Vec::new(),
            query: 2,
            shape: tensor.shape().clone(),
            dtype: tensor.dtype(),
            device: tensor.device().clone(),
        })
    }

    /// The global shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The global dims.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// The size of one dim.
    ///
    /// # Errors
    /// Candle's error for a dim that is not there.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the argument forms of candle"
    )]
    pub fn dim<D: Dim>(&self, dim: D) -> candle_core::Result<usize> {
        Ok(self.dims()[dim.to_index(&self.shape, "dim")?])
    }

    /// The two dims of a 2-D mask.
    ///
    /// # Errors
    /// Candle's error for another number of dims.
    pub fn dims2(&self) -> candle_core::Result<(usize, usize)> {
        self.shape.dims2()
    }

    /// The three dims of a 3-D mask.
    ///
    /// # Errors
    /// Candle's error for another number of dims.
    pub fn dims3(&self) -> candle_core::Result<(usize, usize, usize)> {
        self.shape.dims3()
    }

    /// The four dims of a 4-D mask.
    ///
    /// # Errors
    /// Candle's error for another number of dims.
    pub fn dims4(&self) -> candle_core::Result<(usize, usize, usize, usize)> {
        self.shape.dims4()
    }

    /// Number of dims.
    pub fn rank(&self) -> usize {
        self.dims().len()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device that the mask tensor would be on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A mask has no storage whose order could matter.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn contiguous(&self) -> candle_core::Result<Self> {
        Ok(self.clone())
    }

    /// The mask as a tensor of `device`.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        Ok(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    /// The mask with its values cast, rounding included.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn to_dtype(&self, dtype: DType) -> candle_core::Result<Self> {
        Ok(if dtype == self.dtype {
            self.clone()
        } else {
            self.changed(Change::Cast(dtype), dtype)
        })
    }

    /// `x * mul + add` on every value.
    ///
    /// # Errors
    /// None; the form is candle's.
    pub fn affine(&self, mul: f64, add: f64) -> candle_core::Result<Self> {
        Ok(self.changed(Change::Affine(mul, add, self.dtype), self.dtype))
    }

    /// The float mask of two numbers that this integer mask chooses between.
    pub(crate) fn select(
        &self,
        on_true: f64,
        on_false: f64,
        dtype: DType,
    ) -> candle_core::Result<Self> {
        if !self.is_select() {
            return Err(refused(format!(
                "where_cond: expected an integer mask, found {:?}",
                self.dtype
            ))
            .into());
        }
        Ok(self.changed(Change::Select(on_true, on_false), dtype))
    }

    /// `value` where this integer mask is non-zero (or zero), else `other`, a mask of the same making.
    ///
    /// # Errors
    /// `AS0325` if the two do not come from one mask, or this one is no integer mask.
    pub(crate) fn fill(
        &self,
        value: f64,
        nonzero: bool,
        other: &Self,
    ) -> candle_core::Result<Self> {
        let same = match (&self.source, &other.source) {
            (Source::Rule { rule: a, .. }, Source::Rule { rule: b, .. }) => {
                Arc::ptr_eq(a, b) && self.query == other.query
            }
            (Source::Dense { data: a, view: v }, Source::Dense { data: b, view: w }) => {
                Arc::ptr_eq(a, b) && v.stride() == w.stride()
            }
            _ => false,
        };
        if !same || self.dims() != other.dims() || !self.is_select() {
            return Err(refused(format!(
                "where_cond: expected an integer mask and the same mask in another form, found {self:?} and {other:?}"
            ))
            .into());
        }
        let change = Change::Fill {
            condition: self.changes.clone().into(),
            nonzero,
            value: cast(value, other.dtype),
            other: other.changes.clone().into(),
        };
        Ok(Self {
            changes: vec![change],
            ..other.clone()
        })
    }

    fn changed(&self, change: Change, dtype: DType) -> Self {
        let mut mask = self.clone();
        mask.changes.push(change);
        mask.dtype = dtype;
        mask
    }

    /// Whether `where_cond` takes the mask as its condition.
    pub(crate) fn is_select(&self) -> bool {
        matches!(self.dtype, DType::U8 | DType::U32 | DType::I64)
    }

    /// The value after all changes of a value that the source has.
    fn changed_value(&self, x: f64) -> f64 {
        Change::all(&self.changes, x)
    }
}

macro_rules! arithmetic {
    ($($trait:ident $method:ident, $mul:expr, $add:expr;)*) => { $(
        impl std::ops::$trait<f64> for &Mask {
            type Output = candle_core::Result<Mask>;
            fn $method(self, x: f64) -> Self::Output {
                self.affine($mul(x), $add(x))
            }
        }
        impl std::ops::$trait<f64> for Mask {
            type Output = candle_core::Result<Mask>;
            fn $method(self, x: f64) -> Self::Output {
                self.affine($mul(x), $add(x))
            }
        }
    )* };
}

arithmetic! {
    Add add, |_| 1.0, |x| x;
    Sub sub, |_| 1.0, |x: f64| -x;
    Mul mul, |x| x, |_| 0.0;
    Div div, |x: f64| 1.0 / x, |_| 0.0;
}

impl std::ops::Sub<&Mask> for f64 {
    type Output = candle_core::Result<Mask>;
    fn sub(self, mask: &Mask) -> Self::Output {
        mask.affine(-1.0, self)
    }
}

impl std::ops::Sub<Mask> for f64 {
    type Output = candle_core::Result<Mask>;
    fn sub(self, mask: Mask) -> Self::Output {
        mask.affine(-1.0, self)
    }
}

#[cfg(test)]
mod tests;
