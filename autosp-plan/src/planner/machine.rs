//! The machine.

/// GPUs and the memory around them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "plain numbers")]
pub struct Machine {
    /// GPUs of all hosts together: the ranks.
    pub gpus: usize,
    /// GPUs that share a host's memory.
    pub gpus_per_host: usize,
    /// Memory of a GPU that a run may use, in bytes.
    pub device_bytes: u64,
    /// Memory of a host that a run may use, in bytes.
    pub host_bytes: u64,
}

/// Device memory that is no tensor: the CUDA context, libraries and buffers of NCCL. An allowance, not a measurement.
const CONTEXT: u64 = 3 << 29;

impl Machine {
    /// What tensors may fill on a device: 98 % of the memory, since a pool has gaps, less 1.5 GiB for the context, libraries and NCCL.
    pub fn usable(&self) -> u64 {
        (self.device_bytes / 50 * 49).saturating_sub(CONTEXT)
    }

    /// A device of which tensors may fill `usable` bytes.
    pub(super) fn around(usable: u64) -> u64 {
        usable
            .saturating_add(CONTEXT)
            .div_ceil(49)
            .saturating_mul(50)
    }

    /// Ranks that share a host's memory.
    pub fn ranks_of_host(&self) -> u64 {
        self.gpus.min(self.gpus_per_host) as u64
    }
}
