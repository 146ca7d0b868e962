//! Exact attention, forward and backward, without S x S memory. On GPUs `cuda::attention` computes it; here, the CPU does.
//!
//! Tensors are [b, h, S, d] (queries), [b, g, S, d] (keys) and [b, g, S, dv] (values); `dv` may differ from `d`, and query head
//! `h` uses kv head [`Spec::kv_of`]`[h]` without repeating it. With scores
//! s = [`scale`](Spec::scale) q·k, or cap · tanh(scale q·k), then changed by masks in their order,
//!
//! - O = softmax(s) V and LSE = ln Σ exp s (natural logarithm), over valid keys;
//! - backward, from the global O and LSE: P = exp(s - LSE), dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - rowsum(dO O)), through
//!   masks (a filled score has no gradient) and cap to dQ and dK.
//!
//! Finite fills and fully masked rows follow candle's softmax over the filled scores: a row filled with -1e9 altogether is uniform
//! over the valid keys, a row filled with -inf is NaN. Keys from `valid` on never count; queries from `valid` on give O = 0, LSE = 0
//! and no gradient. Formulas: Dao et al., FlashAttention-2, 2023, section 3.
//!
//! Two kernels: [`Kernel::Reference`] is the plain loop, [`Kernel::Tiled`] the fast one. Both are bitwise repeatable, whatever the
//! number of threads.

// What a kernel's inner loops call has to be inlined to be compiled for the vectors that the kernel was dispatched to.
#![allow(
    clippy::inline_always,
    reason = "inlining decides which instructions are used"
)]

#[cfg(any(feature = "cuda", test))]
pub(crate) mod blocks;
#[cfg(any(feature = "cuda", test))]
pub(crate) mod graphs;
pub(crate) mod real;
mod reference;
mod simd;
mod tiled;
mod view;

use autosp_plan::codes;
/// Which implementation computes attention.
pub use autosp_plan::settings::Attention as Kernel;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::mask::{Action, Band, Mask, Term, mask_rule};
use real::{Element, Real};
use view::{View, with_view};

/// What is computed between Q, K, V and O.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Factor on q·k.
    pub scale: f64,
    /// Factor on tanh(scale q·k), if the scores are capped.
    pub cap: Option<f64>,
    /// Masks, in the order in which they are applied.
    pub(crate) terms: Vec<Term>,
    /// Valid tokens: keys and queries from here on are padding.
    pub valid: usize,
    /// The kv head of each query head, both counted among the heads at hand.
    pub kv_of: Vec<usize>,
    /// The global index of each query head, for what depends on the head.
    pub heads: Vec<usize>,
}

impl Spec {
    /// Unmasked attention of `heads` query heads over `kv_heads` kv heads, consecutive query heads sharing one.
    pub fn new(scale: f64, valid: usize, heads: usize, kv_heads: usize) -> Self {
        let share = heads.checked_div(kv_heads).unwrap_or(1).max(1);
        Self {
            scale,
            cap: None,
            terms: Vec::new(),
            valid,
            kv_of: (0..heads).map(|h| h / share).collect(),
            heads: (0..heads).collect(),
        }
    }

    /// With scores of -inf where a query does not see a key.
    ///
    /// # Errors
    /// None for a band; the form is that of masks.
    pub fn with_band(mut self, band: Band) -> Result<Self> {
        let length = self.valid;
        let host = mask_rule(length, length, move |i, j| u8::from(!band.contains(i, j)));
        let mask = Mask::from_slice(&host.band(band, 0, 1), (length, length), &Device::Cpu)?;
        let action = Action::Fill {
            value: f64::NEG_INFINITY,
            nonzero: true,
        };
        self.terms
            .push(Term::new(&mask, action, 1, self.heads.len(), length)?);
        Ok(self)
    }
}

/// Sizes of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    /// Width of queries and keys.
    d: usize,
    /// Width of values.
    dv: usize,
}

