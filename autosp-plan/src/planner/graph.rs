//! What the tape of a block keeps, and what its backward holds for a moment.
//!
//! Counted from what the runtime keeps of the example's Llama (`ops/tape.rs`, `ops/record.rs`, `site/recorded.rs`); e bytes an element,
//! h hidden, q and k the widths of queries and keys, f the width of the feed-forward. Results of norms and the product of gate and up are
//! made again when they are needed. What the site keeps (Q, K, V, O and LSE of its heads) is [`Site::kept_bytes`] under `qkv`, on one
//! rank as on several.
//!
//! [`Site::kept_bytes`]: crate::cost::Site::kept_bytes

use super::Model;

/// Widths of tensors `[tokens, width]` of one block, in elements a token; what the site keeps is beside these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Graph {
    /// The block's input and the sum before the feed-forward, which the norms read (2 h); the attention's result with the heads last, which
    /// its projection reads (q).
    pub(super) outside: usize,
    /// Gate and up (2 f).
    pub(super) inside: usize,
    /// What the backward of the feed-forward holds beside the graph outside of tiles: the gradient of the result, in tiles of the input
    /// too (h).
    pub(super) mlp_moment: usize,
    /// Inside of tiles: the gradients of the product, of gate and of up (3 f).
    pub(super) tile_moment: usize,
    /// What attention's backward holds: gradients of Q, K, V and O in both layouts, and of the block (6 q + 6 k + 4 h).
    pub(super) attention_moment: usize,
}

impl Graph {
    pub(super) fn of(model: &Model) -> Self {
        let (h, q, k, f) = (model.hidden, model.queries(), model.keys(), model.ffn);
        Self {
            outside: 2 * h + q,
            inside: 2 * f,
            mlp_moment: h,
            tile_moment: 3 * f,
            attention_moment: 6 * q + 6 * k + 4 * h,
        }
    }

    /// Width of what lies in tokens' order for a block that keeps everything, without what the site keeps.
    pub(super) fn width(self, mlp_tiles: usize) -> usize {
        let inside = if mlp_tiles > 1 { 0 } else { self.inside };
        self.outside + inside
    }
}
