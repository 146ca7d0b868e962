//! Compiles every module of kernels for the processor: the same text, with a header that stands for CUDA.

use std::fmt::Write as _;
use std::path::PathBuf;

/// The instructions of the kernels that only a GPU has, and what the header has for them.
const INSTRUCTIONS: [(&str, &str); 3] = [
    (
        r#"asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));"#,
        "y = host::to_bf16(x);",
    ),
    (
        r#"asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));"#,
        "y = host::to_f16(x);",
    ),
    (
        r#"asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));"#,
        "y = host::from_f16(x);",
    ),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/host.h");
    println!("cargo::rustc-check-cfg=cfg(no_compiler)");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut table = String::new();
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(1)
        .include("src");
    // Whatever is out of alignment or bounds ends the test: a GPU would end the program.
    if build
        .is_flag_supported("-fsanitize-undefined-trap-on-error")
        .unwrap_or(false)
    {
        build
            .flag("-fsanitize=alignment,bounds,shift,signed-integer-overflow,null")
            .flag("-fsanitize-undefined-trap-on-error");
    }
    for (name, source) in autosp_templates::kernels::all() {
        let symbol = name.replace('-', "_");
        let path = out.join(format!("{symbol}.cpp"));
        std::fs::write(&path, translate(&symbol, &source)?)?;
        build.file(path);
        writeln!(table, "{symbol} {name:?}")?;
    }
    std::fs::write(out.join("modules.rs"), format!("modules! {{\n{table}}}\n"))?;
    if let Err(error) = build.try_compile("kernels") {
        // A machine with Rust alone may have none; one that has any must compile them.
        if build.try_get_compiler().is_ok_and(|compiler| {
            std::process::Command::new(compiler.path())
                .arg("--version")
                .output()
                .is_ok()
        }) {
            return Err(error.into());
        }
        println!("cargo::warning=no C++ compiler: the kernels are not run on the processor");
        println!("cargo::rustc-cfg=no_compiler");
    }
    Ok(())
}

/// The module's text in a namespace of its own, and a function that launches its kernels by name.
fn translate(symbol: &str, source: &str) -> Result<String, Box<dyn std::error::Error>> {
    const KERNEL: &str = "extern \"C\" __global__ void ";
    let names: Vec<&str> = source
        .split(KERNEL)
        .skip(1)
        .filter_map(|rest| rest.split('(').next())
        .collect();
    let mut text = source.replace(KERNEL, "static void ");
    for (instruction, call) in INSTRUCTIONS {
        text = text.replace(instruction, call);
    }
    if text.contains("asm") || text.contains("__global__") || names.is_empty() {
        return Err(format!("{symbol}: an instruction that the header has nothing for").into());
    }
    let mut all = format!("#include \"host.h\"\nnamespace {symbol}_kernels {{\n{text}\n}}\n");
    writeln!(
        all,
        "extern \"C\" int {symbol}(const char* name, unsigned blocks, unsigned threads, uint64_t seed, void** arguments) {{"
    )?;
    for name in names {
        writeln!(
            all,
            "    if (!strcmp(name, \"{name}\")) {{ host::launch({symbol}_kernels::{name}, blocks, threads, seed, arguments); return 1; }}"
        )?;
    }
    all += "    return 0;\n}\n";
    Ok(all)
}
