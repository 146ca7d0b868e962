//! The `nccl` engine: ranks have a GPU each, and parts go from one to the other on the communication stream.
//!
//! Letters between the hosts say what travels, by the engine of threads: tags are compared, and the receiver learns the shapes, before
//! anything is put on a GPU. So [`start`](Engine::start) waits for the hosts of the peers, never for a GPU, and a mismatch is an
//! error instead of two kernels that wait for each other. [`wait`](Engine::wait) does not block either: it makes the compute stream
//! wait.
//!
//! Memory: what is sent and received stays in the engine's list from `start` to `wait`, since the pool frees in the order of
//! the compute stream, which knows nothing of the communication stream until then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use autosp_plan::codes;
use candle_core::{Device, Tensor};
use cudarc::driver::CudaEvent;

use super::local::{Letter, given};
use super::{Engine, Group, LocalEngine, Pending, Tag, World, broadcast};
use crate::cuda::nccl::{Communicator, Id, Piece, new_id};
use crate::cuda::{Explain, Gpu, Watch, address, unwritten};
use crate::{Error, Ledger, Mesh, Result};

/// A collective between `start` and `wait`.
struct Flying {
    /// What is sent: kept until the compute stream waits.
    _sent: Vec<Tensor>,
    received: Vec<Option<Tensor>>,
    done: Option<Arc<CudaEvent>>,
}

/// The communicators of one rank.
pub(crate) struct Wires {
    pub(crate) sp: Option<Arc<Communicator>>,
    pub(crate) dp: Option<Arc<Communicator>>,
    pub(crate) world: Option<Arc<Communicator>>,
    pub(crate) watch: Option<Arc<Watch>>,
}

/// A rank's handle on one group of GPUs.
pub(crate) struct NcclEngine {
    mail: LocalEngine,
    gpu: Gpu,
    group: Option<Arc<Communicator>>,
    watch: Option<Arc<Watch>>,
    flying: Mutex<HashMap<u64, Flying>>,
}

/// Joins the groups of rank `rank`: one communicator for the world, parts of it for sp and dp. All ranks call this together.
///
/// # Errors
/// AS0411 if NCCL refuses; as [`Engine::wait`].
pub(crate) fn connect(world: &Arc<World>, mesh: Mesh, rank: usize) -> Result<Wires> {
    let size = mesh.world();
    if size == 1 {
        return Ok(Wires {
            sp: None,
            dp: None,
            world: None,
            watch: None,
        });
    }
    let group = Group {
        kind: "start",
        members: (0..size).collect(),
    };
    let mail = LocalEngine::new(Arc::clone(world), group, rank, Arc::new(Ledger::default()));
    let own = if rank == 0 { new_id()? } else { [0; 128] };
    let id = broadcast(
        &mail,
        Tag::new("nccl", "join"),
        &Tensor::from_slice(&own, 128, &Device::Cpu)?,
        0,
    )?;
    let id: Id = id.to_vec1::<u8>()?.try_into().unwrap_or([0; 128]);
    let whole = Arc::new(Communicator::join(&id, rank, size)?);
    let part = |members: usize, color: usize, place: usize| -> Result<Option<Arc<Communicator>>> {
        match members {
            1 => Ok(None),
            all if all == size => Ok(Some(Arc::clone(&whole))),
            _ => Ok(Some(Arc::new(whole.split(color, place, place, members)?))),
        }
    };
    let sp = part(mesh.sp, mesh.dp_rank(rank), mesh.sp_rank(rank))?;
    let dp = part(mesh.dp, mesh.sp_rank(rank), mesh.dp_rank(rank))?;
    let all: Vec<Weak<Communicator>> = [&sp, &dp]
        .into_iter()
        .flatten()
        .chain([&whole])
        .map(Arc::downgrade)
        .collect();
    let aborted = all.clone();
    world.on_failure(move || {
        aborted
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|group| group.abort());
    });
    let (for_deadline, for_late) = (Arc::downgrade(world), Arc::downgrade(world));
    let watch = Watch::new(
        // Without a world there is nothing left to watch.
        move || {
            for_deadline
                .upgrade()
                .map_or(Duration::MAX, |world| world.deadline(rank))
        },
        move || {
            all.iter()
                .filter_map(Weak::upgrade)
                .find_map(|group| group.asynchronous_error())
        },
        move |what| {
            if let Some(world) = for_late.upgrade() {
                let all: Vec<usize> = (0..size).collect();
                let last = world.history(&all);
                let text = format!("rank {rank}: {what}\n  the last collectives were:{last}");
                world.raise(
                    rank,
                    Error::new(codes::DEADLINE, text)
                        .with_help("AUTOSP_DEADLINE=600 if the ranks only need longer"),
                );
            }
        },
    )
    .map_err(|error| {
        Error::new(
            codes::CUDA,
            format!("rank {rank}: could not start a watchdog: {error}"),
        )
    })?;
    Ok(Wires {
        sp,
        dp,
        world: Some(whole),
        watch: Some(Arc::new(watch)),
    })
}

