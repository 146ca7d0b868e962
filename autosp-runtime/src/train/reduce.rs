//! Gradients summed over all ranks.

use autosp_plan::codes;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var, WithDType};
use rayon::prelude::*;

use super::flat::{Bucket, buckets};
use crate::comm::{Tag, all_gather, reduce_scatter_as};
use crate::ops::{Real, Rows, Visit, cast, visit, wide};
use crate::{Error, Result, Sp, memory, scope};

/// Bytes of gradients that [`Sp::reduce_gradients`] sums at once.
const BUCKET: usize = 32 << 20;

impl Sp {
    /// Sums the gradients of `vars` over all ranks, in their order, for a loop of one's own: afterwards every rank holds the same
    /// gradients, the exact ones of the loss, for candle's own optimizers.
    ///
    /// Also collects what checkpointed blocks have found. A gradient that is missing on this rank counts as zero. All ranks call this
    /// with the same variables in the same order.
    ///
    /// ```
    /// use autosp_runtime::{Settings, loss, run_with};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// # fn main() -> autosp_runtime::Result<()> {
    /// run_with(Settings::default().with_sp(2), |sp| {
    ///     let logits = Var::zeros((1, 3, 5), DType::F32, &Device::Cpu)?;
    ///     let labels = Tensor::new(&[[0i64, 1, 2]], &Device::Cpu)?;
    ///     let mut grads = sp.scope(|| loss::cross_entropy(&logits, &labels)?.backward())?;
    ///     sp.reduce_gradients(&mut grads, &[logits.clone()])
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// AS0512 if a variable has no gradient on any rank; as [`wait`](crate::comm::Engine::wait).
    pub fn reduce_gradients(&self, grads: &mut GradStore, vars: &[Var]) -> Result<()> {
        memory::collect(grads)?;
        let named: Vec<(String, Var)> = vars
            .iter()
            .enumerate()
            .map(|(i, var)| {
                (
                    format!("variable {i} of shape {:?}", var.dims()),
                    var.clone(),
                )
            })
            .collect();
        let own = detached(grads, &named);
        presence(self, &here(&own), &[])?.require(&named)?;
        for (var, sum) in vars.iter().zip(sums(self, own, vars, BUCKET)?) {
            grads.insert(var, sum.to_dtype(var.dtype())?);
        }
        Ok(())
    }
}

/// This rank's gradients of the variables. Those of candle's store hold on to the graph that made them, all activations included.
pub(crate) fn detached(grads: &GradStore, named: &[(String, Var)]) -> Vec<Option<Tensor>> {
    named
        .iter()
        .map(|(_, var)| grads.get(var).map(Tensor::detach))
        .collect()
}

/// What all ranks have said about their gradients.
pub(crate) struct Presence {
    /// Whether any rank has a gradient of variable i.
    pub(crate) anywhere: Vec<bool>,
    /// Whether every rank has said yes to question i.
    pub(crate) unanimous: Vec<bool>,
}

