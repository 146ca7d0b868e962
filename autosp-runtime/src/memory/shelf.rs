//! What blocks keep on the host.
//!
//! A shelf belongs to a rank. Blocks leave things on it, each a [`Stash`]; what is there lies in memory of the host, which is allocated when
//! the first steps need it and used again by all others. Of what was left, the device has two blocks' at most: in the forward the
//! last two that were left, in the backward the one in use and the one that comes next, which is the one that was left before it. So a
//! block's copy to the host runs beside the next block, and its copy back beside the one that is needed before it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use autosp_plan::codes;
use autosp_plan::units::show_size;
use candle_core::{Shape, Tensor};

use super::link::{Extent, Link, Mark, Memory};
use crate::ops::{put, taken, tensor};
use crate::{Error, Ledger, Purpose, Result};

/// Of what blocks have left, how much more than one block's the device may have while a further block runs.
const NEAR: usize = 1;

/// The host's side of a rank.
pub(crate) struct Shelf {
    link: Box<dyn Link>,
    /// The most bytes of the host.
    limit: u64,
    ledger: Arc<Ledger>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Memory of the host that nobody uses now.
    free: Vec<Box<dyn Memory>>,
    /// Bytes of the host, in use or not.
    allocated: u64,
    next: u64,
    books: BTreeMap<u64, Book>,
    /// Those whose values are on the device, or on their way there or back, the oldest first.
    near: Vec<u64>,
}

/// One block's.
struct Book {
    /// Tensors whose memory nobody else reads: it is taken out of them, and put back.
    shells: Vec<Tensor>,
    /// How copies of the others are seen.
    views: Vec<View>,
    /// Of the shells' memory, then of the copies'.
    extents: Vec<Extent>,
    memory: Box<dyn Memory>,
    bytes: u64,
    saved: Mark,
    /// The copies of what was left, and the mark after which the device may use or free the values.
    near: Option<(Vec<Tensor>, Mark)>,
}

/// A tensor whose memory is all its own, seen through a permutation.
struct View {
    /// As it lies in memory.
    shape: Shape,
    /// For each dim of the tensor, which one in memory it is.
    order: Vec<usize>,
}

impl View {
    /// How `x` is to be seen again, and what is to be copied for it: itself, or its values put in order.
    fn of(x: &Tensor) -> Result<(Self, Tensor)> {
        let layout = x.layout();
        let mut sorted: Vec<usize> = (0..x.rank()).collect();
        sorted.sort_by_key(|&dim| std::cmp::Reverse(layout.stride()[dim]));
        let lying = x.permute(sorted.as_slice())?;
        let whole = Extent::of(x).is_some_and(|extent| extent.elements == x.elem_count());
        if whole && lying.is_contiguous() && layout.start_offset() == 0 {
            let mut order = vec![0; sorted.len()];
            for (place, &dim) in sorted.iter().enumerate() {
                order[dim] = place;
            }
            let shape = lying.shape().clone();
            return Ok((Self { shape, order }, x.detach()));
        }
        let shape = x.shape().clone();
        let order = (0..x.rank()).collect();
        Ok((Self { shape, order }, x.detach().force_contiguous()?))
    }
}

/// What a block has left on the shelf, until this is dropped.
pub(crate) struct Stash {
    shelf: Arc<Shelf>,
    id: u64,
}

/// What was left, back on the device.
pub(crate) struct Fetched {
    /// Copies of the tensors that were not shells.
    pub(crate) tensors: Vec<Tensor>,
    shelf: Arc<Shelf>,
    bytes: u64,
}

impl Drop for Fetched {
    fn drop(&mut self) {
        self.shelf.ledger.release(Purpose::Kept, self.bytes);
    }
}

