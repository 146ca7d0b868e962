//! One forward and backward of the annotated Llama on ranks, and of the plain one without.

use std::collections::BTreeMap;

use autosp::{Bytes, Parameters, Settings, Sp, loss::cross_entropy};
use autosp_reference::{Tensors, Variables, global_norm, llama_step, variables};
use candle_core::{DType, Device, Tensor};

use crate::llama;

/// A model and a batch.
pub struct Job {
    pub config: llama::Config,
    /// The variables start from the seed, or from these tensors.
    pub start: Start,
    /// `[b, s]` of u32.
    pub tokens: Tensor,
    /// `[b, s]` of i64, negative where there is no target.
    pub labels: Tensor,
}

pub enum Start {
    Seed(u64),
    File(String),
}

/// The loss of a model on this rank's tokens and labels.
pub type Loss =
    fn(&llama::Llama, &Tensor, &mut llama::Cache, &Tensor) -> candle_core::Result<Tensor>;

/// What one rank found.
pub struct Found {
    pub loss: f64,
    /// Reduced over all ranks.
    pub gradients: Tensors,
    /// What this rank handed to its peers.
    pub bytes: Bytes,
}

impl Job {
    /// A job on seeded tokens whose labels are the next tokens, where `valid(position)` holds.
    pub fn random(
        config: llama::Config,
        b: usize,
        s: usize,
        seed: u64,
        valid: impl Fn(usize) -> bool,
    ) -> Self {
        let vocab = config.vocab_size as u64;
        let text: Vec<i64> = (0..(b * (s + 1)) as u64)
            .map(|i| (draw(seed, i) % vocab) as i64)
            .collect();
        let row = |r: usize| &text[r * (s + 1)..(r + 1) * (s + 1)];
        let tokens: Vec<u32> = (0..b)
            .flat_map(|r| row(r)[..s].iter().map(|&token| token as u32))
            .collect();
        let label = |r: usize, i: usize| {
            if valid(i) {
                row(r)[i + 1]
            } else {
                autosp_reference::IGNORED
            }
        };
        let labels: Vec<i64> = (0..b)
            .flat_map(|r| (0..s).map(move |i| (r, i)))
            .map(|(r, i)| label(r, i))
            .collect();
        Self {
            config,
            start: Start::Seed(seed),
            tokens: Tensor::from_vec(tokens, (b, s), &Device::Cpu).unwrap(),
            labels: Tensor::from_vec(labels, (b, s), &Device::Cpu).unwrap(),
        }
    }

    /// The variables that a run starts from.
    pub fn parameters(&self, device: &Device) -> autosp::Result<Parameters> {
        match &self.start {
            Start::Seed(seed) => Ok(Parameters::init(*seed, DType::F32, device)),
            Start::File(path) => autosp::load_trainable(&[path], DType::F32, device),
        }
    }

    /// The same variables for the reference.
    pub fn variables(&self) -> Variables {
        let parameters = self.parameters(&Device::Cpu).unwrap();
        llama::Llama::load(parameters.builder(), &self.config).unwrap();
        let tensors = parameters
            .named()
            .into_iter()
            .map(|(name, var)| (name, var.as_detached_tensor()));
        variables(&tensors.collect::<BTreeMap<_, _>>()).unwrap()
    }

    /// Loss and gradients on all ranks of `settings`.
    pub fn on_ranks(&self, settings: Settings) -> Vec<Found> {
        autosp::run_with(settings, |sp| self.on_rank(sp)).unwrap()
    }

    /// This rank's part, by a loop of one's own.
    pub fn on_rank(&self, sp: &Sp) -> autosp::Result<Found> {
        self.with_loss(sp, |model, tokens, cache, labels| {
            cross_entropy(&model.forward(tokens, 0, cache)?, labels)
        })
    }

    /// The same with another way to the loss.
    pub fn with_loss(&self, sp: &Sp, loss: Loss) -> autosp::Result<Found> {
        let parameters = self.parameters(sp.device())?;
        let model = llama::Llama::load(parameters.builder(), &self.config)?;
        let before = sp.ledger().snapshot();
        let batch = sp.shard_targets(&self.tokens, &self.labels)?;
        let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
            let mut cache = llama::Cache::new(false, DType::F32, &self.config, sp.device())?;
            let loss = loss(&model, &batch.tokens, &mut cache, &batch.labels)?;
            let gradients = loss.backward()?;
            Ok((f64::from(loss.to_scalar::<f32>()?), gradients))
        })?;
        sp.reduce_gradients(&mut store, &parameters.vars())?;
        let gradient = |var: &candle_core::Var| store.get(var).unwrap().detach();
        let gradients = parameters
            .named()
            .into_iter()
            .map(|(name, var)| (name, gradient(&var)))
            .collect();
        Ok(Found {
            loss,
            gradients,
            bytes: sp.ledger().since(before),
        })
    }

    /// The unannotated model on candle's slow operations, on one device.
    pub fn expected(&self) -> (f64, Tensors) {
        let config = plain(&self.config);
        let (loss, gradients) = llama_step(
            &self.variables(),
            &config,
            &self.tokens,
            &self.labels,
            DType::F32,
        )
        .unwrap();
        (f64::from(loss), gradients)
    }
}

/// The same sizes for the other module that includes the file.
pub fn plain(config: &llama::Config) -> autosp_reference::llama::Config {
    autosp_reference::llama::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        max_position_embeddings: config.max_position_embeddings,
        rope_theta: config.rope_theta,
        rms_norm_eps: config.rms_norm_eps,
        tie_word_embeddings: config.tie_word_embeddings,
        last_token_only: config.last_token_only,
    }
}

/// A Llama that a rank runs in milliseconds.
pub fn tiny(kv_heads: usize) -> llama::Config {
    llama::Config {
        vocab_size: 40,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: kv_heads,
        head_dim: None,
        max_position_embeddings: 1024,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        last_token_only: false,
    }
}

/// Contract 1: the loss, and per tensor |a - b| <= 1e-5 |b| + 1e-7 x the norm of all gradients.
pub fn assert_contract(what: &str, found: &Found, expected: &(f64, Tensors)) {
    let (loss, gradients) = expected;
    assert!(
        (found.loss - loss).abs() <= 1e-5 * loss.abs(),
        "{what}: loss: expected {loss}, found {}",
        found.loss
    );
    assert_eq!(found.gradients.len(), gradients.len(), "{what}");
    let global = global_norm(gradients).unwrap();
    for (name, expected) in gradients {
        let difference = (&found.gradients[name] - expected).unwrap();
        let norm = |tensor: &Tensor| {
            global_norm(&Tensors::from([(name.clone(), tensor.clone())])).unwrap()
        };
        let (difference, size) = (norm(&difference), norm(expected));
        let allowed = 1e-5 * size + 1e-7 * global;
        assert!(
            difference <= allowed,
            "{what}: {name}: differs by {difference:e} of {size:e}, allowed {allowed:e}"
        );
    }
}

/// `SplitMix64` at a counter.
pub fn draw(seed: u64, counter: u64) -> u64 {
    let z = seed
        .wrapping_mul(0xd134_2543_de82_ef95)
        .wrapping_add((counter + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
