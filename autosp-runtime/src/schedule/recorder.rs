//! Runs a schedule without data.

use std::fmt;

use candle_core::Result;

use super::{Backward, Check, Direction, Forward, Schedule, Ulysses, Verb};
use crate::error::Result as SiteResult;

/// Runs a schedule without data, checks it, and draws it.
///
/// ```text
/// llama::Attention::forward, forward
///   group 0  qkv      s.w
///            attend      #
///            out          s...w
///   group 1  qkv       s...w
///            attend         #
///            out             sw
/// ```
/// Each column is one verb of the schedule: `s` starts an exchange, `w` waits for it, `#` computes; a dot is time in which the
/// exchange is on its way.
#[derive(Debug, Clone)]
pub struct Recorder {
    site: &'static str,
    direction: Direction,
    check: Check,
    verbs: Vec<(Verb, usize)>,
}

impl Recorder {
    fn new(site: &'static str, direction: Direction, needs: &[Vec<usize>]) -> Self {
        Self {
            site,
            direction,
            check: Check::new(site, direction, needs),
            verbs: Vec::new(),
        }
    }

    /// Records the forward of `S` for groups that use the kv heads `needs[g]`.
    ///
    /// # Errors
    /// `AS0328`, naming the verb that is missing, repeated or too early.
    pub fn forward<S: Schedule<Ulysses>>(needs: &[Vec<usize>]) -> SiteResult<Self> {
        let mut recorder = Self::new(S::NAME, Direction::Forward, needs);
        S::forward(&mut recorder)?;
        recorder.check.end()?;
        Ok(recorder)
    }

    /// Records the replay of `S`; see [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn replay<S: Schedule<Ulysses>>(needs: &[Vec<usize>]) -> SiteResult<Self> {
        let mut recorder = Self::new(S::NAME, Direction::Replay, needs);
        S::replay(&mut recorder)?;
        recorder.check.end()?;
        Ok(recorder)
    }

    /// Records the backward of `S`; see [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<S: Schedule<Ulysses>>(needs: &[Vec<usize>]) -> SiteResult<Self> {
        let mut recorder = Self::new(S::NAME, Direction::Backward, needs);
        S::backward(&mut recorder)?;
        recorder.check.end()?;
        Ok(recorder)
    }

    /// The verbs in their order, as a schedule writes them.
    pub fn verbs(&self) -> Vec<String> {
        let call = |&(verb, g): &(Verb, usize)| match verb {
            Verb::Finish => format!("{}()", verb.name(self.direction)),
            _ => format!("{}({g})", verb.name(self.direction)),
        };
        self.verbs.iter().map(call).collect()
    }

    fn step(&mut self, verb: Verb, g: usize) -> Result<()> {
        self.check.step(verb, g)?;
        self.verbs.push((verb, g));
        Ok(())
    }

    fn place(&self, verb: Verb, g: usize) -> Option<usize> {
        self.verbs.iter().position(|&step| step == (verb, g))
    }

    /// One line: what happens between `first` and `last`, drawn over the schedule's columns.
    fn line(&self, first: Option<usize>, last: Option<usize>) -> String {
        let column = |at| match (first, last) {
            (Some(first), Some(last)) if first == last && at == first => '#',
            (Some(first), _) if at == first => 's',
            (_, Some(last)) if at == last => 'w',
            (Some(first), Some(last)) if (first..last).contains(&at) => '.',
            _ => ' ',
        };
        let line: String = (0..self.verbs.len()).map(column).collect();
        line.trim_end().to_owned()
    }
}

impl Forward for Recorder {
    fn groups(&self) -> usize {
        self.check.groups()
    }
    fn send_qkv(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Send, g)
    }
    fn wait_qkv(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Wait, g)
    }
    fn attend(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Attend, g)
    }
    fn send_out(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Return, g)
    }
    fn wait_out(&mut self) -> Result<()> {
        self.step(Verb::Finish, 0)
    }
}

impl Backward for Recorder {
    fn groups(&self) -> usize {
        self.check.groups()
    }
    fn send_grad_out(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Send, g)
    }
    fn wait_grad_out(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Wait, g)
    }
    fn attend_backward(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Attend, g)
    }
    fn send_grad_qkv(&mut self, g: usize) -> Result<()> {
        self.step(Verb::Return, g)
    }
    fn wait_grad_qkv(&mut self) -> Result<()> {
        self.step(Verb::Finish, 0)
    }
}

impl fmt::Display for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, there, back) = match self.direction {
            Direction::Forward => ("forward", "qkv", "out"),
            Direction::Replay => ("replay", "qkv", "out"),
            Direction::Backward => ("backward", "grad out", "grad qkv"),
        };
        writeln!(f, "{}, {way}", self.site)?;
        for g in 0..self.check.groups() {
            let attend = self.place(Verb::Attend, g);
            let lines = [
                (
                    format!("group {g}"),
                    there,
                    self.line(self.place(Verb::Send, g), self.place(Verb::Wait, g)),
                ),
                (String::new(), "attend", self.line(attend, attend)),
                (
                    String::new(),
                    back,
                    self.line(self.place(Verb::Return, g), self.place(Verb::Finish, 0)),
                ),
            ];
            for (group, what, line) in lines {
                if what == "attend" && self.direction == Direction::Replay {
                    continue;
                }
                writeln!(f, "  {group:<9}{what:<9}{line}")?;
            }
        }
        Ok(())
    }
}
