//! The operations of [`crate::ops`] and of training, as kernels of our own. Each returns `None` where it has no kernel: another type,
//! or rows that a block cannot hold; the caller then composes the operation as before.

use autosp_templates::kernels::{Copy, Element, Rows};
use candle_core::{DType, Tensor};
use cudarc::driver::DeviceRepr;

pub(crate) use super::elementwise::{
    add, add_to, add_wide, cast, gated_backward, gated_forward, mul, silu_backward, silu_forward,
};
use super::failure::failure;
use super::kernels::{
    Launch, MANY, MOST_STEPS, Module, THREADS, aligned, element, function, looping, rows,
};
use super::memory::{address, device_of, unwritten};
use crate::Result;

/// Kernels over all elements of a tensor, in packs where its size allows.
pub(super) fn flat(element: Element, count: usize) -> Rows {
    let pack = if count.is_multiple_of(element.widest()) {
        element.widest()
    } else {
        1
    };
    Rows {
        element,
        pack,
        steps: 1,
    }
}

/// Sizes and strides of [b, h, t, d] as kernels walk over rows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RowSteps {
    h: i64,
    t: i64,
    sb: i64,
    sh: i64,
    st: i64,
}

// SAFETY: five 64-bit numbers in C's layout, as the kernel declares them.
unsafe impl DeviceRepr for RowSteps {}

/// Three 64-bit numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Three(i64, i64, i64);

// SAFETY: three 64-bit numbers in C's layout, as the kernel declares them.
unsafe impl DeviceRepr for Three {}

/// A contiguous tensor with the same values that begins where 16 bytes can be read at once, detached; the same one if it is so already.
pub(crate) fn contiguous(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() && aligned(x, 16 / x.dtype().size_in_bytes()) {
        return Ok(x.detach());
    }
    let out = unwritten(&device_of(x)?, x.shape(), x.dtype())?;
    if !copy(x, &out)? {
        return Ok(x.detach().force_contiguous()?);
    }
    Ok(out)
}

/// Writes the values of `x` into `out`, of the same shape. False, and nothing is done, if a kernel cannot: more than four dims, or
/// elements that are not neighbours along the last.
pub(crate) fn copy(x: &Tensor, out: &Tensor) -> Result<bool> {
    if x.elem_count() == 0 {
        return Ok(true);
    }
    let size = x.dtype().size_in_bytes();
    let Some((dims, from, to)) = walk(x, out) else {
        return Ok(false);
    };
    let fits = |bytes: usize| {
        let unit = bytes / size.min(bytes);
        bytes >= size
            && dims[3].is_multiple_of(unit)
            && [x, out].iter().all(|x| aligned(x, unit))
            && from[..3]
                .iter()
                .chain(&to[..3])
                .all(|step| step.is_multiple_of(unit))
    };
    let Some(bytes) = Copy::WIDTHS.into_iter().find(|&bytes| fits(bytes)) else {
        return Ok(false);
    };
    let unit = bytes / size;
    let step = |s: [usize; 4]| {
        Three(
            (s[0] / unit) as i64,
            (s[1] / unit) as i64,
            (s[2] / unit) as i64,
        )
    };
    let sizes = Three(dims[1] as i64, dims[2] as i64, (dims[3] / unit) as i64);
    let (from, to) = (step(from), step(to));
    let count = (x.elem_count() / unit) as i64;
    let (at, target) = (address(x)?, address(out)?);
    let kernel = function(&device_of(x)?, Module::Copy(Copy { bytes }), "copy")?;
    Launch::new(&kernel)
        .with(&at)
        .with(&target)
        .with(&sizes)
        .with(&from)
        .with(&to)
        .with(&count)
        .run(looping(count as usize, 1), "copying a tensor")?;
    Ok(true)
}

type Walk = ([usize; 4], [usize; 4], [usize; 4]);

/// Both tensors as four dims with their strides, neighbours along the last.
fn walk(x: &Tensor, out: &Tensor) -> Option<Walk> {
    let mut dims: Vec<(usize, usize, usize)> = Vec::new();
    for ((&n, &f), &t) in x.dims().iter().zip(x.stride()).zip(out.stride()) {
        match dims.last_mut() {
            _ if n == 1 => {}
            // Dims that lie side by side in both tensors are one.
            Some((m, pf, pt)) if *pf == n * f && *pt == n * t => (*m, *pf, *pt) = (*m * n, f, t),
            _ => dims.push((n, f, t)),
        }
    }
    if dims.last().is_none_or(|&(_, f, t)| (f, t) != (1, 1)) {
        dims.push((1, 1, 1));
    }
    if dims.len() > 4 {
        return None;
    }
    let mut all = vec![(1, 0, 0); 4 - dims.len()];
    all.extend(dims);
    let pick = |f: fn(&(usize, usize, usize)) -> usize| std::array::from_fn(|i| f(&all[i]));
    Some((pick(|d| d.0), pick(|d| d.1), pick(|d| d.2)))
}