impl Sizes {
    fn new(spec: &Spec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let (batch, heads, queries, d) = q.dims4()?;
        let (_, kv_heads, keys, _) = k.dims4()?;
        let dv = v.dims4()?.3;
        let expected = ([batch, kv_heads, keys, d], [batch, kv_heads, keys, dv]);
        if (k.dims(), v.dims()) != (expected.0.as_slice(), expected.1.as_slice()) {
            return Err(Error::new(
                codes::SITE_SHAPE,
                format!(
                    "q {:?}: expected k {:?} and v {:?}, found {:?} and {:?}",
                    q.dims(),
                    expected.0,
                    expected.1,
                    k.dims(),
                    v.dims()
                ),
            ));
        }
        if spec.kv_of.len() != heads
            || spec.heads.len() != heads
            || spec.kv_of.iter().any(|&g| g >= kv_heads)
        {
            return Err(Error::new(
                codes::SITE_SHAPE,
                format!(
                    "expected a kv head below {kv_heads} for each of {heads} query heads, found {:?}",
                    spec.kv_of
                ),
            ));
        }
        if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
            return Err(Error::new(
                codes::KERNEL,
                format!(
                    "expected q, k and v of one type, found {:?}, {:?} and {:?}",
                    q.dtype(),
                    k.dtype(),
                    v.dtype()
                ),
            ));
        }
        Ok(Self {
            batch,
            heads,
            kv_heads,
            queries,
            keys,
            d,
            dv,
        })
    }
}

/// O [b, h, S, dv] of the inputs' type and LSE [b, h, S], contiguous; LSE is `f64` for `f64` inputs, else `f32`.
#[derive(Debug, Clone)]
pub struct Output {
    /// The attention's output.
    pub o: Tensor,
    /// The logarithm of the softmax's denominator.
    pub lse: Tensor,
    /// What rounding took from `lse`, of its shape: a row filled with -1e9 altogether has LSE = -1e9 + ln n, of which `f32` keeps
    /// only -1e9. Weights are exp((s - lse) - rest). Empty where such rows are refused, on GPUs.
    pub rest: Tensor,
}

/// Gradients of q, k and v, of their shapes and type, contiguous.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// dQ [b, h, S, d].
    pub q: Tensor,
    /// dK [b, g, S, d].
    pub k: Tensor,
    /// dV [b, g, S, dv].
    pub v: Tensor,
}

/// Runs `$body` with `$e` bound to the element type of a tensor.
macro_rules! by_type {
    ($tensor:expr, $e:ident => $body:expr) => {
        match $tensor.dtype() {
            DType::F32 => {
                type $e = f32;
                $body
            }
            DType::F64 => {
                type $e = f64;
                $body
            }
            DType::BF16 => {
                type $e = bf16;
                $body
            }
            DType::F16 => {
                type $e = f16;
                $body
            }
            other => Err(Error::new(
                codes::KERNEL,
                format!("attention: expected a float type, found {other:?}"),
            )),
        }
    };
}

/// Computes O and LSE.
///
/// # Errors
/// `AS0323` for shapes that do not fit, `AS0329` for a type that is not a float or a device other than the CPU.
pub fn forward(kernel: Kernel, spec: &Spec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Output> {
    let sizes = Sizes::new(spec, q, k, v)?;
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return crate::cuda::attention::forward(kernel, spec, q, k, v);
    }
    by_type!(q, E => with_view::<E, _>(q, |q| with_view::<E, _>(k, |k| with_view::<E, _>(v, |v| {
        let problem = Problem { spec, sizes, q, k, v };
        let (o, lse, rest) = match kernel {
            Kernel::Reference => reference::forward(&problem),
            Kernel::Tiled => tiled::forward(&problem),
        };
        let Sizes { batch, heads, queries, dv, .. } = sizes;
        Ok(Output {
            o: Tensor::from_vec(o, (batch, heads, queries, dv), &Device::Cpu)?,
            lse: Tensor::from_vec(lse, (batch, heads, queries), &Device::Cpu)?,
            rest: Tensor::from_vec(rest, (batch, heads, queries), &Device::Cpu)?,
        })
    }))))
}

