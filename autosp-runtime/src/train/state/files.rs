//! The folder of checkpoints: which is the latest, and which are whole.
//!
//! ```text
//! FOLDER/latest                              the name of the latest checkpoint
//! FOLDER/step-00000040/manifest.json         written last: lists the files with their sizes
//!                      parameters.safetensors
//!                      optimizer.safetensors, or optimizer-R-of-W.safetensors of each rank
//! ```
//! A folder without a manifest, or whose files do not have the sizes that it lists, is what an interrupted run has left.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use autosp_plan::codes;
use candle_core::Tensor;
use candle_core::safetensors::MmapedSafetensors;
use serde_json::{Value, json};

use crate::parameters::replace_file;
use crate::{Error, Result};

const MANIFEST: &str = "manifest.json";
const LATEST: &str = "latest";

/// The number of this layout of files.
const FORMAT: u64 = 1;

/// What a checkpoint says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) step: u64,
    /// Steps of the optimizer: without skipped ones.
    pub(super) optimizer_steps: u64,
    /// Scopes that the run has opened.
    pub(super) scopes: u64,
    /// Of what models draw while they run.
    pub(super) seed: u64,
    pub(super) optimizer: String,
    pub(super) note: String,
    /// Names and sizes in bytes.
    pub(super) files: BTreeMap<String, u64>,
}

impl Manifest {
    fn to_json(&self) -> Value {
        json!({
            "format": FORMAT,
            "step": self.step,
            "optimizer_steps": self.optimizer_steps,
            "scopes": self.scopes,
            "seed": self.seed,
            "optimizer": self.optimizer,
            "note": self.note,
            "files": self.files,
        })
    }

    /// `None` for JSON of another form.
    fn from_json(json: &Value) -> Option<Self> {
        let number = |key: &str| json[key].as_u64();
        let text = |key: &str| Some(json[key].as_str()?.to_owned());
        if number("format")? != FORMAT {
            return None;
        }
        let files = json["files"].as_object()?.iter();
        Some(Self {
            step: number("step")?,
            optimizer_steps: number("optimizer_steps")?,
            scopes: number("scopes")?,
            seed: number("seed")?,
            optimizer: text("optimizer")?,
            note: text("note")?,
            files: files
                .map(|(name, bytes)| Some((name.clone(), bytes.as_u64()?)))
                .collect::<Option<_>>()?,
        })
    }
}

/// A whole checkpoint.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) place: PathBuf,
    pub(super) manifest: Manifest,
}

fn unwritable(path: &Path, error: &std::io::Error) -> Error {
    let reason = crate::io_reason(error);
    let text = format!("cannot write `{}`: {reason}", path.display());
    Error::new(codes::FILE_UNWRITABLE, text)
}

/// A checkpoint that is not of this model or optimizer: `what` says what was expected and found.
pub(super) fn differs(place: &Path, what: &str) -> Error {
    let text = format!("checkpoint `{}`: expected {what}", place.display());
    Error::new(codes::CHECKPOINT, text)
}

/// Makes a folder for the checkpoint of a step, and returns its name. A name that is taken is not used again.
pub(super) fn create(folder: &Path, step: u64) -> Result<String> {
    fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
    let mut name = format!("step-{step:08}");
    for attempt in 1_u64.. {
        let place = folder.join(&name);
        match fs::create_dir(&place) {
            Ok(()) => break,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                name = format!("step-{step:08}-{attempt}");
            }
            Err(error) => return Err(unwritable(&place, &error)),
        }
    }
    Ok(name)
}

/// Writes tensors as a safetensors file that appears whole or not at all.
pub(super) fn write_tensors(path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    replace_file(path, |temporary| {
        candle_core::safetensors::save(tensors, temporary)
            .map_err(|error| Error::from(error).message().to_owned())
    })
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    replace_file(path, |temporary| {
        File::create(temporary)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| crate::io_reason(&error))
    })
}