/// What a norm over the last dim does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) eps: f64,
    pub(crate) remove_mean: bool,
}

/// The module of a norm over rows of `n`, and `x` and the weights as it takes them.
fn norm_module(x: &Tensor, alpha: &Tensor) -> Option<Rows> {
    let element = element(x.dtype()).filter(|_| alpha.dtype() == x.dtype())?;
    Some(rows(element, alpha.elem_count())).filter(|rows| rows.steps <= MOST_STEPS)
}

/// y = alpha h + beta over the last dim.
pub(crate) fn norm_forward(
    norm: Norm,
    x: &Tensor,
    alpha: &Tensor,
    beta: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let Some(module) = norm_module(x, alpha) else {
        return Ok(None);
    };
    let (x, alpha) = (contiguous(x)?, contiguous(alpha)?);
    let beta = beta.map(contiguous).transpose()?;
    let n = alpha.elem_count();
    let y = unwritten(&device_of(&x)?, x.shape(), x.dtype())?;
    let (x_at, a_at, y_at) = (address(&x)?, address(&alpha)?, address(&y)?);
    let b_at = beta.as_ref().map_or(Ok(0), address)?;
    let (width, eps, mean) = (n as i64, norm.eps as f32, i32::from(norm.remove_mean));
    let kernel = function(&device_of(&x)?, Module::Rows(module), "norm_forward")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&a_at)
        .with(&b_at)
        .with(&y_at)
        .with(&width)
        .with(&eps)
        .with(&mean)
        .run(x.elem_count() / n.max(1), "norm")?;
    Ok(Some(y))
}

/// dx, dalpha and dbeta.
pub(crate) fn norm_backward(
    norm: Norm,
    x: &Tensor,
    alpha: &Tensor,
    grad: &Tensor,
) -> Result<Option<[Tensor; 3]>> {
    let Some(module) = norm_module(x, alpha) else {
        return Ok(None);
    };
    let (x, alpha, grad) = (contiguous(x)?, contiguous(alpha)?, contiguous(grad)?);
    let device = device_of(&x)?;
    let n = alpha.elem_count();
    let count = x.elem_count() / n.max(1);
    let blocks = count.clamp(1, 2 * 132);
    let dx = unwritten(&device, x.shape(), x.dtype())?;
    let partial = unwritten(&device, (2, blocks, n), DType::F32)?;
    let (x_at, a_at, g_at, dx_at, p_at) = (
        address(&x)?,
        address(&alpha)?,
        address(&grad)?,
        address(&dx)?,
        address(&partial)?,
    );
    let (height, width, eps, mean) = (
        count as i64,
        n as i64,
        norm.eps as f32,
        i32::from(norm.remove_mean),
    );
    let kernel = function(&device, Module::Rows(module), "norm_backward")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&a_at)
        .with(&g_at)
        .with(&dx_at)
        .with(&p_at)
        .with(&height)
        .with(&width)
        .with(&eps)
        .with(&mean)
        .run(blocks, "norm backward")?;
    let sum = |part: usize| -> Result<Tensor> {
        let out = unwritten(&device, n, x.dtype())?;
        let (from, to) = (address(&partial.get(part)?)?, address(&out)?);
        let kernel = function(&device, Module::Rows(module), "sum_rows")?;
        let rows = blocks as i64;
        Launch::new(&kernel)
            .with(&from)
            .with(&to)
            .with(&rows)
            .with(&width)
            .run(n.div_ceil(THREADS as usize), "norm backward")?;
        Ok(out)
    };
    Ok(Some([dx, sum(0)?, sum(1)?]))
}

/// Which pairs a rope turns, and which way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rope {
    pub(crate) interleaved: bool,
    pub(crate) sequence_first: bool,
    pub(crate) inverse: bool,
}

