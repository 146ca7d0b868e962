//! Changes of a mask's shape, none of which makes it.

use candle_core::Shape;
use candle_core::shape::{Dim, ShapeWithOneHole};

use super::{Mask, Source, refused};

impl Mask {
    /// Repeats along leading dims or dims of size 1, without making anything.
    ///
    /// # Errors
    /// Candle's error for a shape that it cannot be broadcast to.
    pub fn broadcast_as<S: Into<Shape>>(&self, shape: S) -> candle_core::Result<Self> {
        let shape = shape.into();
        let lead = shape.rank().checked_sub(self.rank());
        let fits = lead.is_some_and(|lead| {
            self.dims()
                .iter()
                .zip(&shape.dims()[lead..])
                .all(|(&from, &to)| from == to || from == 1)
        });
        if !fits {
            return Err(candle_core::Error::BroadcastIncompatibleShapes {
                src_shape: self.shape.clone(),
                dst_shape: shape,
            });
        }
        let source = match &self.source {
            Source::Dense { data, view } => Source::Dense {
                data: data.clone(),
                view: view.broadcast_as(&shape)?,
            },
            rule @ Source::Rule { .. } => rule.clone(),
        };
        Ok(Self {
            source,
            shape,
            ..self.clone()
        })
    }

    /// As [`broadcast_as`](Self::broadcast_as).
    ///
    /// # Errors
    /// As [`broadcast_as`](Self::broadcast_as).
    pub fn expand<S: Into<Shape>>(&self, shape: S) -> candle_core::Result<Self> {
        self.broadcast_as(shape)
    }

    /// Inserts a dim of size 1.
    ///
    /// # Errors
    /// `AS0325` after the keys of a rule, which stay last.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the argument forms of candle"
    )]
    pub fn unsqueeze<D: Dim>(&self, dim: D) -> candle_core::Result<Self> {
        let dim = dim.to_index_plus_one(&self.shape, "unsqueeze")?;
        let rank = self.rank();
        let mut dims = self.dims().to_vec();
        dims.insert(dim, 1);
        let (source, query) = match &self.source {
            Source::Dense { data, view } => {
                let (data, view) = (data.clone(), view.unsqueeze(dim)?);
                (Source::Dense { data, view }, self.query)
            }
            Source::Rule { .. } if dim == rank => {
                return Err(refused(format!(
                    "unsqueeze({dim}) on a mask {:?}: its last dim has to stay the keys",
                    self.dims()
                ))
                .into());
            }
            rule @ Source::Rule { .. } => {
                let between = usize::from(dim + self.query > rank);
                (rule.clone(), self.query + between)
            }
        };
        Ok(Self {
            source,
            query,
            shape: dims.into(),
            ..self.clone()
        })
    }

    /// Takes out a dim of size 1; another one stays.
    ///
    /// # Errors
    /// `AS0325` for the queries or keys of a rule over one token.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "the argument forms of candle"
    )]
    pub fn squeeze<D: Dim>(&self, dim: D) -> candle_core::Result<Self> {
        let dim = dim.to_index(&self.shape, "squeeze")?;
        if self.dims()[dim] != 1 {
            return Ok(self.clone());
        }
        let rank = self.rank();
        let mut dims = self.dims().to_vec();
        dims.remove(dim);
        let (source, query) = match &self.source {
            Source::Dense { data, view } => {
                let (data, view) = (data.clone(), view.squeeze(dim)?);
                (Source::Dense { data, view }, self.query)
            }
            Source::Rule { .. } if dim + 1 == rank || dim + self.query == rank => {
                return Err(refused(format!(
                    "squeeze({dim}) on a mask {:?} of one token",
                    self.dims()
                ))
                .into());
            }
            rule @ Source::Rule { .. } => {
                let between = usize::from(dim + self.query > rank);
                (rule.clone(), self.query - between)
            }
        };
        Ok(Self {
            source,
            query,
            shape: dims.into(),
            ..self.clone()
        })
    }

    /// The same mask with dims of size 1 put in or taken out.
    ///
    /// # Errors
    /// `AS0325` for other changes of shape.
    pub fn reshape<S: ShapeWithOneHole>(&self, shape: S) -> candle_core::Result<Self> {
        let shape = shape.into_shape(self.shape.elem_count())?;
        let long =
            |dims: &[usize]| -> Vec<usize> { dims.iter().copied().filter(|n| *n != 1).collect() };
        if long(self.dims()) != long(shape.dims()) {
            return Err(refused(format!(
                "reshape to {:?} of a mask {:?}: only dims of size 1 can be put in or taken out",
                shape.dims(),
                self.dims()
            ))
            .into());
        }
        let mut mask = self.clone();
        for dim in (0..self.rank()).rev().filter(|d| self.dims()[*d] == 1) {
            mask = mask.squeeze(dim)?;
        }
        for (dim, _) in shape.dims().iter().enumerate().filter(|(_, n)| **n == 1) {
            mask = mask.unsqueeze(dim)?;
        }
        Ok(mask)
    }

    /// Repeats along new leading dims.
    ///
    /// # Errors
    /// As [`broadcast_as`](Self::broadcast_as).
    pub fn broadcast_left<S: Into<Shape>>(&self, left: S) -> candle_core::Result<Self> {
        let mut dims = left.into().into_dims();
        dims.extend_from_slice(self.dims());
        self.broadcast_as(dims)
    }
}
