//! Operations that draw numbers.

use super::*;

#[test]
fn random_operations_differ_from_rank_to_rank() {
    for path in ["candle_nn::ops::dropout", "candle_nn::Dropout::forward"] {
        let case = nn_op(path, 5).expect("an operation");
        let (a, b) = (
            (case.run)(&case.inputs).expect("a draw"),
            (case.run)(&case.inputs).expect("a draw"),
        );
        assert_ne!(
            bits(&a).expect("numbers"),
            bits(&b).expect("numbers"),
            "{path}"
        );
    }
    let x = random(1, &[64]);
    for draw in [
        |x: &Tensor| x.rand_like(0.0, 1.0),
        |x: &Tensor| x.randn_like(0.0, 1.0),
    ] {
        assert_ne!(
            bits(&draw(&x).expect("a draw")).expect("numbers"),
            bits(&draw(&x).expect("a draw")).expect("numbers")
        );
    }
    let d = &Device::Cpu;
    assert_ne!(
        bits(&Tensor::rand(0f32, 1.0, 64, d).expect("a draw")).expect("numbers"),
        bits(&Tensor::rand(0f32, 1.0, 64, d).expect("a draw")).expect("numbers")
    );
    assert_ne!(
        bits(&Tensor::randn(0f32, 1.0, 64, d).expect("a draw")).expect("numbers"),
        bits(&Tensor::randn(0f32, 1.0, 64, d).expect("a draw")).expect("numbers")
    );
}
