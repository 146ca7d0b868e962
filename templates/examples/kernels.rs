//! Writes the source of every kernel module into a folder, for a compiler to look at: `cargo run -p autosp-templates --example kernels -- DIR`.

fn main() -> std::io::Result<()> {
    let folder = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "target/kernels".to_owned());
    std::fs::create_dir_all(&folder)?;
    for (name, source) in autosp_templates::kernels::all() {
        std::fs::write(format!("{folder}/{name}.cu"), source)?;
    }
    Ok(())
}
