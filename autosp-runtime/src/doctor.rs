//! What the machine at hand does in a second: the [`Rates`] that the planner works with, measured with what training runs, on all ranks
//! at once.

use std::time::Instant;

use autosp_plan::Settings;
use autosp_plan::planner::Rates;
use autosp_plan::settings::Device as Kind;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::attention::{self, Kernel, Spec};
use crate::comm::{Tag, all_to_all};
use crate::mask::Band;
use crate::{Result, Sp, run_on_threads};

/// Times that each piece of work is done; the median counts.
const TIMES: usize = 5;

/// What was found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Findings {
    /// What the machine is: a name and what was found, in the order of printing.
    pub machine: Vec<(String, String)>,
    /// Of one rank while all do the same.
    pub rates: Rates,
    /// What was not measured, and why: these rates are those of the planner's default.
    pub assumed: Vec<(&'static str, &'static str)>,
}

/// How much is done of each kind of work.
struct Sizes {
    dtype: DType,
    /// Rows, width and columns of the product.
    product: [usize; 3],
    copy_bytes: usize,
    /// Heads, kv heads and width of attention.
    heads: [usize; 3],
    lengths: &'static [usize],
}

/// Long enough that a piece of work takes milliseconds.
const PROCESSOR: Sizes = Sizes {
    dtype: DType::F32,
    product: [512, 1024, 1024],
    copy_bytes: 64 << 20,
    heads: [4, 2, 64],
    lengths: &[512, 2048],
};

/// The sizes behind the figures of the planner's default.
const GPU: Sizes = Sizes {
    dtype: DType::BF16,
    product: [32_768, 4096, 14_336],
    copy_bytes: 1 << 30,
    heads: [32, 8, 128],
    lengths: &[16_384, 32_768, 65_536, 131_072],
};

/// Measures `ranks` ranks on threads: on the processor, or on a GPU each.
///
/// # Errors
/// AS0410 and AS0411 if there are not as many GPUs or they refuse; else those of the work itself.
pub fn measure(device: Kind, ranks: usize) -> Result<Findings> {
    let settings = Settings::default().with_device(device).with_sp(ranks);
    let sizes = if device == Kind::Cpu { PROCESSOR } else { GPU };
    let machine = machine(device)?;
    let mut all = run_on_threads(settings, |sp| rates(sp, &sizes))?;
    let mut assumed = Vec::new();
    if ranks == 1 {
        assumed.push(("link", "one rank sends nothing"));
    }
    // The slowest rank is the one that the others wait for.
    let mut slowest = all.swap_remove(0);
    for rates in all {
        let lower = |a: &mut f64, b: f64| *a = a.min(b);
        lower(&mut slowest.gemm, rates.gemm);
        lower(&mut slowest.copy, rates.copy);
        lower(&mut slowest.link, rates.link);
        lower(&mut slowest.host_link, rates.host_link);
        lower(&mut slowest.host_memory, rates.host_memory);
        for (row, other) in slowest.attention.iter_mut().zip(rates.attention) {
            lower(&mut row[1], other[1]);
            lower(&mut row[2], other[2]);
        }
    }
    Ok(Findings {
        machine,
        rates: slowest,
        assumed,
    })
}

fn rates(sp: &Sp, sizes: &Sizes) -> Result<Rates> {
    let device = sp.device();
    let zeros = |dims: &[usize]| Ok::<_, crate::Error>(Tensor::zeros(dims, sizes.dtype, device)?);
    let [rows, width, columns] = sizes.product;
    let (a, b) = (zeros(&[rows, width])?, zeros(&[width, columns])?);
    let product = seconds(sp, || Ok(a.matmul(&b)?))?;
    drop((a, b));

    let bytes = sizes.copy_bytes;
    let side = (bytes / sizes.dtype.size_in_bytes()).isqrt();
    let x = zeros(&[side, side])?;
    let bytes_of_x = (side * side * sizes.dtype.size_in_bytes()) as f64;
    let copy = 2.0 * bytes_of_x / seconds(sp, || Ok(x.copy()?))?;
    let default = Rates::default();
    let peers = sp.world_size() - 1;
    let link = if peers == 0 {
        default.link
    } else {
        // Between threads a part is handed over as it lies: what costs is that parts are cut out, as from a transposed matrix.
        let part = if device.is_cpu() { x.t()? } else { x.clone() };
        let time = seconds(sp, || {
            let parts = vec![Some(part.clone()); peers + 1];
            all_to_all(sp.world_group(), Tag::new("doctor", "exchange"), parts)
        })?;
        bytes_of_x * peers as f64 / time
    };
    drop(x);
    let attention = sizes.lengths.iter().map(|&length| {
        let [forward, backward] = attention_rates(sp, sizes, length)?;
        Ok([length as f64, forward, backward])
    });
    Ok(Rates {
        gemm: 2.0 * (rows * width * columns) as f64 / product,
        attention: attention.collect::<Result<_>>()?,
        copy,
        link,
        host_link: host_link(device, bytes, copy)?,
        host_memory: if sp.is_main() {
            host_memory(bytes)
        } else {
            f64::INFINITY
        },
    })
}

