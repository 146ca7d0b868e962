//! One rule for each kind of operation: when it may run on shards, and what its operands need.

use autosp_plan::codes;

use super::{Conversion, Place, Placer};
use crate::ops::{PlaceRule, Row, ShapeRule};
use crate::trace::Role;
use crate::trace::graph::NodeId;
use crate::trace::shape::{Dim, Shape};

impl Placer<'_, '_, '_> {
    pub(super) fn row(
        &mut self,
        node: NodeId,
        row: &'static Row,
        inputs: &[Place],
        sharded: bool,
    ) -> Place {
        let trace = self.trace;
        let n = &trace.nodes[node];
        if let Some(i) = inputs.iter().position(|p| p.lazy()) {
            let what = match inputs[i] {
                Place::Mask => "a mask",
                Place::Scores => "attention scores",
                _ => "attention weights",
            };
            return self.refuse(
                node,
                codes::SCORES_USED,
                format!("`{}` uses {what} outside the attention", n.text),
                Some("scores of all tokens against all are never made on a rank".into()),
                "use the attention's result instead",
            );
        }
        if let Some(refused) = self.counts_own_rows(node, row, sharded) {
            return refused;
        }
        if row.place == PlaceRule::Dropout {
            return self.dropout(node, inputs);
        }
        if !sharded {
            return match inputs.iter().position(|p| *p == Place::Given) {
                Some(i) => self.given(node, row, n.inputs[i].node),
                None => match self.rows_of_the_batch(node) {
                    Some(refused) => refused,
                    None => self.uniform(node, row),
                },
            };
        }
        if let Some(refused) = self.never_on_shards(node, row) {
            return refused;
        }
        if inputs.contains(&Place::Either) {
            return self.one_or_all(node, row);
        }
        if let Some(refused) = self.shapes_are_read(node, row, inputs) {
            return refused;
        }
        if matches!(row.shape, ShapeRule::Rope | ShapeRule::RopeThd) {
            return self.rope(node, row, inputs);
        }
        if let Some(whole) = self.along_the_sequence(node, row, inputs) {
            return whole;
        }
        if let Some(refused) = self.computes_along_tokens(node, row, inputs) {
            return refused;
        }
        if let Some(refused) = self.uses_copies(node, row) {
            return refused;
        }
        if let Some(refused) = self.cut_tables(node, inputs) {
            return refused;
        }
        if let Some(refused) = self.rows_of_the_batch(node) {
            return refused;
        }
        match &n.shape {
            Shape::Unknown(why) => {
                let why = why.clone();
                self.refuse(
                    node,
                    codes::NOT_FOLLOWED,
                    format!("cannot follow `{}`: {why}", n.text),
                    None,
                    "write the operation with sizes that come from the tensor's own dimensions",
                )
            }
            Shape::Known(_) if self.varying_dims(node).len() > 1 => self.refuse(
                node,
                if row.shape == ShapeRule::Matmul {
                    codes::NO_SOFTMAX
                } else {
                    codes::MIXES_TOKENS
                },
                format!(
                    "`{}` pairs every token with every token, outside a softmax attention",
                    n.text
                ),
                None,
                "an attention that can be sharded is `softmax(q k^T) v`",
            ),
            _ => Place::Sharded,
        }
    }

    /// Cuts this rank's rows out of the tables that meet a shard.
    fn cut_tables(&mut self, node: NodeId, inputs: &[Place]) -> Option<Place> {
        let trace = self.trace;
        let n = &trace.nodes[node];
        for (i, input) in n.inputs.iter().enumerate() {
            if inputs[i] == Place::Replicated
                && let Some(dim) = self.sequence_dims(input.node).first()
            {
                if !self.rows_alone(input.node, *dim) {
                    let operand = trace.nodes[input.node].text.clone();
                    return Some(self.refuse(
                        node,
                        codes::NOT_FOLLOWED,
                        format!("cannot cut this rank's rows out of `{operand}`"),
                        self.shape_note(input.node, *dim),
                        "cut a table that has one row a token, before it is reshaped",
                    ));
                }
                self.conversions.push((
                    node,
                    Conversion::Slice {
                        input: i,
                        dim: *dim as i64,
                    },
                ));
            }
        }
        None
    }

    /// Numbers of rows that a rank counts from its own first one, used for anything but its own rows.
    fn counts_own_rows(&mut self, node: NodeId, row: &Row, sharded: bool) -> Option<Place> {
        let trace = self.trace;
        let n = &trace.nodes[node];
        let rows = |i: &crate::trace::graph::Input| {
            matches!(
                trace.nodes[i.node].op,
                crate::trace::graph::Op::Rows { index: true }
            )
        };
        let by_index = matches!(row.shape, ShapeRule::IndexSelect | ShapeRule::IndexAdd);
        let placed = n.inputs.get(1).is_some_and(rows) && by_index && n.touches.is_empty();
        if sharded && n.inputs.iter().any(rows) && !placed {
            return Some(self.refuse(
                node,
                codes::MIXES_TOKENS,
                format!(
                    "`{}` uses numbers of rows, which every rank counts from its own first one",
                    n.text
                ),
                None,
                "select and add rows of the tensor that the loop was over",
            ));
        }
        None
    }

    /// What may happen to one token or all of them: what does the same to both.
    fn one_or_all(&mut self, node: NodeId, row: &Row) -> Place {
        let n = &self.trace.nodes[node];
        if !(n.inputs.len() == 1
            && matches!(
                row.shape,
                ShapeRule::Same | ShapeRule::Linear | ShapeRule::AlongLast
            ))
        {
            let refused = self.refuse(
                node,
                codes::NOT_FOLLOWED,
                format!(
                    "cannot follow `{}`: its operand is one token or all of them, by a condition",
                    n.text
                ),
                None,
                "end the function in both branches",
            );
            let either = n
                .inputs
                .iter()
                .find(|i| self.place[i.node] == Place::Either);
            if let Some(branch) = either.and_then(|i| self.whole_branch(i.node)) {
                self.elsewhere(node, branch);
            }
            return refused;
        }
        Place::Either
    }

    /// Dropout draws by global row and token, which have to be told apart from features.
    fn dropout(&mut self, node: NodeId, inputs: &[Place]) -> Place {
        let trace = self.trace;
        let n = &trace.nodes[node];
        let place = inputs.first().copied().unwrap_or(Place::Replicated);
        let known = n
            .shape
            .known()
            .filter(|_| matches!(place, Place::Sharded | Place::Replicated));
        let axes = known.and_then(|dims| {
            let (mut rows, mut tokens) = (None, None);
            for (d, dim) in dims
                .iter()
                .enumerate()
                .filter(|(_, dim)| dim.anchored(&trace.atoms))
            {
                let [factor] = dim.0.as_slice() else {
                    return None;
                };
                let atom = trace.atoms.normal(&factor.size).as_atom()?;
                let slot = if atom == self.sequence {
                    &mut tokens
                } else {
                    &mut rows
                };
                if slot.replace(d).is_some() {
                    return None;
                }
            }
            // What is whole has its tokens from the first on, whatever this rank's are.
            Some((rows, tokens.filter(|_| place == Place::Sharded)))
        });
        let Some((rows, tokens)) = axes else {
            return self.refuse(
                node,
                codes::RANDOM,
                format!(
                    "`{}` drops elements of which rows and tokens cannot be told apart",
                    n.text
                ),
                None,
                "drop elements of [batch, sequence, width], before rows and tokens are merged",
            );
        };
        self.conversions
            .push((node, Conversion::Draw { rows, tokens }));
        place
    }

    /// What runs along the sequence and has a form over all ranks.
    fn along_the_sequence(&mut self, node: NodeId, row: &Row, inputs: &[Place]) -> Option<Place> {
        let trace = self.trace;
        let n = &trace.nodes[node];
        let ([(0, d)], [Place::Sharded]) = (n.touches.as_slice(), inputs) else {
            return None;
        };
        let input = n.inputs[0].node;
        let Shape::Known(dims) = &trace.nodes[input].shape else {
            return None;
        };
        // The sequence alone, once, and not merged with anything.
        let [factor] = dims.get(*d)?.0.as_slice() else {
            return None;
        };
        let alone = trace.atoms.normal(&factor.size).as_atom() == Some(self.sequence);
        if !alone || factor.repeat || self.sequence_dims(input) != [*d] {
            return None;
        }
        let (conversion, place) = match (row.shape, row.name()) {
            (
                ShapeRule::Reduce | ShapeRule::ReduceKeep,
                "sum" | "mean" | "sum_keepdim" | "mean_keepdim",
            ) => (Conversion::Sequence, Place::Replicated),
            (ShapeRule::Along, "cumsum") if trace.data_only(input) => {
                (Conversion::Sequence, Place::Sharded)
            }
            _ => return None,
        };
        self.conversions.push((node, conversion));
        Some(place)
    }

    /// An operation that runs along the sequence or the batch of a shard.
    fn computes_along_tokens(
        &mut self,
        node: NodeId,
        row: &Row,
        inputs: &[Place],
    ) -> Option<Place> {
        let n = &self.trace.nodes[node];
        for (i, d) in &n.touches {
            let input = n.inputs.get(*i).map_or(node, |i| i.node);
            if inputs.get(*i) != Some(&Place::Sharded) {
                continue;
            }
            if self.sequence_dims(input).contains(d) {
                let note = self.shape_note(input, *d);
                return Some(self.mixes(node, row, note));
            }
            if self.is_batch(input, *d) {
                return Some(self.mixes_rows(node));
            }
        }
        None
    }

    fn mixes_rows(&mut self, node: NodeId) -> Place {
        let text = &self.trace.nodes[node].text;
        let message = format!("`{text}` mixes rows of the batch, which the dp replicas share out");
        self.refuse(
            node,
            codes::MIXES_TOKENS,
            message,
            None,
            "compute it for each row",
        )
    }

    /// What every rank of a sequence holds alike still has the rows of one replica alone.
    pub(super) fn rows_of_the_batch(&mut self, node: NodeId) -> Option<Place> {
        let trace = self.trace;
        let n = &trace.nodes[node];
        let foreign = |dim: &Dim| {
            dim.0.iter().any(|f| {
                let size = trace.atoms.normal(&f.size);
                let mut atoms = size.atoms();
                atoms.any(|a| a != self.sequence && trace.atoms.is_dim(a))
            })
        };
        let along = n.touches.iter().any(|(i, d)| {
            let dims = n
                .inputs
                .get(*i)
                .and_then(|i| trace.nodes[i.node].shape.known());
            dims.and_then(|dims| dims.get(*d)).is_some_and(foreign)
        });
        let pairs = |dims: &[Dim]| {
            let rows = dims.iter().filter(|d| foreign(d) && !d.has_repeat());
            let rows: Vec<_> = rows
                .map(|d| trace.atoms.normal(&d.size(&trace.atoms)))
                .collect();
            rows.iter().enumerate().any(|(i, d)| rows[..i].contains(d))
        };
        (along || n.shape.known().is_some_and(pairs)).then(|| self.mixes_rows(node))
    }

    /// Whether a dimension is the batch: one of the input's that is not the sequence and that no layer runs along.
    fn is_batch(&self, node: NodeId, d: usize) -> bool {
        let atoms = &self.trace.atoms;
        match &self.trace.nodes[node].shape {
            Shape::Known(dims) => dims.get(d).is_some_and(|dim| dim.anchored(atoms)),
            _ => false,
        }
    }

    /// Operations that no shard may meet.
    fn never_on_shards(&mut self, node: NodeId, row: &Row) -> Option<Place> {
        let text = &self.trace.nodes[node].text;
        let random = format!("`{text}` draws random numbers, which differ between ranks");
        let host = format!("`{text}` reads a sharded tensor to the host");
        Some(match row.place {
            PlaceRule::Random => self.refuse(
                node,
                codes::RANDOM,
                random,
                None,
                "make the numbers before the model runs and pass them in",
            ),
            // A loop over the rows was followed: each rank reads its own.
            PlaceRule::Host if self.trace.row_reads.contains(&node) => return Some(Place::Sharded),
            PlaceRule::Window => {
                let (message, note) = (
                    format!("`{text}` slides over tokens of different ranks"),
                    self.first_note(node),
                );
                self.refuse(
                    node,
                    codes::CONVOLUTION,
                    message,
                    note,
                    "leave the convolution out, or compute it before the tokens are sharded",
                )
            }
            PlaceRule::Scan => {
                let (message, note) = (
                    format!("`{text}` goes from token to token"),
                    self.first_note(node),
                );
                self.refuse(
                    node,
                    codes::SCAN,
                    message,
                    note,
                    "use attention in the place of the recurrent layer",
                )
            }
            PlaceRule::Host => {
                let note = self.first_note(node);
                self.refuse(
                    node,
                    codes::HOST_READ,
                    host,
                    note,
                    "keep the computation in tensors",
                )
            }
            _ => return None,
        })
    }

    fn first_note(&self, node: NodeId) -> Option<String> {
        let input = self.trace.nodes[node]
            .inputs
            .iter()
            .find(|i| self.place[i.node] == Place::Sharded)?;
        let dim = *self.sequence_dims(input.node).first()?;
        self.shape_note(input.node, dim)
    }

    fn mixes(&mut self, node: NodeId, row: &Row, note: Option<String>) -> Place {
        let text = &self.trace.nodes[node].text;
        let (message, help) = match row.shape {
            ShapeRule::Matmul => (
                format!(
                    "`{text}` sums over tokens of different ranks, outside a softmax attention"
                ),
                "an attention that can be sharded is `softmax(q k^T) v`",
            ),
            ShapeRule::Cat => (
                format!(
                    "`{text}` puts tokens behind tokens, so that a shard is no longer a range of positions"
                ),
                "put prompts or prefixes into the tokens before the model",
            ),
            ShapeRule::Narrow | ShapeRule::Chunk | ShapeRule::Index => (
                format!("`{text}` takes some of the tokens, which other ranks hold"),
                "take the tokens before they are sharded, or all of them",
            ),
            _ => (
                format!("`{text}` mixes tokens of different ranks"),
                "compute it for each token, or over another dimension",
            ),
        };
        let refused = self.refuse(node, codes::MIXES_TOKENS, message, note, help);
        // A cache that the caller may give.
        if let (ShapeRule::Cat, Some(branch)) = (row.shape, self.trace.nodes[node].branch) {
            self.elsewhere(node, branch);
        }
        refused
    }

    /// The tables of a rotary embedding are cut where they meet the shard.
    fn rope(&mut self, node: NodeId, row: &Row, inputs: &[Place]) -> Place {
        let n = &self.trace.nodes[node];
        let from_end = if row.shape == ShapeRule::Rope { 2 } else { 3 };
        let x = n.inputs[0].node;
        if let Shape::Known(dims) = &self.trace.nodes[x].shape {
            let expected = dims.len().checked_sub(from_end);
            if inputs[0] == Place::Sharded && self.sequence_dims(x).first().copied() != expected {
                return self.refuse(
                    node,
                    codes::MIXES_TOKENS,
                    format!(
                        "`{}` rotates along another dimension than the sequence",
                        n.text
                    ),
                    self.first_note(node),
                    "transpose the operand so that the sequence is where this operation expects it",
                );
            }
        }
        for (i, input) in n.inputs.iter().enumerate().skip(1) {
            if inputs[i] == Place::Replicated {
                let dim = self
                    .sequence_dims(input.node)
                    .first()
                    .map_or(-2, |d| *d as i64);
                self.conversions
                    .push((node, Conversion::Slice { input: i, dim }));
            }
        }
        Place::Sharded
    }

    /// A tensor made without operands, or from replicated ones. Where all its elements along the sequence are alike and
    /// its sizes were read from a shard, it is made as a shard.
    fn uniform(&self, node: NodeId, row: &Row) -> Place {
        let alike = match row.shape {
            ShapeRule::Filled | ShapeRule::FilledWith => true,
            ShapeRule::Expand => match &self.trace.nodes[node].shape {
                Shape::Known(dims) => dims
                    .iter()
                    .filter(|d| self.in_dim(d))
                    .all(|d| d.0.iter().all(|f| f.repeat)),
                _ => false,
            },
            _ => false,
        };
        // What has a place for each two tokens is a mask, of which no rank has a part.
        let square = row.shape != ShapeRule::Expand && self.sequence_dims(node).len() > 1;
        if !alike || square || self.sequence_dims(node).is_empty() {
            return Place::Replicated;
        }
        let sized = self
            .trace
            .sizes
            .iter()
            .filter(|u| u.role == Role::SizeOf(node));
        let from_shard = sized
            .flat_map(|u| u.size.origins.iter())
            .any(|o| self.place[*o] == Place::Sharded);
        let like_shard = self.trace.nodes[node].inputs.is_empty() || from_shard;
        if from_shard && like_shard {
            Place::Sharded
        } else {
            Place::Replicated
        }
    }
}
