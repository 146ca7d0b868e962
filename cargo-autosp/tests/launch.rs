//! Launched programs, and everything that can happen to a process: the ranks of these tests are this test program once more.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub
)]

#[path = "launch/faults.rs"]
mod faults;
#[path = "launch/job.rs"]
mod job;
#[path = "launch/roles.rs"]
mod roles;

use std::time::{Duration, Instant};

use job::{Job, Loose};

#[test]
fn all_ranks_run_and_their_lines_say_whose_they_are() {
    let done = Job::launch("sum", 3).wait();
    assert_eq!(done.code, Some(0), "{done:?}");
    for rank in 0..3 {
        // sp is what was launched, as nobody has said it; 3 ranks of 8 bytes twice to 2 others.
        done.says(&format!("[rank {rank}] rank {rank} of 3: sp 3, bytes 96"));
    }
}

/// As for the ranks themselves.
#[test]
fn an_empty_place_of_rank_0_is_none() {
    let done = Job::launch_with("sum", 2, &["AUTOSP_RENDEZVOUS="]).wait();
    assert_eq!(done.code, Some(0), "{done:?}");
}

#[test]
fn the_variables_of_other_launchers_work_as_well() {
    for set in [Loose::torchrun, Loose::slurm, Loose::mpirun] {
        for done in Loose::start("sum", 2, set).wait() {
            assert_eq!(done.code, Some(0), "{done:?}");
            done.says("of 2: sp 2, bytes 32");
        }
    }
}

#[test]
fn several_runs_of_one_program_and_runs_of_its_own_work() {
    let done = Job::launch("again", 2).wait();
    assert_eq!(done.code, Some(0), "{done:?}");
    done.says("[rank 0] runs: 2 2 2, alone: 1");
    done.says("[rank 1] runs: 2 2 2, alone: 1");
}

#[test]
fn the_exit_code_is_that_of_the_first_rank_that_fails() {
    let done = Job::launch("code", 3).wait();
    assert_eq!(done.code, Some(41), "{done:?}");
    done.says("error: rank 1 of 3 failed: its process ended with exit code 41 [AS0607]");
    done.says("the last that it has written:");
    done.says("    these are the last words");
}

#[test]
fn ranks_that_do_not_end_by_themselves_are_ended() {
    let begin = Instant::now();
    let done = Job::launch_with("deaf", 2, &["--grace", "0"]).wait();
    assert_eq!(done.code, Some(7), "{done:?}");
    done.says("rank 0 of 2 failed: its process ended with exit code 7");
    assert!(begin.elapsed() < Duration::from_secs(15));
    done.all_ranks_are_gone();
}

#[test]
fn an_interrupt_ends_all_ranks() {
    let mut job = Job::launch("steps", 3);
    let ranks = job.pids();
    job.signal(libc::SIGINT);
    let done = job.wait();
    assert_eq!(done.code, Some(130), "{done:?}");
    done.says("ended all ranks on signal 2");
    job::are_gone(&ranks);
}

#[cfg(target_os = "linux")]
#[test]
fn ranks_do_not_outlive_a_launcher_that_is_killed() {
    let mut job = Job::launch("steps", 2);
    let ranks = job.pids();
    job.signal(libc::SIGKILL);
    job.wait();
    job::are_gone(&ranks);
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let done = Job::command(&["launch", "--ranks", "2", "--", "./no-such-program"]).wait();
    assert_eq!(done.code, Some(1), "{done:?}");
    done.says("cannot start `./no-such-program` as rank 0");
    done.says("[AS0608]");
    let done = Job::command(&["launch", "--", "x"]).wait();
    assert_eq!(done.code, Some(1), "{done:?}");
    done.says("--ranks");
}
