//! Expands the example Llama, once as it is emitted and twice with the schedule edited as a person would edit it.

use std::path::Path;

const LOOP: &str = "                if g + 1 < io.groups() {
                    io.send_qkv(g + 1)?;
                }
                io.wait_qkv(g)?;
                io.attend(g)?;
                io.send_out(g)?;
";

/// The next exchange begins when this group is done.
const SERIAL: &str = "                io.wait_qkv(g)?;
                io.attend(g)?;
                io.send_out(g)?;
                if g + 1 < io.groups() {
                    io.send_qkv(g + 1)?;
                }
";

fn main() {
    let model = "../../examples/models/llama.rs";
    println!("cargo::rerun-if-changed={model}");
    let source = std::fs::read_to_string(model).expect("the example model");
    let file = autosp_compiler::expand(&source)
        .expect("Rust")
        .expect("no refusal");
    let emitted = prettyplease::unparse(&file);
    assert_eq!(
        emitted.matches(LOOP).count(),
        1,
        "the loop over head groups"
    );
    let serial = emitted.replace(LOOP, SERIAL);
    let broken = emitted.replace(
        LOOP,
        &LOOP.replace("                io.wait_qkv(g)?;\n", ""),
    );
    let out = std::env::var("OUT_DIR").expect("OUT_DIR");
    for (name, text) in [("emitted", emitted), ("serial", serial), ("broken", broken)] {
        std::fs::write(Path::new(&out).join(name).with_extension("rs"), text)
            .expect("a file in OUT_DIR");
    }
}