/// Computes the gradients of q, k and v from the output's gradient, and the output and LSE of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward(
    kernel: Kernel,
    spec: &Spec,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Output,
    grad: &Tensor,
) -> Result<Gradients> {
    let sizes = Sizes::new(spec, q, k, v)?;
    let Sizes {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        d,
        dv,
    } = sizes;
    let expected = [batch, heads, queries, dv];
    for (name, tensor) in [("output", &output.o), ("gradient", grad)] {
        if tensor.dims() != expected || tensor.dtype() != q.dtype() {
            return Err(Error::new(
                codes::SITE_SHAPE,
                format!(
                    "{name} of attention: expected {:?} {expected:?}, found {:?} {:?}",
                    q.dtype(),
                    tensor.dtype(),
                    tensor.dims()
                ),
            ));
        }
    }
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return crate::cuda::attention::backward(kernel, spec, (q, k, v), output, grad);
    }
    let (lse, rest) = (output.lse.flatten_all()?, output.rest.flatten_all()?);
    by_type!(q, E => {
        let lse = lse.to_vec1::<<E as Element>::Acc>()?;
        let rest = rest.to_vec1::<<E as Element>::Acc>()?;
        with_view::<E, _>(q, |q| with_view::<E, _>(k, |k| with_view::<E, _>(v, |v| {
            with_view::<E, _>(&output.o, |o| with_view::<E, _>(grad, |grad| {
                let problem = Problem { spec, sizes, q, k, v };
                let given = Given { o, lse: &lse, rest: &rest, grad };
                let (dq, dk, dv_) = match kernel {
                    Kernel::Reference => reference::backward(&problem, &given),
                    Kernel::Tiled => tiled::backward(&problem, &given),
                };
                Ok(Gradients {
                    q: Tensor::from_vec(dq, (batch, heads, queries, d), &Device::Cpu)?,
                    k: Tensor::from_vec(dk, (batch, kv_heads, keys, d), &Device::Cpu)?,
                    v: Tensor::from_vec(dv_, (batch, kv_heads, keys, dv), &Device::Cpu)?,
                })
            }))
        })))
    })
}

/// LSE of a row from its maximum and the sum of exp(s - max), and what rounding takes from it. NaN for an empty sum.
fn log_sum<R: Real>(max: R, total: R) -> (R, R) {
    if total == R::ZERO {
        return (R::NAN, R::ZERO);
    }
    let log = total.log();
    let lse = max + log;
    // The error of a sum, exactly (Knuth's two-sum).
    let part = lse - max;
    (lse, (max - (lse - part)) + (log - part))
}

/// A problem on the host.
struct Problem<'a, E> {
    spec: &'a Spec,
    sizes: Sizes,
    q: View<'a, E>,
    k: View<'a, E>,
    v: View<'a, E>,
}

impl<E> Problem<'_, E> {
    /// Valid queries.
    fn queries(&self) -> usize {
        self.spec.valid.min(self.sizes.queries)
    }

    /// Valid keys.
    fn keys(&self) -> usize {
        self.spec.valid.min(self.sizes.keys)
    }

    /// The query heads of a kv head, in their order.
    fn heads_of(&self, kv_head: usize) -> Vec<usize> {
        (0..self.sizes.heads)
            .filter(|&h| self.spec.kv_of[h] == kv_head)
            .collect()
    }
}

/// What the backward is given besides the problem; LSE and its rest are [b, h, S].
struct Given<'a, E: Element> {
    o: View<'a, E>,
    lse: &'a [E::Acc],
    rest: &'a [E::Acc],
    grad: View<'a, E>,
}

#[cfg(test)]
mod tests;
