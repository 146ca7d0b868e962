//! The tensors of a model's safetensors files: one file, several, a folder, or an index that names them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use autosp_plan::codes;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde_json::Value;

use crate::{Error, Result};

/// How an index of several files is called; Hugging Face writes `model.safetensors.index.json`.
const INDEX: &str = "model.safetensors.index.json";

/// The one file of a small model.
const SINGLE: &str = "model.safetensors";

/// Names in one message.
const SHOWN: usize = 4;

/// Files that together hold a model, each tensor in one of them.
pub(super) struct Files {
    files: Vec<Mapped>,
    /// The file of each tensor.
    places: BTreeMap<String, usize>,
}

struct Mapped {
    path: PathBuf,
    tensors: MmapedSafetensors,
}

/// What an index says: the file of each tensor, as a path.
struct Index {
    path: PathBuf,
    files: BTreeMap<String, PathBuf>,
}

impl Files {
    /// Opens what the paths name: safetensors files, indices, and folders with either.
    ///
    /// # Errors
    /// AS0501 for what cannot be read, AS0502 for what is no safetensors file, AS0541 for a tensor that two files hold, AS0543 for
    /// an index that does not fit its files.
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self> {
        let (mut names, mut indices) = (Vec::new(), Vec::new());
        for path in paths {
            let path = resolve(path)?;
            if path.extension().is_some_and(|ending| ending == "json") {
                let index = Index::read(&path)?;
                let mut files: Vec<PathBuf> = index.files.values().cloned().collect();
                files.sort();
                files.dedup();
                names.extend(files);
                indices.push(index);
            } else {
                names.push(path);
            }
        }
        if names.is_empty() {
            return Err(unreadable("expected at least one model file, found none"));
        }
        let mut all = Self {
            files: Vec::new(),
            places: BTreeMap::new(),
        };
        for path in names {
            all.add(path)?;
        }
        for index in &indices {
            all.check(index)?;
        }
        Ok(all)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        check_readable(&path)?;
        // SAFETY: the caller keeps other programs from changing the file, as `load_trainable` documents; our own `save` replaces a
        // file by a rename, which leaves the mapped one as it is.
        let tensors = unsafe { MmapedSafetensors::new(&path) }.map_err(|error| {
            let text = format!(
                "`{}` is not a valid safetensors file: {}",
                path.display(),
                Error::from(error).message()
            );
            Error::new(codes::FILE_BROKEN, text)
        })?;
        let place = self.files.len();
        for (name, _) in tensors.tensors() {
            if let Some(&other) = self.places.get(&name) {
                let text = format!(
                    "expected `{name}` in one file, found it in `{}` and in `{}`",
                    self.files[other].path.display(),
                    path.display()
                );
                return Err(Error::new(codes::TENSOR_TWICE, text));
            }
            self.places.insert(name, place);
        }
        self.files.push(Mapped { path, tensors });
        Ok(())
    }

    /// Holds an index against the files it names.
    fn check(&self, index: &Index) -> Result<()> {
        let refuse = |text: String| {
            Err(Error::new(
                codes::INDEX,
                format!("`{}`: {text}", index.path.display()),
            ))
        };
        for (name, path) in &index.files {
            match self.places.get(name).map(|&place| &self.files[place].path) {
                Some(found) if found == path => {}
                Some(found) => {
                    return refuse(format!(
                        "expected `{name}` in `{}`, found it in `{}`",
                        path.display(),
                        found.display()
                    ));
                }
                None => {
                    return refuse(format!(
                        "expected `{name}` in `{}`, found none there",
                        path.display()
                    ));
                }
            }
        }
        for (name, &place) in &self.places {
            let path = &self.files[place].path;
            if !index.files.contains_key(name) && index.files.values().any(|file| file == path) {
                return refuse(format!(
                    "expected only tensors that the index lists, found `{name}` in `{}`",
                    path.display()
                ));
            }
        }
        Ok(())
    }

