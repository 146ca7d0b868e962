//! Finds attention by its data flow: matmul, operations on scores, softmax over keys, matmul.

use std::collections::HashSet;

use autosp_plan::codes;

use super::layout;
use crate::error::Refusal;
use crate::ops::{PlaceRule, ShapeRule};
use crate::trace::graph::{Input, NodeId, Op};
use crate::trace::shape::{Dim, Shape, show};
use crate::trace::size::{AtomId, AtomKind};
use crate::trace::{Role, Trace};

/// One attention.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    /// `q k^T`.
    pub(crate) matmul: NodeId,
    pub(crate) softmax: NodeId,
    /// `weights v`.
    pub(crate) out: NodeId,
    pub(crate) q: Input,
    pub(crate) k: Input,
    pub(crate) v: Input,
    /// From the first product to the operand of the softmax.
    pub(crate) scores: Vec<NodeId>,
    /// From the softmax to the operand of the second product.
    pub(crate) weights: Vec<NodeId>,
    pub(crate) masks: Vec<NodeId>,
    /// Operands of scores and masks that are tensors over keys: operation and operand.
    pub(crate) keys: Vec<(NodeId, usize)>,
    pub(crate) layout: Layout,
}

/// The axes of the operands by name: batch `b`, query heads `h`, key heads `g`, sequence `s`, width `d`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) q: String,
    pub(crate) k: String,
    pub(crate) v: String,
    /// The batch, where a dimension merges it with heads.
    pub(crate) batch: Option<AtomId>,
}

/// Tensors that are masks, and operands that become masks.
type Masks = (Vec<NodeId>, Vec<(NodeId, usize)>);

type Found = Result<(Vec<Site>, AtomId), Vec<Refusal>>;

/// All sites of a trace and the sequence dimension that they share.
pub(crate) fn find(trace: &Trace<'_, '_>) -> Found {
    let mut finder = Finder {
        trace,
        refusals: Vec::new(),
    };
    let mut sites: Vec<(Site, AtomId)> = Vec::new();
    for softmax in 0..trace.nodes.len() {
        if is_softmax(trace, softmax) {
            let known = finder.refusals.len();
            sites.extend(finder.site(softmax));
            for refusal in &mut finder.refusals[known..] {
                // What can be left out with a branch of its own says so.
                if !refusal.elsewhere {
                    refusal.branch = trace.nodes[softmax].branch;
                }
            }
        }
    }
    if let Some((first, sequence)) = sites.first().cloned()
        && let Some((other, _)) = sites.iter().find(|(_, s)| *s != sequence)
    {
        finder.refusals.push(
            Refusal::new(
                codes::CROSS_ATTENTION,
                trace.nodes[other.matmul].at.span,
                "this attention runs over another sequence than the first one",
            )
            .note(format!(
                "the first one is `{}`",
                trace.nodes[first.matmul].text
            ))
            .help("annotate the two models in modules of their own"),
        );
    }
    if finder.refusals.is_empty() {
        match sites.first().map(|(_, s)| *s) {
            Some(sequence) => Ok((sites.into_iter().map(|(s, _)| s).collect(), sequence)),
            None => Err(Vec::new()),
        }
    } else {
        Err(finder.refusals)
    }
}

fn is_softmax(trace: &Trace<'_, '_>, node: NodeId) -> bool {
    trace.nodes[node].row().is_some_and(|r| {
        matches!(r.name(), "softmax_last_dim" | "softmax") && r.path.starts_with("candle_nn::ops::")
    })
}

struct Finder<'t, 's, 'a> {
    trace: &'t Trace<'s, 'a>,
    refusals: Vec<Refusal>,
}

/// What lies between a product and a softmax.
#[derive(Default)]
struct Chain {
    nodes: Vec<NodeId>,
    /// The other operands of these: operation and operand.
    others: Vec<(NodeId, usize)>,
    /// The first operation that scores may not pass through.
    foreign: Option<NodeId>,
}

