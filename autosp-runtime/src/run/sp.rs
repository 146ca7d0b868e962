//! What the user's closure gets: one rank's view of the run.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use autosp_plan::{Settings, codes};
use candle_core::{Device, TensorId};

use crate::comm::{Engine, Tag, World, all_to_all, barrier};
use crate::memory::{Shelf, link_to};
use crate::scope::{self, Scope, Shard};
use crate::{Bytes, Error, Ledger, Mesh, Result};

/// Shards that a rank remembers.
const SHARDS: usize = 16;

/// One rank of a run. Clones are the same rank.
#[derive(Clone)]
pub struct Sp(Arc<Inner>, Arc<Settings>);

struct Inner {
    mesh: Mesh,
    rank: usize,
    sp_group: Box<dyn Engine>,
    dp_group: Box<dyn Engine>,
    world_group: Box<dyn Engine>,
    device: Device,
    ledger: Arc<Ledger>,
    shared: Arc<World>,
    steps: AtomicU64,
    /// Of the numbers that dropout draws.
    seed: AtomicU64,
    shards: Mutex<VecDeque<(TensorId, Shard)>>,
    /// What blocks keep on the host, once one does.
    shelf: OnceLock<Arc<Shelf>>,
}

/// The three groups that a rank is in.
pub(super) struct Groups {
    pub(super) sp: Box<dyn Engine>,
    pub(super) dp: Box<dyn Engine>,
    pub(super) world: Box<dyn Engine>,
}

impl Sp {
    pub(super) fn new(
        mesh: Mesh,
        rank: usize,
        groups: Groups,
        device: Device,
        settings: Settings,
        ledger: Arc<Ledger>,
        shared: Arc<World>,
    ) -> Self {
        let Groups { sp, dp, world } = groups;
        let inner = Inner {
            mesh,
            rank,
            sp_group: sp,
            dp_group: dp,
            world_group: world,
            device,
            ledger,
            shared,
            steps: AtomicU64::new(0),
            seed: AtomicU64::new(0),
            shards: Mutex::default(),
            shelf: OnceLock::new(),
        };
        if let Some(limit) = settings.memory_limit() {
            inner.ledger.set_limit(limit);
        }
        Self(Arc::new(inner), Arc::new(settings))
    }

    /// The same rank, with other settings for what it runs in its scopes.
    pub(crate) fn with_settings(&self, settings: Settings) -> Self {
        Self(Arc::clone(&self.0), Arc::new(settings))
    }

    /// The mesh.
    pub fn mesh(&self) -> Mesh {
        self.0.mesh
    }

    /// This rank, from 0 to [`world_size`](Self::world_size).
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// All ranks of the run.
    pub fn world_size(&self) -> usize {
        self.0.mesh.world()
    }

    /// This rank's place among those that share its sequence.
    pub fn sp_rank(&self) -> usize {
        self.0.mesh.sp_rank(self.0.rank)
    }

    /// The replica that this rank is in.
    pub fn dp_rank(&self) -> usize {
        self.0.mesh.dp_rank(self.0.rank)
    }

    /// Whether this is rank 0, which prints and writes files.
    pub fn is_main(&self) -> bool {
        self.0.rank == 0
    }

    /// The ranks that share one sequence.
    pub fn sp_group(&self) -> &dyn Engine {
        &*self.0.sp_group
    }

    /// The ranks that hold the same part of different rows.
    pub fn dp_group(&self) -> &dyn Engine {
        &*self.0.dp_group
    }

    /// All ranks.
    pub fn world_group(&self) -> &dyn Engine {
        &*self.0.world_group
    }

    /// The device of this rank.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The settings of the run; of the rank inside of a trainer's scopes those with what the planner has chosen
    /// ([`Trainer::expect`](crate::Trainer::expect)).
    pub fn settings(&self) -> &Settings {
        &self.1
    }

    /// What this rank has handed to its peers.
    pub fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    /// The ledger, for those who hold on to it.
    pub(crate) fn shared_ledger(&self) -> Arc<Ledger> {
        Arc::clone(&self.0.ledger)
    }

    /// Sets the seed of what models draw while they run (dropout), on every rank the same; 0 at first.
    pub fn set_seed(&self, seed: u64) {
        self.0.seed.store(seed, Ordering::Relaxed);
    }

    /// The seed of what models draw while they run.
    pub fn seed(&self) -> u64 {
        self.0.seed.load(Ordering::Relaxed)
    }

    /// Runs `f` inside a sharded scope: models under the attribute run their sequence-parallel twins there, also on one rank.
    /// Every rank enters the same scopes. `trainer.step` and `trainer.evaluate` do this themselves.
    pub fn scope<R>(&self, f: impl FnOnce() -> R) -> R {
        self.0.shared.scope_begins(self.0.rank);
        let step = self.0.steps.fetch_add(1, Ordering::Relaxed);
        Scope::new(self.clone(), step).run(f)
    }

