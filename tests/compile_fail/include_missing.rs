//! A model in a file that is not there.

#[autosp::sequence_parallel]
mod model {
    include!("nowhere/model.rs");
}

fn main() {}