    /// The tensor of a name, converted.
    ///
    /// # Errors
    /// AS0503 if no file has it, AS0542 if it does not hold floating-point numbers, AS0502 if it cannot be read.
    pub(super) fn load(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(&place) = self.places.get(name) else {
            let text = format!("expected a tensor `{name}` in {}, found none", self.paths());
            return Err(Error::new(codes::TENSOR_MISSING, text));
        };
        let Mapped { path, tensors } = &self.files[place];
        let broken = |error: candle_core::Error| {
            Error::from(error).context(format_args!("`{name}` in `{}`", path.display()))
        };
        let found = tensors.get(name).map_err(broken)?.dtype();
        if !is_float(found) {
            let text = format!(
                "expected floating-point numbers (F64, F32, BF16 or F16) for `{name}` in `{}`, found {found:?}",
                path.display()
            );
            return Err(Error::new(codes::TENSOR_DTYPE, text));
        }
        let tensor = tensors.load(name, &Device::Cpu).map_err(broken)?;
        Ok(tensor.to_dtype(dtype)?.to_device(device)?)
    }

    /// Whether a file has a tensor of that name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Tensors of floating-point numbers, with their files. Others, such as tables of positions, are no parameters.
    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.places.iter().filter_map(|(name, &place)| {
            let Mapped { path, tensors } = &self.files[place];
            let view = tensors.get(name).ok()?;
            is_float(view.dtype()).then_some((name.as_str(), path.as_path()))
        })
    }

    fn paths(&self) -> String {
        let mut names: Vec<String> = self
            .files
            .iter()
            .take(SHOWN)
            .map(|file| format!("`{}`", file.path.display()))
            .collect();
        if self.files.len() > SHOWN {
            names.push(format!("{} more files", self.files.len() - SHOWN));
        }
        names.join(", ")
    }
}

impl Index {
    fn read(path: &Path) -> Result<Self> {
        let refuse = |text: String| {
            Error::new(codes::INDEX, format!("`{}`: {text}", path.display()))
                .with_help("an index is `{\"weight_map\": {\"TENSOR\": \"FILE.safetensors\"}}`")
        };
        check_readable(path)?;
        let text = fs::read_to_string(path).map_err(|error| {
            unreadable(format!(
                "cannot read `{}`: {}",
                path.display(),
                crate::io_reason(&error)
            ))
        })?;
        let json: Value = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(refuse(
                "expected an object `weight_map`, found none".to_owned(),
            ));
        };
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut files = BTreeMap::new();
        for (name, file) in map {
            let Some(file) = file.as_str() else {
                return Err(refuse(format!(
                    "expected the name of a file for `{name}`, found {file}"
                )));
            };
            // An index that was downloaded must not reach for files elsewhere.
            if !matches!(
                Path::new(file).components().collect::<Vec<_>>()[..],
                [Component::Normal(_)]
            ) {
                return Err(refuse(format!(
                    "expected a file beside the index for `{name}`, found `{file}`"
                )));
            }
            files.insert(name.clone(), folder.join(file));
        }
        if files.is_empty() {
            return Err(refuse(
                "expected at least one tensor in `weight_map`, found none".to_owned(),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            files,
        })
    }
}

/// The file to read for a path: in a folder the index, else the one model file.
fn resolve(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    for name in [INDEX, SINGLE] {
        let file = path.join(name);
        if file.is_file() {
            return Ok(file);
        }
    }
    Err(unreadable(format!(
        "expected `{SINGLE}` or `{INDEX}` in the folder `{}`, found neither",
        path.display()
    )))
}

fn check_readable(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.metadata())
        .and_then(|found| {
            if found.is_dir() {
                Err(std::io::Error::other("it is a folder"))
            } else {
                Ok(())
            }
        })
        .map_err(|error| {
            unreadable(format!(
                "cannot read the model file `{}`: {}",
                path.display(),
                crate::io_reason(&error)
            ))
        })
}

fn unreadable(text: impl Into<String>) -> Error {
    Error::new(codes::FILE_UNREADABLE, text)
}

/// Eight-bit floats are left out: without the scales that belong to them they are not the weights.
fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16)
}

#[cfg(test)]
mod tests;
