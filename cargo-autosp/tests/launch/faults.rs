//! Ranks that are killed, stopped, late, missing, or other than the rest: whoever is left ends in time, and says why.

use std::time::Duration;

use crate::job::{Done, Job, Loose, send};

/// Longer than a deadline of 2 s and everything that comes after it, on a machine with other things to do.
const SOON: Duration = Duration::from_secs(15);

const SHORT: [(&str, &str); 2] = [("AUTOSP_DEADLINE", "2"), ("AUTOSP_START_DEADLINE", "4")];

/// That a survivor has ended by itself with one error that has these parts.
#[track_caller]
fn fails(done: &Done, parts: &[&str]) {
    assert_eq!(done.code, Some(3), "{done:?}");
    assert!(done.took < SOON, "{done:?}");
    let line = done.text.lines().find(|line| line.starts_with("error: "));
    let line = line.unwrap_or_else(|| panic!("no error in {}", done.text));
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in {line}");
    }
}

#[test]
fn survivors_of_a_killed_rank_end_at_once_and_name_it() {
    let mut ranks = Loose::start("steps", 3, Loose::torchrun).0;
    for rank in &mut ranks {
        rank.pids();
    }
    let mut killed = ranks.remove(1);
    killed.signal(libc::SIGKILL);
    for rank in ranks {
        let done = rank.wait();
        assert!(done.took < Duration::from_secs(10), "{:?}", done.took);
        fails(
            &done,
            &[
                "rank 1 of 3 failed: its process ended without a word",
                "it was last in `sp.barrier` barrier",
                "of the world group",
            ],
        );
        done.says("the last collectives were:");
        done.says("[AS0412]");
    }
    assert_eq!(killed.wait().code, None);
}

#[test]
fn survivors_of_a_stopped_rank_end_after_the_deadline_and_name_it() {
    let mut ranks = Loose::start_with("steps", 3, Loose::torchrun, &SHORT).0;
    for rank in &mut ranks {
        rank.pids();
    }
    let mut stopped = ranks.remove(2);
    stopped.signal(libc::SIGSTOP);
    for rank in ranks {
        // Either sign comes first: nothing was heard, or the collective is late.
        let done = rank.wait();
        fails(&done, &["`sp.barrier` barrier", "rank 2"]);
        done.says("the last collectives were:");
    }
    stopped.signal(libc::SIGKILL);
    stopped.wait();
}

#[test]
fn the_launcher_names_a_killed_rank_and_passes_its_signal_on() {
    let mut job = Job::launch("steps", 3);
    let ranks = job.pids();
    send(job.pid_of(1), libc::SIGKILL);
    let done = job.wait();
    assert_eq!(done.code, Some(128 + 9), "{done:?}");
    assert!(done.took < SOON, "{:?}", done.took);
    done.says("error: rank 1 of 3 failed: its process was killed by SIGKILL [AS0607]");
    // The others say which collective it was.
    done.says("[rank 0] error: rank 1 of 3 failed: its process ended without a word");
    done.says("it was last in `sp.barrier` barrier");
    crate::job::are_gone(&ranks);
}

#[test]
fn the_launcher_kills_a_stopped_rank() {
    let mut job = Job::launch("steps", 2);
    let ranks = job.pids();
    send(job.pid_of(0), libc::SIGSTOP);
    let done = job.wait();
    assert_eq!(done.code, Some(128 + 9), "{done:?}");
    assert!(done.took < SOON, "{:?}", done.took);
    done.says("rank 0 of 2 failed: its process was stopped by SIGSTOP, and was killed");
    crate::job::are_gone(&ranks);
}

#[test]
fn a_late_rank_is_waited_for() {
    let done = Job::launch("late", 2).wait();
    assert_eq!(done.code, Some(0), "{done:?}");
    done.says("rank 1 of 2: sp 2");
}

#[test]
fn a_missing_rank_is_named_by_those_that_wait() {
    let mut ranks = Loose::start_with("missing", 3, Loose::torchrun, &SHORT).wait();
    assert_eq!(ranks.remove(1).code, Some(0));
    for done in ranks {
        fails(
            &done,
            &["rank 0 waited 4 s for the ranks to start; missing: rank 1"],
        );
        done.says("[AS0408]");
    }
}

#[test]
fn a_rank_with_other_settings_is_refused_by_all() {
    for done in Loose::start("settings", 2, Loose::torchrun).wait() {
        fails(
            &done,
            &["the same setting `groups` on all ranks, found 2 on rank 0 and 7 on rank 1"],
        );
    }
}

#[test]
fn a_rank_with_another_length_is_named_by_all() {
    let done = Job::launch("length", 3).wait();
    assert_eq!(done.code, Some(3), "{done:?}");
    for rank in 0..3 {
        done.says(&format!("[rank {rank}] error: "));
    }
    done.says("`sp.shard`: expected the same");
    done.says(" on rank 2");
}

#[test]
fn a_panic_is_named_by_all_and_by_the_launcher() {
    let done = Job::launch("panic", 3).wait();
    assert_eq!(done.code, Some(3), "{done:?}");
    for rank in 0..3 {
        done.says(&format!(
            "[rank {rank}] error: rank 1 of 3 failed: panicked at "
        ));
    }
    done.says("no tokens are left");
    done.says("error: rank 1 of 3 failed: its process ended with exit code 3 [AS0607]");
}
