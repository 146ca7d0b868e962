//! The attribute on a function.

#[autosp::sequence_parallel]
fn forward(x: &candle_core::Tensor) -> candle_core::Tensor {
    x.clone()
}

fn main() {}