impl Presence {
    /// # Errors
    /// AS0512 naming the first variables without a gradient.
    pub(crate) fn require(&self, named: &[(String, Var)]) -> Result<()> {
        let missing = named
            .iter()
            .zip(&self.anywhere)
            .filter(|(_, found)| !**found);
        let missing: Vec<&str> = missing.map(|((name, _), _)| name.as_str()).collect();
        let shown = match missing.as_slice() {
            [] => return Ok(()),
            [first, .., last] if missing.len() > 3 => {
                format!("`{first}` to `{last}` ({} variables)", missing.len())
            }
            few => few
                .iter()
                .map(|name| format!("`{name}`"))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let text =
            format!("expected a gradient for every variable, found none on any rank for {shown}");
        Err(Error::new(codes::NO_GRADIENT, text).with_help("parameters.freeze(|name| ..)"))
    }
}

/// Which gradients there are.
pub(crate) fn here(grads: &[Option<Tensor>]) -> Vec<bool> {
    grads.iter().map(Option::is_some).collect()
}

/// Tells all ranks which gradients are here, and asks them yes-or-no questions.
pub(crate) fn presence(sp: &Sp, here: &[bool], questions: &[bool]) -> Result<Presence> {
    let both = here.iter().chain(questions);
    let own: Vec<u8> = both.copied().map(u8::from).collect();
    let width = own.len();
    let own = Tensor::from_vec(own, (1, width), &candle_core::Device::Cpu)?;
    let all = if sp.world_size() == 1 {
        own
    } else {
        all_gather(sp.world_group(), tag("present"), &own, 0)?
    };
    let all = all.to_vec2::<u8>()?;
    let anywhere = (0..here.len())
        .map(|i| all.iter().any(|rank| rank[i] == 1))
        .collect();
    let unanimous = (here.len()..width)
        .map(|i| all.iter().all(|rank| rank[i] == 1))
        .collect();
    Ok(Presence {
        anywhere,
        unanimous,
    })
}

fn tag(direction: &'static str) -> Tag {
    Tag::new("gradients", direction).at(scope::current().map_or(0, |scope| scope.step()))
}

/// Sums a bucket's gradients over all ranks: of the flat bucket the whole, or this rank's share of it.
///
/// Sums are taken in `f32` (`f64` for `f64` variables), in the order of the ranks; every rank that has an element has the same bits. A
/// gradient that is missing here is zero. Gradients travel in the type `travels`, which all ranks pass: that of the variables where
/// nothing was added to them yet, so that a sum is rounded nowhere.
pub(crate) fn reduce(
    sp: &Sp,
    bucket: &Bucket,
    grads: impl Iterator<Item = Option<Tensor>>,
    vars: &[Var],
    (travels, sharded): (DType, bool),
) -> Result<Tensor> {
    let dtype = travels;
    let mut flat = Vec::with_capacity(bucket.vars.len());
    for (var, grad) in vars[bucket.vars.clone()].iter().zip(grads) {
        flat.push(match grad {
            Some(grad) => cast(&grad, dtype)?.flatten_all()?,
            None => Tensor::zeros(var.elem_count(), dtype, var.device())?,
        });
    }
    let joined = if let [one] = flat.as_slice() {
        one.clone()
    } else {
        Tensor::cat(&flat, 0)?
    };
    drop(flat);
    let (engine, sum) = (sp.world_group(), wide(bucket.dtype));
    if sp.world_size() == 1 {
        return Ok(joined.detach().to_dtype(sum)?);
    }
    let share = reduce_scatter_as(engine, tag("sum"), &joined, 0, sum)?;
    if sharded {
        return Ok(share);
    }
    all_gather(engine, tag("sum"), &share, 0)
}

/// The sum of each variable's gradients over all ranks, in buckets of `bytes` bytes; see [`reduce`].
pub(crate) fn sums(
    sp: &Sp,
    grads: Vec<Option<Tensor>>,
    vars: &[Var],
    bytes: usize,
) -> Result<Vec<Tensor>> {
    let mut grads = grads.into_iter();
    let mut sums = Vec::with_capacity(vars.len());
    for bucket in buckets(vars, bytes) {
        let travels = wide(bucket.dtype);
        let sum = reduce(sp, &bucket, grads.by_ref(), vars, (travels, false))?;
        sums.extend(bucket.split(&sum, vars)?);
    }
    Ok(sums)
}

/// The whole flat bucket from the shares of all ranks.
pub(crate) fn gather(sp: &Sp, share: &Tensor) -> Result<Tensor> {
    if sp.world_size() == 1 {
        return Ok(share.clone());
    }
    all_gather(sp.world_group(), Tag::new("parameters", "gather"), share, 0)
}

/// The 2-norm of all gradients together, in `f64`, the same bits on all ranks and for any number of threads. `sharded` says that each
/// rank has its share of them.
pub(crate) fn global_norm(sp: &Sp, grads: &[Tensor], sharded: bool) -> Result<f64> {
    let mut sum = 0.0;
    #[cfg(feature = "cuda")]
    let grads = &crate::train::reduce::on_gpu(grads, &mut sum)?;
    for grad in grads {
        let grad = grad.to_device(&candle_core::Device::Cpu)?.flatten_all()?;
        sum += visit(&SquareSum, [&grad])?;
    }
    if sharded && sp.world_size() > 1 {
        let own = Tensor::new(&[sum], &candle_core::Device::Cpu)?;
        let all = all_gather(sp.world_group(), tag("norm"), &own, 0)?;
        sum = all.to_vec1::<f64>()?.iter().sum();
    }
    Ok(sum.sqrt())
}

/// Adds the squares of what kernels take, read back together; returns the others.
#[cfg(feature = "cuda")]
fn on_gpu(grads: &[Tensor], sum: &mut f64) -> Result<Vec<Tensor>> {
    let (mut partial, mut others) = (Vec::new(), Vec::new());
    for grad in grads {
        let squares = if grad.device().is_cuda() {
            crate::cuda::ops::squares(grad)?
        } else {
            None
        };
        match squares {
            Some(squares) => partial.push(squares),
            None => others.push(grad.clone()),
        }
    }
    if !partial.is_empty() {
        *sum += Tensor::cat(&partial, 0)?
            .to_vec1::<f64>()?
            .iter()
            .sum::<f64>();
    }
    Ok(others)
}

struct SquareSum;

impl Visit<1> for SquareSum {
    const NAME: &'static str = "norm of gradients";
    type Output = f64;

    fn visit<T: WithDType, A: Real>(&self, [x]: [Rows<'_, T>; 1]) -> candle_core::Result<f64> {
        let squares = |chunk: &[T]| chunk.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>();
        let mut sum = 0.0;
        for i in 0..x.count() {
            let partial: Vec<f64> = x.row(i).par_chunks(4096).map(squares).collect();
            sum += partial.iter().sum::<f64>();
        }
        Ok(sum)
    }
}
