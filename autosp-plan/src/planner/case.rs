//! All of a choice but what the blocks keep, worked out for one length.

use super::graph::Graph;
use super::{Choice, Job, Model};
use crate::cost::{Site, input_bytes};
use crate::settings::Policy;

/// Bytes of an element of what is summed and of the optimizer's state, where the parameters have no more.
const WIDE: u64 = 4;

/// The most bytes of a load that goes to the host and back.
const HOST_LOAD: u64 = 1 << 30;

/// Bytes of a bucket of gradients that is reduced, `TrainSettings::bucket_bytes`.
const BUCKET: u64 = 32 << 20;

/// The most elements that candle's elementwise kernels take.
const INDEX: u64 = 1 << 31;

pub(super) struct Case<'a> {
    pub(super) job: &'a Job,
    pub(super) choice: &'a Choice,
    /// Tokens of this rank, all rows of its batch together.
    pub(super) tokens: u64,
    pub(super) site: Site,
    pub(super) graph: Graph,
    /// Bytes of an element of parameters and activations.
    pub(super) e: u64,
    pub(super) world: u64,
}

impl<'a> Case<'a> {
    pub(super) fn new(job: &'a Job, choice: &'a Choice, seq: usize) -> Self {
        let model = &job.model;
        let padded = seq.next_multiple_of(choice.sp);
        let site = Site {
            batch: job.batch,
            heads: model.heads,
            kv_heads: model.kv_heads,
            key_width: model.head_dim,
            value_width: model.head_dim,
            padded,
            ranks: choice.sp,
            element: job.dtype_bytes,
            lse_element: if job.dtype_bytes == 8 { 8 } else { 4 },
        };
        Self {
            job,
            choice,
            tokens: (job.batch * padded / choice.sp) as u64,
            site,
            graph: Graph::of(model),
            e: job.dtype_bytes as u64,
            world: choice.world() as u64,
        }
    }

    pub(super) fn model(&self) -> &Model {
        &self.job.model
    }

    /// Bytes of a tensor `[tokens, width]` of this rank.
    fn rows(&self, width: usize) -> u64 {
        self.tokens * width as u64 * self.e
    }

    /// Bytes that a block's tape keeps.
    fn graph_bytes(&self, mlp_tiles: usize) -> u64 {
        self.rows(self.graph.width(mlp_tiles)) + self.site.kept_bytes(Policy::Qkv)
    }

    /// What a block's forward writes is taken to be in proportion to this.
    pub(super) fn traffic_bytes(&self) -> u64 {
        self.graph_bytes(1)
    }

    /// What a block keeps from its forward to its backward. Under [`Policy::All`] nothing runs in tiles.
    pub(super) fn kept(&self, policy: Policy) -> u64 {
        if policy == Policy::All {
            return self.graph_bytes(1);
        }
        let (tokens, hidden) = (self.tokens as usize, self.model().hidden);
        input_bytes(1, tokens, hidden, self.job.dtype_bytes) + self.site.kept_bytes(policy)
    }

    /// The part of a block's graph that its recomputation makes again: a copy of its input too, and on one rank of the attention's result.
    pub(super) fn again(&self, policy: Policy) -> u64 {
        let kept = match policy {
            Policy::All => return 0,
            Policy::Input => 0,
            _ if self.site.ranks == 1 => {
                let width = self.site.heads * self.site.value_width;
                self.site.kept_bytes(policy) - self.rows(width)
            }
            _ => self.site.kept_bytes(policy),
        };
        self.graph_bytes(self.choice.mlp_tiles) - kept
    }

    /// What the backward of the feed-forward holds beside the block's graph.
    pub(super) fn mlp_moment(&self) -> u64 {
        let tiles = self.choice.mlp_tiles as u64;
        let Graph {
            inside,
            tile_moment,
            mlp_moment,
            ..
        } = self.graph;
        let tile = if tiles > 1 {
            self.rows(inside + tile_moment).div_ceil(tiles)
        } else {
            self.rows(tile_moment)
        };
        tile + self.rows(mlp_moment)
    }

    /// The same of attention: gradients; buffers of an exchange, sent and received; the kernel's workspace.
    pub(super) fn attention_moment(&self) -> [u64; 3] {
        let groups = self.groups() as u64;
        let Site {
            heads,
            ranks,
            padded,
            batch,
            key_width,
            kv_heads,
            ..
        } = self.site;
        let exchange = if ranks == 1 {
            0
        } else {
            let held = (kv_heads.max(ranks) / ranks) as u64;
            let kv = 2 * held.div_ceil(groups.min(held));
            let q = (heads / ranks) as u64 / groups.max(1) + 1;
            2 * (q.min((heads / ranks) as u64) + kv) * (batch * padded * key_width) as u64 * self.e
        };
        // cuDNN's backward: dQ in f32 and a row of sums, h s (4 d + 4); with grouped queries dK and dV of every query head, 4 h s d.
        let grouped = if kv_heads < heads { 4 * key_width } else { 0 };
        let workspace = (heads / ranks * batch * padded * (4 * key_width + 4 + grouped)) as u64;
        // Gate and up are gone by then.
        let gone = if self.choice.mlp_tiles > 1 {
            0
        } else {
            self.graph.inside
        };
        let Graph {
            attention_moment, ..
        } = self.graph;
        [
            self.rows(attention_moment.saturating_sub(gone)),
            exchange,
            workspace.div_ceil(groups),
        ]
    }