/// Forward and backward FLOP/s of causal attention, those that are executed: 2 S^2 d a head forward and 5 S^2 d backward.
fn attention_rates(sp: &Sp, sizes: &Sizes, length: usize) -> Result<[f64; 2]> {
    let [heads, kv_heads, d] = sizes.heads;
    let random = |heads| -> Result<Tensor> {
        let x = Tensor::randn(0f32, 1.0, (1, heads, length, d), sp.device())?;
        Ok(x.to_dtype(sizes.dtype)?)
    };
    let (q, k, v) = (random(heads)?, random(kv_heads)?, random(kv_heads)?);
    let spec = Spec::new(1.0 / (d as f64).sqrt(), length, heads, kv_heads);
    let spec = spec.with_band(Band {
        lo: None,
        hi: Some(0),
    })?;
    let run = || attention::forward(Kernel::Tiled, &spec, &q, &k, &v);
    let forward = seconds(sp, run)?;
    let out = run()?;
    let backward = seconds(sp, || {
        attention::backward(Kernel::Tiled, &spec, (&q, &k, &v), &out, &out.o)
    })?;
    let flops = (length * length * d * heads) as f64;
    Ok([2.0 * flops / forward, 5.0 * flops / backward])
}

/// The median of the seconds that `work` takes while all ranks do it.
fn seconds<T>(sp: &Sp, work: impl Fn() -> Result<T>) -> Result<f64> {
    let mut times = Vec::with_capacity(TIMES);
    for round in 0..=TIMES {
        sp.device().synchronize()?;
        sp.barrier()?;
        let begin = Instant::now();
        let result = work()?;
        sp.device().synchronize()?;
        let time = begin.elapsed().as_secs_f64();
        drop(result);
        // The first is slower: kernels are compiled, memory is taken.
        if round > 0 {
            times.push(time);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[TIMES / 2].max(1e-9))
}

/// Bytes a second between the device and the host; on the processor they are one memory, and a copy reads and writes it.
#[cfg_attr(
    not(feature = "cuda"),
    allow(
        unused_variables,
        clippy::unnecessary_wraps,
        reason = "only a GPU has a link"
    )
)]
fn host_link(device: &Device, bytes: usize, copy: f64) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::doctor::host_link(device, bytes);
    }
    Ok(copy / 2.0)
}

/// Bytes a second that all processors read and write together.
fn host_memory(bytes: usize) -> f64 {
    let from = vec![1u8; bytes];
    let mut to = vec![0u8; bytes];
    let part = bytes.div_ceil(rayon::current_num_threads()).max(1);
    let mut best = f64::INFINITY;
    for _ in 0..TIMES {
        let begin = Instant::now();
        to.par_chunks_mut(part)
            .zip(from.par_chunks(part))
            .for_each(|(to, from)| to.copy_from_slice(from));
        best = best.min(begin.elapsed().as_secs_f64());
    }
    2.0 * bytes as f64 / best.max(1e-9)
}

/// What the machine is.
#[cfg_attr(
    not(feature = "cuda"),
    allow(clippy::unnecessary_wraps, reason = "only a GPU can refuse")
)]
fn machine(device: Kind) -> Result<Vec<(String, String)>> {
    let mut lines = vec![
        (
            "processor".to_owned(),
            field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
        ),
        (
            "threads".to_owned(),
            std::thread::available_parallelism()
                .map_or(1, usize::from)
                .to_string(),
        ),
    ];
    if let Some(memory) = field("/proc/meminfo", "MemTotal") {
        let kilobytes = memory.trim_end_matches(" kB").parse().unwrap_or(0u64);
        lines.push((
            "memory".to_owned(),
            autosp_plan::units::show_size(kilobytes * 1024),
        ));
    }
    match device {
        #[cfg(feature = "cuda")]
        Kind::Cuda | Kind::CudaShared => lines.extend(crate::cuda::doctor::machine()?),
        _ if cfg!(feature = "cuda") => lines.push(("GPUs".to_owned(), "not asked for".to_owned())),
        _ => lines.push((
            "GPUs".to_owned(),
            "not looked for: this program was built without the feature `cuda`".to_owned(),
        )),
    }
    Ok(lines)
}

/// The value behind `name` in a file of the system, where there is one.
fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_measured_and_the_planner_reads_it() {
        let found = measure(Kind::Cpu, 2).unwrap();
        let rates = &found.rates;
        for rate in [
            rates.gemm,
            rates.copy,
            rates.link,
            rates.host_link,
            rates.host_memory,
        ] {
            // More than a calculator, less than any machine.
            assert!((1e6..1e15).contains(&rate), "{rates:?}");
        }
        let lengths: Vec<f64> = rates.attention.iter().map(|row| row[0]).collect();
        assert_eq!(lengths, [512.0, 2048.0]);
        assert!(
            rates
                .attention
                .iter()
                .all(|row| row[1] > 1e6 && row[2] > 1e6)
        );
        assert_eq!(Rates::read(&rates.to_toml()).unwrap(), *rates);
        assert!(found.assumed.is_empty());
        assert!(found.machine.iter().any(|(name, _)| name == "processor"));
    }
}
