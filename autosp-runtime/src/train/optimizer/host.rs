//! The optimizer on the host: gradients come down and new values go up in loads, and the processor steps one load while the next is on its
//! way down and the one before on its way up.
//!
//! A load is a part of a bucket. Its memory on the host holds the gradients, the values where there are no master weights of them, and the
//! new values: of n elements of w bytes a sum and e bytes a value `n (w + 2 e)` bytes, at most [`MOST`]. There are two such memories,
//! page-locked where the device is a GPU, allocated once. The arithmetic is that of the other optimizers (`Rule`), to the bit.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{BLOCK, Rule, Slot, State, Step, Updater, blocks};
use crate::ledger::Holding;
use crate::memory::{Extent, Link, Mark, Memory};
use crate::ops::{Real, tensor, wide};
use crate::site::bytes;
use crate::train::groups::Manner;
use crate::{Ledger, Purpose, Result};

/// The most bytes of a load.
const MOST: usize = 1 << 30;

/// The host's side of a trainer.
pub(in crate::train) struct Desk {
    link: Box<dyn Link>,
    ledger: Arc<Ledger>,
    most: usize,
    memories: [Option<Box<dyn Memory>>; 2],
}

/// A piece of a variable that is to be stepped.
pub(in crate::train) struct Order {
    /// The place of its state.
    pub(in crate::train) slot: usize,
    pub(in crate::train) manner: Manner,
    /// The piece, flat.
    pub(in crate::train) var: Tensor,
}

/// The pieces of a bucket, end to end.
pub(in crate::train) struct Batch {
    pub(in crate::train) orders: Vec<Order>,
    /// The type of the variables.
    pub(in crate::train) dtype: DType,
    /// Their summed gradients, flat.
    pub(in crate::train) grad: Tensor,
}

/// A part of a batch.
struct Load {
    batch: usize,
    range: Range<usize>,
    /// Whether values come down: some piece has no master weights yet, or never has.
    values: bool,
}

/// A load on its way down.
struct Flight {
    parts: Vec<Part>,
    values: bool,
    dtype: DType,
    elements: usize,
    /// What is copied, until it was.
    from: Vec<Tensor>,
    arrived: Mark,
    _staged: Holding,
}

/// A part of a piece.
struct Part {
    slot: usize,
    manner: Manner,
    /// Elements of the whole piece.
    len: usize,
    range: Range<usize>,
    /// Whether this step makes its master weights.
    fresh: bool,
}

impl Batch {
    fn elements(&self) -> usize {
        self.grad.elem_count()
    }

    /// The parts of pieces in a range of the batch, with their values on the device.
    fn parts(&self, range: &Range<usize>, fresh: &[bool]) -> Result<Vec<(Part, Tensor)>> {
        let (mut parts, mut begin) = (Vec::new(), 0);
        for (order, &fresh) in self.orders.iter().zip(fresh) {
            let len = order.var.elem_count();
            let own = range.start.max(begin)..range.end.min(begin + len);
            if own.start < own.end {
                let range = own.start - begin..own.end - begin;
                let var = order.var.narrow(0, range.start, range.len())?;
                let part = Part {
                    slot: order.slot,
                    manner: order.manner,
                    len,
                    range,
                    fresh,
                };
                parts.push((part, var));
            }
            begin += len;
        }
        Ok(parts)
    }
}

impl Desk {
    pub(in crate::train) fn new(link: Box<dyn Link>, ledger: Arc<Ledger>) -> Self {
        Self {
            link,
            ledger,
            most: MOST,
            memories: [None, None],
        }
    }

    /// Bytes of the host, beside the optimizer's state.
    pub(in crate::train) fn bytes(&mut self) -> u64 {
        let memories = self.memories.iter_mut().flatten();
        memories.map(|memory| memory.bytes().len() as u64).sum()
    }

    /// Memory for a load of `bytes` bytes.
    fn make_memory(&mut self, turn: usize, bytes: usize) -> Result<()> {
        let slot = &mut self.memories[turn];
        let enough = slot
            .as_mut()
            .is_some_and(|memory| memory.bytes().len() >= bytes);
        if !enough {
            // The smaller one goes first.
            *slot = None;
            *slot = Some(self.link.allocate(bytes)?);
        }
        Ok(())
    }

