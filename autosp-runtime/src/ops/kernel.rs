//! Row kernels on the CPU: how an operation over the last dimension reads its operands and is spread over threads.
//!
//! The work of a kernel is cut into blocks of rows whose size depends on the tensor's shape alone, and partial sums are added in
//! block order. The number of threads decides only who computes a block, never what is added to what.

use std::borrow::Cow;
use std::ops::{Add, Div, Mul, Sub};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use rayon::prelude::*;

/// Elements that one task handles: large enough to hide the cost of a task, small enough to balance.
const BLOCK: usize = 16 * 1024;

/// Partial sums that a reduction over rows is cut into.
const PARTIALS: usize = 64;

/// Number of independent accumulators of a sum: wide enough for SIMD, and it bounds the rounding error of long rows.
const LANES: usize = 16;

/// The type a kernel computes in: `f32`, or `f64` for `f64` tensors.
pub(crate) trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// Below every finite number.
    const NEG_INFINITY: Self;
    /// The nearest value of this type.
    fn real(x: f64) -> Self;
    /// Exact.
    fn wide(self) -> f64;
    /// e^x.
    fn exp(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;

    /// Reads an element of a tensor.
    fn up<T: WithDType>(x: T) -> Self {
        Self::real(x.to_f64())
    }

    /// Writes an element of a tensor, rounded once.
    fn down<T: WithDType>(self) -> T {
        T::from_f64(self.wide())
    }
}

macro_rules! real {
    ($t:ident, $wide:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            fn real(x: f64) -> Self {
                x as $t
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
        }
    };
}
real!(f32, f64::from);
real!(f64, std::convert::identity);

/// An operand as rows along its last dimension, which are contiguous whatever the layout of the tensor.
pub(crate) struct Rows<'a, T: WithDType> {
    data: Cow<'a, [T]>,
    start: usize,
    /// `(size, stride)` of the dimensions before the last, outermost first; one entry when rows are evenly spaced.
    outer: Vec<(usize, usize)>,
    width: usize,
    count: usize,
    shape: Shape,
}

/// Where index `i`, counted in row-major order, lies in dimensions of the given `(size, stride)`.
fn offset(dims: &[(usize, usize)], mut i: usize) -> usize {
    let mut offset = 0;
    for &(size, stride) in dims.iter().rev() {
        offset += i % size * stride;
        i /= size;
    }
    offset
}

impl<'a, T: WithDType> Rows<'a, T> {
    fn new(data: &'a [T], layout: &Layout) -> Self {
        let shape = layout.shape().clone();
        let width = shape.dims().last().copied().unwrap_or(1);
        let count = shape.elem_count().checked_div(width).unwrap_or(0);
        if let Some((start, _)) = layout.contiguous_offsets() {
            return Self {
                data: Cow::Borrowed(data),
                start,
                outer: vec![(count, width)],
                width,
                count,
                shape,
            };
        }
        let mut outer: Vec<_> = layout
            .dims()
            .iter()
            .copied()
            .zip(layout.stride().iter().copied())
            .collect();
        let step = outer.pop().map_or(1, |(_, stride)| stride);
        let start = layout.start_offset();
        if step == 1 || width == 1 {
            return Self {
                data: Cow::Borrowed(data),
                start,
                outer,
                width,
                count,
                shape,
            };
        }
        let mut gathered = Vec::with_capacity(count * width);
        for i in 0..count {
            let first = start + offset(&outer, i);
            gathered.extend((0..width).map(|j| data[first + j * step]));
        }
        Self {
            data: Cow::Owned(gathered),
            start: 0,
            outer: vec![(count, width)],
            width,
            count,
            shape,
        }
    }

    /// Elements in a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Number of rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The tensor's shape.
    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Row `i`, counted in row-major order of the leading dimensions.
    pub(crate) fn row(&self, i: usize) -> &[T] {
        let first = self.start + offset(&self.outer, i);
        &self.data[first..first + self.width]
    }

    /// Copies row `i` into `into`.
    pub(crate) fn read<A: Real>(&self, i: usize, into: &mut [A]) {
        for (slot, &x) in into.iter_mut().zip(self.row(i)) {
            *slot = A::up(x);
        }
    }
}