    /// Scopes that were opened so far.
    pub(crate) fn scopes(&self) -> u64 {
        self.0.steps.load(Ordering::Relaxed)
    }

    /// Goes on counting scopes where another run ended.
    pub(crate) fn set_scopes(&self, scopes: u64) {
        self.0.steps.store(scopes, Ordering::Relaxed);
    }

    /// Remembers that the tensor `tokens` is this rank's `shard` of a sequence. All ranks of the sp group register the same sequence at
    /// the same time.
    ///
    /// # Errors
    /// AS0306 if the ranks of the group cut sequences of different lengths; else as [`Engine::wait`].
    pub fn register_shard(&self, tokens: TensorId, shard: Shard) -> Result<()> {
        self.agree("sp.shard", "length", &[shard.valid as u64])?;
        let mut shards = self.shards();
        if shards.len() == SHARDS {
            shards.pop_front();
        }
        shards.push_back((tokens, shard));
        Ok(())
    }

    /// Makes sure that `values` are the same on all ranks of the sp group; `what` says what they are, in messages.
    ///
    /// # Errors
    /// AS0306 with the values of all ranks if they differ; else as [`Engine::wait`].
    pub fn agree(&self, name: &'static str, what: &'static str, values: &[u64]) -> Result<()> {
        scope::agree(self, name, what, values)
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// As [`Engine::wait`].
    pub fn barrier(&self) -> Result<()> {
        barrier(self.world_group(), Tag::new("sp.barrier", "barrier"))
    }

    /// The bytes of all ranks together, each given its own `bytes`.
    ///
    /// # Errors
    /// As [`Engine::wait`].
    pub fn sum_bytes(&self, bytes: Bytes) -> Result<Bytes> {
        let engine = self.world_group();
        let own =
            candle_core::Tensor::new(&[bytes.sent as i64, bytes.exchange as i64], &Device::Cpu)?;
        let received = all_to_all(
            engine,
            Tag::new("ledger", "sum"),
            vec![Some(own); engine.size()],
        )?;
        let mut sum = Bytes::default();
        for part in received.into_iter().flatten() {
            let numbers = part.to_vec1::<i64>()?;
            sum.sent += numbers[0] as u64;
            sum.exchange += numbers[1] as u64;
        }
        Ok(sum)
    }

    /// The shard that was registered for exactly this tensor, if it is not too long ago.
    pub(crate) fn shard_of(&self, tokens: TensorId) -> Option<Shard> {
        self.shards()
            .iter()
            .rev()
            .find(|(id, _)| *id == tokens)
            .map(|&(_, shard)| shard)
    }

    /// The latest shard of `len` tokens.
    ///
    /// # Errors
    /// AS0303 if there is none; AS0307 if there are several of different valid lengths.
    pub(crate) fn shard_of_length(&self, len: usize) -> Result<Shard> {
        let shards = self.shards();
        let mut fitting = shards
            .iter()
            .rev()
            .filter(|(_, shard)| shard.len == len)
            .map(|&(_, shard)| shard);
        let Some(latest) = fitting.next() else {
            let known: Vec<usize> = shards.iter().rev().map(|(_, shard)| shard.len).collect();
            let expected = match known.as_slice() {
                [] => "a tensor that `sp.shard` returned".to_owned(),
                [latest, ..] => format!("length {latest} (this rank's shard)"),
            };
            return Err(Error::new(
                codes::LOCAL_LENGTH,
                format!("expected {expected}, found length {len}"),
            )
            .with_help("let tokens = sp.shard(&tokens)?"));
        };
        if let Some(other) = fitting.find(|other| *other != latest) {
            let text = format!(
                "expected one batch with length {len} on this rank, found two of valid lengths {} and {}",
                latest.valid, other.valid
            );
            return Err(Error::new(codes::AMBIGUOUS_SHARD, text)
                .with_help("pass the model the very tensor that `sp.shard` returned"));
        }
        Ok(latest)
    }

    /// Where blocks of this rank keep things on the host.
    ///
    /// # Errors
    /// As [`link_to`].
    pub(crate) fn shelf(&self) -> Result<&Arc<Shelf>> {
        if let Some(shelf) = self.0.shelf.get() {
            return Ok(shelf);
        }
        let ledger = Arc::clone(&self.0.ledger);
        let link = link_to(&self.0.device)?;
        let shelf = Shelf::new(link, self.settings().host_memory(), ledger);
        Ok(self.0.shelf.get_or_init(|| Arc::new(shelf)))
    }

    fn shards(&self) -> std::sync::MutexGuard<'_, VecDeque<(TensorId, Shard)>> {
        self.0.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mesh { dp, sp } = self.0.mesh;
        write!(f, "rank {} of dp {dp} x sp {sp}", self.0.rank)
    }
}
