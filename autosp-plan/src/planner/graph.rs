//! The tensors that a block leaves in candle's graph, and those that its backward holds for a moment.
//!
//! Counted from what the emitted twin of the example's Llama does on a GPU; e bytes an element, h hidden, q and k the widths of
//! queries and keys, f the width of the feed-forward. What a site exchanges (Q, K, V, O and LSE of its heads) is
//! [`Site::kept_bytes`] under `qkv`.

use super::Model;
use crate::cost::Site;
use crate::settings::Policy;

/// Widths of tensors `[tokens, width]` of one block, in elements a token; the exchanged ones are beside these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Graph {
    /// Attention: its norm, the projection of its result, the residual sum (3 h); Q, K and V out of their projections, with the heads
    /// first and, of Q and K, turned (3 q + 5 k); the result sent back and with the heads last (2 q).
    pub(super) attention: usize,
    /// Feed-forward outside of tiles: norm, projection down, residual sum (3 h).
    pub(super) outside: usize,
    /// Inside of tiles: gate, its activation, up, product (4 f).
    pub(super) inside: usize,
    /// What the backward of the feed-forward holds beside the graph outside of tiles: two gradients of width h.
    pub(super) mlp_moment: usize,
    /// Inside of tiles: candle's product has two operands, whose gradients are computed, zeroed and summed (5 f at once).
    pub(super) tile_moment: usize,
    /// What attention's backward holds: gradients of Q, K, V and O in both layouts, and of the block (6 q + 6 k + 4 h).
    pub(super) attention_moment: usize,
}

impl Graph {
    pub(super) fn of(model: &Model) -> Self {
        let (h, q, k, f) = (model.hidden, model.queries(), model.keys(), model.ffn);
        Self {
            attention: 3 * h + 5 * q + 5 * k,
            outside: 3 * h,
            inside: 4 * f,
            mlp_moment: 2 * h,
            tile_moment: 5 * f,
            attention_moment: 6 * q + 6 * k + 4 * h,
        }
    }

    /// Width of what lies in tokens' order for a block that keeps everything, without what is exchanged.
    pub(super) fn width(self, mlp_tiles: usize) -> usize {
        let inside = if mlp_tiles > 1 { 0 } else { self.inside };
        self.attention + self.outside + inside
    }
}

/// Bytes of a site's tensors that are beside the model's own in a block's graph: on one rank nothing is exchanged, and of what attention
/// leaves only the LSE is no tensor of the model.
pub(super) fn exchanged(site: &Site) -> u64 {
    let all = site.kept_bytes(Policy::Qkv);
    if site.ranks > 1 {
        return all;
    }
    let result = site.batch * site.padded * site.heads * site.value_width * site.element;
    site.kept_bytes(Policy::Attention) - result as u64
}