impl Shelf {
    pub(crate) fn new(link: Box<dyn Link>, limit: u64, ledger: Arc<Ledger>) -> Self {
        Self {
            link,
            limit,
            ledger,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the host that were allocated, in use or not.
    #[cfg(test)]
    pub(crate) fn allocated(&self) -> u64 {
        self.state().allocated
    }

    /// Frees the device of all but the last thing that was left, before a block runs that will leave another.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn make_room(&self) -> Result<()> {
        let mut state = self.state();
        while state.near.len() > NEAR {
            let oldest = state.near[0];
            self.retire(&mut state, oldest)?;
        }
        Ok(())
    }

    /// Begins to copy to the host: the memory of `shells`, which only the block reads, and `others`, of which this keeps copies alone.
    ///
    /// # Errors
    /// AS0353 if that is more than the host may have; those of the device.
    pub(crate) fn leave(self: &Arc<Self>, shells: Vec<Tensor>, others: &[Tensor]) -> Result<Stash> {
        let (mut views, mut copies) = (Vec::new(), Vec::new());
        for x in others {
            let (view, copy) = View::of(x)?;
            views.push(view);
            copies.push(copy);
        }
        let all: Vec<Tensor> = shells.iter().chain(&copies).cloned().collect();
        let extents: Option<Vec<Extent>> = all.iter().map(Extent::of).collect();
        let Some(extents) = extents else {
            let text = "what a block keeps on the host: expected floating point numbers";
            return Err(candle_core::Error::Msg(text.to_owned()).into());
        };
        let bytes = extents.iter().map(|extent| extent.bytes()).sum();
        let mut state = self.state();
        let mut memory = self.memory(&mut state, bytes)?;
        let saved = match self.link.save(&all, &mut memory.bytes()[..bytes]) {
            Ok(saved) => saved,
            Err(error) => {
                state.free.push(memory);
                return Err(error);
            }
        };
        let (id, bytes) = (state.next, bytes as u64);
        state.next += 1;
        self.ledger.hold(Purpose::Host, bytes);
        self.ledger.hold(Purpose::Kept, bytes);
        let book = Book {
            shells,
            views,
            extents,
            memory,
            bytes,
            near: Some((copies, saved.clone())),
            saved,
        };
        state.books.insert(id, book);
        state.near.push(id);
        Ok(Stash {
            shelf: Arc::clone(self),
            id,
        })
    }

    /// Memory of the host for so many bytes: the smallest that is free, else new, in place of one that is free and too small.
    fn memory(&self, state: &mut State, bytes: usize) -> Result<Box<dyn Memory>> {
        let fitting = |(at, free): (usize, &mut Box<dyn Memory>)| {
            let has = free.bytes().len();
            (has >= bytes).then_some((has, at))
        };
        let best = state.free.iter_mut().enumerate().filter_map(fitting).min();
        if let Some((_, at)) = best {
            return Ok(state.free.swap_remove(at));
        }
        if let Some(mut small) = state.free.pop() {
            state.allocated -= small.bytes().len() as u64;
        }
        let wanted = state.allocated + bytes as u64;
        if wanted > self.limit {
            let text = format!(
                "what blocks keep on the host: expected at most {} of this rank, found {}",
                show_size(self.limit),
                show_size(wanted)
            );
            return Err(Error::new(codes::HOST_MEMORY, text).with_help(format!(
                "AUTOSP_HOST_MEMORY={}B, or `attention` or `input` in `policy`, which keep less",
                2 * wanted
            )));
        }
        let memory = self.link.allocate(bytes)?;
        state.allocated = wanted;
        Ok(memory)
    }

    /// Takes what was left off the device.
    fn retire(&self, state: &mut State, id: u64) -> Result<()> {
        state.near.retain(|&near| near != id);
        let Some(book) = state.books.get_mut(&id) else {
            return Ok(());
        };
        if let Some((copies, mark)) = book.near.take() {
            self.link.join(&mark)?;
            drop(copies);
            for shell in &book.shells {
                drop(taken(shell)?);
            }
            self.ledger.release(Purpose::Kept, book.bytes);
        }
        Ok(())
    }

    /// Begins to copy back what is not on the device.
    fn bring(&self, state: &mut State, id: u64) -> Result<()> {
        let Some(book) = state.books.get_mut(&id) else {
            return Ok(());
        };
        if book.near.is_some() {
            return Ok(());
        }
        let bytes = book.bytes as usize;
        let from = &book.memory.bytes()[..bytes];
        let (storages, mark) = self.link.load(from, &book.extents, &book.saved)?;
        let mut storages = storages.into_iter();
        for (shell, storage) in book.shells.iter().zip(storages.by_ref()) {
            put(shell, storage)?;
        }
        let see = |(view, storage): (&View, _)| -> Result<Tensor> {
            Ok(tensor((storage, view.shape.clone())).permute(view.order.as_slice())?)
        };
        let copies: Result<Vec<Tensor>> = book.views.iter().zip(storages).map(see).collect();
        book.near = Some((copies?, mark));
        state.near.push(id);
        self.ledger.hold(Purpose::Kept, book.bytes);
        Ok(())
    }

    fn fetch(self: &Arc<Self>, id: u64) -> Result<Fetched> {
        let mut state = self.state();
        // What was left before this is needed next; whatever else is near was brought for nothing.
        let next = state.books.range(..id).next_back().map(|(&next, _)| next);
        for other in state.near.clone() {
            if other != id && Some(other) != next {
                self.retire(&mut state, other)?;
            }
        }
        self.bring(&mut state, id)?;
        state.near.retain(|&near| near != id);
        let (tensors, bytes) = match state.books.get_mut(&id) {
            Some(book) => {
                let near = book.near.take();
                if let Some((_, mark)) = &near {
                    self.link.join(mark)?;
                }
                // Whoever reads the shells frees them one by one.
                book.extents.drain(..book.shells.len());
                let used = std::mem::take(&mut book.shells);
                let bytes = book.bytes;
                if !used.is_empty() {
                    book.bytes = 0;
                    self.ledger.release(Purpose::Host, bytes);
                }
                (near.map_or_else(Vec::new, |(copies, _)| copies), bytes)
            }
            None => (Vec::new(), 0),
        };
        let fetched = Fetched {
            tensors,
            shelf: Arc::clone(self),
            bytes,
        };
        if let Some(next) = next {
            self.bring(&mut state, next)?;
        }
        Ok(fetched)
    }
}

impl Stash {
    /// What was left, on the device: copies of what was not a shell; shells have their memory again, once and for all. Begins to bring what
    /// was left before it.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn fetch(&self) -> Result<Fetched> {
        self.shelf.fetch(self.id)
    }
}

impl Drop for Stash {
    fn drop(&mut self) {
        let mut state = self.shelf.state();
        state.near.retain(|&near| near != self.id);
        if let Some(mut book) = state.books.remove(&self.id) {
            if let Some((_, mark)) = book.near.take() {
                // A device that fails here fails at its next operation too.
                let _ = self.shelf.link.join(&mark);
                self.shelf.ledger.release(Purpose::Kept, book.bytes);
            }
            self.shelf.ledger.release(Purpose::Host, book.bytes);
            state.free.push(book.memory);
        }
    }
}

#[cfg(test)]
mod tests;
