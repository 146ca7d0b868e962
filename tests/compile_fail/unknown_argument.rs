//! An argument that does not exist.

#[autosp::sequence_parallel(plna = "autosp.toml")]
mod model {}

fn main() {}
