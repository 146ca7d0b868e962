//! How fast the tiled kernel is, beside candle's matrix product.

use candle_core::DType;

use super::{Case, MaskCase, long, noise};
use crate::attention::{Kernel, backward, forward};

/// Prints what the tiled kernel reaches on one core, in time that the thread was running:
/// `cargo test -p autosp-runtime --lib attention_rate -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
#[allow(clippy::print_stdout)]
fn attention_rate() {
    let running = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
    };
    // The clock ticks in milliseconds: count enough of them.
    let mean = |f: &dyn Fn()| {
        let start = running();
        let mut runs = 0.0;
        while running() - start < 0.5 {
            f();
            runs += 1.0;
        }
        (running() - start) / runs
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    pool.install(|| {
        for (len, d, causal) in [(1024, 16, true), (1024, 32, true), (1024, 64, true), (1024, 64, false), (2048, 128, true)] {
            let mask = if causal {
                MaskCase::Fill(None, Some(0), f64::NEG_INFINITY, true)
            } else {
                MaskCase::None
            };
            let case = Case { kv_heads: 2, share: 1, len, valid: len, d, dv: d, dtype: DType::F32, ..long(mask) };
            let inputs = case.inputs();
            let [q, k, v, w] = &inputs;
            let spec = case.spec();
            let flop = 4.0 * (case.heads() * len * len * d) as f64 * if causal { 0.5 } else { 1.0 };
            let output = forward(Kernel::Tiled, &spec, q, k, v).unwrap();
            let ahead = mean(&|| drop(forward(Kernel::Tiled, &spec, q, k, v).unwrap()));
            let back = mean(&|| drop(backward(Kernel::Tiled, &spec, (q, k, v), &output, w).unwrap()));
            println!(
                "S {len} d {d} causal {causal}: forward {:.1} GFLOP/s ({:.1} ms), backward {:.1} GFLOP/s ({:.1} ms)",
                flop / ahead / 1e9,
                ahead * 1e3,
                2.5 * flop / back / 1e9,
                back * 1e3
            );
        }
        let n = 1024;
        let (a, b) = (noise(1, &[n, n], DType::F32), noise(2, &[n, n], DType::F32));
        let product = mean(&|| drop(a.matmul(&b).unwrap()));
        println!("matmul {n}: {:.1} GFLOP/s", 2.0 * (n * n * n) as f64 / product / 1e9);
    });
}
