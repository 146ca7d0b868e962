//! candle-transformers' Llama and Qwen2 under the attribute, against what Hugging Face transformers computed: losses, every
//! gradient norm, and five steps of both optimizers, on one rank and on four, which do not divide S = 90.

use autosp::{Decay, Optimizer, Parameters, Schedule, Settings, Sp, TrainSettings, Trainer};
use autosp_reference::{global_norm, labels, Golden, Norms, Tensors};
use autosp_zoo::{config, with};
use candle::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde_json::{json, Value};

autosp_zoo::models!["llama", "qwen2"];

/// A model that stays from step to step: tokens and labels of a shard to the loss.
type Model = Box<dyn FnMut(&Tensor, &Tensor) -> Result<Tensor>>;

fn llama(json: &Value, vb: VarBuilder) -> Result<Model> {
    let config = config::<models::llama::LlamaConfig>(json)?.into_config(false);
    let device = vb.device().clone();
    let model = models::llama::Llama::load(vb, &config)?;
    Ok(Box::new(move |tokens, labels| {
        let mut cache = models::llama::Cache::new(false, DType::F32, &config, &device)?;
        model.forward_loss(tokens, 0, &mut cache, labels)
    }))
}

fn qwen2(json: &Value, vb: VarBuilder) -> Result<Model> {
    // The file's config has numbers where Hugging Face's has null.
    let json = with(
        json.clone(),
        json!({"sliding_window": 4096, "rope_theta": json["rope_parameters"]["rope_theta"]}),
    );
    let mut model = models::qwen2::ModelForCausalLM::new(&config(&json)?, vb)?;
    Ok(Box::new(move |tokens, labels| {
        model.forward_loss(tokens, 0, labels)
    }))
}

fn near(what: &str, found: f64, expected: f64) {
    assert!(
        (found - expected).abs() <= 1e-5 * expected.abs(),
        "{what}: expected {expected}, found {found}"
    );
}

/// The golden parameters, and the model on them.
fn load(
    name: &str,
    golden: &Golden,
    make: fn(&Value, VarBuilder) -> Result<Model>,
    sp: &Sp,
) -> autosp::Result<(Parameters, Model)> {
    let file = format!(
        "{}/../golden/{name}/model.safetensors",
        env!("CARGO_MANIFEST_DIR")
    );
    let parameters = autosp::load_trainable(&[file], DType::F32, sp.device())?;
    let model = make(&golden.config, parameters.builder())?;
    Ok((parameters, model))
}

fn losses_and_gradient_norms(name: &str, make: fn(&Value, VarBuilder) -> Result<Model>) {
    let golden = Golden::load(name).unwrap();
    for case in golden.cases() {
        for ranks in [1, 4] {
            autosp::run_with(Settings::default().with_sp(ranks), |sp| {
                let (parameters, mut model) = load(name, &golden, make, sp)?;
                let batch = sp.shard_targets(
                    &golden.batches[0],
                    &labels(&golden.batches[0], case.ignore)?,
                )?;
                let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
                    let loss = model(&batch.tokens, &batch.labels)?;
                    Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
                })?;
                sp.reduce_gradients(&mut store, &parameters.vars())?;
                let gradients: Tensors = parameters
                    .named()
                    .into_iter()
                    .map(|(name, var)| (name, store.get(&var).unwrap().detach()))
                    .collect();
                let what = |part: &str| {
                    format!("{name}: {part} on {ranks} ranks, {} ignored", case.ignore)
                };
                near(&what("loss"), loss, case.loss);
                near(
                    &what("gradient norm"),
                    global_norm(&gradients)?,
                    case.grad_norm,
                );
                assert_eq!(gradients.len(), case.grad_norms.len());
                for (part, gradient) in gradients {
                    let norm = global_norm(&Tensors::from([(part.clone(), gradient)]))?;
                    // The key bias has no effect on a softmax; what is left of its gradient is rounding.
                    let floor = 1e-7 * case.grad_norm;
                    let expected = case.grad_norms[&part];
                    assert!(
                        (norm - expected).abs() <= 1e-5 * expected + floor,
                        "{}: expected {expected}, found {norm}",
                        what(&part)
                    );
                }
                Ok(())
            })
            .unwrap();
        }
    }
}

fn five_steps(
    name: &str,
    make: fn(&Value, VarBuilder) -> Result<Model>,
    expected: impl Fn(&Golden) -> Vec<Norms>,
    settings: impl Fn() -> TrainSettings + Sync,
) {
    let golden = Golden::load(name).unwrap();
    let expected = expected(&golden);
    assert_eq!(expected.len(), 5);
    autosp::run_with(Settings::default().with_sp(4), |sp| {
        let (parameters, mut model) = load(name, &golden, make, sp)?;
        let mut trainer = Trainer::new(sp, parameters, settings())?;
        for (tokens, expected) in golden.batches.iter().zip(&expected) {
            let batch = sp.shard_targets(tokens, &labels(tokens, 0)?)?;
            let step = trainer.step(|| model(&batch.tokens, &batch.labels))?;
            let what = |part: &str| format!("{name}: {part} of step {}", step.step);
            near(&what("loss"), step.loss, expected.loss);
            near(&what("gradient norm"), step.grad_norm, expected.grad_norm);
        }
        Ok(())
    })
    .unwrap();
}

fn sgd() -> TrainSettings {
    TrainSettings {
        optimizer: Optimizer::sgd(),
        schedule: Schedule::constant(0.1),
        clip: Some(1.0),
        ..TrainSettings::default()
    }
}

fn adamw() -> TrainSettings {
    TrainSettings {
        optimizer: Optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        },
        schedule: Schedule::constant(1e-3),
        decay: Decay::All,
        ..sgd()
    }
}

#[test]
fn llama_as_hugging_face() {
    losses_and_gradient_norms("llama-tiny", llama);
    five_steps("llama-tiny", llama, Golden::sgd, sgd);
    five_steps("llama-tiny", llama, Golden::adamw, adamw);
}

#[test]
fn qwen2_as_hugging_face() {
    losses_and_gradient_norms("qwen2-tiny", qwen2);
    five_steps("qwen2-tiny", qwen2, Golden::sgd, sgd);
    five_steps("qwen2-tiny", qwen2, Golden::adamw, adamw);
}