/// x turned by its rows' angles; contiguous.
pub(crate) fn rope(rope: Rope, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Option<Tensor>> {
    let (b, h, t, d) = x.dims4()?;
    let same = |table: &Tensor| table.dtype() == x.dtype();
    let Some(element) = element(x.dtype()).filter(|_| same(cos) && same(sin)) else {
        return Ok(None);
    };
    let (cos, sin) = (contiguous(cos)?, contiguous(sin)?);
    let steps = x.stride();
    let fits = |pack: usize| {
        (d / 2).is_multiple_of(pack)
            && aligned(x, pack)
            && steps[..3].iter().all(|step| step.is_multiple_of(pack))
    };
    let pack = if fits(element.widest()) {
        element.widest()
    } else {
        1
    };
    let x = if steps[3] == 1 {
        x.detach()
    } else {
        contiguous(x)?
    };
    let steps = RowSteps {
        h: h as i64,
        t: t as i64,
        sb: x.stride()[0] as i64,
        sh: x.stride()[1] as i64,
        st: x.stride()[2] as i64,
    };
    let module = Module::Rows(Rows {
        element,
        pack,
        steps: 1,
    });
    let out = unwritten(&device_of(&x)?, x.shape(), x.dtype())?;
    let step = |table: &Tensor| match *table.dims() {
        [_, rows, width] => (rows * width) as i64,
        _ => 0,
    };
    let (x_at, c_at, s_at, y_at) = (address(&x)?, address(&cos)?, address(&sin)?, address(&out)?);
    let (count, half) = ((b * h * t) as i64, (d / 2) as i32);
    let (c_step, s_step) = (step(&cos), step(&sin));
    let (interleaved, first) = (i32::from(rope.interleaved), i32::from(rope.sequence_first));
    let sign = if rope.inverse { -1_f32 } else { 1.0 };
    let kernel = function(&device_of(&x)?, module, "rope")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&c_at)
        .with(&s_at)
        .with(&y_at)
        .with(&steps)
        .with(&count)
        .with(&half)
        .with(&c_step)
        .with(&s_step)
        .with(&interleaved)
        .with(&first)
        .with(&sign)
        .run(
            (b * h * t * (d / 2 / pack)).div_ceil(THREADS as usize),
            "rope",
        )?;
    Ok(Some(out))
}

/// No class, in the tensor of classes.
pub(crate) const NO_CLASS: u32 = u32::MAX;

/// LSE and loss of each row of logits [rows, n]; `classes` is [rows] of `u32`.
pub(crate) fn loss_forward(logits: &Tensor, classes: &Tensor) -> Result<Option<[Tensor; 2]>> {
    let Some(element) = element(logits.dtype()) else {
        return Ok(None);
    };
    let (count, n) = logits.dims2()?;
    let logits = contiguous(logits)?;
    let device = device_of(&logits)?;
    let module = Module::Rows(flat(element, n));
    let (lse, loss) = (
        unwritten(&device, count, DType::F32)?,
        unwritten(&device, count, DType::F32)?,
    );
    let (x_at, c_at, lse_at, loss_at) = (
        address(&logits)?,
        address(classes)?,
        address(&lse)?,
        address(&loss)?,
    );
    let width = n as i64;
    let kernel = function(&device, module, "loss_forward")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&c_at)
        .with(&lse_at)
        .with(&loss_at)
        .with(&width)
        .run(count, "cross-entropy")?;
    Ok(Some([lse, loss]))
}

/// scale (softmax - onehot) of logits [rows, n].
pub(crate) fn loss_backward(
    logits: &Tensor,
    classes: &Tensor,
    lse: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let Some(element) = element(logits.dtype()) else {
        return Err(failure(
            "cross-entropy backward",
            format_args!("expected a float type, found {:?}", logits.dtype()),
        ));
    };
    let (count, n) = logits.dims2()?;
    let logits = contiguous(logits)?;
    let device = device_of(&logits)?;
    let out = unwritten(&device, logits.shape(), logits.dtype())?;
    let (x_at, c_at, lse_at, out_at) = (
        address(&logits)?,
        address(classes)?,
        address(lse)?,
        address(&out)?,
    );
    let (width, scale) = (n as i64, scale as f32);
    let kernel = function(&device, Module::Rows(flat(element, n)), "loss_backward")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&c_at)
        .with(&lse_at)
        .with(&out_at)
        .with(&width)
        .with(&scale)
        .run(count, "cross-entropy backward")?;
    Ok(out)
}

