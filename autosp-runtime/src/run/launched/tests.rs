//! The variables of each launcher, alone, together, damaged and cut.

use proptest::prelude::*;

use super::*;

/// A process on the host of rank 0.
pub(in crate::run) fn launched_as(rank: usize, world: usize, address: &str) -> Launched {
    Launched {
        by: Launcher::Torchrun,
        rank,
        world,
        local_rank: rank,
        gpu: rank,
        one_host: true,
        address: address.to_owned(),
    }
}

const TORCH: &str =
    "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node0 MASTER_PORT=29500";
const MPI: &str = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3 OMPI_COMM_WORLD_LOCAL_SIZE=4";
const SRUN: &str = "SLURM_PROCID=2 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_NNODES=2 SLURM_STEP_ID=0 SLURM_JOB_ID=77 SLURM_STEP_NODELIST=gpu[07-08]";

fn with(line: &str) -> Result<Option<Launched>> {
    let all: Vec<(&str, &str)> = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect();
    // The last of two counts, so that a test can say otherwise.
    read(&|name| {
        let found = all.iter().rev().find(|(known, _)| *known == name)?;
        (!found.1.is_empty()).then(|| found.1.to_owned())
    })
}

fn place(line: &str) -> (Launcher, [usize; 3], bool, String) {
    let found = with(line).unwrap().unwrap();
    (
        found.by,
        [found.rank, found.world, found.local_rank],
        found.one_host,
        found.address,
    )
}

fn refused(line: &str, parts: &[&str]) {
    let error = with(line).expect_err(line);
    for part in parts {
        assert!(error.to_string().contains(part), "{line}: {part}: {error}");
    }
}

#[test]
fn the_gpu_is_that_of_the_place_or_the_only_one() {
    let gpu = |more: &str| with(&format!("{TORCH} {more}")).unwrap().unwrap().gpu;
    assert_eq!(gpu(""), 1);
    assert_eq!(gpu("CUDA_VISIBLE_DEVICES=4,5,6,7"), 1);
    assert_eq!(gpu("CUDA_VISIBLE_DEVICES=1"), 0);
    assert_eq!(gpu("CUDA_VISIBLE_DEVICES=GPU-4a1b"), 0);
}

#[test]
fn every_launcher_is_understood() {
    assert_eq!(with("PATH=/bin AUTOSP_SP=4 SLURM_JOB_ID=3").unwrap(), None);
    assert_eq!(
        place(TORCH),
        (Launcher::Torchrun, [5, 8, 1], false, "node0:29500".into())
    );
    let one_host = format!("{MPI} AUTOSP_RENDEZVOUS=10.0.0.1:4000");
    assert_eq!(
        place(&one_host),
        (Launcher::OpenMpi, [3, 4, 3], true, "10.0.0.1:4000".into())
    );
    let port = 12_000 + 77 * 37;
    assert_eq!(
        place(SRUN),
        (Launcher::Slurm, [2, 4, 0], false, format!("gpu07:{port}"))
    );
    // The tasks of the step, not of the job.
    let step = format!("{SRUN} SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NUM_NODES=1");
    assert_eq!(place(&step).1, [2, 3, 0]);
    assert!(place(&step).2);
}

#[test]
fn one_process_is_no_launch() {
    for line in [
        "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1",
        "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NNODES=1 SLURM_STEP_ID=0",
        // A batch script, which will call srun.
        "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_NNODES=2 SLURM_JOB_ID=77",
    ] {
        assert_eq!(with(line).unwrap(), None, "{line}");
    }
}

#[test]
fn incomplete_and_senseless_sets_are_refused() {
    refused(
        &format!("{TORCH} WORLD_SIZE="),
        &["expected WORLD_SIZE beside RANK", "AS0314", "help: "],
    );
    refused(
        &format!("{TORCH} LOCAL_RANK="),
        &["expected LOCAL_RANK beside RANK"],
    );
    refused("WORLD_SIZE=4", &["expected RANK", "env -u"]);
    refused(&format!("{TORCH} RANK=8"), &["rank 8 of 8"]);
    refused(&format!("{TORCH} RANK=-1"), &["whole number, found `-1`"]);
    refused(&format!("{TORCH} LOCAL_RANK=4"), &["4 of at most 4"]);
    refused(&format!("{TORCH} LOCAL_WORLD_SIZE=9"), &["at most 9"]);
    refused(
        &format!("{TORCH} MASTER_PORT="),
        &["expected MASTER_PORT beside MASTER_ADDR"],
    );
    refused(&format!("{TORCH} MASTER_PORT=http"), &["found `http`"]);
    refused(
        &format!("{TORCH} AUTOSP_RENDEZVOUS=node0"),
        &["host:port, found `node0`"],
    );
    refused(MPI, &["AS0408", "mpirun -x AUTOSP_RENDEZVOUS=HOST:PORT"]);
    refused(&format!("{SRUN} SLURM_JOB_ID="), &["AS0408", "SLURM"]);
}

#[test]
fn sets_that_contradict_each_other_are_refused_unless_one_is_inside_the_other() {
    let both = format!("{SRUN} {TORCH}");
    refused(
        &both,
        &[
            "rank 5 of 8, 1 on its host (torchrun's",
            "rank 2 of 4, 0 on its host (SLURM's",
            "AS0314",
            "env -u RANK",
        ],
    );
    refused(&format!("{MPI} {TORCH}"), &["Open MPI's variables"]);
    // srun started torchrun, one a host, and torchrun this process.
    let inside = format!("{both} TORCHELASTIC_RUN_ID=none");
    assert_eq!(place(&inside).1, [5, 8, 1]);
    // srun started the daemons of mpirun.
    let inside = format!("{SRUN} {MPI} AUTOSP_RENDEZVOUS=node0:1");
    assert_eq!(place(&inside).1, [3, 4, 3]);
    // Two that say the same.
    let same = "RANK=2 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1";
    assert_eq!(place(&format!("{SRUN} {same}")).3, "a:1");
}

#[test]
fn the_port_beside_torchruns_store_is_taken() {
    let store = format!("{TORCH} TORCHELASTIC_USE_AGENT_STORE=True");
    assert_eq!(place(&store).3, "node0:29501");
    let last = format!("{store} MASTER_PORT=65535 MASTER_ADDR=fe80::1");
    assert_eq!(place(&last).3, "[fe80::1]:1024");
}

#[test]
fn the_first_host_of_a_list_is_found() {
    for (list, first) in [
        ("gpu01", Some("gpu01")),
        ("gpu01,gpu02", Some("gpu01")),
        ("gpu[01-04,07],login", Some("gpu01")),
        ("gpu[9,11]", Some("gpu9")),
        ("rack[2-3]n,x", Some("rack2n")),
        ("gpu[01", None),
        ("", None),
    ] {
        assert_eq!(first_host(list).as_deref(), first, "{list}");
    }
}

proptest! {
    /// Whatever the variables hold, the answer is a rank below its world or an error.
    #[test]
    fn nothing_senseless_is_accepted(values in prop::collection::vec(prop_oneof![Just(String::new()), (0u8..5).prop_map(|n| n.to_string()), Just("x".to_owned())], 4)) {
        let names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];
        let words: Vec<String> = names.iter().zip(&values).map(|(name, value)| format!("{name}={value}")).collect();
        let line = words.join(" ");
        if let Ok(Some(found)) = with(&format!("{line} MASTER_ADDR=a MASTER_PORT=1")) {
            prop_assert!(found.rank < found.world && found.local_rank < found.world && found.world > 1);
            prop_assert_eq!(found.rank.to_string(), values[0].as_str());
        }
    }
}
