//! Memory of a training step grows with the length, not with its square; and what policies save is what they say.
//!
//! `cargo test --release --test memory -- --nocapture` prints the figures of docs/performance.md.
#![allow(clippy::unwrap_used, clippy::print_stdout, unreachable_pub)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use autosp::loss::cross_entropy;
use autosp::{Optimizer, Parameters, Settings, TrainSettings, Trainer};
use autosp_plan::settings::Policy;
use candle_core::{DType, Device, Tensor};

/// The example Llama with the attribute.
#[autosp::sequence_parallel(loss)]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod llama {
    include!("../examples/models/llama.rs");
}

/// The system's allocator; counts the bytes that are allocated now, and the most since [`Counted::mark`].
struct Counted {
    live: AtomicUsize,
    peak: AtomicUsize,
}

#[global_allocator]
static COUNTED: Counted = Counted {
    live: AtomicUsize::new(0),
    peak: AtomicUsize::new(0),
};

impl Counted {
    fn mark(&self) -> usize {
        let live = self.live.load(Ordering::SeqCst);
        self.peak.store(live, Ordering::SeqCst);
        live
    }

    fn add(&self, bytes: usize) {
        let live = self.live.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.peak.fetch_max(live, Ordering::SeqCst);
    }
}

// SAFETY: all requests go to the system's allocator as they are; counting does not allocate.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.live.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

const LAYERS: usize = 4;
const HIDDEN: usize = 64;

fn config() -> llama::Config {
    llama::Config {
        vocab_size: 64,
        hidden_size: HIDDEN,
        intermediate_size: 128,
        num_hidden_layers: LAYERS,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: None,
        max_position_embeddings: 8192,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        last_token_only: false,
    }
}

/// The most bytes that all ranks together held during a step beyond what they held before it, and those that are left after the
/// forward alone.
fn step(policy: Policy, sp: usize, s: usize) -> (usize, usize) {
    let config = config();
    let tokens: Vec<u32> = (0..s as u32).map(|i| (i * i + 7 * i) % 64).collect();
    let tokens = Tensor::from_vec(tokens, (1, s), &Device::Cpu).unwrap();
    let settings = Settings::default().with_sp(sp).with_policy(policy);
    let bytes = autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let model = llama::Llama::load(parameters.builder(), &config)?;
        let how = TrainSettings {
            optimizer: Optimizer::sgd(),
            ..TrainSettings::default()
        };
        let mut trainer = Trainer::new(sp, parameters, how)?;
        let batch = sp.shard(&tokens)?;
        let loss = || {
            let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
            cross_entropy(&model.forward(&batch.tokens, 0, &mut cache)?, &batch.labels)
        };
        // What is allocated once, such as pools of threads and their stacks, is not counted.
        trainer.step(loss)?;
        sp.barrier()?;
        let before = COUNTED.mark();
        sp.barrier()?;
        let held = sp.scope(|| -> autosp::Result<usize> {
            let loss = loss()?;
            sp.barrier()?;
            let held = COUNTED.live.load(Ordering::SeqCst);
            sp.barrier()?;
            drop(loss);
            Ok(held.saturating_sub(before))
        })?;
        sp.barrier()?;
        let before = COUNTED.mark();
        sp.barrier()?;
        trainer.step(loss)?;
        sp.barrier()?;
        Ok((
            COUNTED.peak.load(Ordering::SeqCst).saturating_sub(before),
            held,
        ))
    })
    .unwrap();
    bytes[0]
}

