//! Strided views of tensors on the host, whose rows along the last dim are slices.

use std::ops::Range;

use autosp_plan::codes;
use candle_core::{Storage, Tensor};

use super::real::Element;
use crate::error::{Error, Result};

/// A tensor [b, h, s, d] with contiguous rows.
#[derive(Clone, Copy)]
pub(super) struct View<'a, E> {
    data: &'a [E],
    strides: [usize; 3],
    width: usize,
}

impl<'a, E> View<'a, E> {
    /// The `d` elements at (b, h, s).
    #[inline(always)]
    pub(super) fn row(&self, b: usize, h: usize, s: usize) -> &'a [E] {
        let at = b * self.strides[0] + h * self.strides[1] + s * self.strides[2];
        &self.data[at..at + self.width]
    }

    /// The rows of a range of the sequence.
    #[inline(always)]
    pub(super) fn rows(
        self,
        b: usize,
        h: usize,
        range: Range<usize>,
    ) -> impl Iterator<Item = &'a [E]> + Clone
    where
        E: Copy,
    {
        range.map(move |s| self.row(b, h, s))
    }
}

/// Runs `body` with a view of a 4-D tensor; the tensor is copied only when the elements of a row are not adjacent.
pub(super) fn with_view<E: Element, T>(
    tensor: &Tensor,
    body: impl FnOnce(View<'_, E>) -> Result<T>,
) -> Result<T> {
    let adjacent = tensor.stride().last() == Some(&1) || tensor.dims().last() == Some(&1);
    let tensor = if adjacent {
        tensor.clone()
    } else {
        tensor.contiguous()?
    };
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::new(
            codes::KERNEL,
            format!(
                "attention: expected tensors on the CPU, found {:?}",
                tensor.device().location()
            ),
        ));
    };
    let data = E::cpu_storage_as_slice(storage)?;
    let data = &data[layout.start_offset()..];
    let (_, _, _, width) = layout.shape().dims4()?;
    let stride = layout.stride();
    body(View {
        data,
        strides: [stride[0], stride[1], stride[2]],
        width,
    })
}
