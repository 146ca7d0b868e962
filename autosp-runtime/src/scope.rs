//! The sharded scope: where a model runs its sequence-parallel twin, and on which shard.
//!
//! A scope belongs to a thread, as a rank does. It ends with the closure that opened it, also by a panic, and never outlives the run.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use autosp_plan::codes;
use candle_core::{Device, Tensor};

use crate::comm::{Tag, all_to_all};
use crate::{Error, Result, Sp};

/// One rank's part of a sequence: tokens `start..start + len` of the padded sequence.
///
/// Padding is at the end of the sequence only, so that a shard holds padding if it reaches beyond `valid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "plain numbers, made by the loader"
)]
pub struct Shard {
    /// Tokens of the sequence, S.
    pub valid: usize,
    /// S rounded up to a multiple of `size`.
    pub padded: usize,
    /// Tokens of each rank, `padded / size`.
    pub len: usize,
    /// First token of this rank, `rank * len`.
    pub start: usize,
    /// Place in the sp group.
    pub rank: usize,
    /// Ranks in the sp group.
    pub size: usize,
}

impl Shard {
    /// The part of rank `rank` of `size` in a sequence of `valid` tokens.
    pub fn new(valid: usize, rank: usize, size: usize) -> Self {
        let len = valid.div_ceil(size);
        Self {
            valid,
            padded: len * size,
            len,
            start: rank * len,
            rank,
            size,
        }
    }

    /// Tokens of this shard that are not padding.
    pub fn valid_here(&self) -> usize {
        self.valid.saturating_sub(self.start).min(self.len)
    }
}

/// A sharded scope in progress.
#[derive(Debug, Clone)]
pub struct Scope {
    sp: Sp,
    step: u64,
    shard: Option<Shard>,
    batch: Option<usize>,
    /// Random operations so far: a copy of the scope goes on from where it was made.
    draws: u64,
    /// Blocks so far, of all copies.
    blocks: Arc<AtomicUsize>,
}

thread_local! {
    static CURRENT: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// The scope that this thread is in; `None` outside of one.
pub fn current() -> Option<Scope> {
    CURRENT.with_borrow(Clone::clone)
}

/// The place of a random operation in the forward in progress, from 0: the same on all ranks, and when a block is computed again.
pub(crate) fn draw() -> u64 {
    CURRENT.with_borrow_mut(|current| {
        current.as_mut().map_or(0, |scope| {
            scope.draws += 1;
            scope.draws - 1
        })
    })
}

/// Whether this thread is in a scope.
pub(crate) fn is_sharded() -> bool {
    CURRENT.with_borrow(Option::is_some)
}

/// The scope that this thread is in.
///
/// # Errors
/// AS0305, naming `what` needs it, outside of a scope.
pub fn require(what: &str) -> Result<Scope> {
    current().ok_or_else(|| {
        Error::new(
            codes::NO_SCOPE,
            format!("`{what}`: expected a sharded scope, found none"),
        )
        .with_help("sp.scope(|| ..)")
    })
}

impl Scope {
    pub(crate) fn new(sp: Sp, step: u64) -> Self {
        Self {
            sp,
            step,
            shard: None,
            batch: None,
            draws: 0,
            blocks: Arc::default(),
        }
    }

    /// The rank.
    pub fn sp(&self) -> &Sp {
        &self.sp
    }

    /// Which scope of the run this is, from 0; the same on all ranks.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The shard of the forward in progress.
    ///
    /// # Errors
    /// AS0305 if no sharded tensor has entered the model yet.
    pub fn shard(&self) -> Result<Shard> {
        self.shard.ok_or_else(|| {
            Error::new(
                codes::NO_SCOPE,
                "expected a forward in progress, found a scope that no sharded tensor has entered",
            )
        })
    }

    /// Rows of the batch of the forward in progress, where the model merges them with its heads.
    pub(crate) fn batch(&self) -> Option<usize> {
        self.batch
    }

    /// The place of a block that begins now among those of this scope, from 0.
    pub(crate) fn next_block(&self) -> usize {
        self.blocks.fetch_add(1, Ordering::Relaxed)
    }

    /// How many blocks have begun.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.load(Ordering::Relaxed)
    }

    /// Runs `f` in this scope, with its shard, whatever scope the thread is in. A backward that computes a block again uses this: by
    /// then the thread may have left the scope, or have forwarded another batch.
    pub fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        let _restore = Restore(CURRENT.replace(Some(self.clone())));
        f()
    }
}

/// Puts the previous scope back, also when unwinding.
struct Restore(Option<Scope>);

impl Drop for Restore {
    fn drop(&mut self) {
        let previous = self.0.take();
        // The thread-local is gone only while the thread itself ends.
        let _ = CURRENT.try_with(|current| current.replace(previous));
    }
}

