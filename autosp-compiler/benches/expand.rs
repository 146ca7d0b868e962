//! How long the attribute takes on the example Llama: `cargo bench -p autosp-compiler`.

use criterion::{Criterion, criterion_group, criterion_main};

fn expand(c: &mut Criterion) {
    let source = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/models/llama.rs"
    ))
    .expect("the example model");
    c.bench_function("analyse llama", |b| {
        b.iter(|| autosp_compiler::analyse(&source));
    });
    c.bench_function("expand llama", |b| {
        b.iter(|| autosp_compiler::expand(&source));
    });
}

criterion_group!(benches, expand);
criterion_main!(benches);
