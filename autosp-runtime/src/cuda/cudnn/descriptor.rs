//! Descriptors of cuDNN's backend: made, given attributes, finished.

use std::ffi::{CStr, c_void};

use cudarc::cudnn::sys;

pub(super) use sys::cudnnBackendAttributeName_t as Name;
pub(super) use sys::cudnnBackendDescriptorType_t as Type;

use crate::Result;
use crate::cuda::failure::failure;

/// A value that an attribute can have.
///
/// # Safety
/// `TYPE` says how cuDNN reads `Self`.
pub(super) unsafe trait Attribute {
    const TYPE: sys::cudnnBackendAttributeType_t;
}

macro_rules! attribute {
    ($($rust:ty => $cudnn:ident),* $(,)?) => { $(
        // SAFETY: cuDNN documents this C type for the attribute type, and the Rust type has its layout.
        unsafe impl Attribute for $rust {
            const TYPE: sys::cudnnBackendAttributeType_t = sys::cudnnBackendAttributeType_t::$cudnn;
        }
    )* };
}

attribute! {
    i64 => CUDNN_TYPE_INT64,
    bool => CUDNN_TYPE_BOOLEAN,
    *mut c_void => CUDNN_TYPE_VOID_PTR,
    sys::cudnnHandle_t => CUDNN_TYPE_HANDLE,
    sys::cudnnDataType_t => CUDNN_TYPE_DATA_TYPE,
    sys::cudnnPointwiseMode_t => CUDNN_TYPE_POINTWISE_MODE,
    sys::cudnnReduceTensorOp_t => CUDNN_TYPE_REDUCTION_OPERATOR_TYPE,
    sys::cudnnBackendHeurMode_t => CUDNN_TYPE_HEUR_MODE,
}

/// A descriptor.
#[derive(Debug)]
pub(super) struct Descriptor {
    raw: sys::cudnnBackendDescriptor_t,
    kind: Type,
}

impl Descriptor {
    pub(super) fn new(kind: Type) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        check(
            // SAFETY: the function writes one pointer.
            unsafe { sys::cudnnBackendCreateDescriptor(kind, &raw mut raw) },
            kind,
            "creating",
        )?;
        Ok(Self { raw, kind })
    }

    /// Sets an attribute to some values.
    pub(super) fn set<T: Attribute>(self, name: Name, values: &[T]) -> Result<Self> {
        // SAFETY: `Attribute` vouches for the type, the slice for pointer and count; cuDNN copies the values.
        let status = unsafe {
            sys::cudnnBackendSetAttribute(
                self.raw,
                name,
                T::TYPE,
                values.len() as i64,
                values.as_ptr().cast(),
            )
        };
        check(status, self.kind, format_args!("{name:?} of"))?;
        Ok(self)
    }

    /// Sets an attribute to other descriptors, which have to outlive this one.
    pub(super) fn refer(self, name: Name, to: &[&Self]) -> Result<Self> {
        let raw: Vec<sys::cudnnBackendDescriptor_t> =
            to.iter().map(|descriptor| descriptor.raw).collect();
        let kind = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        // SAFETY: the descriptors are alive and finished; cuDNN copies the handles.
        let status = unsafe {
            sys::cudnnBackendSetAttribute(
                self.raw,
                name,
                kind,
                raw.len() as i64,
                raw.as_ptr().cast(),
            )
        };
        check(status, self.kind, format_args!("{name:?} of"))?;
        Ok(self)
    }

    pub(super) fn finish(self) -> Result<Self> {
        check(
            // SAFETY: the descriptor is alive.
            unsafe { sys::cudnnBackendFinalize(self.raw) },
            self.kind,
            "finishing",
        )?;
        Ok(self)
    }

    /// A whole number.
    pub(super) fn number(&self, name: Name) -> Result<i64> {
        let (mut value, mut count) = (0_i64, 0_i64);
        // SAFETY: room for one number, as said.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(
                self.raw,
                name,
                i64::TYPE,
                1,
                &raw mut count,
                (&raw mut value).cast(),
            )
        };
        check(status, self.kind, format_args!("reading {name:?} of"))?;
        Ok(value)
    }

    /// Up to `most` descriptors of type `kind`.
    pub(super) fn list(&self, name: Name, kind: Type, most: usize) -> Result<Vec<Self>> {
        let mut all = (0..most)
            .map(|_| Self::new(kind))
            .collect::<Result<Vec<_>>>()?;
        let mut raw: Vec<sys::cudnnBackendDescriptor_t> =
            all.iter().map(|descriptor| descriptor.raw).collect();
        let mut count = 0_i64;
        let attribute = sys::cudnnBackendAttributeType_t::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        // SAFETY: room for `most` descriptors, which cuDNN fills.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(
                self.raw,
                name,
                attribute,
                most as i64,
                &raw mut count,
                raw.as_mut_ptr().cast(),
            )
        };
        check(status, self.kind, format_args!("reading {name:?} of"))?;
        all.truncate(count.clamp(0, most as i64) as usize);
        Ok(all)
    }

    /// Runs a plan.
    pub(super) fn execute(&self, handle: sys::cudnnHandle_t, pack: &Self) -> Result<()> {
        // SAFETY: plan and pack are finished; the pack's addresses are those that the caller answers for.
        check(
            unsafe { sys::cudnnBackendExecute(handle, self.raw, pack.raw) },
            self.kind,
            "running",
        )
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the descriptor is alive and owned.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.raw) };
    }
}

fn check(status: sys::cudnnStatus_t, kind: Type, what: impl std::fmt::Display) -> Result<()> {
    if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut text = [0 as std::ffi::c_char; 512];
    // SAFETY: cuDNN writes at most the given number of bytes, the last of them zero.
    let said = unsafe {
        sys::cudnnGetLastErrorString(text.as_mut_ptr(), text.len());
        text[text.len() - 1] = 0;
        CStr::from_ptr(text.as_ptr())
    };
    Err(failure(
        format_args!("{what} {kind:?}"),
        format_args!("cuDNN: {status:?} {}", said.to_string_lossy()),
    ))
}
