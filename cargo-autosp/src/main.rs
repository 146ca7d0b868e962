//! The command line of AutoSP: what the attribute would do to a file, without building it, and the start of ranks.
//!
//! Works as `cargo autosp X` and as `cargo-autosp X`. Exit codes: 0 done, 1 the input could not be read or parsed, 2 the
//! model is refused, or does not fit; of `launch` that of the first rank that failed.

use std::{
    io::{self, ErrorKind, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand, ValueEnum};

mod adopt;
mod doctor;
mod estimate;
mod expand;
mod explain;
mod failure;
#[cfg(unix)]
mod launch;
mod metadata;
mod plan;
mod source;
mod survey;

use failure::Failure;

#[derive(Debug, Parser)]
#[command(
    name = "cargo autosp",
    version,
    about = "What AutoSP does to a model file, and why"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print what is decided for a model file: attention sites, checkpoint scopes, refusals
    Plan {
        /// A Rust file, annotated or not
        file: PathBuf,
        /// How to print it
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Print a model file with the code that the attribute emits
    Expand {
        /// A Rust file, annotated or not
        file: PathBuf,
    },
    /// Copy a model file of a dependency into your crate, as an annotated module with its paths fixed
    Adopt(adopt::Arguments),
    /// Print what becomes of every model file of a folder or of a dependency
    Survey(survey::Arguments),
    /// Start a program once for each rank of a run on this host, and end all ranks when one fails
    #[cfg(unix)]
    Launch(launch::Arguments),
    /// Print what training a model needs in memory and time, the choices that fit, and the longest sequence
    Estimate(estimate::Arguments),
    /// Print what this machine is and how fast, and save it for `estimate`
    Doctor(doctor::Arguments),
    /// Print what an error code means and what to do; without a code, all of them
    Explain {
        /// An error code, such as AS0203
        code: Option<String>,
        /// Print Markdown, as in docs/errors.md
        #[arg(long)]
        markdown: bool,
    },
}

/// How a plan is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    Text,
    /// For programs
    Json,
}

/// The exit code where the model is refused; a file without attention is.
const REFUSED: u8 = 2;

/// What a command prints, and how the process ends after it.
struct Outcome {
    text: String,
    code: u8,
}

impl Outcome {
    fn done(text: String) -> Self {
        Self { text, code: 0 }
    }
}

/// Stack for the analysis of sources that nest deeply; only what is used is taken.
const STACK: usize = 256 << 20;

fn main() -> ExitCode {
    let thread = std::thread::Builder::new().stack_size(STACK);
    match thread.spawn(run).map(std::thread::JoinHandle::join) {
        Ok(Ok(code)) => code,
        _ => ExitCode::FAILURE,
    }
}

fn run() -> ExitCode {
    let arguments = match Arguments::try_parse_from(command_line(std::env::args())) {
        Ok(arguments) => arguments,
        // clap's own exit code for wrong usage is 2, which means "refused" here.
        Err(error) => {
            let code = u8::from(error.use_stderr());
            return if error.print().is_ok() {
                ExitCode::from(code)
            } else {
                ExitCode::FAILURE
            };
        }
    };
    let outcome = match arguments.command {
        Command::Plan { file, format } => plan::run(&file, format),
        Command::Expand { file } => expand::run(&file),
        Command::Adopt(arguments) => adopt::run(&arguments),
        Command::Survey(arguments) => survey::run(&arguments),
        #[cfg(unix)]
        Command::Launch(arguments) => launch::run(&arguments),
        Command::Estimate(arguments) => estimate::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Explain { code, markdown } => explain::run(code.as_deref(), markdown),
    };
    let written = match &outcome {
        Ok(outcome) => write(&mut io::stdout().lock(), &outcome.text),
        Err(failure) => write(&mut io::stderr().lock(), &format!("{failure}\n")),
    };
    match (written, outcome) {
        (Err(_), _) | (_, Err(_)) => ExitCode::FAILURE,
        (Ok(()), Ok(outcome)) => ExitCode::from(outcome.code),
    }
}

/// The arguments without the word that cargo puts in front of them.
fn command_line(arguments: impl Iterator<Item = String>) -> Vec<String> {
    let mut arguments: Vec<String> = arguments.collect();
    if arguments.get(1).is_some_and(|word| word == "autosp") {
        arguments.remove(1);
    }
    arguments
}

/// Writes everything; a reader that has seen enough (`| head`) is no error.
fn write(to: &mut impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_word_is_optional() {
        let words = |line: &str| command_line(line.split(' ').map(String::from));
        assert_eq!(
            words("cargo-autosp autosp explain AS0101"),
            words("cargo-autosp explain AS0101")
        );
        assert_eq!(words("cargo-autosp explain autosp").len(), 3);
    }

    #[test]
    fn a_closed_pipe_is_no_error_and_a_full_disk_is() {
        struct Fails(ErrorKind);
        impl Write for Fails {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(write(&mut Fails(ErrorKind::BrokenPipe), "x").is_ok());
        assert!(write(&mut Fails(ErrorKind::StorageFull), "x").is_err());
    }
}
