//! Settings by name and type: the setters for programs, and the accessors.

use std::time::Duration;

use super::{
    Attention, Device, Keep, Memory, NO_LIMIT, Place, Policies, Policy, Settings, Source, Value,
    Zero, find,
};

impl Settings {
    /// Sets the number of ranks that share one sequence.
    #[must_use]
    pub fn with_sp(self, sp: usize) -> Self {
        self.program("sp", Value::Count(sp))
    }

    /// Sets the number of replicas that share a batch.
    #[must_use]
    pub fn with_dp(self, dp: usize) -> Self {
        self.program("dp", Value::Count(dp))
    }

    /// Sets the bytes of logits that a loss without whole logits makes at a time.
    #[must_use]
    pub fn with_loss_bytes(self, bytes: usize) -> Self {
        self.program("loss_bytes", Value::Count(bytes))
    }

    /// Sets the number of head groups of each site.
    #[must_use]
    pub fn with_groups(self, groups: usize) -> Self {
        self.program("groups", Value::Count(groups))
    }

    /// Sets how long a rank waits for the others.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        self.program("deadline", Value::Seconds(deadline.as_secs_f64()))
    }

    /// Sets how long ranks may take to start, and over the collectives of the first step.
    #[must_use]
    pub fn with_start_deadline(self, deadline: Duration) -> Self {
        self.program("start_deadline", Value::Seconds(deadline.as_secs_f64()))
    }

    /// Sets the attention.
    #[must_use]
    pub fn with_attention(self, attention: Attention) -> Self {
        self.program(
            "attention",
            Value::Choice(match attention {
                Attention::Tiled => "tiled",
                Attention::Reference => "reference",
            }),
        )
    }

    /// Sets what the ranks compute on.
    #[must_use]
    pub fn with_device(self, device: Device) -> Self {
        self.program(
            "device",
            Value::Choice(match device {
                Device::Cpu => "cpu",
                Device::Cuda => "cuda",
                Device::CudaShared => "cuda-shared",
            }),
        )
    }

    /// Sets what a forward keeps.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        self.with_policies(Policies::uniform(Keep::on_device(policy)))
    }

    /// Sets what each block keeps, and where.
    #[must_use]
    pub fn with_policies(self, policies: Policies) -> Self {
        self.program("policy", Value::Policies(policies))
    }

    /// Sets the most memory of the host that a rank takes for what blocks keep there.
    #[must_use]
    pub fn with_host_memory(self, bytes: u64) -> Self {
        self.program("host_memory", Value::Bytes(bytes))
    }

    /// Sets how many tokens the parts of a block which compute each token by itself take at a time.
    #[must_use]
    pub fn with_tile(self, tokens: usize) -> Self {
        self.program("tile", Value::Count(tokens))
    }

    /// Sets what ranks divide of the optimizer.
    #[must_use]
    pub fn with_zero(self, zero: Zero) -> Self {
        self.program("zero", Value::Choice(zero.name()))
    }

    /// Sets whether what nobody says is chosen by the planner.
    #[must_use]
    pub fn with_memory(self, memory: Memory) -> Self {
        self.program(
            "memory",
            Value::Choice(match memory {
                Memory::Auto => "auto",
                Memory::Fixed => "fixed",
            }),
        )
    }

    /// Sets the most memory of its device that a rank takes, in bytes.
    #[must_use]
    pub fn with_memory_limit(self, bytes: u64) -> Self {
        self.program("memory_limit", Value::Bytes(bytes))
    }

    /// Sets where the optimizer has its state and steps.
    #[must_use]
    pub fn with_optimizer(self, place: Place) -> Self {
        self.program("optimizer", Value::Choice(place.name()))
    }

    /// Ranks that share one sequence.
    pub fn sp(&self) -> usize {
        self.count("sp")
    }

    /// Replicas that share a batch.
    pub fn dp(&self) -> usize {
        self.count("dp")
    }

    /// Head groups of each site; a site with fewer heads on a rank uses fewer.
    pub fn groups(&self) -> usize {
        self.count("groups")
    }

    /// Tokens that the parts of a block which compute each token by itself take at a time.
    pub fn tile(&self) -> usize {
        self.count("tile")
    }

    /// Bytes of logits that a loss without whole logits makes at a time.
    pub fn loss_bytes(&self) -> usize {
        self.count("loss_bytes")
    }

    /// How long a rank waits for the others before it gives up.
    pub fn deadline(&self) -> Duration {
        self.seconds("deadline")
    }

    /// The same while ranks start and in the collectives of the first step; never shorter than [`deadline`](Self::deadline).
    pub fn start_deadline(&self) -> Duration {
        self.seconds("start_deadline").max(self.deadline())
    }

    /// The attention.
    pub fn attention(&self) -> Attention {
        if self.choice("attention") == "reference" {
            Attention::Reference
        } else {
            Attention::Tiled
        }
    }

    /// What the ranks compute on.
    pub fn device(&self) -> Device {
        match self.choice("device") {
            "cuda" => Device::Cuda,
            "cuda-shared" => Device::CudaShared,
            _ => Device::Cpu,
        }
    }

    /// What each block keeps, and where.
    pub fn policies(&self) -> &Policies {
        match &self.get("policy").0 {
            Value::Policies(policies) => policies,
            _ => const { &ALL },
        }
    }

    /// The most memory of the host that a rank takes for what blocks keep there, in bytes.
    pub fn host_memory(&self) -> u64 {
        self.bytes("host_memory")
    }

    /// Who says what a step keeps and cuts.
    pub fn memory(&self) -> Memory {
        match self.choice("memory") {
            "fixed" => Memory::Fixed,
            _ => Memory::Auto,
        }
    }

    /// The most memory of its device that a rank takes, in bytes; `None` for no limit.
    pub fn memory_limit(&self) -> Option<u64> {
        Some(self.bytes("memory_limit")).filter(|bytes| *bytes < NO_LIMIT)
    }

    /// Where the optimizer has its state and steps.
    pub fn optimizer(&self) -> Place {
        match self.choice("optimizer") {
            "host" => Place::Host,
            _ => Place::Device,
        }
    }

    /// What ranks divide of the optimizer.
    pub fn zero(&self) -> Zero {
        let word = self.choice("zero");
        let named = Zero::ALL.into_iter().find(|zero| zero.name() == word);
        named.unwrap_or(Zero::Stage0)
    }

    /// The typed accessors name rows of the table; a test reads each once.
    fn get(&self, name: &str) -> &(Value, Source) {
        &self.values[find(name).expect("an accessor names a row of the table")]
    }

    fn count(&self, name: &str) -> usize {
        match self.get(name).0 {
            Value::Count(n) => n,
            _ => 0,
        }
    }

    fn bytes(&self, name: &str) -> u64 {
        match self.get(name).0 {
            Value::Bytes(n) => n,
            _ => 0,
        }
    }

    fn seconds(&self, name: &str) -> Duration {
        match self.get(name).0 {
            Value::Seconds(seconds) => Duration::from_secs_f64(seconds),
            _ => Duration::ZERO,
        }
    }

    fn choice(&self, name: &str) -> &'static str {
        match self.get(name).0 {
            Value::Choice(word) => word,
            _ => "",
        }
    }
}

/// Every activation of every block.
const ALL: Policies = Policies::uniform(Keep::on_device(Policy::All));