/// Losses of rows of logits [rows, n], which become, if there is a scale, scale (softmax - onehot) in their own memory.
pub(crate) fn loss_tile(
    logits: &Tensor,
    classes: &Tensor,
    scale: Option<f64>,
) -> Result<Option<Tensor>> {
    let (count, n) = logits.dims2()?;
    let Some(element) = element(logits.dtype()).filter(|_| logits.is_contiguous()) else {
        return Ok(None);
    };
    let module = flat(element, n);
    if !aligned(logits, module.pack) {
        return Ok(None);
    }
    let device = device_of(logits)?;
    let loss = unwritten(&device, count, DType::F32)?;
    let (x_at, c_at, loss_at) = (address(logits)?, address(classes)?, address(&loss)?);
    let (width, backward) = (n as i64, i32::from(scale.is_some()));
    let scale = scale.unwrap_or(0.0) as f32;
    let kernel = function(&device, Module::Rows(module), "loss_tile")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&c_at)
        .with(&loss_at)
        .with(&width)
        .with(&scale)
        .with(&backward)
        .run(count, "cross-entropy of a tile")?;
    Ok(Some(loss))
}

/// The gradient of a table [rows, n] from that of the rows that were taken: summed in `f32`, in no fixed order.
pub(crate) fn embedding_backward(
    index: &Tensor,
    grad: &Tensor,
    rows: usize,
) -> Result<Option<Tensor>> {
    let n = grad.dim(candle_core::D::Minus1)?;
    let Some(element) = element(grad.dtype()).filter(|_| index.dtype() == DType::U32) else {
        return Ok(None);
    };
    let (index, grad) = (contiguous(index)?, contiguous(grad)?);
    let device = device_of(&grad)?;
    let sum = Tensor::zeros((rows, n), DType::F32, grad.device())?;
    let (i_at, g_at, s_at) = (address(&index)?, address(&grad)?, address(&sum)?);
    let width = n as i64;
    let kernel = function(
        &device,
        Module::Rows(flat(element, n)),
        "embedding_backward",
    )?;
    Launch::new(&kernel)
        .with(&i_at)
        .with(&g_at)
        .with(&s_at)
        .with(&width)
        .run(index.elem_count(), "embedding backward")?;
    Ok(Some(sum.to_dtype(grad.dtype())?))
}

/// Partial sums of squares, `f64`, whose sum does not depend on timing.
pub(crate) fn squares(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(element) = element(x.dtype()) else {
        return Ok(None);
    };
    let x = contiguous(x)?;
    let module = flat(element, x.elem_count());
    let blocks = looping(x.elem_count(), module.pack).max(1);
    let out = unwritten(&device_of(&x)?, blocks, DType::F64)?;
    let (x_at, out_at, count) = (address(&x)?, address(&out)?, x.elem_count() as i64);
    let kernel = function(&device_of(&x)?, Module::Rows(module), "sum_squares")?;
    Launch::new(&kernel)
        .with(&x_at)
        .with(&out_at)
        .with(&count)
        .run(blocks, "norm of gradients")?;
    Ok(Some(out))
}

/// The numbers of one step of `AdamW`, in the order of the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamW {
    /// Factor on the gradient.
    pub(crate) scale: f32,
    /// 1 - rate x weight decay.
    pub(crate) keep: f32,
    /// 1 - beta1.
    pub(crate) blend1: f32,
    /// beta2.
    pub(crate) keep2: f32,
    /// 1 - beta2.
    pub(crate) blend2: f32,
    /// Rate over the first bias correction.
    pub(crate) step: f32,
    /// Root of the second bias correction.
    pub(crate) root2: f32,
    pub(crate) eps: f32,
}

/// Updates master, moments and variable in place; all contiguous and of one size, `f32` but for `out`.
pub(crate) fn adamw(
    step: AdamW,
    [master, first, second, grad]: [&Tensor; 4],
    out: &Tensor,
) -> Result<()> {
    let Some(element) = element(out.dtype()) else {
        return Err(failure(
            "AdamW",
            format_args!(
                "expected a variable in half or single precision, found {:?}",
                out.dtype()
            ),
        ));
    };
    let device = device_of(out)?;
    let at = [master, first, second, grad, out]
        .iter()
        .map(|x| address(x))
        .collect::<Result<Vec<_>>>()?;
    let count = out.elem_count() as i64;
    let AdamW {
        scale,
        keep,
        blend1,
        keep2,
        blend2,
        step,
        root2,
        eps,
    } = step;
    let kernel = function(
        &device,
        Module::Rows(Rows {
            element,
            pack: 1,
            steps: 1,
        }),
        "adamw",
    )?;
    let launch = at
        .iter()
        .fold(Launch::new(&kernel), Launch::with)
        .with(&count);
    let numbers = [scale, keep, blend1, keep2, blend2, step, root2, eps];
    let launch = numbers.iter().fold(launch, Launch::with);
    launch.run(looping(count as usize, 4).min(MANY as usize), "AdamW")
}
