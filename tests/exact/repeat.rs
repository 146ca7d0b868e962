//! Runs repeat to the bit, whatever the number of threads.

use autosp::Settings;

use crate::job::{Found, Job, tiny};

/// All numbers of all ranks, as bits.
fn bits(found: &[Found]) -> Vec<Vec<u32>> {
    found
        .iter()
        .flat_map(|rank| {
            let gradient = |tensor: &candle_core::Tensor| {
                let numbers = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                numbers.into_iter().map(f32::to_bits).collect()
            };
            let loss = vec![(rank.loss as f32).to_bits()];
            std::iter::once(loss)
                .chain(rank.gradients.values().map(gradient))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn job() -> Job {
    Job::random(tiny(2), 2, 203, 11, |position| position % 3 != 0)
}

fn settings() -> Settings {
    Settings::default().with_sp(2).with_dp(2).with_groups(2)
}

#[test]
fn two_runs_are_equal_and_so_are_all_ranks() {
    let job = job();
    let (first, second) = (
        bits(&job.on_ranks(settings())),
        bits(&job.on_ranks(settings())),
    );
    assert!(first == second);
    let ranks: Vec<_> = first.chunks(first.len() / 4).collect();
    assert!(ranks.iter().all(|rank| rank == &ranks[0]));
}

/// A process has one pool of threads, so that another number of them needs another process: this test calls itself.
#[test]
fn one_and_two_threads_are_equal() {
    const FILE: &str = "EXACT_BITS_FILE";
    if let Some(path) = std::env::var_os(FILE) {
        let bits: Vec<u8> = bits(&job().on_ranks(settings()))
            .into_iter()
            .flatten()
            .flat_map(u32::to_le_bytes)
            .collect();
        std::fs::write(path, bits).unwrap();
        return;
    }
    let results: Vec<Vec<u8>> = ["1", "2", "5"]
        .into_iter()
        .map(|threads| {
            let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"))
                .join(format!("bits-of-{threads}-threads"));
            let status = std::process::Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "repeat::one_and_two_threads_are_equal",
                    "--test-threads",
                    "1",
                ])
                .env(FILE, &path)
                .env("RAYON_NUM_THREADS", threads)
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert!(status.success());
            std::fs::read(path).unwrap()
        })
        .collect();
    assert!(results[0].len() > 1000);
    assert!(results[0] == results[1] && results[0] == results[2]);
}
