//! What a correct schedule is, one verb at a time.

use autosp_plan::codes;

use crate::error::{Error, Result};

/// Which way through a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    /// The forward without its attention.
    Replay,
    Backward,
}

/// The five verbs that forward and backward share in kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    /// Start the exchange to head shards.
    Send,
    /// Wait for it.
    Wait,
    /// Compute.
    Attend,
    /// Start the exchange back.
    Return,
    /// Wait for all of those.
    Finish,
}

impl Verb {
    /// Its name in a schedule.
    pub(crate) fn name(self, direction: Direction) -> &'static str {
        match (direction, self) {
            (Direction::Forward | Direction::Replay, Self::Send) => "send_qkv",
            (Direction::Forward | Direction::Replay, Self::Wait) => "wait_qkv",
            (Direction::Forward | Direction::Replay, Self::Attend) => "attend",
            (Direction::Forward | Direction::Replay, Self::Return) => "send_out",
            (Direction::Forward | Direction::Replay, Self::Finish) => "wait_out",
            (Direction::Backward, Self::Send) => "send_grad_out",
            (Direction::Backward, Self::Wait) => "wait_grad_out",
            (Direction::Backward, Self::Attend) => "attend_backward",
            (Direction::Backward, Self::Return) => "send_grad_qkv",
            (Direction::Backward, Self::Finish) => "wait_grad_qkv",
        }
    }
}

/// How far a group has come: the last verb that was run on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Idle,
    Sent,
    Landed,
    Attended,
    Returned,
}

impl Stage {
    /// The verbs on one group in their order, with the stage that each leads to.
    const ORDER: [(Verb, Self); 4] = [
        (Verb::Send, Self::Sent),
        (Verb::Wait, Self::Landed),
        (Verb::Attend, Self::Attended),
        (Verb::Return, Self::Returned),
    ];
}

/// Follows a schedule and refuses the first verb that is out of order.
#[derive(Debug, Clone)]
pub(crate) struct Check {
    site: &'static str,
    direction: Direction,
    groups: Vec<Stage>,
    /// The groups whose results a replay has sent.
    returned: Vec<bool>,
    /// The kv heads that each group attends, counted on this rank.
    needs: Vec<Vec<usize>>,
    /// The group that brought each kv head, forward.
    bearer: Vec<Option<usize>>,
    finished: bool,
}

impl Check {
    /// For a site whose group `g` attends the kv heads `needs[g]`.
    pub(crate) fn new(site: &'static str, direction: Direction, needs: &[Vec<usize>]) -> Self {
        let kv_heads = needs.iter().flatten().max().map_or(0, |last| last + 1);
        Self {
            site,
            direction,
            groups: vec![Stage::Idle; needs.len()],
            returned: vec![false; needs.len()],
            needs: needs.to_vec(),
            bearer: vec![None; kv_heads],
            finished: false,
        }
    }

    fn refused(&self, why: &str) -> Error {
        Error::new(
            codes::SCHEDULE,
            format!("schedule of `{}`: {why}", self.site),
        )
    }

    fn call(&self, verb: Verb, g: usize) -> String {
        format!("{}({g})", verb.name(self.direction))
    }

    /// Accepts a verb on group `g`, or on none for [`Verb::Finish`].
    ///
    /// # Errors
    /// `AS0328`, naming the verb and the one that is missing before it.
    pub(crate) fn step(&mut self, verb: Verb, g: usize) -> Result<()> {
        let Some(place) = Stage::ORDER.iter().position(|(known, _)| *known == verb) else {
            return self.finish_exchange();
        };
        let call = self.call(verb, g);
        let Some(&stage) = self.groups.get(g) else {
            let last = self.groups.len().saturating_sub(1);
            return Err(self.refused(&format!("{call}, but the last group is {last}")));
        };
        if self.direction == Direction::Replay {
            match verb {
                Verb::Attend => {
                    let why = "in a replay, which has the result of the forward";
                    return Err(self.refused(&format!("{call} {why}")));
                }
                Verb::Return if std::mem::replace(&mut self.returned[g], true) => {
                    return Err(self.refused(&format!("{call} for a second time")));
                }
                Verb::Return => return Ok(()),
                _ => {}
            }
        }
        if stage >= Stage::ORDER[place].1 {
            return Err(self.refused(&format!("{call} for a second time")));
        }
        if place > 0 && stage < Stage::ORDER[place - 1].1 {
            let before = self.call(Stage::ORDER[place - 1].0, g);
            return Err(self.refused(&format!("{call} before {before}")));
        }
        match verb {
            Verb::Send => {
                for &kv in &self.needs[g] {
                    self.bearer[kv].get_or_insert(g);
                }
            }
            Verb::Attend if self.direction == Direction::Forward => {
                if let Some(bearer) = self.on_its_way(g) {
                    let before = self.call(Verb::Wait, bearer);
                    let why = "which brings a kv head that both groups use";
                    return Err(self.refused(&format!("{call} before {before}, {why}")));
                }
            }
            _ => {}
        }
        self.groups[g] = Stage::ORDER[place].1;
        Ok(())
    }

    /// A group that brings a kv head of group `g` and has not landed.
    fn on_its_way(&self, g: usize) -> Option<usize> {
        let bearers = self.needs[g].iter().filter_map(|&kv| self.bearer[kv]);
        bearers
            .into_iter()
            .find(|&bearer| self.groups[bearer] < Stage::Landed)
    }

    fn finish_exchange(&mut self) -> Result<()> {
        let finish = Verb::Finish.name(self.direction);
        if self.finished {
            return Err(self.refused(&format!("{finish} for a second time")));
        }
        let open = |g: &usize| match self.direction {
            Direction::Replay => !self.returned[*g],
            _ => self.groups[*g] < Stage::Returned,
        };
        if let Some(g) = (0..self.groups.len()).find(open) {
            return Err(self.refused(&format!("{finish} before {}", self.call(Verb::Return, g))));
        }
        self.finished = true;
        Ok(())
    }

    /// The end of the schedule.
    ///
    /// # Errors
    /// `AS0328`, naming the first verb that never came.
    pub(crate) fn end(&self) -> Result<()> {
        // In a replay a group is done when it has landed; that it was returned stands with the end of the exchange.
        let verbs = match self.direction {
            Direction::Replay => &Stage::ORDER[..2],
            _ => &Stage::ORDER[..],
        };
        for (g, stage) in self.groups.iter().enumerate() {
            if let Some((verb, _)) = verbs.iter().find(|(_, reached)| stage < reached) {
                return Err(self.refused(&format!("{} is missing", self.call(*verb, g))));
            }
        }
        if !self.finished {
            return Err(self.refused(&format!("{} is missing", Verb::Finish.name(self.direction))));
        }
        Ok(())
    }

    /// Number of groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The kv heads of group `g` that group `g` itself brings (forward, after its send).
    pub(crate) fn brings(&self, g: usize) -> Vec<usize> {
        self.needs[g]
            .iter()
            .copied()
            .filter(|&kv| self.bearer[kv] == Some(g))
            .collect()
    }

    /// The kv heads of group `g` that no group which is still to be returned uses (backward, after its return).
    pub(crate) fn completes(&self, g: usize) -> Vec<usize> {
        let open = |kv: usize| {
            let mut others = self.groups.iter().zip(&self.needs);
            others.any(|(group, needs)| *group < Stage::Returned && needs.contains(&kv))
        };
        self.needs[g]
            .iter()
            .copied()
            .filter(|&kv| !open(kv))
            .collect()
    }
}
