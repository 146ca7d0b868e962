//! Matrix products that add to a sum in single precision, which candle's do not.

use std::ffi::{c_int, c_void};

use candle_core::{DType, Tensor};
use cudarc::cublas::{result, sys};

use super::failure::failure;
use super::memory::{address, device_of, unwritten};
use super::ops::contiguous;
use crate::Result;

/// `sum += aᵀ b` in `f32`, with a `[k, m]` and b `[k, n]` of one type of at most 32 bits; a new sum `[m, n]` if there is none.
///
/// # Errors
/// AS0411 with cuBLAS' words, or for a type that it is not given here.
pub(crate) fn add_product(
    sum: &mut Option<Tensor>,
    a: &Tensor,
    b: &Tensor,
) -> candle_core::Result<()> {
    let ((k, m), (_, n)) = (a.dims2()?, b.dims2()?);
    let (a, b) = (contiguous(a)?, contiguous(b)?);
    let beta = if sum.is_some() { 1f32 } else { 0.0 };
    let target = match sum.take() {
        Some(sum) => sum,
        None => unwritten(&device_of(&a)?, (m, n), DType::F32)?,
    };
    multiply(&a, &b, &target, [m, n, k], beta)?;
    *sum = Some(target);
    Ok(())
}

fn multiply(a: &Tensor, b: &Tensor, c: &Tensor, sizes: [usize; 3], beta: f32) -> Result<()> {
    const WHAT: &str = "sum of matrix products";
    let kind = match a.dtype() {
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        other => {
            let text = format_args!("expected a type of at most 32 bits, found {other:?}");
            return Err(failure(WHAT, text));
        }
    };
    let size = |n: usize| {
        c_int::try_from(n)
            .map_err(|_| failure(WHAT, format_args!("expected sizes below 2^31, found {n}")))
    };
    let [m, n, k] = sizes;
    let (m, n, k) = (size(m)?, size(n)?, size(k)?);
    let alpha = 1f32;
    let blas = device_of(a)?.cublas_handle();
    let (a_at, b_at, c_at) = (address(a)?, address(b)?, address(c)?);
    // cuBLAS has columns where candle has rows: cᵀ [n, m] = bᵀ a, of which b is read as bᵀ, and a as aᵀ, which is turned.
    // SAFETY: the addresses are those of contiguous tensors of these sizes on the handle's device, which live until the product is in the
    // stream that they are freed on; the scalars are read before the call returns.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            sys::cublasOperation_t::CUBLAS_OP_N,
            sys::cublasOperation_t::CUBLAS_OP_T,
            n,
            m,
            k,
            (&raw const alpha).cast::<c_void>(),
            b_at as *const c_void,
            kind,
            n,
            a_at as *const c_void,
            kind,
            m,
            (&raw const beta).cast::<c_void>(),
            c_at as *mut c_void,
            sys::cudaDataType::CUDA_R_32F,
            n,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .map_err(|error| failure(WHAT, format_args!("cuBLAS: {:?}", error.0)))
}