    fn begin(&mut self, turn: usize, load: &Load, batch: &Batch, fresh: &[bool]) -> Result<Flight> {
        let sum = wide(batch.dtype);
        let elements = load.range.len();
        let grad = batch.grad.narrow(0, load.range.start, elements)?;
        let own = elements == batch.elements() && batch.grad.dtype() == sum;
        let grad = whole(&grad.to_dtype(sum)?)?;
        let (parts, values): (Vec<_>, Vec<_>) =
            batch.parts(&load.range, fresh)?.into_iter().unzip();
        let mut from = vec![grad];
        if load.values {
            from.push(match values.as_slice() {
                [one] => whole(one)?,
                several => Tensor::cat(several, 0)?,
            });
        }
        // The gradients themselves are counted where they are.
        let staged = from.iter().skip(usize::from(own)).map(bytes).sum();
        let staged = self.ledger.holding(Purpose::Optimizer, staged);
        let down: usize = from.iter().map(|x| bytes(x) as usize).sum();
        let all = elements * size_of_load(batch.dtype);
        self.make_memory(turn, all)?;
        // The memory is this turn's alone until the flight has ended.
        let memory = self.memories[turn].as_mut();
        let to = memory.map_or(&mut [][..], |memory| memory.bytes());
        let arrived = self.link.save(&from, &mut to[..down])?;
        Ok(Flight {
            parts,
            values: load.values,
            dtype: batch.dtype,
            elements,
            from,
            arrived,
            _staged: staged,
        })
    }

    /// Steps a load that was begun at `turn`: its new values, flat.
    fn finish(
        &mut self,
        turn: usize,
        flight: Flight,
        step: Step,
        slots: &mut [Slot],
    ) -> Result<Tensor> {
        self.link.wait(&flight.arrived)?;
        let Flight {
            parts,
            values,
            dtype,
            elements,
            from,
            ..
        } = flight;
        drop(from);
        let size = dtype.size_in_bytes();
        let memory = self.memories[turn].as_mut();
        let all = memory.map_or(&mut [][..], |memory| memory.bytes());
        let all = &mut all[..elements * size_of_load(dtype)];
        let (grad, rest) = all.split_at_mut(elements * wide(dtype).size_in_bytes());
        let (old, new) = rest.split_at_mut(elements * size);
        let new = &mut new[..elements * size];
        let mut at = 0;
        for part in parts {
            let end = at + part.range.len();
            let old = if values {
                &old[at * size..end * size]
            } else {
                &[]
            };
            let new = &mut new[at * size..end * size];
            let lane = Lane {
                part: &part,
                step,
                old,
                new,
            };
            match (&mut slots[part.slot], dtype) {
                (Slot::Double(state), _) => lane.run::<f64, f64>(state, &grad[at * 8..end * 8]),
                (Slot::Single(state), DType::BF16) => {
                    lane.run::<bf16, f32>(state, &grad[at * 4..end * 4]);
                }
                (Slot::Single(state), DType::F16) => {
                    lane.run::<f16, f32>(state, &grad[at * 4..end * 4]);
                }
                (Slot::Single(state), _) => lane.run::<f32, f32>(state, &grad[at * 4..end * 4]),
                #[cfg(feature = "cuda")]
                (Slot::Gpu(_), _) => {
                    let text = "the optimizer on the host: expected its state there";
                    return Err(candle_core::Error::Msg(text.to_owned()).into());
                }
            }
            at = end;
        }
        let extent = Extent { dtype, elements };
        let (storages, mark) = self.link.load(new, &[extent], &None)?;
        self.link.join(&mark)?;
        let storage = storages.into_iter().next();
        let storage = storage.ok_or_else(|| {
            candle_core::Error::Msg("expected the values of a load, found none".to_owned())
        })?;
        Ok(tensor((storage, elements.into())))
    }
}

impl Updater {
    /// Steps the pieces of all batches; `done` takes each batch's new values, flat and in parts, in the order of the batches.
    ///
    /// # Errors
    /// Those of the device, of its link and of `done`.
    pub(in crate::train) fn update_on_host(
        &mut self,
        desk: &mut Desk,
        step: Step,
        batches: Vec<Batch>,
        mut done: impl FnMut(usize, Vec<Tensor>) -> Result<()>,
    ) -> Result<()> {
        let fresh: Vec<Vec<bool>> = batches.iter().map(|batch| self.fresh(batch)).collect();
        let mut loads = Vec::new();
        for (at, (batch, fresh)) in batches.iter().zip(&fresh).enumerate() {
            let has_masters = batch.dtype != wide(batch.dtype);
            let values = !has_masters || fresh.contains(&true);
            let most = (desk.most / size_of_load(batch.dtype)).max(1);
            let all = batch.elements();
            loads.extend((0..all).step_by(most).map(|start| Load {
                batch: at,
                range: start..all.min(start + most),
                values,
            }));
        }
        let mut batches: Vec<Option<Batch>> = batches.into_iter().map(Some).collect();
        let begin = |desk: &mut Desk, batches: &[Option<Batch>], at: usize| {
            let Some(load) = loads.get(at) else {
                return Ok(None);
            };
            match &batches[load.batch] {
                Some(batch) => desk
                    .begin(at % 2, load, batch, &fresh[load.batch])
                    .map(Some),
                None => Ok(None),
            }
        };
        let mut next = begin(desk, &batches, 0)?;
        let (mut current, mut values, mut staged) = (0, Vec::new(), Vec::new());
        for (at, load) in loads.iter().enumerate() {
            let flight = std::mem::replace(&mut next, begin(desk, &batches, at + 1)?);
            while current < load.batch {
                batches[current] = None;
                done(current, std::mem::take(&mut values))?;
                staged.clear();
                current += 1;
            }
            if let Some(flight) = flight {
                let new = desk.finish(at % 2, flight, step, &mut self.slots)?;
                staged.push(desk.ledger.holding(Purpose::Optimizer, bytes(&new)));
                values.push(new);
            }
        }
        while current < batches.len() {
            batches[current] = None;
            done(current, std::mem::take(&mut values))?;
            current += 1;
        }
        Ok(())
    }