impl Finder<'_, '_, '_> {
    fn dims(&self, node: NodeId) -> Option<&[Dim]> {
        self.trace.nodes[node].shape.known()
    }

    /// The batch or sequence atom that a dimension is, alone.
    fn atom(&self, dim: &Dim) -> Option<AtomId> {
        let [factor] = dim.0.as_slice() else {
            return None;
        };
        let atom = self.trace.atoms.normal(&factor.size).as_atom()?;
        matches!(self.trace.atoms.kind(atom), AtomKind::Dim(..)).then_some(atom)
    }

    /// Walks back to the product of queries and keys.
    fn scores(
        &self,
        node: NodeId,
        chain: &mut Chain,
        seen: &mut HashSet<NodeId>,
    ) -> Option<NodeId> {
        if !seen.insert(node) {
            return None;
        }
        let n = &self.trace.nodes[node];
        match &n.op {
            Op::Row(row) if row.shape == ShapeRule::Matmul => {
                let dims = self.dims(node)?;
                let [.., rows, keys] = dims else { return None };
                let score_like = layout::token_axis(self.trace, rows).is_some()
                    && (self.atom(keys).is_some() || keys.anchored(&self.trace.atoms));
                score_like.then(|| {
                    chain.nodes.push(node);
                    node
                })
            }
            Op::Row(row) if matches!(row.place, PlaceRule::Each | PlaceRule::Move) => {
                let hit =
                    n.inputs.iter().enumerate().find_map(|(i, input)| {
                        self.scores(input.node, chain, seen).map(|m| (i, m))
                    });
                let (i, matmul) = hit?;
                chain.nodes.push(node);
                chain
                    .others
                    .extend((0..n.inputs.len()).filter(|k| *k != i).map(|k| (node, k)));
                if !row.scores {
                    chain.foreign = Some(node);
                }
                Some(matmul)
            }
            Op::Phi { carried: false } => {
                let mut found = None;
                for input in &n.inputs {
                    let mut own = seen.clone();
                    own.retain(|s| !chain.nodes.contains(s));
                    if chain.nodes.contains(&input.node) {
                        continue;
                    }
                    let matmul = self.scores(input.node, chain, &mut own)?;
                    found = found.or(Some(matmul));
                    seen.extend(own);
                }
                chain.nodes.push(node);
                found.or_else(|| chain.nodes.first().copied())
            }
            _ => None,
        }
    }

    /// Walks forward from the softmax to the product with the values.
    fn weights(&mut self, softmax: NodeId) -> Option<(NodeId, Vec<NodeId>)> {
        let mut nodes = vec![softmax];
        let mut at = 0;
        let mut out = None;
        while at < nodes.len() {
            let current = nodes[at];
            at += 1;
            for (node, n) in self.trace.nodes.iter().enumerate() {
                let Some(i) = n.inputs.iter().position(|i| i.node == current) else {
                    continue;
                };
                match &n.op {
                    Op::Row(row) if row.shape == ShapeRule::Matmul && i == 0 => {
                        out = out.or(Some(node));
                    }
                    Op::Row(row) if matches!(row.place, PlaceRule::Random | PlaceRule::Dropout) => {
                        let refusal = if switched_off(self.trace, n) {
                            Refusal::new(
                                codes::RANDOM,
                                n.at.span,
                                format!("`{}` stands between the softmax and the values", n.text),
                            )
                            .note("it is switched off by its argument and changes nothing here")
                            .help("leave the call out, and take what it is given as it is")
                        } else {
                            Refusal::new(codes::RANDOM, n.at.span, format!("`{}` drops attention weights at random", n.text))
                                .note("the weights of one rank's heads would be dropped differently than on one device")
                                .help("leave the call out; elements of the attention's output can be dropped")
                        };
                        self.refusals.push(refusal);
                        return None;
                    }
                    Op::Row(row) if row.scores && n.inputs.len() == 1 && !nodes.contains(&node) => {
                        nodes.push(node);
                    }
                    Op::Phi { carried: false } if !nodes.contains(&node) => nodes.push(node),
                    _ => {}
                }
            }
        }
        out.map(|out| (out, nodes))
    }

    fn site(&mut self, softmax: NodeId) -> Option<(Site, AtomId)> {
        let trace = self.trace;
        let n = &trace.nodes[softmax];
        let mut chain = Chain::default();
        let operand = n.inputs.first()?.node;
        let matmul = self.scores(operand, &mut chain, &mut HashSet::new())?;
        let dims = self.dims(matmul)?.to_vec();
        let rank = dims.len();
        self.over_the_keys(softmax, matmul)?;
        let rows = layout::token_axis(trace, &dims[rank - 2]);
        let keys = self.atom(&dims[rank - 1]);
        let (Some(sequence), true) = (rows, rows == keys) else {
            self.refusals.push(
                Refusal::new(
                    codes::CROSS_ATTENTION,
                    trace.nodes[matmul].at.span,
                    "queries and keys run over different sequences",
                )
                .note(format!("the scores are {}", show(&trace.atoms, &dims)))
                .help("only self-attention is sharded: queries and keys of the same tokens"),
            );
            return None;
        };
        if let Some(node) = chain.foreign {
            let n = &trace.nodes[node];
            self.refusals.push(
                Refusal::new(codes::SCORES_USED, n.at.span, format!("`{}` is not an operation that attention scores can pass through", n.text))
                    .note("scores of all tokens against all are never made on a rank")
                    .help("scale, soft cap (`tanh`), masks and casts can stand between the product and the softmax"),
            );
            return None;
        }
        let Some((out, weights)) = self.weights(softmax) else {
            if self.refusals.is_empty() {
                self.refusals.push(
                    Refusal::new(
                        codes::SCORES_USED,
                        n.at.span,
                        format!("the weights of `{}` are not multiplied with values", n.text),
                    )
                    .help("an attention that can be sharded is `softmax(q k^T) v`"),
                );
            }
            return None;
        };
        let (masks, keys) = self.masks(&chain)?;
        let (q, k, v) = (
            trace.nodes[matmul].inputs[0],
            trace.nodes[matmul].inputs[1],
            trace.nodes[out].inputs[1],
        );
        let layout = self.layout(matmul, out, sequence)?;
        chain.nodes.sort_unstable();
        chain.nodes.dedup();
        Some((
            Site {
                matmul,
                softmax,
                out,
                q,
                k,
                v,
                scores: chain.nodes,
                weights,
                masks,
                keys,
                layout,
            },
            sequence,
        ))
    }

    /// The softmax runs along the keys: the last dimension, whatever the model did to the others since the product.
    fn over_the_keys(&mut self, softmax: NodeId, matmul: NodeId) -> Option<()> {
        let trace = self.trace;
        let n = &trace.nodes[softmax];
        let operand = n.inputs.first()?.node;
        let dims = self.dims(matmul)?.to_vec();
        let rank = dims.len();
        let along = n.touches.first().map(|(_, d)| *d);
        // The model may have split or merged other dimensions since the product.
        let last = match self.dims(operand).and_then(<[Dim]>::split_last) {
            Some((keys, before)) if self.atom(keys) == self.atom(&dims[rank - 1]) => before.len(),
            _ => rank,
        };
        if along.is_none() && self.dims(operand).is_none() {
            let why = match &trace.nodes[operand].shape {
                Shape::Unknown(why) => why.clone(),
                Shape::Either(all) => {
                    let all: Vec<String> = all.iter().map(|d| show(&trace.atoms, d)).collect();
                    format!("it is {}, by a condition", all.join(" or "))
                }
                _ => "its dimensions are not known".to_string(),
            };
            let what = &trace.nodes[operand].text;
            self.refusals.push(
                Refusal::new(codes::NOT_FOLLOWED, n.at.span, format!("cannot follow the scores in `{}`: {why}", n.text))
                    .note(format!("the softmax takes `{what}`"))
                    .help("write what comes between the product and the softmax with operations that keep the scores' dimensions"),
            );
            return None;
        }
        if along != Some(last) {
            let which = along.map_or("another dimension".to_string(), |d| {
                format!("dimension {d} of {}", show(&trace.atoms, &dims))
            });
            self.refusals.push(
                Refusal::new(
                    codes::SOFTMAX_AXIS,
                    n.at.span,
                    format!("`{}` normalises over {which}, not over the keys", n.text),
                )
                .note(format!(
                    "the scores are `{}`; keys are the last dimension",
                    trace.nodes[matmul].text
                ))
                .help("`candle_nn::ops::softmax_last_dim(&scores)`"),
            );
            return None;
        }
        Some(())
    }

    /// The tensors that make up the masks: what is made from a rule or takes its sizes from the scores, and the operands
    /// that are tensors over keys.
    fn masks(&mut self, chain: &Chain) -> Option<Masks> {
        let mut masks: Vec<NodeId> = Vec::new();
        let mut keys: Vec<(NodeId, usize)> = Vec::new();
        let mut stack: Vec<(NodeId, usize)> = chain.others.clone();
        while let Some((user, operand)) = stack.pop() {
            let node = self.trace.nodes[user].inputs[operand].node;
            if masks.contains(&node) || chain.nodes.contains(&node) {
                continue;
            }
            let n = &self.trace.nodes[node];
            if !self.reaches_rule(node) && !self.sized_by_scores(node, chain, &masks) {
                // A scalar or a fill: all elements alike.
                if constant(self.trace, node) || !self.ranges(node) {
                    continue;
                }
                if !self.takes_mask(user, operand) {
                    // A factor of unknown shape is looked at when the model runs.
                    if matches!(n.shape, Shape::Partial(_)) {
                        continue;
                    }
                    if matches!(self.trace.nodes[user].op, Op::Phi { .. }) {
                        self.refusals.push(two_kinds(n));
                        return None;
                    }
                    let refusal = Refusal::new(codes::MASK, n.at.span, format!("cannot follow the mask `{}`", n.text))
                        .note("a mask is added to the scores, or selects among them with one number on the other side")
                        .help("`scores.broadcast_add(&mask)?`, or `mask.where_cond(&fill, &scores)?` with a `fill` that is one number");
                    self.refusals.push(refusal);
                    return None;
                }
                let expands = |r: &crate::ops::Row| r.shape == ShapeRule::Expand;
                if !chain.nodes.contains(&user)
                    && !self.trace.nodes[user].row().is_some_and(expands)
                {
                    let refusal = Refusal::new(codes::MASK, self.trace.nodes[user].at.span, format!("`{}` puts a mask from a rule and a mask over keys together", self.trace.nodes[user].text))
                        .help("add one to the scores after the other: `scores.broadcast_add(&rule)?.broadcast_add(&mask)?`");
                    self.refusals.push(refusal);
                    return None;
                }
                keys.push((user, operand));
                continue;
            }
            masks.push(node);
            if matches!(n.op, Op::Phi { .. } | Op::Row(_)) {
                if let Some(row) = n.row().filter(|r| !r.scores) {
                    let refusal = Refusal::new(
                        codes::MASK,
                        n.at.span,
                        format!(
                            "`{}` is not an operation that a mask can pass through",
                            n.text
                        ),
                    )
                    .note(format!("`{}` would need the whole mask", row.name()))
                    .help("build the mask as it is used");
                    self.refusals.push(refusal);
                    return None;
                }
                stack.extend((0..n.inputs.len()).map(|i| (node, i)));
            }
        }
        Some((masks, keys))
    }

    /// Whether a tensor may range over queries or keys: which of the inputs' dimensions are the sequence may still be open.
    fn ranges(&self, node: NodeId) -> bool {
        let over = |dims: &[Dim]| dims.iter().any(|d| d.anchored(&self.trace.atoms));
        match &self.trace.nodes[node].shape {
            Shape::Known(dims) => over(dims),
            Shape::Either(all) => all.iter().any(|dims| over(dims)),
            _ => true,
        }
    }

    /// Whether an operation takes a mask there: what is added, or what selects.
    fn takes_mask(&self, user: NodeId, operand: usize) -> bool {
        let row = self.trace.nodes[user].row();
        row.is_some_and(|row| match row.name() {
            "add" | "broadcast_add" => true,
            "sub" | "broadcast_sub" => operand == 1,
            "where_cond" | "broadcast_as" | "expand" => operand == 0,
            _ => false,
        })
    }

    /// Whether a tensor was repeated to sizes of the scores or of a mask.
    fn sized_by_scores(&self, node: NodeId, chain: &Chain, masks: &[NodeId]) -> bool {
        let expands = self.trace.nodes[node]
            .row()
            .is_some_and(|r| r.shape == ShapeRule::Expand);
        let lazy = |origin: &NodeId| chain.nodes.contains(origin) || masks.contains(origin);
        let own = Role::SizeOf(node);
        let mut sizes = self.trace.sizes.iter().filter(|u| u.role == own);
        expands && !constant(self.trace, node) && sizes.any(|u| u.size.origins.iter().any(lazy))
    }

    fn reaches_rule(&self, node: NodeId) -> bool {
        let n = &self.trace.nodes[node];
        matches!(n.op, Op::Mask(_))
            || (matches!(n.op, Op::Row(_) | Op::Phi { carried: false })
                && n.inputs.iter().any(|i| self.reaches_rule(i.node)))
    }

    fn layout(&mut self, matmul: NodeId, out: NodeId, sequence: AtomId) -> Option<Layout> {
        let input = |n: NodeId, i: usize| self.trace.nodes[n].inputs.get(i).map(|i| i.node);
        let operands = [input(matmul, 0)?, input(matmul, 1)?, input(out, 1)?];
        if let Some(layout) = layout::find(self.trace, operands, sequence) {
            return Some(layout);
        }
        let n = &self.trace.nodes[matmul];
        self.refusals.push(
            Refusal::new(codes::LAYOUT, n.at.span, format!("cannot tell batch, heads and sequence apart in `{}`", n.text))
                .help("bring queries, keys and values into [batch, heads, sequence, width] before the product"),
        );
        None
    }
}

