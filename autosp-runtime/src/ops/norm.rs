//! `RMSNorm` and `LayerNorm` over the last dimension of width n.
//!
//! With `c = x - mean(x)` (LayerNorm) or `c = x` (`RMSNorm`), `r = 1 / sqrt(mean(c^2) + eps)` and `h = c r`:
//! `y = alpha h + beta`. Backward, with `g = dy alpha`: `dx = r (g - [mean(g)] - h mean(g h))`, the bracket for LayerNorm alone;
//! `dalpha = sum over rows of dy h`; `dbeta = sum over rows of dy`.
//! Sources: Zhang and Sennrich, arXiv:1910.07467; Ba, Kiros and Hinton, arXiv:1607.06450.

use candle_core::{D, Result, Shape, Storage, Tensor, WithDType, bail};

use super::kernel::{dot, sum, sum_over_rows};
use super::tape::{Hint, Recipe};
use super::{Kernel, Real, Rows, compute, per_row, record_hinted, tensor, tracked};

/// What the kernels share. `eps` is in the units of `mean(c^2)`.
#[derive(Clone, Copy)]
struct Norm {
    eps: f64,
    remove_mean: bool,
}

impl Norm {
    /// Turns a row into `h` and returns `r`.
    fn normalise<A: Real>(self, row: &mut [A]) -> A {
        let n = A::real(row.len() as f64);
        if self.remove_mean {
            let mean = sum(row) / n;
            for x in row.iter_mut() {
                *x = *x - mean;
            }
        }
        let r = A::real(1.0) / (dot(row, row) / n + A::real(self.eps)).sqrt();
        for x in row.iter_mut() {
            *x = *x * r;
        }
        r
    }
}

impl Norm {
    fn rows<T: WithDType, A: Real>(
        self,
        x: &Rows<'_, T>,
        alpha: &[T],
        beta: Option<&[T]>,
    ) -> (Vec<T>, Shape) {
        let out = per_row(
            x.count(),
            x.width(),
            x.width(),
            |i, out: &mut [T], row: &mut [A]| {
                x.read(i, row);
                self.normalise(row);
                for ((slot, &h), &a) in out.iter_mut().zip(row.iter()).zip(alpha) {
                    *slot = (h * A::up(a)).down();
                }
                if let Some(beta) = beta {
                    for (((slot, &h), &a), &b) in
                        out.iter_mut().zip(row.iter()).zip(alpha).zip(beta)
                    {
                        *slot = (h * A::up(a) + A::up(b)).down();
                    }
                }
            },
        );
        (out, x.shape().clone())
    }
}

struct Forward(Norm);

impl Kernel<2> for Forward {
    const NAME: &'static str = "norm";

    fn run<T: WithDType, A: Real>(&self, [x, alpha]: [Rows<'_, T>; 2]) -> Result<(Vec<T>, Shape)> {
        Ok(self.0.rows::<T, A>(&x, alpha.row(0), None))
    }
}

impl Kernel<3> for Forward {
    const NAME: &'static str = "norm";

    fn run<T: WithDType, A: Real>(
        &self,
        [x, alpha, beta]: [Rows<'_, T>; 3],
    ) -> Result<(Vec<T>, Shape)> {
        Ok(self.0.rows::<T, A>(&x, alpha.row(0), Some(beta.row(0))))
    }
}

/// The gradient of x.
struct GradX(Norm);

impl Kernel<3> for GradX {
    const NAME: &'static str = "norm backward";

    fn run<T: WithDType, A: Real>(
        &self,
        [x, alpha, grad]: [Rows<'_, T>; 3],
    ) -> Result<(Vec<T>, Shape)> {
        let width = x.width();
        let n = A::real(width as f64);
        let alpha = alpha.row(0);
        let out = per_row(
            x.count(),
            width,
            2 * width,
            |i, out: &mut [T], scratch: &mut [A]| {
                let (h, g) = scratch.split_at_mut(width);
                x.read(i, h);
                grad.read(i, g);
                for (g, &a) in g.iter_mut().zip(alpha) {
                    *g = *g * A::up(a);
                }
                let r = self.0.normalise(h);
                let mean = if self.0.remove_mean {
                    sum(g) / n
                } else {
                    A::ZERO
                };
                let slope = dot(g, h) / n;
                for ((slot, &g), &h) in out.iter_mut().zip(g.iter()).zip(h.iter()) {
                    *slot = (r * (g - mean - h * slope)).down();
                }
            },
        );
        Ok((out, x.shape().clone()))
    }
}

/// The gradient of alpha.
struct GradAlpha(Norm);

impl Kernel<2> for GradAlpha {
    const NAME: &'static str = "norm backward";

