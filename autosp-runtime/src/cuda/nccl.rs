//! A communicator of NCCL: one rank's handle on a group of GPUs.

use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::CudaStream;
use cudarc::nccl::{result, sys};

use super::failure::{Explain, failure};
use crate::Result;

/// The name of a group that is being formed: 128 bytes that its first member makes and all members pass.
pub(crate) type Id = [u8; 128];

/// A new name.
///
/// # Errors
/// AS0411 if NCCL finds no way to communicate.
pub(crate) fn new_id() -> Result<Id> {
    let id = result::get_uniqueid().explain("naming a group")?;
    Ok(id.internal.map(std::ffi::c_char::cast_unsigned))
}

/// NCCL's handle; `None` once it was aborted or destroyed.
struct Handle(Option<sys::ncclComm_t>);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the mutex around the handle sees to that.
unsafe impl Send for Handle {}

/// A group of GPUs, and this rank's place in it.
pub(crate) struct Communicator {
    handle: Mutex<Handle>,
    rank: usize,
    size: usize,
}

/// One buffer of an exchange: device address, bytes, and the member that it goes to or comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    pub(crate) peer: usize,
}

impl Communicator {
    /// Joins the group `id` as member `rank` of `size`; returns when all members have. The GPU's context is current on this thread.
    ///
    /// # Errors
    /// AS0411 if NCCL refuses, such as for two members on one GPU.
    pub(crate) fn join(id: &Id, rank: usize, size: usize) -> Result<Self> {
        let id = sys::ncclUniqueId {
            internal: id.map(u8::cast_signed),
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is written once; rank and size are those of a group whose members all pass this id.
        unsafe { result::comm_init_rank(&raw mut handle, size as i32, id, rank as i32) }.map_err(
            |error| {
                failure(
                    format_args!("rank {rank} of {size} joining its group"),
                    said(None, &error),
                )
            },
        )?;
        Ok(Self {
            handle: Mutex::new(Handle(Some(handle))),
            rank,
            size,
        })
    }

    /// The group of the members that pass the same `color`, in the order of `key`; all members call this together.
    ///
    /// # Errors
    /// AS0411 if NCCL refuses.
    pub(crate) fn split(&self, color: usize, key: usize, rank: usize, size: usize) -> Result<Self> {
        self.with("splitting a group", |handle| {
            let mut part = std::ptr::null_mut();
            // SAFETY: the handle is alive; a null configuration is that of the parent.
            let status = unsafe {
                sys::ncclCommSplit(
                    handle,
                    color as i32,
                    key as i32,
                    &raw mut part,
                    std::ptr::null_mut(),
                )
            };
            status.result().map(|_| Self {
                handle: Mutex::new(Handle(Some(part))),
                rank,
                size,
            })
        })
    }

    /// Puts one exchange on `stream`: all pieces travel together. Does not wait.
    ///
    /// # Errors
    /// AS0411 with the bytes of this rank if NCCL refuses.
    pub(crate) fn exchange(
        &self,
        stream: &CudaStream,
        send: &[Piece],
        receive: &[Piece],
    ) -> Result<()> {
        let bytes: usize = send.iter().map(|piece| piece.bytes).sum();
        self.with(format_args!("exchange of {bytes} bytes"), |handle| {
            result::group_start()?;
            let stream = stream.cu_stream().cast();
            let kind = sys::ncclDataType_t::ncclInt8;
            let queued = send.iter().map(|piece| {
                // SAFETY: the caller owns the buffers until the stream has passed this point, and they are on this GPU.
                unsafe {
                    result::send(
                        piece.address as *const _,
                        piece.bytes,
                        kind,
                        piece.peer as i32,
                        handle,
                        stream,
                    )
                }
            });
            let queued = queued.chain(receive.iter().map(|piece| {
                // SAFETY: as above; nothing else writes to the buffers.
                unsafe {
                    result::recv(
                        piece.address as *mut _,
                        piece.bytes,
                        kind,
                        piece.peer as i32,
                        handle,
                        stream,
                    )
                }
            }));
            // The group has to be closed whatever happened in it.
            let queued = queued.collect::<Result<Vec<_>, _>>();
            let closed = result::group_end();
            queued.and(closed).map(drop)
        })
    }

    /// What went wrong since, on any member, that no call has returned.
    pub(crate) fn asynchronous_error(&self) -> Option<String> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let comm = handle.0?;
        let mut status = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the handle is alive while the lock is held.
        let asked = unsafe { sys::ncclCommGetAsyncError(comm, &raw mut status) };
        match (asked, status) {
            (
                sys::ncclResult_t::ncclSuccess,
                sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress,
            ) => None,
            (_, status) => Some(said(Some(comm), &result::NcclError(status))),
        }
    }

    /// Ends what is in flight, also on the GPU, and frees the communicator. Later calls are refused.
    pub(crate) fn abort(&self) {
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(comm) = handle.0.take() {
            // SAFETY: the handle was alive and nobody else can see it any more.
            if let Err(error) = unsafe { result::comm_abort(comm) } {
                tracing::error!(error = ?error.0, "a communicator could not be aborted");
            }
        }
    }

    fn with<T>(
        &self,
        operation: impl std::fmt::Display,
        run: impl FnOnce(sys::ncclComm_t) -> Result<T, result::NcclError>,
    ) -> Result<T> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let operation = format!("rank {} of {}, {operation}", self.rank, self.size);
        let Some(comm) = handle.0 else {
            return Err(failure(operation, "NCCL: the group was aborted"));
        };
        run(comm).map_err(|error| failure(operation, said(Some(comm), &error)))
    }
}

/// NCCL's words for an error.
fn said(comm: Option<sys::ncclComm_t>, error: &result::NcclError) -> String {
    // SAFETY: NCCL returns a text of static life, or null.
    let last = unsafe { sys::ncclGetLastError(comm.unwrap_or(std::ptr::null_mut())) };
    let last = if last.is_null() {
        String::new()
    } else {
        // SAFETY: not null, and ended by a zero byte.
        unsafe { CStr::from_ptr(last) }
            .to_string_lossy()
            .into_owned()
    };
    format!("NCCL: {:?} {last}", error.0)
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let handle = self
            .handle
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(comm) = handle.0.take() {
            // SAFETY: the handle is alive and this is its only owner.
            if let Err(error) = unsafe { result::comm_destroy(comm) } {
                tracing::warn!(error = ?error.0, "a communicator could not be destroyed");
            }
        }
    }
}
