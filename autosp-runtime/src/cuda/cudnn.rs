//! cuDNN's backend interface: graphs of operations, built into plans and run.
//!
//! A handle and its plans belong to one thread and one stream. Building a plan takes 40 ms to half a second, so plans are kept by
//! problem; running one costs the host some ten microseconds.

mod descriptor;
mod plan;

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::cudnn::{result, sys};
use cudarc::driver::CudaStream;

use super::failure::Explain;
use crate::Result;
use crate::attention::graphs::{GradientStrides, Graph, Problem};
pub(super) use plan::Plan;

/// A problem and its direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) problem: Problem,
    /// The strides of the gradients, for a backward.
    pub(super) gradients: Option<GradientStrides>,
}

impl Key {
    fn graph(&self) -> Graph {
        match &self.gradients {
            None => self.problem.forward(),
            Some(gradients) => self.problem.backward(gradients),
        }
    }
}

/// cuDNN on one stream.
struct Session {
    stream: Arc<CudaStream>,
    /// Plans go before their handle.
    plans: HashMap<Key, Rc<Plan>>,
    handle: Handle,
}

pub(super) struct Handle(sys::cudnnHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle was created by this thread and is used no more.
        if let Err(error) = unsafe { result::destroy_handle(self.0) } {
            tracing::warn!(%error, "a cuDNN handle could not be destroyed");
        }
    }
}

thread_local! {
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

/// Runs `f` with the plan of `key` on `stream`, which is built if it is not there yet.
///
/// # Errors
/// AS0411 if cuDNN has no kernel for the problem, in its words; those of `f`.
pub(super) fn with_plan<T>(
    stream: &Arc<CudaStream>,
    key: &Key,
    f: impl FnOnce(&Handle, &Plan) -> Result<T>,
) -> Result<T> {
    SESSION.with_borrow_mut(|session| {
        if session
            .as_ref()
            .is_some_and(|session| session.stream.cu_stream() != stream.cu_stream())
        {
            *session = None;
        }
        let session = match session {
            Some(session) => session,
            empty => empty.insert(Session::new(stream)?),
        };
        let plan = if let Some(plan) = session.plans.get(key) {
            Rc::clone(plan)
        } else {
            let plan = Rc::new(Plan::build(&session.handle, &key.graph())?);
            session.plans.insert(*key, Rc::clone(&plan));
            plan
        };
        f(&session.handle, &plan)
    })
}

impl Session {
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().explain("cuDNN")?;
        let handle = Handle(result::create_handle().explain("opening cuDNN")?);
        // SAFETY: the stream lives as long as the session, which owns it.
        unsafe { result::set_stream(handle.0, stream.cu_stream().cast()) }
            .explain("cuDNN's stream")?;
        Ok(Self {
            stream: Arc::clone(stream),
            plans: HashMap::new(),
            handle,
        })
    }
}
