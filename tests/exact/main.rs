//! The contract: training on ranks has the numbers of one device that runs the unannotated model on candle's slow operations.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod anybody;
mod encoders;
mod faults;
mod finite_differences;
mod frozen;
mod golden;
mod job;
mod leaks;
mod loops;
mod losses;
mod matrix;
mod models;
mod packed;
mod predicted;
mod repeat;
mod resume;
mod trained;
mod training;

/// The example Llama with the attribute; `autosp_reference::llama` is the same file without.
#[autosp::sequence_parallel(loss)]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod llama {
    include!("../../examples/models/llama.rs");
}

/// The example GPT-2 with the attribute.
#[autosp::sequence_parallel(loss)]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod gpt2 {
    include!("../../examples/models/gpt2.rs");
}

/// The example encoder with the attribute.
#[autosp::sequence_parallel]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod encoder {
    include!("../../examples/models/encoder.rs");
}

/// Edits of the encoder: other masks and other ways to pool, with the attribute.
#[autosp::sequence_parallel]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod masked {
    include!("../models/masked.rs");
}

/// A decoder with a window, a soft cap and interleaved heads, with the attribute.
#[autosp::sequence_parallel(loss)]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod window {
    include!("../models/window.rs");
}

/// A decoder that keeps attention within a document, with the attribute.
#[autosp::sequence_parallel]
#[allow(dead_code, missing_docs, clippy::pedantic)]
pub mod documents {
    include!("../models/packed.rs");
}
