//! Frozen variables: the others have the gradients that they would have, and the frozen ones cost nothing.

use autosp::Settings;
use autosp::loss::cross_entropy;
use autosp_plan::settings::Policy;
use autosp_reference::Tensors;
use candle_core::DType;

use crate::job::{Job, tiny};
use crate::llama;

/// What is trained, as an adapter would be: one projection of each block, in the middle of what is frozen.
fn trained(name: &str) -> bool {
    name.contains("v_proj")
}

#[test]
fn frozen_weights_cost_no_gradient_and_change_no_other() {
    let job = Job::random(tiny(2), 2, 45, 3, |_| true);
    let all = job.expected();
    let expected: Tensors = all
        .1
        .into_iter()
        .filter(|(name, _)| trained(name))
        .collect();
    for policy in [Policy::All, Policy::Attention] {
        let settings = Settings::default().with_sp(2).with_policy(policy);
        autosp::run_with(settings, |sp| {
            let parameters = job.parameters(sp.device())?.freeze(|name| !trained(name));
            let model = llama::Llama::load(parameters.builder(), &job.config)?;
            let batch = sp.shard_targets(&job.tokens, &job.labels)?;
            let mut store = sp.scope(|| -> autosp::Result<_> {
                let mut cache = llama::Cache::new(false, DType::F32, &job.config, sp.device())?;
                let logits = model.forward(&batch.tokens, 0, &mut cache)?;
                Ok(cross_entropy(&logits, &batch.labels)?.backward()?)
            })?;
            // candle's store is left with what it has for leaves, constants included: with activations before the first trained
            // variable, and with nothing of the shape of a weight.
            let shapes: Vec<Vec<usize>> = parameters
                .all()
                .iter()
                .map(|(_, var)| var.dims().to_vec())
                .collect();
            let weights = store
                .get_ids()
                .filter_map(|id| store.get_id(*id))
                .filter(|gradient| shapes.iter().any(|shape| shape == gradient.dims()))
                .count();
            // Gradients of variables in a block are not in candle's store.
            assert_eq!(weights, 0);
            let vars = parameters.vars();
            sp.reduce_gradients(&mut store, &vars)?;
            assert_eq!(vars.len(), expected.len());
            for (name, var) in parameters.named() {
                let (found, expected) = (store.get(&var).unwrap(), &expected[&name]);
                let norm = |x: &candle_core::Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
                let (apart, size) = (norm(&(found.detach() - expected)?)?, norm(expected)?);
                assert!(
                    apart.sqrt() <= 1e-5 * size.sqrt(),
                    "{name}: {apart} of {size}"
                );
            }
            Ok(())
        })
        .unwrap();
    }
}
