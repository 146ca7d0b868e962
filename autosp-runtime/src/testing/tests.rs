use candle_nn::Module;

use super::*;
use crate::ops;
use crate::rt::checkpoint;

#[allow(
    clippy::needless_pass_by_value,
    reason = "a model takes its builder by value"
)]
/// Embedding, learned positions, a checkpointed block with a norm, a head: no attention.
fn model(vb: VarBuilder, tokens: &Tensor) -> candle_core::Result<Tensor> {
    crate::rt::enter("model", &[("tokens", tokens, 1)])?;
    let vb = &vb;
    let x = candle_nn::embedding(16, 8, vb.pp("embed"))?.forward(tokens)?;
    let positions = vb.get_with_hints(
        (32, 8),
        "positions",
        candle_nn::Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        },
    )?;
    let positions = if crate::rt::sharded() {
        ops::slice(&positions, 0)?
    } else {
        positions.narrow(0, 0, tokens.dim(1)?)?
    };
    let x = x.broadcast_add(&positions)?;
    let norm = candle_nn::rms_norm(8, 1e-5, vb.pp("norm"))?;
    let inner = candle_nn::linear(8, 8, vb.pp("inner"))?;
    let x = checkpoint(&x, move |x| {
        ops::rms_norm(&norm, x)?.apply(&inner)?.silu()? + x
    })?;
    candle_nn::linear_no_bias(8, 16, vb.pp("head"))?.forward(&x)
}

fn cases() -> Cases {
    Cases {
        vocabulary: 16,
        seq_len: 9,
        ..Cases::default()
    }
}

#[test]
fn a_model_without_exchanges_is_equivalent_everywhere() {
    let cases = Cases {
        sp: vec![1, 2, 4],
        dp: vec![1, 2],
        policies: Policy::ALL.to_vec(),
        targets: |row, position| row == 0 && position > 6 || position == 1,
        ..cases()
    };
    let report = equivalence(&cases, model).unwrap();
    assert_eq!(report.runs.len(), 3 * 2 * Policy::ALL.len());
    assert_equivalent(&cases, model);
    assert_eq!(report.runs[0].gradients.len(), 6);
}

#[test]
fn one_rank_is_equivalent_to_a_reference_outside_a_scope() {
    let slow = |vb: VarBuilder, tokens: &Tensor| -> candle_core::Result<Tensor> {
        let x = candle_nn::embedding(16, 8, vb.pp("embed"))?.forward(tokens)?;
        let positions = vb.get_with_hints(
            (32, 8),
            "positions",
            candle_nn::Init::Randn {
                mean: 0.0,
                stdev: 1.0,
            },
        )?;
        let x = x.broadcast_add(&positions.narrow(0, 0, tokens.dim(1)?)?)?;
        let norm = candle_nn::rms_norm(8, 1e-5, vb.pp("norm"))?;
        let inner = candle_nn::linear(8, 8, vb.pp("inner"))?;
        let y = norm.forward_diff(&x)?.apply(&inner)?.silu()?;
        candle_nn::linear_no_bias(8, 16, vb.pp("head"))?.forward(&(y + x)?)
    };
    equivalence_to(slow, &cases(), model)
        .unwrap()
        .check()
        .unwrap();
    let other = |vb: VarBuilder, tokens: &Tensor| {
        candle_nn::embedding(16, 16, vb.pp("embed"))?.forward(tokens)
    };
    let error = equivalence_to(other, &cases(), model).unwrap_err();
    assert_eq!(error.code(), codes::NOT_EQUIVALENT);
}

#[test]
fn a_model_that_mixes_tokens_is_found_out_with_name_and_place() {
    let mixing = |vb: VarBuilder, tokens: &Tensor| {
        let x = candle_nn::embedding(16, 8, vb.pp("embed"))?.forward(tokens)?;
        let x = x.broadcast_add(&x.mean_keepdim(1)?)?;
        candle_nn::linear_no_bias(8, 16, vb.pp("head"))?.forward(&x)
    };
    let error = equivalence(&cases(), mixing).unwrap().check().unwrap_err();
    assert_eq!(error.code(), codes::NOT_EQUIVALENT);
    for part in [
        "sp 2, dp 1",
        "the gradient of `",
        "most at [",
        "2 of 2 gradients differ",
    ] {
        assert!(error.message().contains(part), "{error}");
    }
    let report = std::panic::catch_unwind(|| assert_equivalent(&cases(), mixing)).unwrap_err();
    assert!(report.downcast_ref::<String>().unwrap().contains("AS0517"));
}

#[test]
fn a_gradient_that_is_lost_is_found_out() {
    let lossy = |vb: VarBuilder, tokens: &Tensor| {
        let x = candle_nn::embedding(16, 8, vb.pp("embed"))?.forward(tokens)?;
        let x = candle_nn::rms_norm(8, 1e-5, vb.pp("norm"))?.forward(&x)?;
        candle_nn::linear_no_bias(8, 16, vb.pp("head"))?.forward(&x)
    };
    let error = equivalence(&cases(), lossy).unwrap_err();
    assert_eq!(error.code(), codes::NO_GRADIENT);
    assert!(
        error.message().contains("`embed.weight`, `norm.weight`"),
        "{error}"
    );
}

#[test]
fn a_gradient_that_is_wrong_is_found_out_by_finite_differences() {
    for dtype in [DType::F64, DType::F32] {
        let cases = Cases { dtype, ..cases() };
        assert_gradients(&cases, 4, model);
        let wrong = |vb: VarBuilder, tokens: &Tensor| {
            let x = candle_nn::embedding(16, 8, vb.pp("embed"))?.forward(tokens)?;
            // The value of x, with the gradient of 1.1 x.
            let x = ((&x * 1.1)? - (x.detach() * 0.1)?)?;
            candle_nn::linear_no_bias(8, 16, vb.pp("head"))?.forward(&x)
        };
        let samples = finite_differences(&cases, 4, wrong).unwrap();
        assert!(
            samples
                .iter()
                .filter(|s| s.name == "embed.weight" && s.difference != 0.0)
                .any(|s| !s.is_close())
        );
        assert!(
            samples
                .iter()
                .filter(|s| s.name == "head.weight")
                .all(Sample::is_close)
        );
    }
}

#[test]
fn places_are_counted_row_by_row() {
    assert_eq!(report::unravel(17, &[2, 3, 4]), [1, 1, 1]);
    assert_eq!(report::unravel(0, &[]), [0usize; 0]);
}
