//! A test that anybody can write for a model of theirs: the same loss and the same gradients on one rank and on many.
//!
//! `cargo test --example equivalence_test`

/// GPT-2 as its users write it.
#[autosp::sequence_parallel]
#[allow(missing_docs, dead_code, clippy::pedantic)]
mod gpt2 {
    include!("models/gpt2.rs");
}

fn main() {}

#[test]
fn my_model_is_the_same_on_any_number_of_ranks() {
    use autosp::testing::{Cases, assert_equivalent};

    let config = gpt2::Config {
        vocab_size: 64,
        n_positions: 32,
        n_embd: 32,
        n_layer: 2,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
    };
    let cases = Cases {
        dp: vec![1, 2],
        groups: vec![1, 2],
        vocabulary: 64,
        ..Cases::default()
    };
    assert_equivalent(&cases, |vb, tokens| {
        gpt2::Gpt2::load(vb, &config)?.forward(tokens)
    });
}
