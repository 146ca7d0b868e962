//! Cutting tensors into the parts that travel, and putting them together again.

use candle_core::Tensor;

use crate::error::Result;

/// `heads` of dim `dim` of a tensor, as few views as possible.
pub(super) fn runs(x: &Tensor, dim: usize, heads: &[usize]) -> Result<Vec<Tensor>> {
    let mut views = Vec::new();
    let mut at = 0;
    while at < heads.len() {
        let mut end = at + 1;
        while end < heads.len() && heads[end] == heads[end - 1] + 1 {
            end += 1;
        }
        views.push(x.narrow(dim, heads[at], end - at)?);
        at = end;
    }
    Ok(views)
}

/// One buffer out of tensors [heads, b, len, d]: stacked by head where widths agree, else one after the other.
pub(super) fn packed(parts: &[Tensor]) -> Result<Tensor> {
    let widths = parts
        .iter()
        .map(|part| part.dim(3))
        .collect::<candle_core::Result<Vec<_>>>()?;
    if widths.windows(2).all(|pair| pair[0] == pair[1]) {
        return joined(parts, 0);
    }
    let flat = parts
        .iter()
        .map(Tensor::flatten_all)
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&flat, 0)?)
}

/// Takes [`packed`] apart: tensors [heads, b, len, d] for each (heads, d), which may have no heads.
pub(super) fn unpacked(
    buffer: &Tensor,
    batch: usize,
    len: usize,
    parts: &[(usize, usize)],
) -> Result<Vec<Tensor>> {
    let mut at = 0;
    let flat = buffer.rank() == 1;
    parts
        .iter()
        .map(|&(heads, d)| {
            let size = if flat { heads * batch * len * d } else { heads };
            let part = buffer.narrow(0, at, size)?;
            at += size;
            Ok(if flat {
                part.reshape((heads, batch, len, d))?
            } else {
                part
            })
        })
        .collect()
}

/// `parts` along `dim` as one tensor of its own memory.
pub(super) fn joined(parts: &[Tensor], dim: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if parts.first().is_some_and(|part| part.device().is_cuda()) {
        return gathered(parts, dim);
    }
    Ok(match parts {
        [one] => one.force_contiguous()?,
        parts => Tensor::cat(parts, dim)?.contiguous()?,
    })
}

/// As [`joined`], with one copy of each part on the GPU, whatever its strides.
#[cfg(feature = "cuda")]
fn gathered(parts: &[Tensor], dim: usize) -> Result<Tensor> {
    use crate::cuda::{device_of, ops, unwritten};
    let mut dims = parts[0].dims().to_vec();
    let lengths = parts
        .iter()
        .map(|part| part.dim(dim))
        .collect::<candle_core::Result<Vec<_>>>()?;
    dims[dim] = lengths.iter().sum();
    let whole = unwritten(&device_of(&parts[0])?, dims, parts[0].dtype())?;
    let mut at = 0;
    for (part, length) in parts.iter().zip(lengths) {
        if !ops::copy(&part.detach(), &whole.narrow(dim, at, length)?)? {
            return Ok(Tensor::cat(parts, dim)?.contiguous()?);
        }
        at += length;
    }
    Ok(whole)
}
