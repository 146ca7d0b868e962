//! What a rank does: this test is the program that the others launch.

use std::process::exit;
use std::time::Duration;

use autosp_runtime::{Result, Settings, Sp, run_on_threads, run_with};
use candle_core::{DType, Device, Tensor};

/// The variable that says what this process is, if it is a rank.
pub const ROLE: &str = "LAUNCH_TEST_ROLE";

/// The name of the test that ranks run.
pub const NAME: &str = "roles::a_rank";

#[test]
fn a_rank() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    // Lines of their own, whatever the test harness has begun to write.
    println!("\npid {}", std::process::id());
    let rank: usize = ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"]
        .iter()
        .find_map(|name| std::env::var(name).ok()?.parse().ok())
        .unwrap();
    if let Err(error) = play(&role, rank) {
        eprintln!("error: {error}");
        exit(3);
    }
    exit(0);
}

fn settings() -> Result<Settings> {
    Ok(Settings::load()?)
}

fn play(role: &str, rank: usize) -> Result<()> {
    match role {
        "again" => again(),
        "late" => {
            if rank == 1 {
                std::thread::sleep(Duration::from_millis(700));
            }
            sum()
        }
        // Ends well, but is never seen by the others.
        "missing" if rank == 1 => Ok(()),
        "settings" if rank == 1 => run_with(settings()?.with("groups", "7")?, |_| Ok(())).map(drop),
        "sum" | "missing" | "settings" => sum(),
        "code" if rank == 1 => {
            println!("these are the last words");
            exit(41)
        }
        "deaf" if rank == 0 => exit(7),
        "code" | "deaf" => loop {
            std::thread::sleep(Duration::from_mins(1));
        },
        "panic" => run_with(settings()?, |sp| {
            sp.barrier()?;
            assert!(sp.rank() != 1, "no tokens are left");
            sp.barrier()
        })
        .map(drop),
        "length" => run_with(settings()?, |sp| {
            let tokens = Tensor::zeros((1, 8 + 8 * (sp.rank() / 2)), DType::U32, &Device::Cpu)?;
            sp.shard(&tokens).map(drop)
        })
        .map(drop),
        "steps" => run_with(settings()?, steps).map(drop),
        other => panic!("no role is called {other}"),
    }
}

fn sum() -> Result<()> {
    run_with(settings()?, |sp| {
        let bytes = sp.sum_bytes(sp.ledger().snapshot())?;
        assert_eq!(bytes.sent, 0);
        let bytes = sp.sum_bytes(sp.ledger().snapshot())?;
        println!(
            "rank {} of {}: sp {}, bytes {}",
            sp.rank(),
            sp.world_size(),
            sp.settings().sp(),
            bytes.sent
        );
        Ok(())
    })
    .map(drop)
}

fn again() -> Result<()> {
    let mut sizes = Vec::new();
    let (mut alone, mut rank) = (0, 0);
    for _ in 0..3 {
        let found = run_with(settings()?, |sp| {
            sp.barrier()?;
            Ok((sp.world_size(), sp.rank()))
        })?;
        sizes.push(found[0].0.to_string());
        rank = found[0].1;
        alone = run_on_threads(Settings::default(), |sp| Ok(sp.world_size()))?[0];
    }
    assert!(rank < 2);
    println!("runs: {}, alone: {alone}", sizes.join(" "));
    Ok(())
}

/// Steps until somebody ends them.
fn steps(sp: &Sp) -> Result<()> {
    for step in 0.. {
        sp.scope(|| sp.barrier())?;
        if step == 3 {
            println!("steps are taken");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
