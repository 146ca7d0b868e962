//! The reference itself is checked against Hugging Face transformers: loss, every gradient norm, and five steps of two
//! optimizers.
#![allow(clippy::unwrap_used)]

use autosp_reference::{
    Adam, Golden, Norms, Tensors, Variables, clip, global_norm, labels, llama, llama_config,
    llama_step, sgd, variables,
};
use candle_core::{DType, Tensor};

fn near(what: &str, found: f64, expected: f64) {
    assert!(
        (found - expected).abs() <= 1e-5 * expected.abs(),
        "{what}: expected {expected}, found {found}"
    );
}

#[test]
fn losses_and_gradient_norms() {
    let golden = Golden::load("llama-tiny").unwrap();
    let config = llama_config!(llama, &golden.config);
    let parameters = variables(&golden.parameters).unwrap();
    for case in golden.cases() {
        let labels = labels(&golden.batches[0], case.ignore).unwrap();
        let (loss, gradients) = llama_step(
            &parameters,
            &config,
            &golden.batches[0],
            &labels,
            DType::F32,
        )
        .unwrap();
        near("loss", f64::from(loss), case.loss);
        near(
            "grad norm",
            global_norm(&gradients).unwrap(),
            case.grad_norm,
        );
        assert_eq!(gradients.len(), case.grad_norms.len());
        for (name, gradient) in gradients {
            let norm = global_norm(&Tensors::from([(name.clone(), gradient)])).unwrap();
            near(&name, norm, case.grad_norms[&name]);
        }
    }
}

fn five_steps(golden: &Golden, expected: &[Norms], mut update: impl FnMut(&Variables, &Tensors)) {
    let config = llama_config!(llama, &golden.config);
    let parameters = variables(&golden.parameters).unwrap();
    assert_eq!(expected.len(), 5);
    for (step, (tokens, expected)) in golden.batches.iter().zip(expected).enumerate() {
        let labels: Tensor = labels(tokens, 0).unwrap();
        let (loss, mut gradients) =
            llama_step(&parameters, &config, tokens, &labels, DType::F32).unwrap();
        let norm = clip(&mut gradients, 1.0).unwrap();
        near(
            &format!("loss of step {step}"),
            f64::from(loss),
            expected.loss,
        );
        near(
            &format!("grad norm of step {step}"),
            norm,
            expected.grad_norm,
        );
        update(&parameters, &gradients);
    }
}

#[test]
fn five_steps_of_sgd() {
    let golden = Golden::load("llama-tiny").unwrap();
    five_steps(&golden, &golden.sgd(), |variables, gradients| {
        sgd(variables, gradients, 0.1).unwrap();
    });
}

#[test]
fn five_steps_of_adamw() {
    let golden = Golden::load("llama-tiny").unwrap();
    let mut adam = Adam::new(1e-3, (0.9, 0.95), 1e-8, 0.1);
    five_steps(&golden, &golden.adamw(), |variables, gradients| {
        adam.step(variables, gradients).unwrap();
    });
}
