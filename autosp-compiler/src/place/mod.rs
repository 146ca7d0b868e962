//! The third room: which tensors are sharded along the sequence, which every rank holds whole, and which are never made.
//!
//! ```text
//!            Unknown                    not followed: reported if something depends on it
//!               |
//!            Either                     sharded or replicated, by a condition
//!          /    |    \
//!   Sharded   Given   Replicated        Lazy (scores, weights, masks: the site's own)
//! ```
//! A join of two placements goes up. `Given` is an input whose dimensions nobody reads: a shard or whole, as the caller has
//! it. A rule says when an operation on shards gives the shard of the operation; where an operand is replicated and has the
//! sequence in its shape, the runtime cuts this rank's rows out of it; a sum over the sequence is taken over all ranks.

mod branches;
mod given;
mod keys;
mod layout;
mod rules;
pub(crate) mod sites;

use std::collections::{HashMap, HashSet};

use autosp_plan::codes;

use crate::error::Refusal;
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::{Dim, Factor, Shape};
use crate::trace::size::{AtomId, AtomKind, Poly};
use crate::trace::{Role, SizeUse, Trace};
use sites::Site;

/// Where a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The same on every rank.
    Replicated,
    /// Cut along the sequence.
    Sharded,
    /// One or the other, by a condition.
    Either,
    /// An input of a rank that nobody reads, or what was made of it element by element: as the caller has it.
    Given,
    /// Attention scores, not yet normalised.
    Scores,
    /// Attention weights.
    Weights,
    /// What is added to or selects among scores.
    Mask,
}

impl Place {
    pub(crate) fn lazy(self) -> bool {
        matches!(self, Self::Scores | Self::Weights | Self::Mask)
    }

    fn join(self, other: Self) -> Self {
        if self == other { self } else { Self::Either }
    }
}

/// Something to insert at an operand or to put in the place of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conversion {
    /// Cut this rank's rows out of operand `input`; the dimension may count from the end.
    Slice { input: usize, dim: i64 },
    /// Fetch one token from the rank that owns it.
    Pick { dim: usize },
    /// Draw by row and token: their dimensions.
    Draw {
        rows: Option<usize>,
        tokens: Option<usize>,
    },
    /// Run along the whole sequence, over all ranks.
    Sequence,
    /// Operand `input` is a mask over keys, of which each rank holds its own; the same for all queries, whatever it looks like.
    Keys { input: usize, all_queries: bool },
}

/// The outcome of placement.
pub(crate) struct Placed {
    pub(crate) sequence: AtomId,
    pub(crate) place: Vec<Place>,
    pub(crate) conversions: Vec<(NodeId, Conversion)>,
    /// Sizes that must be turned from local to valid ones.
    pub(crate) valid: Vec<SizeUse>,
    pub(crate) sites: Vec<Site>,
    pub(crate) live: HashSet<NodeId>,
}

/// Places every tensor of a trace.
///
/// # Errors
/// Everything that cannot be done and matters, in the order of the source.
pub(crate) fn place(trace: &mut Trace<'_, '_>) -> Result<Placed, Vec<Refusal>> {
    let (sites, sequence) = sites::find(trace)?;
    let sequence = relate(trace, sequence);
    let trace: &Trace<'_, '_> = trace;
    let mut placer = Placer {
        trace,
        sequence,
        place: vec![Place::Replicated; trace.nodes.len()],
        conversions: Vec::new(),
        problems: HashMap::new(),
        first_round: true,
    };
    for site in &sites {
        site.scores
            .iter()
            .for_each(|n| placer.place[*n] = Place::Scores);
        site.weights
            .iter()
            .for_each(|n| placer.place[*n] = Place::Weights);
        site.masks
            .iter()
            .for_each(|n| placer.place[*n] = Place::Mask);
    }
    let outputs: HashSet<NodeId> = sites.iter().map(|s| s.out).collect();
    // A value carried round a loop is placed as it comes in; further rounds see what the loop made of it.
    for round in 0..ROUNDS {
        placer.first_round = round == 0;
        placer.conversions.clear();
        placer.problems.clear();
        let before = placer.place.clone();
        for node in 0..trace.nodes.len() {
            if !placer.place[node].lazy() {
                placer.place[node] = if outputs.contains(&node) {
                    Place::Sharded
                } else {
                    placer.node(node)
                };
            }
        }
        if !placer.first_round && placer.place == before {
            break;
        }
    }
    let mut results = Vec::new();
    trace.acts[0].result.tensors(&mut results);
    for node in results {
        if placer.place[node] == Place::Sharded && placer.copied(node) {
            placer.behind_each_other(node, node);
        }
    }
    for site in &sites {
        placer.keys(site);
    }
    let live = live(trace, &sites);
    let mut refusals: Vec<Refusal> = Vec::new();
    let mut nodes: Vec<&NodeId> = placer
        .problems
        .keys()
        .filter(|n| live.contains(n))
        .collect();
    nodes.sort_unstable();
    for node in nodes {
        // What follows from an earlier problem is not said again.
        let behind = trace.nodes[*node]
            .inputs
            .iter()
            .any(|i| placer.follows_problem(i.node, &mut HashSet::new()));
        if !behind {
            refusals.push(placer.problems[node].clone());
        }
    }
    let valid = placer.sizes(&mut refusals);
    if refusals.is_empty() {
        let Placer {
            place, conversions, ..
        } = placer;
        let conversions = conversions
            .into_iter()
            .filter(|(n, _)| live.contains(n))
            .collect();
        Ok(Placed {
            sequence,
            place,
            conversions,
            valid,
            sites,
            live,
        })
    } else {
        Err(refusals)
    }
}

