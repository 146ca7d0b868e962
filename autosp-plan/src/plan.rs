//! What the compiler decided, as plain data: what is printed is what is emitted.
//!
//! A place in a function is the preorder number of an expression, so that a plan needs no syntax. The emitted code is a
//! function of the source and the plan alone.

use std::fmt;

/// Decisions for one module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Plan {
    /// The module's name; empty for a file.
    pub module: String,
    /// The attention sites, in the order of the source.
    pub sites: Vec<Site>,
    /// Loops over the model's blocks.
    pub blocks: Vec<Block>,
    /// Functions that a user calls.
    pub roots: Vec<Root>,
    /// Functions that hold an attention and cannot be called by themselves inside a sharded scope.
    pub unsharded: Vec<Unsharded>,
    /// Helpers of libraries that are compared with their definition when the program runs: path as written, and name.
    pub helpers: Vec<(String, String)>,
    /// The functions that get a twin.
    pub twins: Vec<Twin>,
    /// Things worth knowing that are no refusal.
    pub notes: Vec<String>,
}

/// One attention.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Site {
    /// `llama::Attention::forward`.
    pub function: String,
    /// 1-based line of the product of queries and keys.
    pub line: usize,
    /// The axes of the operands.
    pub layout: Layout,
    /// Shapes of the operands as they were followed.
    pub operands: Operands,
    /// Which key head a query head uses.
    pub heads: HeadMap,
    /// Whether keys and values are exchanged before their heads are repeated.
    pub unrepeated: bool,
    /// What is known of the mask, in words.
    pub mask: String,
    /// How the site can be run, best first.
    pub strategies: Vec<String>,
    /// Bytes that one rank sends, forward and backward, as a formula.
    pub bytes: String,
}

/// Axes by name, outermost first: batch `b`, query heads `h`, key heads `g`, sequence `s`, width `d`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Layout {
    /// Queries, the first operand of the product.
    pub q: String,
    /// Keys, the second operand of the product.
    pub k: String,
    /// Values.
    pub v: String,
}

/// Shapes as text, such as `[x.dim(0), self.num_heads, x.dim(1), self.head_dim]`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Operands {
    /// Queries.
    pub q: String,
    /// Keys, before repetition where [`Site::unrepeated`] holds.
    pub k: String,
    /// Values, likewise.
    pub v: String,
}

/// Which key head serves a query head, with H query heads and G key heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum HeadMap {
    /// Query head h uses key head h / (H / G).
    #[default]
    Blocked,
    /// Query head h uses key head h mod G.
    Interleaved,
}

impl fmt::Display for HeadMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocked => "query head h uses key head h / (heads / kv_heads)",
            Self::Interleaved => "query head h uses key head h mod kv_heads",
        })
    }
}

/// A loop over the model's blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Block {
    /// The function that holds the loop.
    pub function: String,
    /// 1-based line of the loop.
    pub line: usize,
    /// What is checkpointed: the call that makes the next block's input.
    pub scope: Option<String>,
    /// Why there is no scope.
    pub why_none: Option<String>,
}

/// A function that a user calls with a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Root {
    /// `llama::Llama::forward`.
    pub function: String,
    /// 1-based line.
    pub line: usize,
    /// Tensor parameters that arrive as shards, with the sequence dimension.
    pub inputs: Vec<(String, usize)>,
    /// The parameter and dimension that is the batch, where a site merges it with heads.
    pub batch: Option<(String, usize)>,
    /// Further tensor parameters that arrive as shards, compared when the model is entered.
    pub beside: Vec<Beside>,
    /// Integer parameters that must be zero: offsets into a cache.
    pub offsets: Vec<String>,
    /// Index into [`Plan::twins`].
    pub twin: usize,
    /// The twin that gives a row for every token, if a loss was asked for and can be had.
    pub loss: Option<usize>,
}

/// A shard that may be missing, or whose rank the analysis took from its uses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Beside {
    /// The parameter.
    pub name: String,
    /// The sequence dimension.
    pub dim: usize,
    /// How many dimensions it has.
    pub rank: usize,
    /// An `Option`.
    pub optional: bool,
}

/// A function that a user could call, and that only works inside the functions that call it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Unsharded {
    /// `llama::Attention::forward`.
    pub function: String,
    /// The item (and the item of the `impl`) that holds it.
    pub place: (usize, Option<usize>),
    /// Why it is not sharded by itself.
    pub why: String,
}

