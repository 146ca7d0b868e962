//! The sizes of a model.

/// A decoder of blocks with grouped-query attention and a gated feed-forward: Llama, Mistral, Qwen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "plain numbers")]
pub struct Model {
    /// Width of the activations between blocks, h.
    pub hidden: usize,
    /// Width inside the feed-forward, f.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, which divide the query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Blocks, L.
    pub layers: usize,
    /// Tokens of the vocabulary, V.
    pub vocabulary: usize,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Parameters of a block that are not in its seven matrices: biases, and weights of its norms.
    pub vectors: usize,
    /// Blocks whose attention sees a window alone.
    pub window: Option<Window>,
}

/// Sliding-window attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs, reason = "plain numbers")]
pub struct Window {
    /// Keys that a query sees, itself included.
    pub keys: usize,
    /// Blocks that have it.
    pub layers: usize,
}

impl Model {
    /// Width of the queries of a token, q.
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys of a token, k; values are as wide.
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Parameters in matrix products of a block: `n = 2 h q + 2 h k + 3 h f`.
    pub fn block_products(&self) -> u64 {
        let (h, q, k, f) = (self.hidden, self.queries(), self.keys(), self.ffn);
        (2 * h * (q + k) + 3 * h * f) as u64
    }

    /// Parameters of a block.
    pub fn block_parameters(&self) -> u64 {
        self.block_products() + self.vectors as u64
    }

    /// Parameters of the embedding, `V h`.
    pub fn embedding(&self) -> u64 {
        (self.vocabulary * self.hidden) as u64
    }

    /// All parameters, N.
    pub fn parameters(&self) -> u64 {
        let tables = if self.tied { 1 } else { 2 };
        tables * self.embedding()
            + self.layers as u64 * self.block_parameters()
            + self.hidden as u64
    }

    /// Parameters in matrix products, Nm: all but the embedding, which is looked up; a tied embedding is a product too.
    pub fn products(&self) -> u64 {
        self.parameters() - if self.tied { 0 } else { self.embedding() }
    }

    /// Pairs of a query and a key that attention computes in all blocks for one row of `seq` tokens, as a multiple of the causal
    /// `seq^2 / 2`: L, less where windows are.
    pub fn causal_layers(&self, seq: usize) -> f64 {
        let all = self.layers as f64;
        let Some(Window { keys, layers }) = self.window.filter(|window| window.keys < seq) else {
            return all;
        };
        // Of the triangle, what is more than `keys` below the diagonal is not seen.
        let unseen = 1.0 - keys as f64 / seq as f64;
        all - layers as f64 * unseen * unseen
    }

    /// Model FLOPs of a training step over one row of `seq` tokens: `6 Nm S + 6 L S^2 q`, recomputation not counted, of windows the part
    /// that is seen.
    pub fn flops(&self, seq: usize) -> f64 {
        let s = seq as f64;
        6.0 * self.products() as f64 * s
            + 6.0 * self.causal_layers(seq) * s * s * self.queries() as f64
    }

    /// Whether `sp` ranks can share a sequence: they divide the query heads, and divide the kv heads or are divided by them.
    pub fn divides(&self, sp: usize) -> bool {
        sp > 0
            && self.heads.is_multiple_of(sp)
            && (self.kv_heads.is_multiple_of(sp) || sp.is_multiple_of(self.kv_heads))
    }
}

#[cfg(feature = "config")]
mod from_config {
    use super::{Model, Window};
    use crate::codes;
    use crate::config::{ConfigError, ModelConfig};

    /// Families whose blocks are what the formulas count.
    const FAMILIES: &[&str] = &["llama", "mistral", "qwen2", "qwen3"];

    impl Model {
        /// The sizes of a Llama, Mistral or Qwen; `name` is what messages call its file.
        ///
        /// # Errors
        /// AS0544 for another family, whose parameters and activations the formulas do not count.
        pub fn from_config(name: &str, config: &ModelConfig) -> Result<Self, ConfigError> {
            let family = config.model_type.as_str();
            if !FAMILIES.contains(&family) {
                let found = if family.is_empty() { "none" } else { family };
                let families = FAMILIES.join("`, `");
                return Err(ConfigError {
                    code: codes::CONFIG,
                    message: format!(
                        "`{name}`: expected `model_type` among `{families}`, found `{found}`"
                    ),
                });
            }
            let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
            let (heads, kv_heads, head_dim) = (
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
            );
            let (q, k) = (heads * head_dim, kv_heads * head_dim);
            let mut vectors = 2 * hidden;
            if family == "qwen2" {
                vectors += q + 2 * k;
            } else if config.attention_bias {
                vectors += q + 2 * k + hidden;
            }
            if config.mlp_bias {
                vectors += 2 * ffn + hidden;
            }
            if family == "qwen3" {
                // Norms of queries and keys, shared by the heads.
                vectors += 2 * head_dim;
            }
            Ok(Self {
                hidden,
                ffn,
                heads,
                kv_heads,
                head_dim,
                layers: config.num_hidden_layers,
                vocabulary: config.vocab_size,
                tied: config.tie_word_embeddings.unwrap_or(false),
                vectors,
                window: window(config),
            })
        }
    }

    fn window(config: &ModelConfig) -> Option<Window> {
        let keys = config.sliding_window?;
        let layers = if config.layer_types.is_empty() {
            // Qwen's first layers see everything.
            let whole = config.other.get("max_window_layers");
            let whole = whole.and_then(serde_json::Value::as_u64).unwrap_or(0);
            config.num_hidden_layers.saturating_sub(whole as usize)
        } else {
            let types = config.layer_types.iter();
            types.filter(|kind| *kind == "sliding_attention").count()
        };
        (layers > 0).then_some(Window { keys, layers })
    }
}
