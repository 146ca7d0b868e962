//! `cargo autosp launch`: one process for each rank of a run on this host, and an end for all of them when one fails.
//!
//! Ranks learn who they are by the variables of torchrun, and the secret of the run by `AUTOSP_SECRET`, which is made anew for each
//! launch. Each rank has a process group of its own, so that what it has started itself ends with it, and so that Ctrl-C reaches the
//! launcher alone, which then ends the ranks.

mod output;
mod ranks;
mod system;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use autosp_plan::codes;
use autosp_plan::settings::SECRET_VARIABLE;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::output::say;
use self::ranks::{End, Ranks};
use crate::{Failure, Outcome};

/// How often the launcher looks at its ranks.
const PERIOD: Duration = Duration::from_millis(20);

/// What `launch` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Ranks: processes of this host
    #[arg(long, value_name = "N", required_unless_present = "gpus", conflicts_with = "gpus", value_parser = clap::value_parser!(u16).range(1..=256))]
    ranks: Option<u16>,
    /// GPUs: one process for each, with `AUTOSP_DEVICE=cuda`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    gpus: Option<u16>,
    /// Seconds that the other ranks have to end by themselves when one has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    grace: u32,
    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    program: Vec<OsString>,
}

/// Runs the program on all ranks.
///
/// # Errors
/// AS0608 if it cannot be started, AS0604 for a variable that contradicts a flag.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let count = arguments.ranks.or(arguments.gpus).unwrap_or(1);
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)
            .map_err(|error| refused(format!("cannot wait for signals: {error}")))?;
    }
    let variables = variables(arguments, count)?;
    let mut ranks = Ranks::start(&arguments.program, count, &variables)?;
    let end = watch(
        &mut ranks,
        &signal,
        Duration::from_secs(arguments.grace.into()),
    );
    Ok(Outcome {
        text: String::new(),
        code: report(&mut ranks, &end),
    })
}

/// Why a launch is over.
enum Over {
    /// All ranks have ended well.
    Well,
    /// This rank was the first to fail.
    Failed(usize, End),
    /// The launcher got this signal.
    Signal(usize),
}

/// Waits for the end of all ranks. After the first failure the others have `grace` to end by themselves, then they are ended.
fn watch(ranks: &mut Ranks, signal: &AtomicUsize, grace: Duration) -> Over {
    let mut first: Option<(usize, End, Instant)> = None;
    while ranks.are_running() {
        for (rank, end) in ranks.look() {
            if end == End::Code(0) {
                continue;
            }
            if first
                .as_ref()
                .is_none_or(|(_, known, _)| known.is_consequence_of(end))
            {
                let since = first.map_or_else(Instant::now, |(_, _, since)| since);
                first = Some((rank, end, since));
            }
        }
        match signal.load(Ordering::SeqCst) {
            0 => {}
            number => {
                ranks.end_all();
                return Over::Signal(number);
            }
        }
        if first
            .as_ref()
            .is_some_and(|(_, _, since)| since.elapsed() >= grace)
        {
            ranks.end_all();
        }
        std::thread::sleep(PERIOD);
    }
    match first {
        None => Over::Well,
        Some((rank, end, _)) => Over::Failed(rank, end),
    }
}

/// Says how it ended; the exit code.
fn report(ranks: &mut Ranks, over: &Over) -> u8 {
    ranks.finish_output();
    match over {
        Over::Well => 0,
        Over::Signal(number) => {
            say(&format!("launch: ended all ranks on signal {number}"));
            128 + *number as u8
        }
        Over::Failed(rank, end) => {
            let (rank, end) = blamed(ranks, *rank, *end);
            let (code, lines) = (&codes::LAUNCH_FAILED, ranks.last_lines(rank));
            let mut text = format!(
                "error: rank {rank} of {} failed: its process {end} [{}]",
                ranks.count(),
                code.id
            );
            if lines.is_empty() {
                text += "\n  it has written nothing";
            } else {
                text += "\n  the last that it has written:";
            }
            for line in lines {
                let _ = write!(text, "\n    {line}");
            }
            say(&text);
            end.code()
        }
    }
}

/// The rank that failed first: several end at nearly the same time with an error, which names it.
fn blamed(ranks: &Ranks, rank: usize, end: End) -> (usize, End) {
    if !matches!(end, End::Code(_)) {
        return (rank, end);
    }
    let lines = ranks.last_lines(rank);
    let named = lines
        .iter()
        .rev()
        .find_map(|line| named(line, ranks.count()));
    match named.and_then(|named| Some((named, ranks.end(named)?))) {
        Some((named, end)) if end != End::Code(0) => (named, end),
        _ => (rank, end),
    }
}

/// The rank in `rank 2 of 4 failed: ..`, as a run says it, in a line of one of `count` ranks.
fn named(line: &str, count: usize) -> Option<usize> {
    let (before, _) = line.split_once(&format!(" of {count} failed: "))?;
    let (_, rank) = before.rsplit_once("rank ")?;
    rank.parse().ok().filter(|rank| *rank < count)
}

/// What all ranks get from the launcher, besides who they are.
fn variables(arguments: &Arguments, count: u16) -> Result<Vec<(&'static str, String)>, Failure> {
    // AUTOSP_RENDEZVOUS goes before it; the ranks read that themselves.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|free| free.local_addr())
        .map_err(|error| refused(format!("no free port on this host: {error}")))?
        .port();
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| refused(format!("no random numbers: {error}")))?;
    let secret = bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let mut all = vec![
        ("WORLD_SIZE", count.to_string()),
        ("LOCAL_WORLD_SIZE", count.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
        (SECRET_VARIABLE, secret),
    ];
    if arguments.gpus.is_some() {
        match std::env::var("AUTOSP_DEVICE").as_deref() {
            Ok("cuda") | Err(_) => all.push(("AUTOSP_DEVICE", "cuda".to_owned())),
            Ok(other) => {
                let text = format!(
                    "expected AUTOSP_DEVICE=cuda or none with --gpus, found `{other}`\n  help: --ranks {count}"
                );
                return Err(Failure::new(&codes::ARGUMENT, text));
            }
        }
    }
    Ok(all)
}

fn refused(message: String) -> Failure {
    Failure::new(&codes::LAUNCH_PROGRAM, message)
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn the_rank_that_an_error_names_is_found() {
        assert_eq!(named("Error: rank 2 of 4 failed: panicked", 4), Some(2));
        for (line, count) in [
            ("rank 2 of 4 failed: panicked", 3),
            ("rank 5 of 4 failed: panicked", 4),
            ("all 4 ranks failed: panicked", 4),
            ("rank x of 4 failed: ", 4),
        ] {
            assert_eq!(named(line, count), None, "{line}");
        }
    }
}
