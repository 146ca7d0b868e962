use std::collections::HashMap;

use candle_core::{Device, Storage};
use proptest::prelude::*;

use super::*;
use crate::memory::link::Plain;

/// Copies as late as a device may: one way when its mark is joined, and reads the tensors only then.
#[derive(Default)]
struct Late(Mutex<Copies>);

#[derive(Default)]
struct Copies {
    /// Number, tensors and address of copies to the host that were not made yet, in order.
    pending: Vec<(u64, Vec<Tensor>, usize)>,
    /// What lies at an address.
    host: HashMap<usize, Vec<u8>>,
    next: u64,
    /// Copies back that nothing waits for yet.
    loads: Vec<u64>,
}

fn number(mark: &Mark) -> u64 {
    *mark.as_ref().unwrap().downcast_ref::<u64>().unwrap()
}

impl Copies {
    fn mark(&mut self) -> (u64, Mark) {
        self.next += 1;
        (self.next, Some(Arc::new(self.next)))
    }

    /// Makes all copies to the host up to one.
    fn copy(&mut self, until: u64) {
        while self.pending.first().is_some_and(|(at, ..)| *at <= until) {
            let (_, tensors, address) = self.pending.remove(0);
            let bytes = tensors.iter().map(|x| {
                let extent = Extent::of(x).expect("memory that was taken too early");
                assert!(extent.elements == x.elem_count(), "the memory is not whole");
                extent.bytes()
            });
            let mut to = vec![0; bytes.sum()];
            Plain.save(&tensors, &mut to).unwrap();
            self.host.insert(address, to);
        }
    }
}

impl Link for Arc<Late> {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Memory>> {
        // One byte at least has an address.
        let mut memory = Vec::with_capacity(bytes + 1);
        memory.resize(bytes, 0);
        Ok(Box::new(memory))
    }

    fn save(&self, from: &[Tensor], to: &mut [u8]) -> Result<Mark> {
        let mut copies = self.0.lock().unwrap();
        let (number, mark) = copies.mark();
        copies
            .pending
            .push((number, from.to_vec(), to.as_ptr().addr()));
        Ok(mark)
    }

    fn load(&self, from: &[u8], extents: &[Extent], saved: &Mark) -> Result<(Vec<Storage>, Mark)> {
        let mut copies = self.0.lock().unwrap();
        copies.copy(number(saved));
        let bytes: usize = extents.iter().map(|extent| extent.bytes()).sum();
        let found = copies.host[&from.as_ptr().addr()].clone();
        let (storages, _) = Plain.load(&found[..bytes], extents, &None)?;
        let (number, mark) = copies.mark();
        copies.loads.push(number);
        Ok((storages, mark))
    }

    fn join(&self, mark: &Mark) -> Result<()> {
        let mut copies = self.0.lock().unwrap();
        let number = number(mark);
        copies.copy(number);
        copies.loads.retain(|load| *load != number);
        Ok(())
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        self.join(mark)
    }
}

/// Numbers that no other tensor has, seen in one of four ways.
fn values(seed: usize, rows: usize, way: usize) -> Tensor {
    let numbers: Vec<f32> = (0..rows * 6).map(|i| (seed * 10_000 + i) as f32).collect();
    let x = Tensor::from_vec(numbers, (rows, 2, 3), &Device::Cpu).unwrap();
    match way {
        0 => x,
        1 => x.permute((2, 0, 1)).unwrap(),
        2 => x.transpose(0, 1).unwrap(),
        // A part of more.
        _ if rows == 0 => x,
        _ => x.narrow(1, 1, 1).unwrap(),
    }
}

fn bits(x: &Tensor) -> (Vec<usize>, Vec<f32>) {
    (
        x.dims().to_vec(),
        x.flatten_all().unwrap().to_vec1().unwrap(),
    )
}

fn shelf(limit: u64) -> (Arc<Shelf>, Arc<Late>, Arc<Ledger>) {
    let (late, ledger) = (Arc::new(Late::default()), Arc::new(Ledger::default()));
    let link = Box::new(Arc::clone(&late));
    let shelf = Shelf::new(link, limit, Arc::clone(&ledger));
    (Arc::new(shelf), late, ledger)
}

