//! Which rank attends which heads, in which group.

use std::ops::Range;

use autosp_plan::codes;

use crate::error::{Error, Result};
use crate::schedule::HeadMap;

/// The division of a site's heads among ranks and head groups, all as lists of heads.
///
/// Query heads are ordered by kv head (for [`HeadMap::Blocked`] that is their own order), and rank r of P attends the r-th P-th of
/// that order. Its heads are split into groups as evenly as possible, at kv heads where there are as many. With P ranks
/// and G kv heads a rank holds G / P kv heads, or one that P / G ranks hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadPlan {
    ranks: usize,
    /// Query heads, rank after rank.
    order: Vec<usize>,
    /// Kv heads, rank after rank; a head that several ranks hold is there several times.
    kv_order: Vec<usize>,
    kv_heads: usize,
    /// For each query head of a rank, its kv head among the rank's; the same on all ranks.
    kv_of_local: Vec<usize>,
    /// For each group, its query heads among the rank's.
    groups: Vec<Range<usize>>,
}

impl HeadPlan {
    /// Plans `heads` query heads over `kv_heads` kv heads on `ranks` ranks in at most `groups` groups: never more groups than a rank
    /// has query heads, and a single one on a single rank, where there is nothing to overlap.
    ///
    /// # Errors
    /// `AS0321` if the ranks do not divide the query heads, or neither divide nor are divided by the kv heads.
    pub fn new(
        site: &str,
        map: HeadMap,
        heads: usize,
        kv_heads: usize,
        ranks: usize,
        groups: usize,
    ) -> Result<Self> {
        if kv_heads == 0 || ranks == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            let text = format!(
                "`{site}`: expected query heads that kv heads divide, found {heads} and {kv_heads}"
            );
            return Err(Error::new(codes::SITE_HEADS, text));
        }
        let fits = |p: usize| {
            heads.is_multiple_of(p) && (kv_heads.is_multiple_of(p) || p.is_multiple_of(kv_heads))
        };
        if !fits(ranks) {
            let feasible: Vec<String> = (1..=heads)
                .filter(|&p| fits(p))
                .map(|p| p.to_string())
                .collect();
            let feasible = feasible.join(", ");
            let text = format!(
                "`{site}`: {heads} query heads and {kv_heads} kv heads: expected sp among {feasible}, found {ranks}"
            );
            return Err(Error::new(codes::SITE_HEADS, text)
                .with_help(format!("set sp to one of {feasible}")));
        }
        let local = heads / ranks;
        let mut order: Vec<usize> = (0..heads).collect();
        let kv_of = |h: usize| map.kv_of(h, heads, kv_heads);
        if ranks > 1 {
            order.sort_by_key(|&h| kv_of(h));
        }
        let kv_order: Vec<usize> = if ranks == 1 {
            (0..kv_heads).collect()
        } else {
            let mut kv = Vec::new();
            for heads in order.chunks(local) {
                let mut own: Vec<usize> = heads.iter().map(|&h| kv_of(h)).collect();
                own.dedup();
                kv.extend(own);
            }
            kv
        };
        let kv_of_local = order[..local].iter().map(|&h| kv_of(h)).collect();
        let kv_local = kv_order.len() / ranks;
        let groups = if ranks == 1 {
            1
        } else {
            groups.clamp(1, local)
        };
        let units = if groups <= kv_local { kv_local } else { local };
        let groups = (0..groups)
            .map(|g| {
                g * units / groups * (local / units)..(g + 1) * units / groups * (local / units)
            })
            .collect();
        Ok(Self {
            ranks,
            order,
            kv_order,
            kv_heads,
            kv_of_local,
            groups,
        })
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Query heads of the model.
    pub fn heads(&self) -> usize {
        self.order.len()
    }

    /// Kv heads of the model.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Number of head groups.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The query heads that `rank` attends in group `g`, by their index in the model.
    pub fn q_heads(&self, rank: usize, g: usize) -> &[usize] {
        let local = self.order.len() / self.ranks;
        &self.order[rank * local..(rank + 1) * local][self.groups[g].clone()]
    }

    /// The kv heads that `rank` holds, by their index in the model.
    pub fn kv_held(&self, rank: usize) -> &[usize] {
        let held = self.kv_order.len() / self.ranks;
        &self.kv_order[rank * held..(rank + 1) * held]
    }

    /// The kv heads of group `g`, counted among those that a rank holds.
    pub fn kv_of_group(&self, g: usize) -> Vec<usize> {
        let mut kv: Vec<usize> = self.kv_of_local[self.groups[g].clone()].to_vec();
        kv.sort_unstable();
        kv.dedup();
        kv
    }

