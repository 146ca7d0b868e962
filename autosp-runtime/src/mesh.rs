//! The mesh: which rank shares what with whom.

use std::ops::Range;

use autosp_plan::{Settings, codes};

use crate::{Error, Result};

/// `dp` replicas of `sp` ranks. The ranks of a replica share one sequence and are contiguous:
/// `rank = dp_rank * sp + sp_rank`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "two numbers, and a user writes them"
)]
pub struct Mesh {
    /// Replicas, which share a batch by rows.
    pub dp: usize,
    /// Ranks that share one sequence by tokens.
    pub sp: usize,
}

impl Mesh {
    /// The mesh of the settings.
    ///
    /// # Errors
    /// AS0301 if there would be more ranks than a number can say.
    pub fn from_settings(settings: &Settings) -> Result<Self> {
        let (dp, sp) = (settings.dp(), settings.sp());
        match dp.checked_mul(sp) {
            Some(1..=MOST_RANKS) => Ok(Self { dp, sp }),
            _ => Err(Error::new(
                codes::MESH,
                format!("expected 1 to {MOST_RANKS} ranks on threads, found dp {dp} x sp {sp}"),
            )),
        }
    }

    /// All ranks.
    pub fn world(self) -> usize {
        self.dp * self.sp
    }

    /// Place of `rank` in its sequence.
    pub fn sp_rank(self, rank: usize) -> usize {
        rank % self.sp
    }

    /// Replica of `rank`.
    pub fn dp_rank(self, rank: usize) -> usize {
        rank / self.sp
    }

    /// The ranks that share a sequence with `rank`, in order.
    pub fn sp_members(self, rank: usize) -> Range<usize> {
        let first = self.dp_rank(rank) * self.sp;
        first..first + self.sp
    }

    /// The ranks with the same place as `rank` in the other replicas, in order.
    pub fn dp_members(self, rank: usize) -> Vec<usize> {
        (0..self.dp)
            .map(|dp| dp * self.sp + self.sp_rank(rank))
            .collect()
    }
}

/// More threads than this are a typing error.
const MOST_RANKS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_in_one_group_of_each_kind() {
        let mesh = Mesh { dp: 3, sp: 4 };
        for rank in 0..mesh.world() {
            assert_eq!(mesh.dp_rank(rank) * mesh.sp + mesh.sp_rank(rank), rank);
            assert_eq!(mesh.sp_members(rank).nth(mesh.sp_rank(rank)), Some(rank));
            assert_eq!(mesh.dp_members(rank)[mesh.dp_rank(rank)], rank);
        }
        assert_eq!(mesh.sp_members(6), 4..8);
        assert_eq!(mesh.dp_members(6), [2, 6, 10]);
    }

    #[test]
    fn a_mesh_too_large_is_refused() {
        let error =
            Mesh::from_settings(&Settings::default().with_sp(usize::MAX).with_dp(2)).unwrap_err();
        assert_eq!(error.code(), codes::MESH);
    }
}