    /// Head groups that there are.
    pub(super) fn groups(&self) -> usize {
        if self.site.ranks == 1 {
            1
        } else {
            self.choice
                .groups
                .clamp(1, self.site.heads / self.site.ranks)
        }
    }

    /// Bytes of whole logits, and of their copy in f32 where the model has a smaller type.
    pub(super) fn logits(&self) -> u64 {
        let cast = if self.e < WIDE { WIDE } else { 0 };
        self.tokens * self.model().vocabulary as u64 * (self.e + cast)
    }

    /// What of the loss stays through the backward: the last block's result and its norm, and the logits if they are whole.
    pub(super) fn head(&self) -> u64 {
        let whole = if self.choice.loss_tiles > 1 {
            0
        } else {
            self.logits()
        };
        self.rows(2 * self.model().hidden) + whole
    }

    /// What the loss holds for a moment: gradients of the logits, in tiles the logits too and the gradient of what they are made from.
    pub(super) fn loss_moment(&self) -> u64 {
        let tiles = self.choice.loss_tiles as u64;
        if tiles > 1 {
            (2 * self.logits()).div_ceil(tiles) + self.rows(self.model().hidden)
        } else if self.e < WIDE {
            // As measured on GPUs in bf16.
            self.tokens * self.model().vocabulary as u64 * self.e
        } else {
            // candle's zeros, the gradient, and their sum.
            3 * self.logits()
        }
    }

    /// Elements of the largest tensor that an elementwise kernel gets.
    pub(super) fn largest(&self) -> u64 {
        let model = self.model();
        let tiled =
            |width: usize, tiles: usize| (self.tokens * width as u64).div_ceil(tiles as u64);
        tiled(model.hidden, 1)
            .max(tiled(model.queries(), 1))
            .max(tiled(model.ffn, self.choice.mlp_tiles))
            .max(tiled(model.vocabulary, self.choice.loss_tiles))
    }

    pub(super) fn index_fits(&self) -> bool {
        self.largest() <= INDEX
    }

    /// Bytes of an element of sums.
    fn wide(&self) -> u64 {
        WIDE.max(self.e)
    }

    /// Parameters that a rank holds.
    pub(super) fn parameters(&self) -> u64 {
        let n = self.model().parameters();
        if self.choice.stage < 3 {
            return self.e * n;
        }
        // A share of all, the tables whole while they are used, and two blocks.
        let blocks = 2 * self.model().block_parameters() + self.model().embedding();
        self.e * (n / self.world + blocks)
    }

    /// Gradients that a rank holds while blocks walk back.
    pub(super) fn gradients(&self) -> u64 {
        let n = self.model().parameters();
        if self.choice.stage < 2 {
            return self.e * n;
        }
        let arriving = self.model().block_parameters() + self.model().embedding();
        self.wide() * n.div_ceil(self.world) + self.e * arriving + BUCKET
    }

    /// What the update holds beside them: a bucket joined, reduced and gathered.
    pub(super) fn buckets(&self) -> u64 {
        3 * BUCKET.min(self.wide() * self.model().parameters())
    }

    /// Gradients in the update, where their sums take the place of what each rank has found.
    pub(super) fn sums(&self) -> u64 {
        let n = self.model().parameters();
        let share = if self.choice.stage == 0 {
            self.wide() * n
        } else {
            self.wide() * n.div_ceil(self.world)
        };
        let own = if self.choice.stage < 2 { self.e * n } else { 0 };
        share.max(own)
    }

    /// Moments, and master weights where the parameters have less than four bytes.
    fn state(&self) -> u64 {
        let share = if self.choice.stage == 0 {
            1
        } else {
            self.world
        };
        let master = if self.e < WIDE { WIDE } else { 0 };
        (2 * self.wide() + master) * self.model().parameters().div_ceil(share)
    }

    /// A load of the optimizer on the host: of a bucket of gradients, or of the largest variable, this rank's share, with old and new values.
    fn load(&self) -> u64 {
        let most = (BUCKET / self.wide()).max(self.model().embedding());
        let share = if self.choice.stage == 0 {
            1
        } else {
            self.world
        };
        let elements = most.min(self.model().parameters()).div_ceil(share);
        (elements * (self.wide() + 2 * self.e)).min(HOST_LOAD)
    }

    /// The optimizer's bytes on the device: its state, or two loads that pass through.
    pub(super) fn optimizer(&self) -> u64 {
        if self.choice.host_optimizer {
            2 * self.load()
        } else {
            self.state()
        }
    }

    /// Bytes on the host for one rank, without what blocks keep there.
    pub(super) fn host(&self) -> u64 {
        if self.choice.host_optimizer {
            self.state() + 2 * self.load()
        } else {
            0
        }
    }
}