    /// [`kv_of_group`](Self::kv_of_group) of all groups.
    pub fn needs(&self) -> Vec<Vec<usize>> {
        (0..self.groups()).map(|g| self.kv_of_group(g)).collect()
    }

    /// The query heads of group `g`, counted among those of a rank.
    pub(super) fn locals(&self, g: usize) -> Range<usize> {
        self.groups[g].clone()
    }

    /// The kv head of the `local`-th query head of a rank, counted among those that the rank holds.
    pub(super) fn kv_of_local(&self, local: usize) -> usize {
        self.kv_of_local[local]
    }
}

/// Bytes that one rank hands to its peers in one forward of a site, and again in one backward that has everything it needs:
/// (H (d + dv) + max(G, P) (d + dv)) · bytes of an element · b · (`padded` / P) · (P - 1) / P.
///
/// Forward, Q and the output are the first term, K and V the second; backward their gradients, the other way round. What a policy makes
/// the backward send besides is in [`autosp_plan::cost::Site::backward_bytes`].
pub fn exchange_bytes(
    batch: usize,
    (heads, kv_heads): (usize, usize),
    (d, dv): (usize, usize),
    padded: usize,
    ranks: usize,
    element: usize,
) -> u64 {
    let heads_each = heads / ranks + kv_heads.max(ranks) / ranks;
    let numbers = batch * (padded / ranks) * heads_each * (d + dv) * (ranks - 1);
    (numbers * element) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(map: HeadMap, heads: usize, kv_heads: usize, ranks: usize, groups: usize) -> HeadPlan {
        HeadPlan::new("a site", map, heads, kv_heads, ranks, groups).unwrap()
    }

    #[test]
    fn groups_hold_whole_kv_heads_when_there_are_enough() {
        let plan = plan(HeadMap::Blocked, 16, 8, 2, 3);
        assert_eq!(plan.groups, [0..2, 2..4, 4..8]);
        assert_eq!(plan.needs(), [vec![0], vec![1], vec![2, 3]]);
        assert_eq!(plan.q_heads(1, 2), [12, 13, 14, 15]);
        assert_eq!(plan.kv_held(1), [4, 5, 6, 7]);
    }

    #[test]
    fn kv_heads_are_shared_by_groups_and_ranks_when_there_are_few() {
        let plan = plan(HeadMap::Blocked, 8, 1, 2, 3);
        assert_eq!(plan.groups, [0..1, 1..2, 2..4]);
        assert_eq!(plan.needs(), [vec![0], vec![0], vec![0]]);
        assert_eq!(
            (plan.kv_held(0), plan.kv_held(1)),
            ([0].as_slice(), [0].as_slice())
        );
    }

    #[test]
    fn what_does_not_divide_is_refused_with_what_does() {
        let refused = |heads, kv, ranks| {
            HeadPlan::new("m::f", HeadMap::Blocked, heads, kv, ranks, 1)
                .unwrap_err()
                .to_string()
        };
        let text = refused(12, 4, 3);
        assert!(
            text.contains("AS0321") && text.contains("expected sp among 1, 2, 4, 12, found 3"),
            "{text}"
        );
        assert!(refused(8, 3, 1).contains("kv heads divide"));
        assert!(refused(8, 8, 5).contains("among 1, 2, 4, 8"));
    }

    proptest! {
        #[test]
        fn every_head_is_attended_once_with_its_kv_head(
            kv_heads in 1usize..9, share in 1usize..5, ranks in 1usize..17, groups in 1usize..6, blocked in any::<bool>(),
        ) {
            let map = if blocked { HeadMap::Blocked } else { HeadMap::Interleaved };
            let heads = kv_heads * share;
            let Ok(plan) = HeadPlan::new("a site", map, heads, kv_heads, ranks, groups) else { return Ok(()) };
            let mut seen = vec![false; heads];
            for rank in 0..ranks {
                let mut at = 0;
                prop_assert_eq!(plan.kv_held(rank).len() * ranks, kv_heads.max(ranks));
                for g in 0..plan.groups() {
                    prop_assert!(!plan.q_heads(rank, g).is_empty());
                    for &h in plan.q_heads(rank, g) {
                        prop_assert!(!std::mem::replace(&mut seen[h], true));
                        let kv = plan.kv_held(rank)[plan.kv_of_local(at)];
                        prop_assert_eq!(kv, map.kv_of(h, heads, kv_heads));
                        prop_assert!(plan.kv_of_group(g).contains(&plan.kv_of_local(at)));
                        at += 1;
                    }
                }
            }
            prop_assert!(seen.into_iter().all(|seen| seen));
        }
    }
}
