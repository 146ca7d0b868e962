//! Starts launchers and ranks, and reads what they say.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::roles::{NAME, ROLE};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(1);

/// A process and its lines.
pub struct Job {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    ranks: usize,
}

/// What a process has said, and how it ended.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub text: String,
    pub took: Duration,
}

impl Done {
    #[track_caller]
    pub fn says(&self, part: &str) {
        assert!(
            self.text.contains(part),
            "`{part}` is not in:\n{}",
            self.text
        );
    }

    /// The processes that have said who they are.
    pub fn all_ranks_are_gone(&self) {
        are_gone(&pids(self.text.lines()));
    }
}

fn pids<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<i32> {
    lines
        .filter_map(|line| line.split_once("pid ")?.1.parse().ok())
        .collect()
}

/// That none of the processes is left, or will be in a moment.
pub fn are_gone(ranks: &[i32]) {
    assert!(!ranks.is_empty());
    let until = Instant::now() + Duration::from_secs(10);
    for &rank in ranks {
        while is_running(rank) {
            assert!(Instant::now() < until, "{rank} is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A process that nobody has waited for yet counts as ended.
fn is_running(rank: i32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{rank}/stat"));
    match state {
        Ok(text) => !text.contains(") Z "),
        Err(_) => cfg!(not(target_os = "linux")) && is_known(rank),
    }
}

fn is_known(process: i32) -> bool {
    // SAFETY: the call takes two numbers; no signal is sent.
    unsafe { libc::kill(process, 0) == 0 }
}

/// Sends a signal to a process, which is there.
pub fn send(process: i32, signal: i32) {
    // SAFETY: the call takes two numbers; the process is one of this test.
    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
}

fn spawn(mut command: Command, ranks: usize) -> Job {
    let mut child = command
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (say, lines) = channel();
    let streams: [Box<dyn Read + Send>; 2] = [
        Box::new(child.stdout.take().unwrap()),
        Box::new(child.stderr.take().unwrap()),
    ];
    for stream in streams {
        let say = say.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let _ = say.send(line);
            }
        });
    }
    Job {
        child,
        lines,
        seen: Vec::new(),
        ranks,
    }
}

impl Job {
    /// The command line with these arguments.
    pub fn command(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"));
        command.args(arguments);
        spawn(command, 0)
    }

    /// `ranks` processes under the launcher.
    pub fn launch(role: &str, ranks: usize) -> Self {
        Self::launch_with(role, ranks, &[])
    }

    /// The same with more arguments, of the form `NAME=value` for the environment, else for the launcher.
    pub fn launch_with(role: &str, ranks: usize, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cargo-autosp"));
        command.args(["autosp", "launch", "--ranks", &ranks.to_string()]);
        command.env(ROLE, role).env("AUTOSP_DEADLINE", "20");
        for word in more {
            match word.split_once('=') {
                Some((name, value)) => command.env(name, value),
                None => command.arg(word),
            };
        }
        command.arg("--").arg(std::env::current_exe().unwrap());
        command.args([NAME, "--exact", "--nocapture"]);
        spawn(command, ranks)
    }

    /// Reads lines until one has `part` in it, `count` times.
    fn read_until(&mut self, part: &str, count: usize) {
        let until = Instant::now() + PATIENCE;
        let mut found = self.seen.iter().filter(|line| line.contains(part)).count();
        while found < count {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    found += usize::from(line.contains(part));
                    self.seen.push(line);
                }
                Err(end) => panic!(
                    "`{part}` was not said {count} times ({end}):\n{}",
                    self.seen.join("\n")
                ),
            }
        }
    }

    /// The processes of the ranks, all of which are in the middle of their steps.
    pub fn pids(&mut self) -> Vec<i32> {
        let ranks = self.ranks;
        self.read_until("steps are taken", ranks);
        pids(self.seen.iter().map(String::as_str))
    }

    /// The process of one rank of a launcher.
    pub fn pid_of(&mut self, rank: usize) -> i32 {
        let ranks = self.ranks;
        self.read_until("steps are taken", ranks);
        let prefix = format!("[rank {rank}] pid ");
        let line = self.seen.iter().find_map(|line| line.strip_prefix(&prefix));
        line.unwrap().parse().unwrap()
    }

    /// Signals the process itself.
    pub fn signal(&mut self, signal: i32) {
        send(self.child.id() as i32, signal);
    }

    /// Waits for the end, for a while.
    pub fn wait(mut self) -> Done {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > PATIENCE {
                let _ = self.child.kill();
                let said: Vec<String> = self.lines.try_iter().collect();
                panic!("no end of:\n{}\n{}", self.seen.join("\n"), said.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = begin.elapsed();
        // Both readers end with the streams; ranks that outlive the process may hold them.
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(1)) {
            self.seen.push(line);
        }
        Done {
            code: status.code(),
            text: self.seen.join("\n"),
            took,
        }
    }
}

/// Ranks that nobody watches, as under another launcher.
pub struct Loose(pub Vec<Job>);

impl Loose {
    /// `ranks` processes, whose variables are what `set` says.
    pub fn start(
        role: &str,
        ranks: usize,
        set: fn(usize, usize) -> Vec<(&'static str, usize)>,
    ) -> Self {
        Self::start_with(role, ranks, set, &[])
    }

    pub fn start_with(
        role: &str,
        ranks: usize,
        set: fn(usize, usize) -> Vec<(&'static str, usize)>,
        more: &[(&str, &str)],
    ) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let place = free.local_addr().unwrap().to_string();
        drop(free);
        let start = |rank| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args([NAME, "--exact", "--nocapture"])
                .env(ROLE, role)
                .env("AUTOSP_RENDEZVOUS", &place)
                .env("AUTOSP_SECRET", "the secret of this test")
                .env("AUTOSP_DEADLINE", "20");
            for (name, value) in set(rank, ranks) {
                command.env(name, value.to_string());
            }
            for (name, value) in more {
                command.env(name, value);
            }
            spawn(command, 1)
        };
        Self((0..ranks).map(start).collect())
    }

    pub fn torchrun(rank: usize, ranks: usize) -> Vec<(&'static str, usize)> {
        vec![
            ("RANK", rank),
            ("WORLD_SIZE", ranks),
            ("LOCAL_RANK", rank),
            ("LOCAL_WORLD_SIZE", ranks),
        ]
    }

    pub fn slurm(rank: usize, ranks: usize) -> Vec<(&'static str, usize)> {
        vec![
            ("SLURM_PROCID", rank),
            ("SLURM_NTASKS", ranks),
            ("SLURM_LOCALID", rank),
            ("SLURM_NNODES", 1),
            ("SLURM_STEP_ID", 0),
            ("SLURM_JOB_ID", 7),
        ]
    }

    pub fn mpirun(rank: usize, ranks: usize) -> Vec<(&'static str, usize)> {
        vec![
            ("OMPI_COMM_WORLD_RANK", rank),
            ("OMPI_COMM_WORLD_SIZE", ranks),
            ("OMPI_COMM_WORLD_LOCAL_RANK", rank),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", ranks),
        ]
    }

    pub fn wait(self) -> Vec<Done> {
        self.0.into_iter().map(Job::wait).collect()
    }
}