impl NcclEngine {
    /// The handle over `mail`, whose group `group` connects; a group of one has none.
    pub(crate) fn new(
        mail: LocalEngine,
        gpu: Gpu,
        group: Option<Arc<Communicator>>,
        watch: Option<Arc<Watch>>,
    ) -> Self {
        Self {
            mail,
            gpu,
            group,
            watch,
            flying: Mutex::default(),
        }
    }

    /// Puts the parts on the communication stream. `letters` is what the peers announce.
    fn launch(
        &self,
        tag: Tag,
        sequence: u64,
        parts: &[Option<Tensor>],
        letters: Vec<Letter>,
    ) -> Result<Flying> {
        let mut received = Vec::with_capacity(letters.len());
        let (mut send, mut receive, mut sent) = (Vec::new(), Vec::new(), Vec::new());
        for (peer, letter) in letters.into_iter().enumerate() {
            received.push(match letter {
                Letter::Empty => None,
                Letter::Part(part) => Some(part),
                Letter::Announced(dims, dtype) => {
                    let part = unwritten(&self.gpu.device, dims, dtype)?;
                    receive.extend(piece(&part, peer)?);
                    Some(part)
                }
            });
        }
        for (peer, part) in parts.iter().enumerate() {
            if let Some(part) = part.as_ref().filter(|part| part.device().is_cuda()) {
                send.extend(piece(part, peer)?);
                sent.push(part.clone());
            }
        }
        let mut done = None;
        if let Some(group) = self
            .group
            .as_ref()
            .filter(|_| !(send.is_empty() && receive.is_empty()))
        {
            let Gpu { compute, side, .. } = &self.gpu;
            let what = || format!("rank {}, {tag}, collective #{sequence}", self.world_rank());
            // What is sent has been written and what is received has been allocated, in the order of the compute stream.
            side.join(compute).explain(what())?;
            let start = side.record_event(None).explain(what())?;
            group
                .exchange(side, &send, &receive)
                .map_err(|error| error.context(what()))?;
            let finish = Arc::new(side.record_event(None).explain(what())?);
            if let Some(watch) = &self.watch {
                watch.add(what(), start, Arc::clone(&finish));
            }
            done = Some(finish);
        }
        Ok(Flying {
            _sent: sent,
            received,
            done,
        })
    }
}

/// A tensor on a GPU as NCCL takes it; nothing for an empty one.
fn piece(x: &Tensor, peer: usize) -> Result<Option<Piece>> {
    let bytes = x.elem_count() * x.dtype().size_in_bytes();
    if bytes == 0 {
        return Ok(None);
    }
    Ok(Some(Piece {
        address: address(x)?,
        bytes,
        peer,
    }))
}

impl Engine for NcclEngine {
    fn rank(&self) -> usize {
        self.mail.rank()
    }

    fn members(&self) -> &[usize] {
        self.mail.members()
    }

    fn world_rank(&self) -> usize {
        self.mail.world_rank()
    }

    fn start(&self, tag: Tag, mut parts: Vec<Option<Tensor>>) -> Result<Pending> {
        self.mail.expect_parts(tag, parts.len())?;
        let own = parts[self.rank()].take();
        let parts = parts
            .into_iter()
            .map(|part| part.map(given).transpose())
            .collect::<Result<Vec<_>>>()?;
        let letters = parts.iter().map(|part| match part {
            None => Letter::Empty,
            Some(part) if part.device().is_cuda() => {
                Letter::Announced(part.dims().to_vec(), part.dtype())
            }
            Some(part) => Letter::Part(part.clone()),
        });
        let sequence = self.mail.send(tag, letters.collect())?;
        let letters = self.mail.receive(tag, sequence)?;
        // A rank that cannot go on here leaves kernels waiting on the other GPUs: the run fails at once, which aborts them.
        let flying = self
            .launch(tag, sequence, &parts, letters)
            .map_err(|error| self.mail.fault(error))?;
        self.flying
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(sequence, flying);
        Ok(Pending { tag, sequence, own })
    }

    fn wait(&self, pending: Pending) -> Result<Vec<Option<Tensor>>> {
        let Pending { tag, sequence, own } = pending;
        let flying = self
            .flying
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&sequence);
        let Some(Flying {
            mut received,
            done,
            _sent,
        }) = flying
        else {
            let text = format!("{tag}: collective #{sequence} was not started by this engine");
            return Err(Error::new(codes::COLLECTIVE_ARGUMENT, text));
        };
        if let Some(done) = &done {
            self.gpu
                .compute
                .wait(done)
                .explain(format_args!("rank {}, {tag}", self.world_rank()))?;
        }
        self.mail.completed(sequence);
        received[self.mail.rank()] = own;
        Ok(received)
    }
}

impl Drop for NcclEngine {
    /// Collectives that were never waited for, after a failure: their memory is theirs until the stream has passed them.
    fn drop(&mut self) {
        let flying = self
            .flying
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if !flying.is_empty() && self.gpu.side.synchronize().is_err() {
            // The context is lost: its memory goes with the process.
            std::mem::forget(std::mem::take(flying));
        }
    }
}
