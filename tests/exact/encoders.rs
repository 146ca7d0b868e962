//! Encoders with masks from the caller, pooled to one vector a row, on meshes, against the same files on candle's slow operations.

use autosp::{Parameters, Settings, loss::cross_entropy};
use autosp_reference::{Tensors, gradients, variables};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::job::{Found, assert_contract, draw};

/// A global batch of rows of different lengths.
struct Batch {
    tokens: Tensor,
    /// 1 for the tokens of a row, 0 for its padding.
    mask: Tensor,
    types: Tensor,
    /// One class a row; the last row has none.
    classes: Tensor,
}

impl Batch {
    /// `s` tokens; the rows keep all, two thirds, a seventh and one of them.
    fn new(s: usize) -> Self {
        let kept = [s, (2 * s).div_ceil(3), s.div_ceil(7), 1];
        let at = |f: &dyn Fn(usize, usize) -> u32| {
            let numbers: Vec<u32> = (0..4 * s).map(|i| f(i / s, i % s)).collect();
            Tensor::from_vec(numbers, (4, s), &Device::Cpu).unwrap()
        };
        Self {
            tokens: at(&|row, i| (draw(9, (row * s + i) as u64) % 61) as u32),
            mask: at(&|row, i| u32::from(i < kept[row])),
            types: at(&|row, i| u32::from(i > kept[row] / 2)),
            classes: Tensor::new(&[2i64, 0, 1, -100], &Device::Cpu).unwrap(),
        }
    }
}

/// Runs one model twice: `annotated` on the ranks of every mesh, `plain` on one device. Both get tokens, mask and types.
fn same_numbers(
    what: &str,
    s: usize,
    meshes: &[(usize, usize)],
    annotated: impl Fn(VarBuilder, &Tensor, &Tensor, &Tensor) -> Result<Tensor> + Sync,
    plain: impl Fn(VarBuilder, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) {
    let batch = Batch::new(s);
    let Batch {
        tokens,
        mask,
        types,
        classes,
    } = &batch;
    let parameters = Parameters::init(5, DType::F32, &Device::Cpu);
    plain(parameters.builder(), tokens, mask, types).unwrap();
    let start: Tensors = parameters
        .named()
        .into_iter()
        .map(|(name, var)| (name, var.as_detached_tensor()))
        .collect();
    let vars = variables(&start).unwrap();
    let builder = autosp_reference::builder(&vars, DType::F32, &Device::Cpu);
    let logits = plain(builder, tokens, mask, types).unwrap();
    let loss = autosp_reference::cross_entropy(&logits, classes).unwrap();
    let (loss, expected) = gradients(&vars, &loss).unwrap();
    let expected = (f64::from(loss), expected);
    for (i, &(sp, dp)) in meshes.iter().enumerate() {
        let policy = ["all", "input"][i % 2];
        let attention = ["tiled", "reference"][usize::from(i % 3 == 2)];
        let settings = Settings::default().with_sp(sp).with_dp(dp);
        let settings = settings.with("policy", policy).unwrap();
        let settings = settings.with("attention", attention).unwrap();
        let found = autosp::run_with(settings, |sp| {
            let parameters = Parameters::init(5, DType::F32, sp.device());
            let before = sp.ledger().snapshot();
            let rows = sp.shard_rows(tokens, classes)?;
            let (mask, types) = (sp.shard_aligned(mask)?, sp.shard_aligned(types)?);
            let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
                let logits = annotated(parameters.builder(), &rows.tokens, &mask, &types)?;
                let loss = cross_entropy(&logits, &rows.labels)?;
                Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
            })?;
            sp.reduce_gradients(&mut store, &parameters.vars())?;
            let gradients = parameters
                .named()
                .into_iter()
                .map(|(name, var)| (name, store.get(&var).unwrap().detach()))
                .collect();
            Ok(Found {
                loss,
                gradients,
                bytes: sp.ledger().since(before),
            })
        });
        let what = format!("{what}, s {s}, sp {sp} dp {dp}, policy {policy}, {attention}");
        for rank in found.unwrap_or_else(|e| panic!("{what}: {e}")) {
            assert_contract(&what, &rank, &expected);
        }
    }
}

