//! Launches under several orders of threads, and distances.

use autosp_kernels_on_host::{Argument, Buffer, launch};
use autosp_templates::kernels::{Element, Rows};
use candle_core::{Device, Tensor, Var};

/// Orders of threads and blocks in which each kernel runs.
const SEEDS: [u64; 3] = [1, 20, 300];

/// An argument of a kernel, of which each run gets its own copy.
pub(crate) enum A<'a> {
    In(&'a Buffer),
    /// Read and written.
    Both(&'a Buffer),
    /// Bytes that are written.
    Out(usize),
    /// The buffer of the argument of this number.
    Same(usize),
    Nothing,
    Long(i64),
    Int(i32),
    Float(f32),
    Longs(&'a [i64]),
}

/// The name under which a module of rows is compiled.
pub(crate) fn module(rows: Rows) -> String {
    format!("rows-{}-{}-{}", rows.element, rows.pack, rows.steps)
}

/// All modules for elements one by one or in packs, with rows that a thread holds one pack of.
pub(crate) fn modules() -> impl Iterator<Item = Rows> {
    modules_of(1)
}

pub(crate) fn modules_of(steps: usize) -> impl Iterator<Item = Rows> {
    Element::ALL.into_iter().flat_map(move |element| {
        [element.widest(), 1].map(|pack| Rows {
            element,
            pack,
            steps,
        })
    })
}

/// What a kernel has written, the same in every order of threads.
pub(crate) fn run(module: &str, kernel: &str, blocks: usize, arguments: &[A]) -> Vec<Buffer> {
    let mut all = SEEDS.map(|seed| run_once(module, kernel, blocks, seed, arguments));
    for i in 1..SEEDS.len() {
        let (first, rest) = all.split_at_mut(i);
        for (a, b) in first[0].iter_mut().zip(&mut rest[0]) {
            assert_eq!(
                a.bytes(),
                b.bytes(),
                "{module} {kernel}: another order of threads"
            );
        }
    }
    let [first, ..] = all;
    first
}

/// The same under one order.
pub(crate) fn run_once(
    module: &str,
    kernel: &str,
    blocks: usize,
    seed: u64,
    arguments: &[A],
) -> Vec<Buffer> {
    let mut buffers: Vec<Option<Buffer>> = arguments
        .iter()
        .map(|a| match a {
            A::In(x) | A::Both(x) => Some((*x).clone()),
            A::Out(bytes) => Some(Buffer::unwritten(*bytes)),
            _ => None,
        })
        .collect();
    let mut given: Vec<Argument> = arguments
        .iter()
        .zip(&mut buffers)
        .map(|(a, buffer)| match (a, buffer) {
            (_, Some(buffer)) => Argument::Memory(buffer),
            (A::Long(x), _) => Argument::Long(*x),
            (A::Int(x), _) => Argument::Int(*x),
            (A::Float(x), _) => Argument::Float(*x),
            (A::Same(i), _) => Argument::Same(*i),
            (A::Longs(x), _) => Argument::Longs(x.to_vec()),
            _ => Argument::Nothing,
        })
        .collect();
    launch(module, kernel, blocks, seed, &mut given);
    let mut written = Vec::new();
    for (a, buffer) in arguments.iter().zip(buffers) {
        match (a, buffer) {
            (A::In(before), Some(mut after)) => {
                assert_eq!(
                    (*before).clone().bytes(),
                    after.bytes(),
                    "an operand was written"
                );
            }
            (_, Some(buffer)) => written.push(buffer),
            _ => {}
        }
    }
    written
}

/// Numbers between -2 and 2 that an element holds, and the buffer of them.
pub(crate) fn random(element: Element, count: usize, seed: u64) -> (Vec<f64>, Buffer) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let numbers: Vec<f64> = (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / f64::from(1 << 22) - 2.0
        })
        .collect();
    let mut buffer = Buffer::of_elements(element, &numbers);
    (buffer.elements(element), buffer)
}

/// The relative error of one rounding to an element, and of a few operations in single precision.
pub(crate) fn tolerance(element: Element) -> f64 {
    let rounding = match element {
        Element::Bf16 => 2f64.powi(-8),
        Element::F16 => 2f64.powi(-11),
        Element::F32 => 2f64.powi(-24),
    };
    rounding + 4e-6
}

/// That two lists are close, in the Euclidean norm.
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let size = norm(&mut expected.iter().copied());
    assert!(apart <= tolerance * size, "{what}: {} apart", apart / size);
}

/// The result of an operation and the gradients of its operands, if the result's gradient is `dy`.
pub(crate) fn exact(
    operation: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    operands: &[(&[f64], &[usize])],
    dy: Option<&[f64]>,
) -> Vec<Vec<f64>> {
    let variables: Vec<Var> = operands
        .iter()
        .map(|&(x, dims)| {
            let x = Tensor::from_slice(x, dims, &Device::Cpu).unwrap();
            Var::from_tensor(&x).unwrap()
        })
        .collect();
    let tensors: Vec<Tensor> = variables.iter().map(|x| x.as_tensor().clone()).collect();
    let y = operation(&tensors).unwrap();
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let mut all = vec![flat(&y.detach())];
    if let Some(dy) = dy {
        let dy = Tensor::from_slice(dy, y.shape(), &Device::Cpu).unwrap();
        let grads = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        all.extend(variables.iter().map(|x| flat(grads.get(x).unwrap())));
    }
    all
}
