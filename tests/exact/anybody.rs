//! The test that users write: `autosp::testing` on the annotated Llama, and on one that ranks compute wrongly.

use autosp::testing::{Cases, assert_equivalent, equivalence, equivalence_to};
use autosp_plan::settings::Policy;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::{
    job::{plain, tiny},
    llama,
};

fn annotated(vb: VarBuilder, tokens: &Tensor) -> Result<Tensor> {
    let config = tiny(2);
    let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
    llama::Llama::load(vb, &config)?.forward(tokens, 0, &mut cache)
}

/// The same model without the attribute: on several ranks, each attends within its own shard.
fn unannotated(vb: VarBuilder, tokens: &Tensor) -> Result<Tensor> {
    use autosp_reference::llama as reference;
    let config = plain(&tiny(2));
    let mut cache = reference::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
    reference::Llama::load(vb, &config)?.forward(tokens, 0, &mut cache)
}

fn cases() -> Cases {
    Cases {
        groups: vec![1, 2],
        policies: Policy::ALL.to_vec(),
        vocabulary: 40,
        ..Cases::default()
    }
}

#[test]
fn the_annotated_model_is_equivalent() {
    assert_equivalent(&cases(), annotated);
    equivalence_to(unannotated, &cases(), annotated)
        .and_then(|report| report.check())
        .unwrap();
}

#[test]
fn a_model_without_the_attribute_is_not() {
    let error = equivalence(&cases(), unannotated)
        .and_then(|report| report.check())
        .err()
        .unwrap();
    let text = error.to_string();
    assert_eq!(error.code(), autosp::codes::NOT_EQUIVALENT, "{text}");
    assert!(text.contains("model.layers.0"), "{text}");
}