const MESHES: &[(usize, usize)] = &[(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (4, 4)];

macro_rules! encoder_config {
    ($model:ident, $pooling:ident) => {
        $model::Config {
            vocab_size: 61,
            hidden_size: 32,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            intermediate_size: 48,
            max_position_embeddings: 70,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            num_labels: 3,
            pooling: $model::Pooling::$pooling,
        }
    };
}

macro_rules! encoder {
    ($name:ident, $pooling:ident, $types:expr, $lengths:expr) => {
        #[test]
        fn $name() {
            use crate::encoder;
            use autosp_reference::encoder as reference;
            for s in $lengths {
                same_numbers(
                    stringify!($name),
                    s,
                    MESHES,
                    |vb, tokens, mask, types| {
                        let config = encoder_config!(encoder, $pooling);
                        let types = $types.then_some(types);
                        encoder::Classifier::load(vb, &config)?.forward(tokens, mask, types)
                    },
                    |vb, tokens, mask, types| {
                        let config = encoder_config!(reference, $pooling);
                        let types = $types.then_some(types);
                        reference::Classifier::load(vb, &config)?.forward(tokens, mask, types)
                    },
                );
            }
        }
    };
}

encoder!(a_mean_over_the_tokens_of_the_mask, Mean, true, [48, 45]);
encoder!(the_first_token_and_no_types, First, false, [48, 45]);
encoder!(fewer_tokens_than_ranks_are_pooled, Mean, true, [1, 2, 3, 5]);

macro_rules! masked {
    ($($name:ident: $masking:ident, $pooling:ident;)*) => { $(
        #[test]
        fn $name() {
            use crate::masked;
            use autosp_reference::masked as reference;
            macro_rules! config {
                ($model:ident) => {
                    $model::Config {
                        vocab: 61,
                        hidden: 32,
                        heads: 4,
                        layers: 2,
                        classes: 3,
                        masking: $model::Masking::$masking,
                        pooling: $model::Pooling::$pooling,
                        dropout: 0.0,
                    }
                };
            }
            for s in [24, 21] {
                same_numbers(
                    stringify!($name),
                    s,
                    &[(1, 1), (2, 1), (4, 2)],
                    |vb, tokens, mask, _| {
                        masked::Model::load(vb, &config!(masked))?.forward(tokens, Some(mask))
                    },
                    |vb, tokens, mask, _| {
                        reference::Model::load(vb, &config!(reference))?.forward(tokens, Some(mask))
                    },
                );
            }
        }
    )* };
}

masked! {
    scores_that_are_filled_and_a_sum_that_is_kept: Fill, KeptSum;
    a_mask_that_a_helper_expands_and_a_plain_mean: Expanded, PlainMean;
    a_rule_beside_a_mask_and_a_narrowed_token: Causal, Narrowed;
    a_mask_that_is_subtracted_and_tokens_about_their_mean: Subtracted, Centred;
}

/// What enters beside the tokens has to be their shard.
#[test]
fn a_mask_that_was_not_sharded_is_refused() {
    let batch = Batch::new(8);
    let failed = autosp::run_with(Settings::default().with_sp(2), |sp| {
        let parameters = Parameters::init(5, DType::F32, sp.device());
        let rows = sp.shard_rows(&batch.tokens, &batch.classes)?;
        let config = encoder_config!(crate_encoder, Mean);
        let model = crate_encoder::Classifier::load(parameters.builder(), &config)?;
        sp.scope(|| {
            Ok(model
                .forward(&rows.tokens, &batch.mask, None)?
                .dims()
                .to_vec())
        })
    });
    assert_eq!(failed.unwrap_err().code().id, "AS0303");
}

use crate::encoder as crate_encoder;

/// Loss and gradients of a model that drops tokens' features and features of the pooled rows.
fn with_dropout(batch: &Batch, sp: usize, dp: usize, policy: &str) -> Found {
    use crate::masked;
    let config = masked::Config {
        vocab: 61,
        hidden: 32,
        heads: 4,
        layers: 2,
        classes: 3,
        masking: masked::Masking::Fill,
        pooling: masked::Pooling::KeptSum,
        dropout: 0.3,
    };
    let settings = Settings::default().with_sp(sp).with_dp(dp);
    let settings = settings.with("policy", policy).unwrap();
    let mut found = autosp::run_with(settings, |sp| {
        sp.set_seed(3);
        let parameters = Parameters::init(5, DType::F32, sp.device());
        let before = sp.ledger().snapshot();
        let rows = sp.shard_rows(&batch.tokens, &batch.classes)?;
        let mask = sp.shard_aligned(&batch.mask)?;
        let model = masked::Model::load(parameters.builder(), &config)?;
        let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
            let loss = cross_entropy(&model.forward(&rows.tokens, Some(&mask))?, &rows.labels)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
        })?;
        sp.reduce_gradients(&mut store, &parameters.vars())?;
        let named = parameters.named().into_iter();
        Ok(Found {
            loss,
            gradients: named
                .map(|(name, var)| (name, store.get(&var).unwrap().detach()))
                .collect(),
            bytes: sp.ledger().since(before),
        })
    });
    found.as_mut().unwrap().remove(0)
}

/// Contract 4: dropout is drawn by counter, identical in recomputation and for every mesh.
#[test]
fn dropout_drops_the_same_on_every_mesh_and_when_a_block_is_computed_again() {
    for s in [24, 21] {
        let batch = Batch::new(s);
        let one = with_dropout(&batch, 1, 1, "all");
        let expected = (one.loss, one.gradients);
        for (sp, dp) in [(1, 1), (2, 1), (4, 1), (1, 2), (4, 2)] {
            for policy in ["all", "input"] {
                let found = with_dropout(&batch, sp, dp, policy);
                assert_contract(
                    &format!("dropout, s {s}, sp {sp} dp {dp}, {policy}"),
                    &found,
                    &expected,
                );
            }
        }
    }
}
