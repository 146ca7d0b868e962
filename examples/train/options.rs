//! What can be asked of the program, and what it refuses before anything runs.

use std::{ffi::OsString, path::PathBuf};

use autosp::Result;
use candle_core::DType;
use clap::{Parser, ValueEnum, error::ErrorKind};

use crate::failure;

/// Trains a small byte-level Llama on text, each sequence spread over several ranks (threads of this process).
#[derive(Debug, Clone, Parser)]
#[command(name = "train", version)]
pub struct Options {
    /// Text files, or folders of them [default: the sources and documents of this workspace]
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// What makes tokens of text: a tokenizer.json, or a folder with one [default: each byte is a token]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// The data are JSON lines, and the text is in this field
    #[arg(
        long,
        value_name = "NAME",
        requires = "data",
        conflicts_with = "token_width"
    )]
    pub json_field: Option<String>,
    /// The data are files of tokens, of 16 or 32 bits each
    #[arg(long, value_name = "BITS", requires = "data")]
    pub token_width: Option<u8>,
    /// What a sequence is made of: one document each, or the documents end to end
    #[arg(long, value_enum, default_value_t = Documents::Pad)]
    pub documents: Documents,
    /// A Llama to go on from: a folder with config.json and safetensors [default: a small one, drawn]
    #[arg(long, value_name = "FOLDER")]
    pub model: Option<PathBuf>,
    /// Ranks that share one sequence [default: 4]
    #[arg(long, value_name = "N")]
    pub sp: Option<usize>,
    /// Replicas that share a batch [default: 1]
    #[arg(long, value_name = "M")]
    pub dp: Option<usize>,
    /// Tokens (bytes) of a sequence
    #[arg(long, value_name = "S", default_value_t = 512)]
    pub seq_len: usize,
    /// Sequences of a step, over all ranks
    #[arg(long, value_name = "B", default_value_t = 2)]
    pub batch: usize,
    /// Optimizer steps
    #[arg(long, value_name = "K", default_value_t = 60)]
    pub steps: usize,
    /// Decides the first parameters and the order of the text, whatever the number of ranks
    #[arg(long, value_name = "X", default_value_t = 1)]
    pub seed: u64,
    /// Learning rate at its peak
    #[arg(
        long,
        value_name = "R",
        default_value_t = 3e-3,
        allow_negative_numbers = true
    )]
    pub lr: f64,
    /// Head groups of each attention: the next group's exchange overlaps this group's attention [default: 2]
    #[arg(long, value_name = "G")]
    pub groups: Option<usize>,
    /// What ranks compute on: cpu, cuda (a GPU for each rank) or cuda-shared (one GPU for all) [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// The type of the parameters
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = Type::F32)]
    pub dtype: Type,
    /// How the loss is taken: of logits that are there whole, or of those of some tokens at a time
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Loss::Tiled)]
    pub loss: Loss,
    /// One JSON object a step goes here
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// What a forward keeps for its backward: all, qkv, attention or input [default: all]
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<String>,
    /// ZeRO stage, 0 or 1: with 1 the ranks share the optimizer's state out [default: 0]
    #[arg(long, value_name = "STAGE")]
    pub zero: Option<usize>,
    /// Micro-batches of a step, of --batch sequences each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub accumulate: usize,
    /// The trained model goes here, as safetensors
    #[arg(long, value_name = "FILE", default_value = "out/llama.safetensors")]
    pub save: PathBuf,
    /// Steps between checkpoints, which go into a folder beside --save [default: none but the last]
    #[arg(long, value_name = "N")]
    pub save_every: Option<usize>,
    /// Goes on from the latest checkpoint beside --save
    #[arg(long)]
    pub resume: bool,
}

/// The type of the parameters and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Type {
    /// Single precision
    F32,
    /// Half precision with the range of single
    Bf16,
}

impl Type {
    /// As candle has it.
    pub fn candle(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// How far the first step on several ranks may be from that on one: sums in another order, rounded to this type.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::F32 => 1e-5,
            Self::Bf16 => 2e-2,
        }
    }
}

/// How the loss is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Loss {
    /// Logits of all tokens, then their loss
    Whole,
    /// Logits, loss and gradients for some tokens at a time
    Tiled,
}

/// What a sequence is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Documents {
    /// One document, padded at the end where it is short
    Pad,
    /// All documents end to end: attention crosses them
    Cross,
}

impl Options {
    /// Where checkpoints go: `out/llama.checkpoints` for `out/llama.safetensors`.
    pub fn checkpoints(&self) -> PathBuf {
        self.save.with_extension("checkpoints")
    }

    /// Reads the command line. `Ok(Err(text))` is a text that was asked for, such as the help.
    ///
    /// # Errors
    /// An unknown flag or a value that makes no sense, in one line.
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<std::result::Result<Self, String>> {
        let options = match Self::try_parse_from(arguments) {
            Ok(options) => options,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
                ) =>
            {
                return Ok(Err(error.to_string()));
            }
            Err(error) => {
                let text = error.to_string();
                let line = text
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .trim_start_matches("error: ");
                return Err(failure(format!("{line} (--help lists the options)")));
            }
        };
        options.check()?;
        Ok(Ok(options))
    }

    fn check(&self) -> Result<()> {
        for (flag, value) in [
            ("--sp", self.sp.unwrap_or(1)),
            ("--dp", self.dp.unwrap_or(1)),
            ("--seq-len", self.seq_len),
            ("--batch", self.batch),
            ("--steps", self.steps),
            ("--groups", self.groups.unwrap_or(1)),
            ("--accumulate", self.accumulate),
            ("--save-every", self.save_every.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(failure(format!("expected {flag} of at least 1, found 0")));
            }
        }
        if let Some(bits) = self.token_width
            && !matches!(bits, 16 | 32)
        {
            return Err(failure(format!(
                "expected --token-width 16 or 32, found {bits}"
            )));
        }
        for path in &self.data {
            if self.json_field.is_none() && path.extension().is_some_and(|ending| ending == "jsonl")
            {
                return Err(failure(format!(
                    "expected --json-field NAME for the JSON lines of `{}`, found none",
                    path.display()
                )));
            }
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(failure(format!("expected --lr above 0, found {}", self.lr)));
        }
        Ok(())
    }
}