/// An input beside the tokens that something is computed along, and that meets the tokens nowhere, is taken to have the
/// sequence where they have it. Its length is compared when the model is entered. Returns the sequence under its last name.
fn relate(trace: &mut Trace<'_, '_>, sequence: AtomId) -> AtomId {
    let AtomKind::Dim(_, place) = trace.atoms.kind(sequence).clone() else {
        return sequence;
    };
    let mut strangers = Vec::new();
    for n in &trace.nodes {
        for (i, d) in &n.touches {
            let dims = n
                .inputs
                .get(*i)
                .and_then(|i| trace.nodes[i.node].shape.known());
            for factor in dims
                .and_then(|dims| dims.get(*d))
                .iter()
                .flat_map(|dim| &dim.0)
            {
                let Some(atom) = trace.atoms.normal(&factor.size).as_atom() else {
                    continue;
                };
                if trace.atoms.is_dim(atom)
                    && trace.atoms.alone(atom)
                    && matches!(trace.atoms.kind(atom), AtomKind::Dim(_, d) if *d == place)
                {
                    strangers.push(factor.size.clone());
                }
            }
        }
    }
    let mut sequence = Poly::atom(sequence);
    for stranger in strangers {
        trace.atoms.unify(&stranger, &sequence);
        sequence = trace.atoms.normal(&sequence);
    }
    sequence.as_atom().unwrap_or_default()
}

/// Everything that the root's result or a site depends on.
fn live(trace: &Trace<'_, '_>, sites: &[Site]) -> HashSet<NodeId> {
    let mut stack: Vec<NodeId> = sites.iter().map(|s| s.out).collect();
    trace.acts[0].result.tensors(&mut stack);
    stack.extend(&trace.reads);
    let mut live = HashSet::new();
    while let Some(node) = stack.pop() {
        if live.insert(node) {
            stack.extend(trace.nodes[node].inputs.iter().map(|i| i.node));
        }
    }
    live
}

/// A placement goes up the lattice twice at most; loops inside loops pass it on.
const ROUNDS: usize = 8;

struct Placer<'t, 's, 'a> {
    trace: &'t Trace<'s, 'a>,
    sequence: AtomId,
    place: Vec<Place>,
    conversions: Vec<(NodeId, Conversion)>,
    problems: HashMap<NodeId, Refusal>,
    first_round: bool,
}

