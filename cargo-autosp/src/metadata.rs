//! What cargo knows about the dependencies of the crate at hand.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use autosp_plan::codes;
use serde_json::Value;

use crate::Failure;

/// A package that the crate at hand can see.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// As its manifest has it.
    pub(crate) license: Option<String>,
    /// The folder of its manifest.
    pub(crate) folder: PathBuf,
    /// Its dependencies: package, version, and the name that it goes by.
    pub(crate) dependencies: Vec<(String, String, String)>,
}

/// All packages, and the name that each of the crate's own dependencies goes by.
#[derive(Debug)]
pub(crate) struct Metadata {
    packages: Vec<Package>,
    /// Package and name.
    own: Vec<(String, String)>,
}

fn refused(message: impl Into<String>) -> Failure {
    Failure::new(&codes::DEPENDENCY, message)
}

/// How Rust code names a crate.
pub(crate) fn ident(name: &str) -> String {
    name.replace('-', "_")
}

impl Metadata {
    /// Asks cargo, in the folder of `manifest` or in the current one.
    ///
    /// # Errors
    /// AS0605 with cargo's own words if it cannot say.
    pub(crate) fn read(manifest: Option<&Path>) -> Result<Self, Failure> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["metadata", "--format-version", "1"]);
        if let Some(manifest) = manifest {
            command.arg("--manifest-path").arg(manifest);
        }
        let output = command
            .output()
            .map_err(|error| refused(format!("cannot run `cargo metadata`: {error}")))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(refused(format!("`cargo metadata`: {}", words.trim())));
        }
        let all: Value = serde_json::from_slice(&output.stdout)
            .map_err(|error| refused(format!("`cargo metadata`: {error}")))?;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let packages: Vec<Package> = list(&all["packages"]).iter().map(package).collect();
        let root = &all["resolve"]["root"];
        let own = list(&all["packages"])
            .iter()
            .filter(|p| root.is_null() || p["id"] == *root)
            .flat_map(|p| package(p).dependencies)
            .map(|(package, _, name)| (package, name))
            .collect();
        Ok(Self { packages, own })
    }

    /// A package by name.
    ///
    /// # Errors
    /// AS0605 if there is none.
    pub(crate) fn package(&self, name: &str) -> Result<&Package, Failure> {
        self.packages
            .iter()
            .filter(|p| p.name == name)
            .max_by(|a, b| a.version.cmp(&b.version))
            .ok_or_else(|| {
                refused(format!(
                    "no dependency is called `{name}`\n  help: cargo add {name}"
                ))
            })
    }

    /// What the crate at hand calls a package, if it depends on it.
    pub(crate) fn own_name(&self, package: &str) -> Option<&str> {
        self.own
            .iter()
            .find(|(p, _)| p == package)
            .map(|(_, name)| name.as_str())
    }
}

fn package(value: &Value) -> Package {
    let text = |value: &Value| value.as_str().map(String::from);
    let dependencies = value["dependencies"].as_array().into_iter().flatten();
    let dependencies = dependencies.filter_map(|d| {
        let package = text(&d["name"])?;
        let name = text(&d["rename"]).unwrap_or_else(|| package.clone());
        Some((package, text(&d["req"]).unwrap_or_default(), ident(&name)))
    });
    let manifest = PathBuf::from(value["manifest_path"].as_str().unwrap_or_default());
    Package {
        name: text(&value["name"]).unwrap_or_default(),
        version: text(&value["version"]).unwrap_or_default(),
        license: text(&value["license"]),
        folder: manifest.parent().map(PathBuf::from).unwrap_or_default(),
        dependencies: dependencies.collect(),
    }
}