#[derive(Debug, Clone)]
struct Left {
    rows: Vec<(usize, usize)>,
    shells: Vec<usize>,
    /// Dropped without being fetched.
    dropped: bool,
}

fn left() -> impl Strategy<Value = Left> {
    let rows = prop::collection::vec((0usize..5, 0usize..4), 0..4);
    let shells = prop::collection::vec(1usize..5, 0..3);
    (rows, shells, prop::bool::weighted(0.1)).prop_map(|(rows, shells, dropped)| Left {
        rows,
        shells,
        dropped,
    })
}

proptest! {
    /// Whatever is left comes back as it was, in whatever order; the device has two blocks' of it at most, and memory of the host that
    /// was used once is used again.
    #[test]
    fn what_is_left_comes_back(blocks in prop::collection::vec(left(), 1..7), order in any::<u64>(), lifo in any::<bool>()) {
        let (shelf, late, ledger) = shelf(1 << 20);
        let mut sizes: Vec<u64> = Vec::new();
        let mut allocated = 0;
        for round in 0..3 {
            let mut stashes = Vec::new();
            for (at, block) in blocks.iter().enumerate() {
                shelf.make_room().unwrap();
                let others: Vec<Tensor> = block.rows.iter().enumerate().map(|(i, &(rows, way))| values(at * 7 + i, rows, way)).collect();
                let shells: Vec<Tensor> = block.shells.iter().enumerate().map(|(i, &rows)| values(at * 7 + i + 100, rows, 0)).collect();
                let expected: Vec<_> = shells.iter().chain(&others).map(bits).collect();
                let before = ledger.bytes(Purpose::Host);
                let stash = shelf.leave(shells.clone(), &others).unwrap();
                sizes.push(ledger.bytes(Purpose::Host) - before);
                let of = |x: &Tensor| (x.elem_count() * 4) as u64;
                prop_assert_eq!(*sizes.last().unwrap(), shells.iter().chain(&others).map(of).sum::<u64>());
                stashes.push((stash, shells, expected, block.dropped));
            }
            let mut largest = sizes.clone();
            largest.sort_unstable_by_key(|&size| std::cmp::Reverse(size));
            let two = largest.iter().take(2).sum::<u64>();
            let mut state = order;
            while !stashes.is_empty() {
                let at = if lifo { stashes.len() - 1 } else {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 33) as usize % stashes.len()
                };
                let (stash, shells, expected, dropped) = stashes.remove(at);
                if dropped {
                    continue;
                }
                for again in 0..2 {
                    let waiting = late.0.lock().unwrap().loads.len();
                    let fetched = stash.fetch().unwrap();
                    // Only what was brought for the next may still be on its way.
                    prop_assert!(late.0.lock().unwrap().loads.len() <= 1, "{waiting}");
                    if again == 0 || shells.is_empty() {
                        let found: Vec<_> = shells.iter().chain(&fetched.tensors).map(bits).collect();
                        prop_assert_eq!(&found, &expected);
                    }
                }
            }
            prop_assert_eq!([ledger.bytes(Purpose::Kept), ledger.bytes(Purpose::Host)], [0, 0]);
            prop_assert!(ledger.most(Purpose::Kept) <= two, "{} of {two}", ledger.most(Purpose::Kept));
            let all: u64 = sizes.iter().sum();
            prop_assert!(shelf.allocated() <= all);
            if round > 0 {
                prop_assert_eq!(shelf.allocated(), allocated);
            }
            allocated = shelf.allocated();
            sizes.clear();
        }
    }
}

#[test]
fn a_full_host_is_an_error_that_says_how_much_is_needed() {
    let (shelf, _, ledger) = shelf(100);
    let first = shelf.leave(Vec::new(), &[values(0, 3, 0)]).unwrap();
    let error = shelf
        .leave(Vec::new(), &[values(1, 3, 0)])
        .err()
        .expect("72 of 100 bytes are taken");
    for part in ["AS0353", "AUTOSP_HOST_MEMORY=288B"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    drop(first);
    // What is free and too small makes room for what is larger.
    let larger = shelf.leave(Vec::new(), &[values(1, 4, 0)]).unwrap();
    assert_eq!((shelf.allocated(), ledger.bytes(Purpose::Host)), (96, 96));
    drop(larger);
    assert_eq!(ledger.bytes(Purpose::Host), 0);
}
