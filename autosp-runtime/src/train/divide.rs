//! `ZeRO` stage 2: gradients are summed and divided among the ranks while the backward runs, so that no rank ever holds all of them.
//!
//! After each block of the model has walked back, every bucket whose variables all have their gradients is reduced to the ranks that
//! own it, and what was found here is dropped. Ranks have to agree on the buckets: in the first backward they tell each other after
//! each block what they have; from then on the n-th block is followed by the buckets that it was followed by then, whatever is there,
//! and zeros where nothing is. What comes later or from outside of blocks is reduced at the end of the backward and added. So sums are
//! exact whatever the blocks share; that a bucket travels twice is the price where they do.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Tensor, TensorId, Var};

use super::flat::Bucket;
use super::reduce;
use crate::ops::wide;
use crate::site::bytes;
use crate::{Purpose, Result, Sp, memory};

thread_local! {
    /// The divider of the backward in progress on this thread, which is this rank.
    static DIVIDER: RefCell<Option<Divider>> = const { RefCell::new(None) };
}

/// Divides the gradients of a trainer's variables.
pub(crate) struct Divider {
    sp: Sp,
    vars: Vec<Var>,
    buckets: Vec<Bucket>,
    /// The place of each variable in the order of names.
    places: HashMap<TensorId, usize>,
    /// For the n-th block of a backward, the buckets that are reduced after it, and whether they travel as sums, in a wide type.
    schedule: Vec<Vec<(usize, bool)>>,
    /// Blocks of this backward that have walked back.
    blocks: usize,
    /// Gradients that were not reduced yet.
    pending: Vec<Option<Tensor>>,
    /// Variables that had a gradient here.
    had: Vec<bool>,
    /// Variables whose pending gradient is a sum.
    summed: Vec<bool>,
    /// Bytes of the shares of earlier micro-batches.
    earlier: u64,
    /// This rank's share of the sum of each bucket.
    shares: Vec<Option<Tensor>>,
}

impl Divider {
    pub(super) fn new(sp: &Sp, vars: &[Var], buckets: &[Bucket]) -> Self {
        let ids = vars.iter().map(|var| var.as_tensor().id());
        Self {
            sp: sp.clone(),
            vars: vars.to_vec(),
            buckets: buckets.to_vec(),
            places: ids.enumerate().map(|(place, id)| (id, place)).collect(),
            schedule: Vec::new(),
            blocks: 0,
            pending: vec![None; vars.len()],
            had: vec![false; vars.len()],
            summed: vec![false; vars.len()],
            earlier: 0,
            shares: vec![None; buckets.len()],
        }
    }

    /// There are the shares of earlier micro-batches beside those of this one.
    pub(super) fn beside(&mut self, earlier: &[Option<Tensor>]) {
        self.earlier = earlier.iter().flatten().map(bytes).sum();
    }

    /// A block has walked back.
    fn block(&mut self) -> Result<()> {
        for (id, grad) in memory::take(|id| self.places.contains_key(&id)) {
            self.add(self.places[&id], grad)?;
        }
        self.count();
        if self.blocks == self.schedule.len() {
            let mut bits = reduce::here(&self.pending);
            bits.extend(&self.summed);
            let anywhere = reduce::presence(&self.sp, &bits, &[])?.anywhere;
            let (anywhere, summed) = anywhere.split_at(self.vars.len());
            let complete = |&at: &usize| {
                self.shares[at].is_none() && self.buckets[at].vars.clone().all(|var| anywhere[var])
            };
            let as_sum = |at: usize| (at, self.buckets[at].vars.clone().any(|var| summed[var]));
            let buckets = (0..self.buckets.len()).filter(complete).map(as_sum);
            self.schedule.push(buckets.collect());
        }
        for (at, summed) in self.schedule[self.blocks].clone() {
            self.reduce(at, summed)?;
        }
        self.blocks += 1;
        self.count();
        Ok(())
    }

