//! The sources of candle's packages, where cargo keeps them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder `src` of a package that the workspace depends on.
pub(crate) fn folder(package: &str) -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--offline"])
        .arg("--manifest-path")
        .arg(manifest)
        .output()
        .expect("cargo metadata");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let found = text
        .split("\"manifest_path\":\"")
        .filter_map(|manifest| manifest.split('"').next())
        .find(|manifest| manifest.contains(&format!("/{package}-0")))
        .expect(package);
    let folder = Path::new(found).with_file_name("src");
    assert!(folder.is_dir(), "{}", folder.display());
    folder
}

/// The models of candle-transformers.
pub(crate) fn models() -> PathBuf {
    folder("candle-transformers").join("models")
}

/// Every Rust file of a package, in order: path and text.
pub(crate) fn sources(package: &str) -> Vec<(String, String)> {
    let mut paths = Vec::new();
    files(&folder(package), &mut paths);
    paths.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("a source file");
        (path.display().to_string(), text)
    };
    paths.into_iter().map(read).collect()
}

fn files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}