    fn run<T: WithDType, A: Real>(&self, [x, grad]: [Rows<'_, T>; 2]) -> Result<(Vec<T>, Shape)> {
        let width = x.width();
        let total = sum_over_rows(x.count(), width, width, |i, total, h: &mut [A]| {
            x.read(i, h);
            self.0.normalise(h);
            for ((t, &h), &g) in total.iter_mut().zip(h.iter()).zip(grad.row(i)) {
                *t += (h * A::up(g)).wide();
            }
        });
        Ok((
            total.into_iter().map(T::from_f64).collect(),
            Shape::from(width),
        ))
    }
}

/// The gradient of beta: the sum over rows.
struct GradBeta;

impl Kernel<1> for GradBeta {
    const NAME: &'static str = "norm backward";

    fn run<T: WithDType, A: Real>(&self, [grad]: [Rows<'_, T>; 1]) -> Result<(Vec<T>, Shape)> {
        let total = sum_over_rows(grad.count(), grad.width(), 0, |i, total, _: &mut [A]| {
            for (t, &g) in total.iter_mut().zip(grad.row(i)) {
                *t += g.to_f64();
            }
        });
        Ok((
            total.into_iter().map(T::from_f64).collect(),
            Shape::from(grad.width()),
        ))
    }
}

fn norm(
    name: &'static str,
    x: &Tensor,
    alpha: &Tensor,
    beta: Option<&Tensor>,
    norm: Norm,
) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    for (what, weight) in [("alpha", Some(alpha)), ("beta", beta)] {
        if let Some(weight) = weight
            && weight.dims1()? != width
        {
            bail!(
                "{name}: expected {what} of {width} elements, found {:?}",
                weight.dims()
            )
        }
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = on_gpu(name, x, alpha, beta, norm)?
    {
        return Ok(y);
    }
    if !x.device().is_cpu() {
        return composed(x, alpha, beta, norm);
    }
    let wanted = [tracked(x), tracked(alpha), beta.is_some_and(tracked)];
    let grads = move |x: &Tensor, alpha: &Tensor, grad: &Tensor| -> Result<[Option<Tensor>; 3]> {
        let dx = if wanted[0] {
            Some(tensor(compute(&GradX(norm), [x, alpha, grad])?))
        } else {
            None
        };
        let dalpha = if wanted[1] {
            Some(tensor(compute(&GradAlpha(norm), [x, grad])?))
        } else {
            None
        };
        let dbeta = if wanted[2] {
            Some(tensor(compute(&GradBeta, [grad])?))
        } else {
            None
        };
        Ok([dx, dalpha, dbeta])
    };
    let forward = move |x: &Tensor, alpha: &Tensor, beta: Option<&Tensor>| match beta {
        None => compute(&Forward(norm), [x, alpha]),
        Some(beta) => compute(&Forward(norm), [x, alpha, beta]),
    };
    let result = forward(x, alpha, beta)?;
    let again = move |x: &Tensor, alpha: &Tensor, beta: Option<&Tensor>| {
        Ok(tensor(forward(x, alpha, beta)?))
    };
    normed(name, [Some(x), Some(alpha), beta], result, again, grads)
}

/// Records a norm of `[x, alpha, beta]`. Its result need not be kept: it is one pass away from x.
fn normed(
    name: &'static str,
    operands: [Option<&Tensor>; 3],
    result: (Storage, Shape),
    again: impl Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor> + Send + Sync + 'static,
    grads: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let [Some(x), Some(alpha), beta] = operands else {
        bail!("{name}: expected x and alpha")
    };
    let hint = tracked(x).then(|| {
        super::tape::keep(x);
        let (x, alpha, beta) = (x.detach(), alpha.detach(), beta.map(Tensor::detach));
        Hint::Again(Recipe::new(move || again(&x, &alpha, beta.as_ref())))
    });
    match beta {
        None => {
            let backward = move |[x, alpha]: [&Tensor; 2], grad: &Tensor| {
                let [dx, dalpha, _] = grads(x, alpha, grad)?;
                Ok([dx, dalpha])
            };
            record_hinted(name, [x, alpha], result, hint, backward)
        }
        Some(beta) => {
            let backward = move |[x, alpha, _]: [&Tensor; 3], grad: &Tensor| grads(x, alpha, grad);
            record_hinted(name, [x, alpha, beta], result, hint, backward)
        }
    }
}

/// The same by kernels on a GPU; `None` for a type or a width that they do not take.
#[cfg(feature = "cuda")]
fn on_gpu(
    name: &'static str,
    x: &Tensor,
    alpha: &Tensor,
    beta: Option<&Tensor>,
    norm: Norm,
) -> Result<Option<Tensor>> {
    use super::taken;
    use crate::cuda::ops;
    let norm = ops::Norm {
        eps: norm.eps,
        remove_mean: norm.remove_mean,
    };
    let Some(y) = ops::norm_forward(norm, x, alpha, beta)? else {
        return Ok(None);
    };
    let result = (taken(&y)?, x.shape().clone());
    let grads = move |x: &Tensor, alpha: &Tensor, grad: &Tensor| {
        let grads = ops::norm_backward(norm, x, alpha, grad)?;
        let Some([dx, dalpha, dbeta]) = grads else {
            bail!("{name}: the backward has no kernel for what the forward took")
        };
        Ok([Some(dx), Some(dalpha), Some(dbeta)])
    };
    let again = move |x: &Tensor, alpha: &Tensor, beta: Option<&Tensor>| match ops::norm_forward(
        norm, x, alpha, beta,
    )? {
        Some(y) => Ok(y),
        None => bail!("{name}: no kernel for what the forward took"),
    };
    normed(name, [Some(x), Some(alpha), beta], result, again, grads).map(Some)
}

/// The same by candle's differentiable operations, for devices without a kernel here.
fn composed(x: &Tensor, alpha: &Tensor, beta: Option<&Tensor>, norm: Norm) -> Result<Tensor> {
    use candle_core::Module;
    match (norm.remove_mean, beta) {
        (true, Some(beta)) => candle_nn::ops::layer_norm_slow(x, alpha, beta, norm.eps as f32),
        (true, None) => candle_nn::LayerNorm::new_no_bias(alpha.clone(), norm.eps).forward(x),
        (false, None) => candle_nn::LayerNorm::rms_norm(alpha.clone(), norm.eps).forward(x),
        (false, Some(beta)) => candle_nn::LayerNorm::rms_norm(alpha.clone(), norm.eps)
            .forward(x)?
            .broadcast_add(beta),
    }
}

/// What `norm.forward(xs)` computes, with gradients for `xs` and the weight.
///
/// # Errors
/// When the last dimension of `xs` differs from the weight's, or their types differ.
pub fn rms_norm(module: &candle_nn::RmsNorm, xs: &Tensor) -> Result<Tensor> {
    norm(
        "rms-norm",
        xs,
        module.weight(),
        None,
        Norm {
            eps: module.eps(),
            remove_mean: false,
        },
    )
}

/// `candle_nn::ops::rms_norm` with gradients: `xs` is `[.., n]`, `alpha` is `[n]`.
///
/// # Errors
/// When the shapes do not fit or the types differ.
pub fn rms_norm_op(xs: &Tensor, alpha: &Tensor, eps: f32) -> Result<Tensor> {
    norm(
        "rms-norm",
        xs,
        alpha,
        None,
        Norm {
            eps: f64::from(eps),
            remove_mean: false,
        },
    )
}

/// What `norm.forward(xs)` computes, with gradients for `xs`, the weight and the bias.
///
/// # Errors
/// When the last dimension of `xs` differs from the weight's, or their types differ.
pub fn layer_norm(module: &candle_nn::LayerNorm, xs: &Tensor) -> Result<Tensor> {
    let settings = Norm {
        eps: module.eps(),
        remove_mean: module.remove_mean(),
    };
    norm("layer-norm", xs, module.weight(), module.bias(), settings)
}

/// `candle_nn::ops::layer_norm` with gradients: `xs` is `[.., n]`, `alpha` and `beta` are `[n]`.
///
/// # Errors
/// When the shapes do not fit or the types differ.
pub fn layer_norm_op(xs: &Tensor, alpha: &Tensor, beta: &Tensor, eps: f32) -> Result<Tensor> {
    norm(
        "layer-norm",
        xs,
        alpha,
        Some(beta),
        Norm {
            eps: f64::from(eps),
            remove_mean: true,
        },
    )
}

/// Each norm as a kernel and as a composition, without and with a bias.
#[cfg(test)]
pub(super) fn both() -> Vec<super::tests::Pair> {
    let mut all = Vec::new();
    for remove_mean in [true, false] {
        let settings = Norm {
            eps: 0.25,
            remove_mean,
        };
        all.push(super::tests::Pair {
            fast: Box::new(move |x| norm("norm", &x[0], &x[1], x.get(2), settings)),
            slow: Box::new(move |x| composed(&x[0], &x[1], x.get(2), settings)),
        });
    }
    all
}
