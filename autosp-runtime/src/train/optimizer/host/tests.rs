use candle_core::{Device, Var};
use proptest::prelude::*;

use super::*;
use crate::memory::link_to;
use crate::random::Stream;
use crate::train::optimizer::Part as List;
use crate::train::settings::Optimizer;

/// Numbers that no other seed has.
fn numbers(seed: u64, count: usize, dtype: DType) -> Tensor {
    let stream = Stream::new(seed, "numbers");
    let numbers: Vec<f64> = (0..count as u64).map(|i| stream.normal(i)).collect();
    let x = Tensor::from_vec(numbers, count, &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

const MANNERS: [Manner; 2] = [
    Manner {
        rate: 1.0,
        weight_decay: 0.1,
    },
    Manner {
        rate: 0.25,
        weight_decay: 0.0,
    },
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Loads of any size take the steps of the optimizer beside the variables, to the bit, and leave its state.
    #[test]
    fn loads_step_as_the_device_does(
        sizes in prop::collection::vec(prop::collection::vec(0usize..40, 1..4), 1..4),
        dtypes in prop::collection::vec(prop::sample::select(vec![DType::F32, DType::BF16, DType::F16, DType::F64]), 4),
        most in prop::sample::select(vec![1usize, 50, 300, MOST]),
        adam in any::<bool>(), momentum in any::<bool>(), whole in any::<bool>(), large in any::<bool>(),
    ) {
        let rule = if adam {
            Optimizer::adamw()
        } else {
            Optimizer::Sgd { momentum: if momentum { 0.9 } else { 0.0 }, weight_decay: 0.1 }
        };
        let mut sizes = sizes;
        if large {
            // More than a block of the processor's, and not a whole number of them.
            sizes[0][0] += 2 * BLOCK + 7;
        }
        let most = if large { most.max(100_000) } else { most };
        let pieces: Vec<(usize, usize)> = sizes.iter().enumerate().flat_map(|(b, of)| of.iter().map(move |&n| (b, n))).collect();
        let types = || pieces.iter().map(|&(b, _)| dtypes[b]);
        let start: Vec<Tensor> = pieces.iter().enumerate().map(|(i, &(b, n))| numbers(i as u64, n, dtypes[b])).collect();
        let vars = || start.iter().map(|x| Var::from_tensor(x).unwrap()).collect::<Vec<_>>();
        let (near, far) = (vars(), vars());
        let (mut device, mut host) = (Updater::new(rule, types()), Updater::new(rule, types()));
        let ledger = Arc::new(Ledger::default());
        let mut desk = Desk { most, ..Desk::new(link_to(&Device::Cpu).unwrap(), Arc::clone(&ledger)) };
        for number in 0..3_u64 {
            let (a, b) = (device.begin(0.1, 0.5), host.begin(0.1, 0.5));
            let mut batches = Vec::new();
            let mut slot = 0;
            for (at, of) in sizes.iter().enumerate() {
                let dtype = dtypes[at];
                let count = of.iter().sum::<usize>();
                let grad = numbers(1000 + 10 * number + at as u64, count + 3, wide(dtype));
                // A part of more, or all of its memory.
                let grad = grad.narrow(0, 2, count).unwrap();
                let grad = if whole { grad.copy().unwrap() } else { grad };
                let (mut orders, mut begin) = (Vec::new(), 0);
                for &n in of {
                    let manner = MANNERS[slot % 2];
                    if n > 0 {
                        let own = grad.narrow(0, begin, n).unwrap();
                        let new = device.update(slot, a, manner, &near[slot], &own).unwrap();
                        near[slot].set(&new).unwrap();
                    }
                    orders.push(Order { slot, manner, var: far[slot].as_detached_tensor() });
                    begin += n;
                    slot += 1;
                }
                batches.push(Batch { orders, dtype, grad });
            }
            let mut next = 0;
            host.update_on_host(&mut desk, b, batches, |at, parts| {
                assert_eq!(at, next);
                next += 1;
                let (mut begin, first) = (0, sizes[..at].iter().map(Vec::len).sum::<usize>());
                let Some(_) = parts.first() else { return Ok(()) };
                let all = Tensor::cat(&parts, 0)?;
                for (i, &n) in sizes[at].iter().enumerate() {
                    if n > 0 {
                        far[first + i].set(&all.narrow(0, begin, n)?.copy()?)?;
                    }
                    begin += n;
                }
                Ok(())
            }).unwrap();
            prop_assert_eq!(next, sizes.len());
            for (near, far) in near.iter().zip(&far) {
                let different = values(near).iter().zip(values(far)).position(|(a, b)| a.to_bits() != b.to_bits());
                prop_assert_eq!(different, None);
            }
            for (slot, (_, n)) in pieces.iter().enumerate() {
                for list in List::ALL {
                    let [near, far] = [&device, &host].map(|updater| updater.part(slot, list).unwrap());
                    if *n > 0 {
                        prop_assert!(near.map(|x| values(&x)) == far.map(|x| values(&x)));
                    }
                }
            }
        }
        prop_assert_eq!(ledger.bytes(Purpose::Optimizer), 0);
        // Nothing more than two loads lies on the host, or passes through the device at once.
        let load = pieces.iter().map(|&(b, _)| size_of_load(dtypes[b])).max().unwrap() as u64;
        prop_assert!(desk.bytes() <= 2 * load.max(most as u64));
    }
}