    /// Which pieces of a batch have master weights that this step makes.
    fn fresh(&self, batch: &Batch) -> Vec<bool> {
        let fresh = |order: &Order| {
            batch.dtype != DType::F32
                && matches!(&self.slots[order.slot], Slot::Single(state) if state.master.is_empty())
        };
        batch.orders.iter().map(fresh).collect()
    }
}

/// Bytes of the host for an element: its gradient, its value, and its new value.
fn size_of_load(dtype: DType) -> usize {
    wide(dtype).size_in_bytes() + 2 * dtype.size_in_bytes()
}

/// The tensor itself where its memory is all its own, else a copy.
fn whole(x: &Tensor) -> Result<Tensor> {
    let all = Extent::of(x).is_some_and(|extent| extent.elements == x.elem_count());
    if all && x.is_contiguous() {
        return Ok(x.detach());
    }
    Ok(x.detach().force_contiguous()?)
}

/// Numbers in memory of the host, in the machine's order of bytes.
trait Number: WithDType {
    fn get(bytes: &[u8]) -> Self;
    fn set(self, bytes: &mut [u8]);
    /// The nearest number to a value of the type that sums have.
    fn nearest(wide: f64) -> Self;
}

macro_rules! number {
    ($($t:ty, $nearest:expr);*) => {$(
        impl Number for $t {
            fn get(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$t>()];
                own.copy_from_slice(bytes);
                <$t>::from_ne_bytes(own)
            }
            fn set(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_ne_bytes());
            }
            fn nearest(wide: f64) -> Self {
                $nearest(wide)
            }
        }
    )*};
}
// Sums of half precision are `f32`, and `from_f64` of these types looks at fewer bits than those have.
number!(f32, |x| x as f32; f64, |x| x; bf16, |x| bf16::from_f32(x as f32); f16, |x| f16::from_f32(x as f32));

/// What a part of a piece is stepped with: its old values in bytes, or none, and room for its new ones.
struct Lane<'a> {
    part: &'a Part,
    step: Step,
    old: &'a [u8],
    new: &'a mut [u8],
}

impl Lane<'_> {
    /// Steps values of type `T` in the type `A`, in which gradients are.
    fn run<T: Number, A: Number + Real>(self, state: &mut State<A>, grad: &[u8]) {
        let Part {
            manner,
            len,
            range,
            fresh,
            ..
        } = self.part;
        let step = Step {
            rate: self.step.rate * manner.rate,
            ..self.step
        };
        let rule = Rule::<A>::new(step, manner.weight_decay);
        state.make_room(step.rule, *len);
        let has_master = T::DTYPE != A::DTYPE;
        if has_master {
            state.master.resize(*len, A::ZERO);
        }
        let own = |list: &mut Vec<A>| -> Range<usize> {
            if list.is_empty() { 0..0 } else { range.clone() }
        };
        let [master, first, second] =
            [&mut state.master, &mut state.first, &mut state.second].map(|list| {
                let own = own(list);
                blocks(&mut list[own])
            });
        let old = |at: usize| {
            let (size, start) = (size_of::<T>(), at * BLOCK * size_of::<T>());
            &self.old[start.min(self.old.len())..(start + BLOCK * size).min(self.old.len())]
        };
        let new = self.new.chunks_mut(BLOCK * size_of::<T>());
        let grad = grad.chunks(BLOCK * size_of::<A>());
        let lists = master.zip(first.zip(second));
        let all: Vec<_> = new.zip(grad).zip(lists).enumerate().collect();
        all.into_par_iter()
            .for_each(|(at, ((new, grad), (master, (first, second))))| {
                let grad: Vec<A> = grad.chunks_exact(size_of::<A>()).map(A::get).collect();
                let mut values: Vec<A> = if has_master && !fresh {
                    master.to_vec()
                } else {
                    let old = old(at).chunks_exact(size_of::<T>());
                    old.map(|bytes| A::up(T::get(bytes))).collect()
                };
                rule.step(&mut values, &grad, first, second);
                if has_master {
                    master.copy_from_slice(&values);
                }
                for (value, new) in values.iter().zip(new.chunks_exact_mut(size_of::<T>())) {
                    T::nearest(value.wide()).set(new);
                }
            });
    }
}

#[cfg(test)]
mod tests;
