//! Each of our kernels against its floor and its twin, on a GPU: `cargo bench --features cuda --bench kernels`.
//!
//! One line of JSON for each kernel: size, time, bytes that it has to move a second, and which share that is of a device copy of as
//! many bytes, which is what memory gives. One line for each operation: the distance of its result and gradients from its twin on the
//! CPU in f64, and that of the twin in the same type; more than twice that ends the program with an error.

#![allow(clippy::print_stdout, clippy::print_stderr)]

#[cfg(feature = "cuda")]
mod measure;

fn main() -> std::process::ExitCode {
    #[cfg(feature = "cuda")]
    return measure::run();
    #[cfg(not(feature = "cuda"))]
    {
        println!("no kernels without a GPU: cargo bench --features cuda --bench kernels");
        std::process::ExitCode::SUCCESS
    }
}