/// A function that gets a twin for use inside a sharded scope.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Twin {
    /// `Attention::forward`.
    pub function: String,
    /// Name of the twin.
    pub name: String,
    /// The item (and the item of the `impl`) that holds the function.
    pub place: (usize, Option<usize>),
    /// What each parameter after `self` becomes.
    pub params: Vec<Kind>,
    /// What the result becomes.
    pub result: Kind,
    /// The changes to the body, by expression.
    pub edits: Vec<Edit>,
}

/// What a tensor type becomes in a twin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum Kind {
    /// Stays what it is.
    Data,
    /// Attention scores that are never made whole.
    Scores,
    /// Attention weights, likewise.
    Weights,
    /// A mask, likewise.
    Mask,
    /// Logits that a loss computes for some tokens at a time.
    Logits,
}

/// One change to a function body.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Edit {
    /// Preorder number of the expression.
    pub expr: u32,
    /// What becomes of it.
    pub action: Action,
}

/// What becomes of an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(rename_all = "snake_case")
)]
pub enum Action {
    /// A call: the replacement below `rt::`, with the receiver as the first argument.
    Replace(String),
    /// A call into the scope: the twin of this name.
    Twin(String),
    /// The product of queries and keys: `rt::scores::<SiteN>`.
    Scores(usize),
    /// The softmax over keys.
    Softmax,
    /// The product of weights and values, where it is written as a function call.
    Attend,
    /// An operation of a block, which goes on the block's tape.
    Recorded,
    /// A size of the shard becomes the valid length of the sequence.
    Valid,
    /// A tuple of so many sizes, of which these become valid ones.
    ValidParts(usize, Vec<usize>),
    /// A replicated tensor: this rank's rows.
    Slice(i64),
    /// One token of a sharded tensor.
    Pick(usize),
    /// In the place of a pick: all tokens as rows of the batch.
    Fold(usize),
    /// A dropout, by the dimensions of rows and tokens.
    Draw(Option<usize>, Option<usize>),
    /// A tensor over keys, of which each rank holds its own, becomes a mask; the same for all queries, if that is set.
    Keys(bool),
    /// The expression inside, with this number, takes its place.
    Inner(u32),
    /// The `if` always takes its first branch.
    Then,
    /// The `if` never takes its first branch.
    Else,
    /// The `match` always takes this arm.
    Arm(usize),
    /// The alternative cannot be sharded, for this reason: an error if it is taken.
    Untaken(usize, String),
    /// The statement writes to a cache and is left out.
    Drop,
    /// A host array over (query, key) becomes a rule.
    Rule(MaskRule),
    /// A tensor made from a rule becomes a mask.
    Mask,
    /// The type written beside a variable no longer fits.
    Untyped,
    /// The call is a block: its input is kept and the rest can be computed again.
    Checkpoint(Checkpoint),
    /// The call computes each token by itself and can run on a few at a time.
    Tiled(Tiled),
}

/// A call of a part of the model with one sharded tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Tiled {
    /// The dimension of the tensor that is the sequence.
    pub dim: usize,
    /// Whether it takes a reference.
    pub by_ref: bool,
}

/// A block's call.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Checkpoint {
    /// The variable that carries the input from block to block.
    pub variable: String,
    /// The expression of the argument that is the block's input.
    pub input: u32,
    /// Variables that the block needs: name, and whether a reference is passed.
    pub captures: Vec<(String, bool)>,
    /// Whether the loop reads the input nowhere else.
    pub last: bool,
}

/// A mask as a rule over (query, key).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct MaskRule {
    /// Expressions of the two ranges' ends.
    pub ends: (u32, u32),
    /// Expressions of the two closures.
    pub closures: (u32, u32),
    /// The band, if the rule is one.
    pub band: Option<Band>,
}

/// `lo <= j - i <= hi` holds one value, everything else another.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Band {
    /// Smallest j - i inside.
    pub lo: Option<Bound>,
    /// Largest j - i inside.
    pub hi: Option<Bound>,
    /// The expressions (or numbers) inside and outside.
    pub inside: String,
    /// Value outside.
    pub outside: String,
}

/// A constant plus multiples of integer expressions of the closure's body.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Bound {
    /// The constant.
    pub constant: i64,
    /// Coefficient and expression.
    pub terms: Vec<(i64, u32)>,
}

/// Bytes that one rank sends for one site in one direction of a Ulysses exchange, by design: queries and the result
/// (`2q`), keys and values (`2k'`), for `s/P` tokens to `P - 1` peers.
pub const ULYSSES_BYTES: &str = "(2*q + 2*k')*bytes*b*(S/P)*(P-1)/P forward and again backward, and backward what the policy did not keep (qkv: q, attention and input: 2*q + 2*k'); q = heads*head_dim, k' = head_dim*max(kv_heads, P)";
