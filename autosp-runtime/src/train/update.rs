//! The update: summed gradients, of which this rank has its pieces, become new values of the variables.

use autosp_plan::settings::Place;
use candle_core::{DType, Tensor, Var};

use super::flat::Bucket;
use super::optimizer::{Batch, Desk, Order};
use super::settings::Optimizer;
use super::{Trainer, reduce};
use crate::memory::{limit, link_to};
use crate::ops::wide;
use crate::{Purpose, Result, Sp};

impl Trainer {
    /// Updates the variables from the summed gradients, of which this rank has its pieces, bucket by bucket.
    pub(super) fn apply(
        &mut self,
        rate: f64,
        scale: f64,
        sums: Vec<Tensor>,
        sharded: bool,
    ) -> Result<()> {
        let _span = tracing::info_span!("optimizer").entered();
        if self.updater.place() == Place::Host {
            return self.apply_on_host(rate, scale, sums, sharded);
        }
        let step = self.updater.begin(rate, scale);
        let mut slot = 0;
        for ((bucket, pieces), sum) in self.buckets.iter().zip(&self.pieces).zip(sums) {
            let mut updated = Vec::with_capacity(pieces.len());
            let mut at = 0;
            for piece in pieces {
                let var = self.vars[piece.var].as_detached_tensor().flatten_all()?;
                let var = var.narrow(0, piece.range.start, piece.range.len())?;
                let grad = sum.narrow(0, at, piece.range.len())?;
                let manner = self.manners[piece.var];
                updated.push(self.updater.update(slot, step, manner, &var, &grad)?);
                at += piece.range.len();
                slot += 1;
            }
            if sharded {
                let own = joined(&self.sp, bucket, &updated)?;
                let whole = reduce::gather(&self.sp, &own)?;
                updated = bucket.split(&whole, &self.vars)?;
            }
            set(bucket, &self.vars, updated)?;
        }
        Ok(())
    }

    /// The same with the optimizer's state on the host.
    fn apply_on_host(
        &mut self,
        rate: f64,
        scale: f64,
        sums: Vec<Tensor>,
        sharded: bool,
    ) -> Result<()> {
        let step = self.updater.begin(rate, scale);
        let mut desk = match self.desk.take() {
            Some(desk) => desk,
            None => Desk::new(link_to(self.sp.device())?, self.sp.shared_ledger()),
        };
        let (mut batches, mut slot) = (Vec::with_capacity(sums.len()), 0);
        for ((bucket, pieces), grad) in self.buckets.iter().zip(&self.pieces).zip(sums) {
            let mut orders = Vec::with_capacity(pieces.len());
            for piece in pieces {
                let var = self.vars[piece.var].as_detached_tensor().flatten_all()?;
                orders.push(Order {
                    slot,
                    manner: self.manners[piece.var],
                    var: var.narrow(0, piece.range.start, piece.range.len())?,
                });
                slot += 1;
            }
            batches.push(Batch {
                orders,
                dtype: bucket.dtype,
                grad: grad.flatten_all()?,
            });
        }
        let (sp, buckets, vars) = (&self.sp, &self.buckets, &self.vars);
        let done = |at: usize, parts: Vec<Tensor>| -> Result<()> {
            let own = joined(sp, &buckets[at], &parts)?;
            let whole = if sharded {
                reduce::gather(sp, &own)?
            } else {
                own
            };
            set(&buckets[at], vars, buckets[at].split(&whole, vars)?)
        };
        let done = self.updater.update_on_host(&mut desk, step, batches, done);
        self.desk = Some(desk);
        done
    }

    /// Tells the ledger what the optimizer has, on the device or on the host.
    pub(super) fn count_optimizer(&mut self) {
        let ledger = self.sp.ledger();
        let state = self.updater.bytes();
        if self.updater.place() == Place::Device {
            ledger.set(Purpose::Optimizer, state);
            return;
        }
        let now = state + self.desk.as_mut().map_or(0, Desk::bytes);
        ledger.release(Purpose::Host, self.hosted);
        ledger.hold(Purpose::Host, now);
        self.hosted = now;
    }

    /// Makes sure before the first update that its state will have room, so that no update ends half-way for want of it.
    ///
    /// # Errors
    /// AS0562 if it has not.
    pub(super) fn expect_room(&self) -> Result<()> {
        if self.updater.place() == Place::Host || self.updater.bytes() > 0 {
            return Ok(());
        }
        let lists = match self.settings.optimizer {
            Optimizer::AdamW { .. } => 2,
            Optimizer::Sgd { momentum, .. } => usize::from(momentum > 0.0),
        };
        let of = |dtype: DType, elements: usize| {
            let master = usize::from(dtype != wide(dtype));
            (elements * (lists + master) * wide(dtype).size_in_bytes()) as u64
        };
        let pieces = self.pieces.iter().flatten();
        let coming = pieces
            .map(|piece| of(self.vars[piece.var].dtype(), piece.range.len()))
            .sum();
        drop(self.sp.shared_ledger().holding(Purpose::Optimizer, coming));
        limit::expect_within(&self.sp)
    }
}

/// A rank's part of a bucket.
fn joined(sp: &Sp, bucket: &Bucket, parts: &[Tensor]) -> Result<Tensor> {
    Ok(match parts {
        [] => Tensor::zeros(0, bucket.dtype, sp.device())?,
        [one] => one.clone(),
        parts => Tensor::cat(parts, 0)?,
    })
}

/// Gives the variables of a bucket their new values.
fn set(bucket: &Bucket, vars: &[Var], values: Vec<Tensor>) -> Result<()> {
    for (var, value) in vars[bucket.vars.clone()].iter().zip(values) {
        var.set(&value.reshape(var.shape())?)?;
    }
    Ok(())
}