/// Declares a checkpoint whole and the latest, and removes all but the one before.
pub(super) fn finish(folder: &Path, name: &str, mut manifest: Manifest) -> Result<()> {
    let place = folder.join(name);
    for (file, bytes) in &mut manifest.files {
        let path = place.join(file);
        // Every rank has written its own: one that does not see this folder has written elsewhere.
        *bytes = fs::metadata(&path)
            .map_err(|error| unwritable(&path, &error))?
            .len();
    }
    let before = pointer(folder);
    write_text(
        &place.join(MANIFEST),
        &format!("{:#}\n", manifest.to_json()),
    )?;
    write_text(&folder.join(LATEST), &format!("{name}\n"))?;
    // What a process that was killed has left of `latest`; this one has renamed its own.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&format!(".{LATEST}.")) && name.ends_with(".tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
    for other in names(folder) {
        if other != name && Some(&other) != before.as_ref() {
            remove(&folder.join(other));
        }
    }
    Ok(())
}

/// Removes a checkpoint; without its manifest, the rest is nothing. What cannot be removed is in nobody's way.
fn remove(place: &Path) {
    let removed = match fs::remove_file(place.join(MANIFEST)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => fs::remove_dir_all(place),
    };
    if let Err(error) = removed {
        tracing::warn!(place = %place.display(), %error, "an old checkpoint cannot be removed");
    }
}

/// The names of all checkpoints, whole or not, oldest first.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            name.strip_prefix("step-")
                .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit() || b == b'-'))
        })
        .collect();
    names.sort();
    names
}

/// What `latest` says.
fn pointer(folder: &Path) -> Option<String> {
    let text = fs::read_to_string(folder.join(LATEST)).ok()?;
    Some(text.trim().to_owned())
}

/// The name of the latest whole checkpoint; `None` if the folder has none.
///
/// # Errors
/// AS0502 if there are manifests and none of their checkpoints is whole.
pub(super) fn latest(folder: &Path) -> Result<Option<String>> {
    let known = names(folder);
    let pointed = pointer(folder).filter(|name| known.contains(name));
    let mut broken = None;
    for name in pointed.into_iter().chain(known.into_iter().rev()) {
        if !folder.join(&name).join(MANIFEST).is_file() {
            continue;
        }
        match open(folder, &name) {
            Ok(_) => return Ok(Some(name)),
            Err(error) => {
                tracing::warn!(checkpoint = name, %error, "a checkpoint is not whole");
                broken.get_or_insert(error);
            }
        }
    }
    broken.map_or(Ok(None), Err)
}

/// Reads a manifest and makes sure that its files are there.
///
/// # Errors
/// AS0501 if the manifest cannot be read; AS0502 if it or a file is not what was written.
pub(super) fn open(folder: &Path, name: &str) -> Result<Checkpoint> {
    let place = folder.join(name);
    let path = place.join(MANIFEST);
    let text = fs::read_to_string(&path).map_err(|error| {
        let reason = crate::io_reason(&error);
        let text = format!("cannot read `{}`: {reason}", path.display());
        Error::new(codes::FILE_UNREADABLE, text)
    })?;
    let json = serde_json::from_str::<Value>(&text).ok();
    let Some(manifest) = json.as_ref().and_then(Manifest::from_json) else {
        let text = format!(
            "`{}`: expected the manifest of a checkpoint, found another text",
            path.display()
        );
        return Err(Error::new(codes::FILE_BROKEN, text));
    };
    for (file, bytes) in &manifest.files {
        let path = place.join(file);
        let found = fs::metadata(&path).map_or(0, |file| file.len());
        if found != *bytes {
            let text = format!(
                "`{}`: expected {bytes} bytes, found {found}",
                path.display()
            );
            return Err(Error::new(codes::FILE_BROKEN, text));
        }
    }
    Ok(Checkpoint { place, manifest })
}

/// Maps safetensors files of a checkpoint into memory.
///
/// # Errors
/// AS0502 if one is none.
pub(super) fn map(paths: &[PathBuf]) -> Result<MmapedSafetensors> {
    // SAFETY: files of a whole checkpoint are never written to; they are only removed, which leaves a mapping as it is.
    unsafe { MmapedSafetensors::multi(paths) }.map_err(|error| {
        let names: Vec<String> = paths
            .iter()
            .map(|path| format!("`{}`", path.display()))
            .collect();
        let text = format!(
            "cannot read {}: {}",
            names.join(", "),
            Error::from(error).message()
        );
        Error::new(codes::FILE_BROKEN, text)
    })
}