/// A mask over keys where another branch has a mask from a rule: an error if the branch is taken, where it can be left.
fn two_kinds(n: &crate::trace::graph::Node) -> Refusal {
    let message = format!(
        "`{}` is a mask over keys, where another branch has a mask from a rule",
        n.text
    );
    let help = "add one to the scores after the other: `scores.broadcast_add(&rule)?.broadcast_add(&mask)?`";
    let mut refusal = Refusal::new(codes::MASK, n.at.span, message).help(help);
    refusal.branch = n.branch;
    refusal.elsewhere = n.branch.is_some();
    refusal
}

/// Whether a dropout is called with a literal that says that nothing is dropped.
fn switched_off(trace: &Trace<'_, '_>, n: &crate::trace::graph::Node) -> bool {
    let function = trace.acts[n.at.act].function;
    let call = trace.scope.functions[function].numbers.get(n.at.expr);
    matches!(
        call,
        Some(syn::Expr::MethodCall(m)) if matches!(
            m.args.last(),
            Some(syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Bool(train), .. })) if !train.value
        )
    )
}

/// Whether all elements are one number: a scalar, repeated or filled.
pub(crate) fn constant(trace: &Trace<'_, '_>, node: NodeId) -> bool {
    let n = &trace.nodes[node];
    match n.row().map(|r| r.shape) {
        Some(ShapeRule::Scalar | ShapeRule::Filled | ShapeRule::FilledWith) => true,
        Some(ShapeRule::Expand | ShapeRule::Same | ShapeRule::Unsqueeze | ShapeRule::Reshape) => {
            n.inputs.iter().all(|i| constant(trace, i.node))
        }
        _ => false,
    }
}