/// A tensor that enters a model: finds its shard, and makes it the shard of the forward in progress.
pub(crate) fn enter(function: &str, inputs: &[(&str, &Tensor, usize)]) -> Result<()> {
    let Some(scope) = current() else {
        return Ok(());
    };
    let mut found: Option<(&str, Shard)> = None;
    for &(name, x, dim) in inputs {
        let shard = find(&scope, x, dim)
            .map_err(|error| error.context(format_args!("`{function}`, `{name}`")))?;
        match found {
            Some((first, other)) if other != shard => {
                let text = format!(
                    "`{function}`: expected inputs of one sequence, found `{first}` of length {} and `{name}` of length {}",
                    other.valid, shard.valid
                );
                return Err(Error::new(codes::LOCAL_LENGTH, text));
            }
            _ => found = Some((name, shard)),
        }
    }
    if let Some((_, shard)) = found {
        CURRENT.with_borrow_mut(|current| {
            if let Some(scope) = current {
                scope.shard = Some(shard);
            }
        });
    }
    Ok(())
}

/// The rows of the batch that the forward in progress has.
pub(crate) fn set_batch(rows: usize) {
    CURRENT.with_borrow_mut(|current| {
        if let Some(scope) = current {
            scope.batch = Some(rows);
        }
    });
}

/// A further tensor that enters a model, of a known number of dims; it is the same shard as those before it.
pub(crate) fn enter_beside(
    function: &str,
    name: &str,
    x: &Tensor,
    dim: usize,
    rank: usize,
) -> Result<()> {
    let Some(scope) = current() else {
        return Ok(());
    };
    if x.rank() != rank {
        let text = format!(
            "`{function}`: expected `{name}` of {rank} dims, as the model was analysed, found {:?}",
            x.dims()
        );
        return Err(Error::new(codes::INPUT_RANK, text)
            .with_help("read its sizes in the model, such as `let (b, s) = mask.dims2()?;`"));
    }
    let before = scope.shard;
    enter(function, &[(name, x, dim)])?;
    let after = current().and_then(|scope| scope.shard);
    match (before, after) {
        (Some(before), Some(after)) if before != after => {
            let text = format!(
                "`{function}`: expected inputs of one sequence, of length {}, found `{name}` of length {}",
                before.valid, after.valid
            );
            Err(Error::new(codes::LOCAL_LENGTH, text))
        }
        _ => Ok(()),
    }
}

fn find(scope: &Scope, x: &Tensor, dim: usize) -> Result<Shard> {
    let len = x.dim(dim)?;
    if let Some(shard) = scope.sp.shard_of(x.id()) {
        if shard.len != len {
            let text = format!(
                "expected length {} along dim {dim} (this rank's shard), found {len}",
                shard.len
            );
            return Err(Error::new(codes::LOCAL_LENGTH, text));
        }
        return Ok(shard);
    }
    match scope.sp.shard_of_length(len) {
        // One rank holds whole sequences: nothing needs to be cut for it.
        Err(error) if scope.sp.mesh().sp == 1 && error.code() == codes::LOCAL_LENGTH => {
            Ok(Shard::new(len, 0, 1))
        }
        found => found,
    }
}

/// Makes sure that `values` are the same on all ranks of the sp group of `sp`.
///
/// # Errors
/// AS0306 with the values of all ranks if they differ; else as [`crate::comm::Engine::wait`].
pub fn agree(sp: &Sp, name: &'static str, what: &str, values: &[u64]) -> Result<()> {
    let engine = sp.sp_group();
    if engine.size() == 1 {
        return Ok(());
    }
    let own: Vec<i64> = values.iter().map(|&value| value as i64).collect();
    let own = Tensor::new(own, &Device::Cpu)?;
    let received = all_to_all(
        engine,
        Tag::new(name, "agree"),
        vec![Some(own); engine.size()],
    )?;
    let mut all = Vec::with_capacity(received.len());
    for part in received.into_iter().flatten() {
        all.push(
            part.to_vec1::<i64>()?
                .into_iter()
                .map(|value| value as u64)
                .collect::<Vec<_>>(),
        );
    }
    if all.iter().all(|other| other == values) {
        return Ok(());
    }
    let shown: Vec<String> = engine
        .members()
        .iter()
        .zip(&all)
        .map(|(rank, values)| format!("{} on rank {rank}", numbers(values)))
        .collect();
    let text = format!(
        "`{name}`: expected the same {what} on all ranks of a sequence, found {}",
        shown.join(", ")
    );
    Err(Error::new(codes::RANKS_DISAGREE, text)
        .with_help("read data by `sp.dp_rank()`, which the ranks of a sequence share"))
}

fn numbers(values: &[u64]) -> String {
    match values {
        [one] => one.to_string(),
        many => format!("{many:?}"),
    }
}

#[cfg(test)]
mod tests;