    /// The shares of all buckets, with what was found outside of blocks; `found` learns of which variables some rank has a gradient.
    pub(super) fn finish(
        &mut self,
        outside: Vec<Option<Tensor>>,
        found: &mut Vec<bool>,
    ) -> Result<Vec<Option<Tensor>>> {
        for (var, grad) in outside.into_iter().enumerate() {
            if let Some(grad) = grad {
                self.add(var, grad)?;
            }
        }
        self.count();
        let left = reduce::here(&self.pending);
        let had = self.had.iter().zip(&left).map(|(had, left)| had | left);
        let mut bits: Vec<bool> = had.collect();
        bits.extend(&left);
        bits.extend(&self.summed);
        let anywhere = reduce::presence(&self.sp, &bits, &[])?.anywhere;
        let (had, left) = anywhere.split_at(self.vars.len());
        let (left, summed) = left.split_at(self.vars.len());
        found.resize(self.vars.len(), false);
        for (found, had) in found.iter_mut().zip(had) {
            *found |= had;
        }
        for at in 0..self.buckets.len() {
            let more = self.buckets[at].vars.clone().any(|var| left[var]);
            if more || self.shares[at].is_none() {
                let summed = self.buckets[at].vars.clone().any(|var| summed[var]);
                self.reduce(at, summed)?;
            }
        }
        let shares = std::mem::take(&mut self.shares);
        self.begin();
        Ok(shares)
    }

    /// Forgets what an earlier backward has left.
    fn begin(&mut self) {
        self.blocks = 0;
        self.pending = vec![None; self.vars.len()];
        self.had = vec![false; self.vars.len()];
        self.summed = vec![false; self.vars.len()];
        self.shares = vec![None; self.buckets.len()];
    }

    fn add(&mut self, var: usize, grad: Tensor) -> Result<()> {
        let dtype = self.vars[var].dtype();
        let sum = match self.pending[var].take() {
            None => grad,
            Some(earlier) => memory::added(&earlier, &grad, dtype)?,
        };
        self.summed[var] |= sum.dtype() != dtype;
        self.pending[var] = Some(sum.detach());
        Ok(())
    }

    /// Sums what is pending of a bucket over the ranks and adds it to this rank's share. What was `summed` on some rank travels as it is on
    /// all, in the wide type; the rest is rounded nowhere either way.
    fn reduce(&mut self, at: usize, summed: bool) -> Result<()> {
        let bucket = &self.buckets[at];
        for var in bucket.vars.clone() {
            self.had[var] |= self.pending[var].is_some();
            self.summed[var] = false;
        }
        let grads = self.pending[bucket.vars.clone()].iter_mut();
        let grads = grads.map(Option::take);
        let travels = if summed {
            wide(bucket.dtype)
        } else {
            bucket.dtype
        };
        let sum = reduce::reduce(&self.sp, bucket, grads, &self.vars, (travels, true))?;
        self.shares[at] = Some(match self.shares[at].take() {
            None => sum,
            Some(earlier) => (earlier + sum)?,
        });
        Ok(())
    }

    /// Tells the ledger how many bytes of gradients and shares there are.
    fn count(&self) {
        let all = self.pending.iter().chain(&self.shares).flatten();
        self.sp.ledger().set(
            Purpose::Gradients,
            self.earlier + all.map(bytes).sum::<u64>(),
        );
    }
}

/// Runs a backward, with the divider at hand for its blocks.
pub(super) fn during<R, E>(
    divider: &mut Option<Divider>,
    backward: impl FnOnce() -> std::result::Result<R, E>,
) -> std::result::Result<R, E> {
    /// Gives the divider back, also when unwinding.
    struct Back<'a>(&'a mut Option<Divider>);

    impl Drop for Back<'_> {
        fn drop(&mut self) {
            *self.0 = DIVIDER.take();
        }
    }

    let Some(mut own) = divider.take() else {
        return backward();
    };
    own.begin();
    DIVIDER.set(Some(own));
    let _back = Back(divider);
    backward()
}

/// The gradients of a block are in the sink.
///
/// # Errors
/// Those of the reduction.
pub(crate) fn block_done() -> Result<()> {
    // Not borrowed while ranks wait for each other: what fails there unwinds.
    let Some(mut divider) = DIVIDER.take() else {
        return Ok(());
    };
    let done = divider.block();
    DIVIDER.set(Some(divider));
    done
}
