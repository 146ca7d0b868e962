//! A model under every lint of rustc and clippy: what the attribute emits has to be as silent as what its user wrote.
//!
//! Building this crate is the test, and `cargo clippy` on it another. Lints that the model itself would break by its nature are
//! left out with a reason.
#![deny(
    warnings,
    future_incompatible,
    keyword_idents,
    let_underscore,
    nonstandard_style,
    refining_impl_trait,
    rust_2018_idioms,
    rust_2021_compatibility,
    rust_2024_compatibility,
    unused,
    absolute_paths_not_starting_with_crate,
    ambiguous_negative_literals,
    elided_lifetimes_in_paths,
    explicit_outlives_requirements,
    ffi_unwind_calls,
    let_underscore_drop,
    macro_use_extern_crate,
    meta_variable_misuse,
    missing_abi,
    missing_copy_implementations,
    missing_debug_implementations,
    missing_docs,
    missing_unsafe_on_extern,
    non_ascii_idents,
    redundant_imports,
    redundant_lifetimes,
    single_use_lifetimes,
    trivial_casts,
    trivial_numeric_casts,
    unit_bindings,
    unnameable_types,
    unreachable_pub,
    unsafe_code,
    unsafe_op_in_unsafe_fn,
    unused_crate_dependencies,
    unused_extern_crates,
    unused_import_braces,
    unused_lifetimes,
    unused_macro_rules,
    unused_qualifications,
    unused_results,
    variant_size_differences,
    clippy::all,
    clippy::pedantic,
    clippy::nursery,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::dbg_macro,
    clippy::todo,
    clippy::unimplemented,
    clippy::exit,
    clippy::mem_forget,
    clippy::allow_attributes_without_reason,
    clippy::undocumented_unsafe_blocks
)]

/// A decoder with everything that the attribute rewrites: attention, norms, rotary positions, learned positions, a loop over blocks.
#[autosp::sequence_parallel]
pub mod model {
    use candle_core::{DType, Device, Result, Tensor};
    use candle_nn::{
        Embedding, LayerNorm, Linear, Module, RmsNorm, VarBuilder, embedding, layer_norm,
        linear_no_bias, rms_norm,
    };

    /// The sizes of the model.
    #[derive(Debug, Clone, Copy)]
    pub struct Config {
        /// Tokens of the vocabulary.
        pub vocabulary: usize,
        /// Width between blocks.
        pub width: usize,
        /// Blocks.
        pub blocks: usize,
        /// Heads of each attention.
        pub heads: usize,
        /// The longest sequence.
        pub length: usize,
    }

    /// Zero where a key comes no later than its query, minus infinity elsewhere.
    fn causal(length: usize, device: &Device) -> Result<Tensor> {
        let mask: Vec<_> = (0..length)
            .flat_map(|i| (0..length).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        Tensor::from_slice(&mask, (length, length), device)
    }

    /// Attention and what is around it.
    #[derive(Debug, Clone)]
    struct Block {
        norm: RmsNorm,
        query: Linear,
        key: Linear,
        value: Linear,
        out: Linear,
        heads: usize,
        head_width: usize,
    }

    impl Block {
        fn load(vb: &VarBuilder<'_>, config: &Config) -> Result<Self> {
            let linear = |name: &str| linear_no_bias(config.width, config.width, vb.pp(name));
            Ok(Self {
                norm: rms_norm(config.width, 1e-5, vb.pp("norm"))?,
                query: linear("query")?,
                key: linear("key")?,
                value: linear("value")?,
                out: linear("out")?,
                heads: config.heads,
                head_width: config.width / config.heads,
            })
        }

        fn split(&self, x: &Tensor, rows: usize, length: usize) -> Result<Tensor> {
            x.reshape((rows, length, self.heads, self.head_width))?
                .transpose(1, 2)?
                .contiguous()
        }

        fn forward(&self, x: &Tensor, mask: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
            let (rows, length, width) = x.dims3()?;
            let input = self.norm.forward(x)?;
            let q = self.split(&self.query.forward(&input)?, rows, length)?;
            let k = self.split(&self.key.forward(&input)?, rows, length)?;
            let v = self.split(&self.value.forward(&input)?, rows, length)?;
            let q = candle_nn::rotary_emb::rope(&q, cos, sin)?;
            let k = candle_nn::rotary_emb::rope(&k, cos, sin)?;
            let scores = (q.matmul(&k.t()?)? / 2.0)?.broadcast_add(mask)?;
            let weights = candle_nn::ops::softmax_last_dim(&scores)?;
            let mixed = weights
                .matmul(&v)?
                .transpose(1, 2)?
                .reshape((rows, length, width))?;
            x + self.out.forward(&mixed)?
        }
    }

    /// Logits for every token.
    #[derive(Debug, Clone)]
    pub struct Model {
        tokens: Embedding,
        places: Embedding,
        blocks: Vec<Block>,
        norm: LayerNorm,
        head: Linear,
        cos: Tensor,
        sin: Tensor,
    }

    impl Model {
        /// Takes the model's tensors.
        ///
        /// # Errors
        /// When one is missing or has another shape.
        pub fn load(vb: &VarBuilder<'_>, config: &Config) -> Result<Self> {
            let angles = Tensor::arange(
                0_u32,
                u32::try_from(config.length).unwrap_or(0),
                vb.device(),
            )?
            .to_dtype(DType::F32)?
            .reshape((config.length, 1))?
            .matmul(&Tensor::ones(
                (1, config.width / config.heads / 2),
                DType::F32,
                vb.device(),
            )?)?;
            Ok(Self {
                tokens: embedding(config.vocabulary, config.width, vb.pp("tokens"))?,
                places: embedding(config.length, config.width, vb.pp("places"))?,
                blocks: (0..config.blocks)
                    .map(|i| Block::load(&vb.pp(i), config))
                    .collect::<Result<Vec<_>>>()?,
                norm: layer_norm(config.width, 1e-5, vb.pp("norm"))?,
                head: linear_no_bias(config.width, config.vocabulary, vb.pp("head"))?,
                cos: angles.cos()?,
                sin: angles.sin()?,
            })
        }

        /// `[b, s]` tokens to `[b, s, vocabulary]` logits.
        ///
        /// # Errors
        /// When an operation fails.
        #[allow(
            clippy::cast_possible_truncation,
            reason = "a length is no more than 32 bits"
        )]
        pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
            let (_, length) = tokens.dims2()?;
            let mask = causal(length, tokens.device())?;
            let cos = self.cos.narrow(0, 0, length)?;
            let sin = self.sin.narrow(0, 0, length)?;
            let places = Tensor::arange(0_u32, length as u32, tokens.device())?;
            let mut x = self
                .tokens
                .forward(tokens)?
                .broadcast_add(&self.places.forward(&places)?)?;
            for block in &self.blocks {
                x = block.forward(&x, &mask, &cos, &sin)?;
            }
            self.head.forward(&self.norm.forward(&x)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use autosp::testing::{Cases, assert_equivalent};

    use super::model::{Config, Model};

    #[test]
    fn the_silent_model_is_the_same_on_two_ranks() {
        let config = Config {
            vocabulary: 32,
            width: 16,
            blocks: 2,
            heads: 4,
            length: 16,
        };
        let cases = Cases {
            sp: vec![2],
            vocabulary: 32,
            seq_len: 11,
            ..Cases::default()
        };
        assert_equivalent(&cases, |vb, tokens| {
            Model::load(&vb, &config)?.forward(tokens)
        });
    }
}
