//! A refusal in an included file names the file, the line and the column.

#[autosp::sequence_parallel]
mod model {
    include!("models/cumsum.rs");
}

fn main() {}