impl Placer<'_, '_, '_> {
    /// The dimensions (of a known shape) that have the sequence in them.
    fn sequence_dims(&self, node: NodeId) -> Vec<usize> {
        match &self.trace.nodes[node].shape {
            Shape::Known(dims) => (0..dims.len()).filter(|d| self.in_dim(&dims[*d])).collect(),
            Shape::Partial(known) => known
                .iter()
                .filter(|(_, dim)| self.in_dim(dim))
                .map(|(d, _)| *d)
                .collect(),
            _ => Vec::new(),
        }
    }

    /// Those of them along which elements differ.
    fn varying_dims(&self, node: NodeId) -> Vec<usize> {
        let mut dims = self.sequence_dims(node);
        if let Shape::Known(known) = &self.trace.nodes[node].shape {
            dims.retain(|d| {
                let varies = |f: &Factor| {
                    !f.repeat && self.trace.atoms.normal(&f.size).contains(self.sequence)
                };
                known[*d].0.iter().any(varies)
            });
        }
        dims
    }

    fn in_dim(&self, dim: &Dim) -> bool {
        dim.0.iter().any(|f| {
            let size = self.trace.atoms.normal(&f.size);
            size.contains(self.sequence) || self.trace.atoms.counts_rows(&size)
        })
    }

    fn refuse(
        &mut self,
        node: NodeId,
        code: codes::Code,
        message: String,
        note: Option<String>,
        help: &str,
    ) -> Place {
        let mut refusal = Refusal::new(code, self.trace.nodes[node].at.span, message);
        refusal.notes.extend(note);
        refusal.branch = self.trace.nodes[node].branch;
        self.problems.insert(node, refusal.help(help));
        Place::Sharded
    }

    fn shape_note(&self, node: NodeId, dim: usize) -> Option<String> {
        let Shape::Known(dims) = &self.trace.nodes[node].shape else {
            return None;
        };
        let shape = crate::trace::shape::show(&self.trace.atoms, dims);
        Some(format!(
            "`{}` is {shape}; dimension {dim} is the sequence, of which each rank holds a part",
            self.trace.nodes[node].text
        ))
    }

    fn node(&mut self, node: NodeId) -> Place {
        let n = &self.trace.nodes[node];
        let inputs: Vec<Place> = n.inputs.iter().map(|i| self.place[i.node]).collect();
        let sharded = inputs
            .iter()
            .any(|p| matches!(p, Place::Sharded | Place::Either));
        match &n.op {
            Op::Param(_) => match &n.shape {
                _ if !self.sequence_dims(node).is_empty() => Place::Sharded,
                Shape::Known(_) => Place::Replicated,
                _ => Place::Given,
            },
            Op::Rows { .. } if sharded => Place::Sharded,
            Op::Field | Op::Mask(_) | Op::Rows { .. } => Place::Replicated,
            Op::Phi { .. } => {
                // In the first round, what comes round the loop has no place yet.
                let known = n
                    .inputs
                    .iter()
                    .filter(|i| !self.first_round || i.node < node);
                let places = known.map(|i| self.place[i.node]);
                let place = places.reduce(Place::join).unwrap_or(Place::Replicated);
                match &n.shape {
                    // Its dimensions are not the same in every round.
                    Shape::Unknown(why) if matches!(n.op, Op::Phi { carried: true }) && sharded => {
                        let message = format!("cannot follow `{}`: {why}", n.text);
                        let help = "give what has another shape another name";
                        self.refuse(node, codes::NOT_FOLLOWED, message, None, help)
                    }
                    _ => place,
                }
            }
            Op::Pick { dim } => self.pick(node, *dim, sharded),
            Op::Each { dim, .. } => self.each(node, *dim, inputs[0]),
            Op::Unknown(reason) => {
                let lazy = inputs.iter().any(|p| p.lazy());
                if sharded || lazy || self.depends_on_input(node) {
                    let (code, message, help) =
                        (reason.code, reason.message.clone(), reason.help.clone());
                    return self.refuse(node, code, message, None, &help);
                }
                Place::Replicated
            }
            Op::Row(row) => self.row(node, row, &inputs, sharded),
        }
    }

    /// Whether a problem stands at a tensor, or at one that meets others in it.
    fn follows_problem(&self, node: NodeId, seen: &mut HashSet<NodeId>) -> bool {
        let n = &self.trace.nodes[node];
        self.problems.contains_key(&node)
            || (matches!(n.op, Op::Phi { .. })
                && seen.insert(node)
                && n.inputs.iter().any(|i| self.follows_problem(i.node, seen)))
    }

    /// Whether a value that could not be followed comes from the tokens at all.
    fn depends_on_input(&self, node: NodeId) -> bool {
        let mut stack = vec![node];
        let mut seen = HashSet::new();
        while let Some(n) = stack.pop() {
            if seen.insert(n) {
                if matches!(self.trace.nodes[n].op, Op::Param(_)) {
                    return true;
                }
                stack.extend(self.trace.nodes[n].inputs.iter().map(|i| i.node));
            }
        }
        false
    }

    /// One row in each round of a loop: of the batch, and not of the sequence.
    fn each(&mut self, node: NodeId, dim: usize, place: Place) -> Place {
        let input = self.trace.nodes[node].inputs[0].node;
        match place {
            Place::Given => self.cannot_tell(node, input),
            Place::Sharded if self.sequence_dims(input).contains(&dim) || self.copied(input) => {
                let text = &self.trace.nodes[node].text;
                let message =
                    format!("`{text}` takes one token in each round of a loop over the tokens");
                let help = "compute all tokens at once, with operations on the whole tensor";
                self.refuse(node, codes::SCAN, message, None, help)
            }
            place if place.lazy() => {
                let message = format!(
                    "`{}` uses attention scores outside the attention",
                    self.trace.nodes[node].text
                );
                let help = "use the attention's result instead";
                self.refuse(node, codes::SCORES_USED, message, None, help)
            }
            other => other,
        }
    }

    fn pick(&mut self, node: NodeId, dim: usize, sharded: bool) -> Place {
        let input = self.trace.nodes[node].inputs[0].node;
        if sharded && self.copied(input) {
            return self.behind_each_other(node, input);
        }
        if self.place[input] == Place::Given {
            return self.cannot_tell(node, input);
        }
        let listed = self.trace.nodes[input]
            .shape
            .known()
            .and_then(|dims| dims.get(dim));
        let listed =
            listed.is_some_and(|d| self.trace.atoms.counts_rows(&d.size(&self.trace.atoms)));
        if listed {
            let message = format!(
                "`{}` takes one of the listed rows, of which each rank has its own",
                self.trace.nodes[node].text
            );
            return self.refuse(
                node,
                codes::MIXES_TOKENS,
                message,
                None,
                "compute with all rows",
            );
        }
        let token = self.sequence_dims(input).contains(&dim);
        if let Some(refused) = (!token).then(|| self.rows_of_the_batch(node)).flatten() {
            return refused;
        }
        if !sharded || !token {
            return if sharded {
                Place::Sharded
            } else {
                Place::Replicated
            };
        }
        self.conversions.push((node, Conversion::Pick { dim }));
        Place::Replicated
    }

    /// Classifies every use of a size.
    fn sizes(&self, refusals: &mut Vec<Refusal>) -> Vec<SizeUse> {
        let mut valid = Vec::new();
        for u in &self.trace.sizes {
            let rows = self
                .trace
                .atoms
                .counts_rows(&self.trace.atoms.normal(&u.size.poly));
            if rows && !matches!(u.role, Role::SizeOf(_)) {
                refusals.push(
                    Refusal::new(
                        codes::SIZE_USE,
                        u.span,
                        "the number of listed rows is used, of which each rank has its own",
                    )
                    .help("compute with the tensors of the rows alone"),
                );
                continue;
            }
            if !self
                .trace
                .atoms
                .normal(&u.size.poly)
                .contains(self.sequence)
            {
                continue;
            }
            let local = u.size.origins.is_empty()
                || u.size
                    .origins
                    .iter()
                    .any(|o| matches!(self.place[*o], Place::Sharded | Place::Either));
            let wants_local = match &u.role {
                Role::SizeOf(node) => matches!(self.place[*node], Place::Sharded | Place::Either),
                Role::Valid => false,
                Role::Unclassified(what) => {
                    if local {
                        let size = self.trace.atoms.show(&u.size.poly);
                        let mut refusal = Refusal::new(codes::SIZE_USE, u.span, format!("cannot tell whether `{what}` wants the length of the shard or of the sequence"))
                            .note(format!("the size is `{size}`, of which each rank sees its own part"))
                            .help("compare it, reshape with it, or move the function that takes it into the annotated module");
                        refusal.branch = u.branch;
                        refusals.push(refusal);
                    }
                    continue;
                }
            };
            match (local, wants_local) {
                (true, false) => valid.push(u.clone()),
                (false, true) => refusals.push(
                    Refusal::new(
                        codes::SIZE_USE,
                        u.span,
                        "a size of a whole tensor is used for a shard",
                    )
                    .help("read the size from the tensor that is reshaped"),
                ),
                _ => {}
            }
        }
        valid
    }
}