/// A computation over `N` operands of one floating point type.
pub(crate) trait Kernel<const N: usize> {
    /// What errors call it.
    const NAME: &'static str;
    /// The elements of the result, row-major, and its shape. `A` is the type to compute in.
    fn run<T: WithDType, A: Real>(&self, operands: [Rows<'_, T>; N]) -> Result<(Vec<T>, Shape)>;
}

fn views<'a, T: WithDType, const N: usize>(
    name: &str,
    operands: [(&'a CpuStorage, &'a Layout); N],
) -> Result<[Rows<'a, T>; N]> {
    let mut rows = Vec::with_capacity(N);
    for (storage, layout) in operands {
        let Ok(data) = T::cpu_storage_as_slice(storage) else {
            bail!(
                "{name}: expected all operands in {:?}, found {:?}",
                T::DTYPE,
                storage.dtype()
            )
        };
        rows.push(Rows::new(data, layout));
    }
    match rows.try_into() {
        Ok(rows) => Ok(rows),
        Err(_) => bail!("{name}: wrong number of operands"),
    }
}

/// A computation over `N` operands of one floating point type, of any result.
pub(crate) trait Visit<const N: usize> {
    /// What errors call it.
    const NAME: &'static str;
    /// The result.
    type Output;
    /// Computes it; `A` is the type to compute in.
    fn visit<T: WithDType, A: Real>(&self, operands: [Rows<'_, T>; N]) -> Result<Self::Output>;
}

/// Runs a computation on CPU tensors.
pub(crate) fn visit<V: Visit<N>, const N: usize>(
    visitor: &V,
    operands: [&Tensor; N],
) -> Result<V::Output> {
    let guards = operands.map(Tensor::storage_and_layout);
    let mut parts = Vec::with_capacity(N);
    for (storage, layout) in &guards {
        match &**storage {
            Storage::Cpu(cpu) => parts.push((cpu, *layout)),
            _ => bail!("{}: expected operands on the cpu", V::NAME),
        }
    }
    let Ok(parts): std::result::Result<[_; N], _> = parts.try_into() else {
        bail!("{}: wrong number of operands", V::NAME)
    };
    match parts[0].0 {
        CpuStorage::F32(like) => typed::<V, _, f32, N>(visitor, like, parts),
        CpuStorage::F64(like) => typed::<V, _, f64, N>(visitor, like, parts),
        CpuStorage::BF16(like) => typed::<V, _, f32, N>(visitor, like, parts),
        CpuStorage::F16(like) => typed::<V, _, f32, N>(visitor, like, parts),
        other => bail!(
            "{}: expected a floating point tensor, found {:?}",
            V::NAME,
            other.dtype()
        ),
    }
}

/// Operands of the element type of `_like`, computing in `A`.
fn typed<V: Visit<N>, T: WithDType, A: Real, const N: usize>(
    visitor: &V,
    _like: &[T],
    operands: [(&CpuStorage, &Layout); N],
) -> Result<V::Output> {
    visitor.visit::<T, A>(views::<T, N>(V::NAME, operands)?)
}

/// A kernel as a computation whose result is a storage.
struct Stored<'a, K>(&'a K);

impl<K: Kernel<N>, const N: usize> Visit<N> for Stored<'_, K> {
    const NAME: &'static str = K::NAME;
    type Output = (Storage, Shape);

    fn visit<T: WithDType, A: Real>(&self, operands: [Rows<'_, T>; N]) -> Result<(Storage, Shape)> {
        let (data, shape) = self.0.run::<T, A>(operands)?;
        Ok((Storage::Cpu(T::to_cpu_storage_owned(data)), shape))
    }
}

/// Runs a kernel on CPU tensors. The result is not part of any graph.
pub(crate) fn compute<K: Kernel<N>, const N: usize>(
    kernel: &K,
    operands: [&Tensor; N],
) -> Result<(Storage, Shape)> {
    visit(&Stored(kernel), operands)
}

/// Fills a row-major result: `f(row index, row, scratch)`, where the scratch holds `scratch` numbers and keeps no values.
pub(crate) fn per_row<T: WithDType, A: Real>(
    count: usize,
    width: usize,
    scratch: usize,
    f: impl Fn(usize, &mut [T], &mut [A]) + Sync,
) -> Vec<T> {
    let mut out = vec![T::zero(); count * width];
    if out.is_empty() {
        return out;
    }
    let rows = (BLOCK / width).max(1);
    out.par_chunks_mut(rows * width)
        .enumerate()
        .for_each(|(block, out)| {
            let mut buffer = vec![A::ZERO; scratch];
            for (r, row) in out.chunks_exact_mut(width).enumerate() {
                f(block * rows + r, row, &mut buffer);
            }
        });
    out
}

/// Sums rows: `f(row index, accumulators, scratch)` adds one row's share. Sums run in `f64`, over blocks that depend on `count`
/// alone.
pub(crate) fn sum_over_rows<A: Real>(
    count: usize,
    width: usize,
    scratch: usize,
    f: impl Fn(usize, &mut [f64], &mut [A]) + Sync,
) -> Vec<f64> {
    let rows = count.div_ceil(PARTIALS).max(1);
    let partials: Vec<Vec<f64>> = (0..count.div_ceil(rows))
        .into_par_iter()
        .map(|block| {
            let mut sum = vec![0.0; width];
            let mut buffer = vec![A::ZERO; scratch];
            for i in block * rows..((block + 1) * rows).min(count) {
                f(i, &mut sum, &mut buffer);
            }
            sum
        })
        .collect();
    let mut total = vec![0.0; width];
    for partial in partials {
        for (t, p) in total.iter_mut().zip(partial) {
            *t += p;
        }
    }
    total
}

/// Sum of a row.
pub(crate) fn sum<A: Real>(row: &[A]) -> A {
    fold(
        row.chunks_exact(LANES),
        |acc: A, &x: &A| acc + x,
        |a, b| a + b,
        A::ZERO,
    )
}

/// Largest element of a row; negative infinity for an empty one. A NaN element is passed over here and surfaces in what follows.
pub(crate) fn max<A: Real>(row: &[A]) -> A {
    let larger = |a: A, b: A| if b > a { b } else { a };
    fold(
        row.chunks_exact(LANES),
        |acc, &x| larger(acc, x),
        larger,
        A::NEG_INFINITY,
    )
}

/// Sum of the products of two rows of one length.
pub(crate) fn dot<A: Real>(a: &[A], b: &[A]) -> A {
    let mut lanes = [A::ZERO; LANES];
    let (mut left, mut right) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in left.by_ref().zip(right.by_ref()) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *lane = *lane + x * y;
        }
    }
    for ((lane, &x), &y) in lanes
        .iter_mut()
        .zip(left.remainder())
        .zip(right.remainder())
    {
        *lane = *lane + x * y;
    }
    lanes.into_iter().fold(A::ZERO, |acc, x| acc + x)
}

fn fold<A: Real>(
    mut chunks: std::slice::ChunksExact<'_, A>,
    step: impl Fn(A, &A) -> A,
    join: impl Fn(A, A) -> A,
    start: A,
) -> A {
    let mut lanes = [start; LANES];
    for chunk in chunks.by_ref() {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = step(*lane, x);
    }
    lanes.into_iter().fold(start, join)
}