/// The most bytes that a forward and backward of one rank hold, with logits whole or at most `TILE` bytes of them.
fn loss_peak(s: usize, tiled: bool) -> usize {
    let config = llama::Config {
        vocab_size: VOCABULARY,
        hidden_size: 16,
        intermediate_size: 16,
        num_hidden_layers: 1,
        ..config()
    };
    let tokens: Vec<u32> = (0..s as u32).map(|i| (i * i + 7 * i) % 64).collect();
    let tokens = Tensor::from_vec(tokens, (1, s), &Device::Cpu).unwrap();
    let settings = Settings::default().with_loss_bytes(TILE);
    let bytes = autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let model = llama::Llama::load(parameters.builder(), &config)?;
        let batch = sp.shard(&tokens)?;
        sp.scope(|| {
            let mut cache = llama::Cache::new(false, DType::F32, &config, sp.device())?;
            let before = COUNTED.mark();
            let loss = if tiled {
                model.forward_loss(&batch.tokens, 0, &mut cache, &batch.labels)?
            } else {
                cross_entropy(&model.forward(&batch.tokens, 0, &mut cache)?, &batch.labels)?
            };
            loss.backward()?;
            Ok(COUNTED.peak.load(Ordering::SeqCst) - before)
        })
    });
    bytes.unwrap()[0]
}

const VOCABULARY: usize = 4096;
const TILE: usize = 1 << 18;

/// Everything is in one test: the allocator counts the whole process.
#[test]
fn memory_grows_with_the_length() {
    losses_hold_no_logits();
    let lengths = [256, 512, 1024, 2048, 4096];
    for policy in [Policy::All, Policy::Attention] {
        let found = lengths.map(|s| step(policy, 2, s));
        for (s, (peak, held)) in lengths.iter().zip(found) {
            let mb = |bytes: usize| bytes as f64 / 1e6;
            println!(
                "{policy:?}: S = {s}: {:.2} MB at most, {:.2} MB after the forward",
                mb(peak),
                mb(held)
            );
        }
        // Twice the length adds twice the bytes, the square would add four times.
        for three in found.windows(3) {
            let [a, b, c] = [0, 1, 2].map(|i| three[i].1 as f64);
            let growth = (c - b) / (b - a);
            assert!((1.95..2.05).contains(&growth), "{policy:?}: {found:?}");
        }
        // The most that two ranks hold together depends on which of them is ahead.
        for pair in found.windows(2) {
            let growth = pair[1].0 as f64 / pair[0].0 as f64;
            assert!((1.3..2.8).contains(&growth), "{policy:?}: {found:?}");
        }
        let all = found[4].0 as f64 / found[0].0 as f64;
        assert!((8.0..20.0).contains(&all), "{policy:?}: {found:?}");
    }
    // What one layer's blocks hold is what the formula says, and more with each policy that keeps more.
    let s = 2048;
    let held = Policy::ALL.map(|policy| step(policy, 1, s).1);
    assert!(held.is_sorted_by(|more, less| more > less), "{held:?}");
    let site = autosp_plan::cost::Site {
        batch: 1,
        heads: 4,
        kv_heads: 2,
        key_width: HIDDEN / 4,
        value_width: HIDDEN / 4,
        padded: s,
        ranks: 1,
        element: 4,
        lse_element: 4,
    };
    for (i, policy) in Policy::ALL.into_iter().enumerate().skip(1) {
        // The difference to `input` is what the sites keep, and nothing else: allocated bytes, not those of the ledger.
        let extra = held[i] - held[3];
        let formula = LAYERS * site.kept_bytes(policy) as usize;
        let apart = extra.abs_diff(formula);
        assert!(apart < 20_000, "{policy:?}: {extra} and {formula}");
    }
}

/// Neither logits nor their gradient exist: what a loss holds beyond the model's own activations is a tile and gradients of weights.
fn losses_hold_no_logits() {
    let s = 1024;
    let logits = s * VOCABULARY * 4;
    let (tiled, whole) = (loss_peak(s, true), loss_peak(s, false));
    println!("logits of {logits} bytes: {whole} at most where they are whole, {tiled} in tiles");
    assert!(whole > 2 * logits, "{whole}");
    // Less than any tensor of all logits.
    assert!(tiled < logits / 2, "{tiled}");
    // Without logits, twice the length is about twice the activations of one small layer.
    let activations = loss_peak(2 * s, true).saturating_sub(tiled);
    assert!(activations < 6_000_000, "{activations}");
}
