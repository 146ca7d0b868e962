//! An included file beside other items.

#[autosp::sequence_parallel]
mod model {
    pub const LAYERS: usize = 2;
    include!("models/cumsum.rs");
}

fn main() {}
