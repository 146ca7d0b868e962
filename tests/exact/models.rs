//! Other models than the Llama, on meshes, against the same files on candle's slow operations.

use autosp::{Parameters, Settings, loss::cross_entropy};
use autosp_reference::{Tensors, gradients, variables};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::job::{Found, Job, assert_contract, tiny};

/// Runs one model twice: `annotated` on the ranks of every mesh, `plain` on one device.
fn same_numbers(
    what: &str,
    s: usize,
    annotated: impl Fn(VarBuilder, &Tensor) -> Result<Tensor> + Sync,
    plain: impl Fn(VarBuilder, &Tensor) -> Result<Tensor>,
) {
    let loss = |vb: VarBuilder, tokens: &Tensor, labels: &Tensor| {
        cross_entropy(&annotated(vb, tokens)?, labels)
    };
    same_losses(what, s, loss, plain);
}

/// The same for an annotated model that gives its loss.
fn same_losses(
    what: &str,
    s: usize,
    annotated: impl Fn(VarBuilder, &Tensor, &Tensor) -> Result<Tensor> + Sync,
    plain: impl Fn(VarBuilder, &Tensor) -> Result<Tensor>,
) {
    // Tokens and labels of the Llama's jobs; every third position has no target.
    let job = Job::random(tiny(2), 2, s, 11, |position| position % 3 != 0);
    let parameters = Parameters::init(5, DType::F32, &Device::Cpu);
    plain(parameters.builder(), &job.tokens).unwrap();
    let start: Tensors = parameters
        .named()
        .into_iter()
        .map(|(name, var)| (name, var.as_detached_tensor()))
        .collect();
    let vars = variables(&start).unwrap();
    let logits = plain(
        autosp_reference::builder(&vars, DType::F32, &Device::Cpu),
        &job.tokens,
    )
    .unwrap();
    let loss = autosp_reference::cross_entropy(&logits, &job.labels).unwrap();
    let (loss, expected) = gradients(&vars, &loss).unwrap();
    let expected = (f64::from(loss), expected);
    for (sp, dp, groups) in [(1, 1, 1), (2, 1, 2), (4, 1, 2), (2, 2, 3), (4, 2, 1)] {
        let settings = Settings::default()
            .with_sp(sp)
            .with_dp(dp)
            .with_groups(groups)
            .with_loss_bytes(3000);
        let found = autosp::run_with(settings, |sp| {
            let parameters = Parameters::init(5, DType::F32, sp.device());
            let before = sp.ledger().snapshot();
            let batch = sp.shard_targets(&job.tokens, &job.labels)?;
            // Variables come to be with the first call, and the graph has to begin at them.
            let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
                let loss = annotated(parameters.builder(), &batch.tokens, &batch.labels)?;
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
        for rank in found.unwrap() {
            assert_contract(
                &format!("{what}, s {s}, sp {sp} dp {dp} groups {groups}"),
                &rank,
                &expected,
            );
        }
    }
}

macro_rules! gpt2_config {
    ($model:ident) => {
        $model::Config {
            vocab_size: 97,
            n_positions: 80,
            n_embd: 48,
            n_layer: 2,
            n_head: 8,
            layer_norm_epsilon: 1e-5,
        }
    };
}

#[test]
fn gpt_2() {
    use crate::gpt2;
    use autosp_reference::gpt2 as reference;
    for s in [48, 45] {
        same_numbers(
            "gpt-2",
            s,
            |vb, tokens| gpt2::Gpt2::load(vb, &gpt2_config!(gpt2))?.forward(tokens),
            |vb, tokens| reference::Gpt2::load(vb, &gpt2_config!(reference))?.forward(tokens),
        );
    }
}

macro_rules! window_config {
    ($model:ident, $window:expr) => {
        $model::Config {
            vocab: 97,
            hidden: 48,
            layers: 2,
            heads: 8,
            kv_heads: 2,
            key_width: 6,
            value_width: 10,
            window: $window,
            cap: 3.0,
        }
    };
}

#[test]
fn a_window_a_soft_cap_and_interleaved_heads() {
    use crate::window;
    use autosp_reference::window as reference;
    // A window inside one shard, across shards, and wider than the sequence.
    for (s, width) in [(48, 5), (45, 20), (45, 100)] {
        same_numbers(
            &format!("window {width}"),
            s,
            |vb, tokens| window::Model::load(vb, &window_config!(window, width))?.forward(tokens),
            |vb, tokens| {
                reference::Model::load(vb, &window_config!(reference, width))?.forward(tokens)
            },
        );
    }
}

/// Logits through the token embedding, whose gradient is the sum of both uses; and a head with a bias.
#[test]
fn losses_without_logits() {
    use crate::window;
    use autosp_reference::window as reference;
    {
        use crate::gpt2;
        use autosp_reference::gpt2 as reference;
        same_losses(
            "gpt-2",
            45,
            |vb, tokens, labels| {
                gpt2::Gpt2::load(vb, &gpt2_config!(gpt2))?.forward_loss(tokens, labels)
            },
            |vb, tokens| reference::Gpt2::load(vb, &gpt2_config!(reference))?.forward(tokens),
        );
    }
    same_losses(
        "window",
        48,
        |vb, tokens, labels| {
            window::Model::load(vb, &window_config!(window, 5))?.forward_loss(tokens, labels)
        },
        |vb, tokens| reference::Model::load(vb, &window_config!(reference, 5))?.forward(tokens),
    );
}
