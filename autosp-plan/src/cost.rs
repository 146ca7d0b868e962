//! What a policy costs: bytes that stay from the forward to the backward, and bytes that ranks exchange.
//!
//! With H query heads of width d, values of width dv, G kv heads of which each rank holds G' / P with G' = max(G, P), batch b, padded
//! length S and P ranks, one token of one rank has at an attention site: queries `q = H d`, keys and values `G' (d + dv)`, the result
//! `o = H dv`, and a logarithm of the softmax's denominator for each query head, which the runtime keeps in two numbers, value and
//! rounding error.

use crate::settings::Policy;

/// The sizes of an attention site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "plain numbers")]
pub struct Site {
    /// Rows of the batch on this rank.
    pub batch: usize,
    /// Query heads of the model.
    pub heads: usize,
    /// Kv heads of the model.
    pub kv_heads: usize,
    /// Width of queries and keys.
    pub key_width: usize,
    /// Width of values and of the result.
    pub value_width: usize,
    /// Tokens of the sequence, rounded up to a multiple of the ranks.
    pub padded: usize,
    /// Ranks that share the sequence.
    pub ranks: usize,
    /// Bytes of an element: 4 for `f32`, 2 for `bf16`.
    pub element: usize,
    /// Bytes of a number of the LSE: 8 for `f64`, else 4.
    pub lse_element: usize,
}

impl Site {
    /// Bytes of the queries, of the keys and values, and of the result, that a rank has after the exchange.
    fn parts(&self) -> [u64; 3] {
        let tokens = self.batch * self.padded * self.element;
        let (heads, kv_heads) = (
            self.heads / self.ranks,
            self.kv_heads.max(self.ranks) / self.ranks,
        );
        [
            heads * self.key_width,
            kv_heads * (self.key_width + self.value_width),
            heads * self.value_width,
        ]
        .map(|width| (tokens * width) as u64)
    }

    /// Of some bytes that a rank has, those that come from or go to others.
    fn travelling(&self, bytes: u64) -> u64 {
        bytes / self.ranks as u64 * (self.ranks as u64 - 1)
    }

    /// Bytes that one rank hands to its peers in a forward: queries, keys and values, and the result.
    pub fn forward_bytes(&self) -> u64 {
        let [q, kv, o] = self.parts();
        self.travelling(q + kv + o)
    }

    /// Bytes that one rank hands to its peers in a backward: the gradients of all that the forward exchanged, and once more what the
    /// policy did not keep. The result is kept in the layout of the attention and goes back to that of the tokens for the block that
    /// is computed again.
    pub fn backward_bytes(&self, policy: Policy) -> u64 {
        let [q, kv, o] = self.parts();
        let again = match policy {
            Policy::All => 0,
            Policy::Qkv => o,
            Policy::Attention | Policy::Input => q + kv + o,
        };
        self.travelling(q + kv + o + again)
    }

    /// Bytes that a checkpoint scope keeps of the site on one rank. Under [`Policy::All`] there are no scopes and nothing is counted:
    /// what stays is candle's graph of the model as it is written.
    pub fn kept_bytes(&self, policy: Policy) -> u64 {
        let [q, kv, o] = self.parts();
        let lse =
            2 * (self.batch * self.padded * self.heads / self.ranks * self.lse_element) as u64;
        match policy {
            Policy::All | Policy::Input => 0,
            Policy::Attention => o + lse,
            Policy::Qkv => q + kv + o + lse,
        }
    }
}

/// Bytes of a block's input `[batch, tokens, hidden]`, which every policy but [`Policy::All`] keeps on each rank for each block;
/// `tokens` are those of the rank.
pub fn input_bytes(batch: usize, tokens: usize, hidden: usize, element: usize) -> u64 {
    (batch * tokens * hidden * element) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3-8B in bf16 on eight ranks.
    const LLAMA: Site = Site {
        batch: 1,
        heads: 32,
        kv_heads: 8,
        key_width: 128,
        value_width: 128,
        padded: 8000,
        ranks: 8,
        element: 2,
        lse_element: 4,
    };

    fn per_token(bytes: u64) -> u64 {
        bytes * LLAMA.ranks as u64 / LLAMA.padded as u64
    }

    #[test]
    fn bytes_a_token_are_those_of_the_planner() {
        let input = input_bytes(1, LLAMA.padded / LLAMA.ranks, 4096, 2);
        // 2h; 2h + 2q + 4 heads; 2h + 4q + 4k + 4 heads, and the second number of the LSE.
        let kept = |policy| per_token(input + LLAMA.kept_bytes(policy));
        assert_eq!(kept(Policy::Input), 8192);
        assert_eq!(kept(Policy::Attention), 16_512 + 128);
        assert_eq!(kept(Policy::Qkv), 28_800 + 128);
    }

    #[test]
    fn the_backward_sends_again_what_was_not_kept() {
        let (q, k) = (4096, 1024);
        let unit = |numbers: u64| numbers * 2 * (8000 / 8) * 7 / 8;
        assert_eq!(LLAMA.forward_bytes(), unit(2 * q + 2 * k));
        assert_eq!(LLAMA.backward_bytes(Policy::All), unit(2 * q + 2 * k));
        assert_eq!(LLAMA.backward_bytes(Policy::Qkv), unit(3 * q + 2 * k));
        for policy in [Policy::Attention, Policy::Input] {
            assert_eq!(LLAMA.backward_bytes(policy), unit(4 * q + 4 * k));
        }
    }

    #[test]
    fn few_kv_heads_are_held_by_several_ranks_and_one_rank_sends_nothing() {
        let few = Site {
            kv_heads: 2,
            ..LLAMA
        };
        assert_eq!(few.forward_bytes(), LLAMA.forward_bytes());
        let alone = Site { ranks: 1, ..LLAMA };
        assert_eq!(
            (alone.forward_bytes(), alone.backward_bytes(Policy::Input)),
            (0, 0)
        );
        assert_eq!(
            alone.kept_bytes(Policy::Qkv),
            8 * LLAMA.kept_bytes(Policy::Qkv)
        );
    }
}
