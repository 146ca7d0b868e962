//! Inputs whose dimensions nobody reads, and operations that would have to know them.

use autosp_plan::codes;

use super::{Place, Placer};
use crate::ops::{PlaceRule, Row, ShapeRule};
use crate::trace::graph::{NodeId, Op};
use crate::trace::shape::Shape;

impl Placer<'_, '_, '_> {
    /// What may happen to an input of a rank that nobody reads: it stays one.
    pub(super) fn given(&mut self, node: NodeId, row: &Row, input: NodeId) -> Place {
        let fine = match row.shape {
            ShapeRule::Embedding
            | ShapeRule::Linear
            | ShapeRule::Unsqueeze
            | ShapeRule::Rope
            | ShapeRule::RopeThd => true,
            ShapeRule::AlongLast => row.name() != "softmax_last_dim",
            ShapeRule::Same => !matches!(row.place, PlaceRule::Random),
            ShapeRule::Expand => self.sequence_dims(node).is_empty(),
            _ => row.place == PlaceRule::Each,
        };
        if fine {
            Place::Given
        } else {
            self.cannot_tell(node, input)
        }
    }

    /// An operation that needs to know whether an input is a shard.
    pub(super) fn cannot_tell(&mut self, node: NodeId, input: NodeId) -> Place {
        let trace = self.trace;
        let mut from = input;
        while let (Op::Row(_), Some(first)) =
            (&trace.nodes[from].op, trace.nodes[from].inputs.first())
        {
            from = first.node;
        }
        let (text, name) = (&trace.nodes[node].text, &trace.nodes[from].text);
        self.refuse(
            node,
            codes::NOT_FOLLOWED,
            format!("cannot tell what `{text}` computes along: no size of `{name}` is read"),
            None,
            &format!("read its sizes first, such as `let (b, s) = {name}.dims2()?;`"),
        )
    }

    /// Operations that need to know where the tokens are in their operands, of which the shapes have to be followed.
    pub(super) fn shapes_are_read(
        &mut self,
        node: NodeId,
        row: &Row,
        inputs: &[Place],
    ) -> Option<Place> {
        let trace = self.trace;
        let n = &trace.nodes[node];
        if row.place == PlaceRule::Each
            || matches!(
                row.shape,
                ShapeRule::Same
                    | ShapeRule::Linear
                    | ShapeRule::Embedding
                    | ShapeRule::Unsqueeze
                    | ShapeRule::Rope
                    | ShapeRule::RopeThd
            )
            || (row.shape == ShapeRule::AlongLast && row.name() != "softmax_last_dim")
        {
            return None;
        }
        for (i, input) in n.inputs.iter().enumerate() {
            if inputs[i] == Place::Given {
                return Some(self.cannot_tell(node, input.node));
            }
            let read = match &trace.nodes[input.node].shape {
                Shape::Partial(known) => known.iter().any(|(_, dim)| self.in_dim(dim)),
                // Read only after this was computed, and what it runs along was not looked at.
                Shape::Known(_) => {
                    let open = matches!(n.shape, Shape::Partial(_)) && n.touches.is_empty();
                    !open || row.shape == ShapeRule::Opaque
                }
                _ => true,
            };
            if inputs[i] == Place::Sharded && !read {
                let operand = trace.nodes[input.node].text.clone();
                let refused = self.refuse(
                    node,
                    codes::NOT_FOLLOWED,
                    format!(
                        "cannot tell what `{}` computes along: the dimensions of `{operand}` are not known",
                        n.text
                    ),
                    None,
                    "read its sizes first, such as `let (b, s, h) = x.dims3()?;`",
                );
                // Keys of an earlier call that a caller may give: an error if it does.
                if let (ShapeRule::Cat, Some(branch)) = (row.shape, n.branch) {
                    self.elsewhere(node, branch);
                }
                return Some(refused);
            }
        }
        None
    }
}
