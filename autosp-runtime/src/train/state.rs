//! Checkpoints: what training needs to go on, on disk.
//!
//! [`Trainer::save_checkpoint`] writes the variables, the optimizer's state with the master weights, the counters that steps and random
//! numbers depend on, and what the program notes, such as its position in the data. From `zero = 1` on every rank writes the state that it
//! holds. State is written by variable and element, not by rank, so that any mesh can take it up: [`Trainer::resume`].

mod files;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use autosp_plan::codes;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};

use super::Trainer;
use super::flat::Piece;
use super::optimizer::Part;
use super::settings::Optimizer;
use crate::comm::{Tag, all_gather, barrier};
use crate::ops::wide;
use crate::{Error, Result};
use files::{Checkpoint, Manifest};

/// The parameters of a checkpoint.
const PARAMETERS: &str = "parameters.safetensors";

/// Where training goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resumed {
    /// Steps that were taken before the checkpoint.
    pub step: u64,
    /// What the program noted when it was written.
    pub note: String,
}

impl Trainer {
    /// Writes a checkpoint into `folder`, which is made if it is not there; `note` is what the program needs besides to go on, such as
    /// its position in the data. Returns on every rank once the checkpoint is on disk. All ranks call this alike, and see one folder.
    ///
    /// The checkpoint becomes the latest at once or not at all, whenever the process ends: its files are written and synchronised, then
    /// a manifest that lists them, then the file `latest` that names it, each beside its place and renamed. It and the one before are
    /// kept, older ones are removed; rename a folder to keep it.
    ///
    /// # Errors
    /// AS0505 if it cannot be written; as [`wait`](crate::comm::Engine::wait).
    pub fn save_checkpoint(&self, folder: impl AsRef<Path>, note: &str) -> Result<()> {
        let folder = folder.as_ref();
        let own = if self.sp.is_main() {
            Some(files::create(folder, self.steps)?)
        } else {
            None
        };
        let name = self.said_by_main(Tag::new("checkpoint", "name"), own)?;
        let place = folder.join(&name);
        if self.sp.is_main() {
            self.parameters.save(place.join(PARAMETERS))?;
        }
        if let Some(file) = self.state_file(self.sp.rank()) {
            let mut tensors = HashMap::new();
            for (slot, piece) in self.pieces.iter().flatten().enumerate() {
                for part in Part::ALL {
                    if let Some(values) = self.updater.part(slot, part)? {
                        tensors.insert(self.entry(part, piece), values);
                    }
                }
            }
            files::write_tensors(&place.join(file), &tensors)?;
        }
        barrier(self.sp.world_group(), Tag::new("checkpoint", "written"))?;
        if self.sp.is_main() {
            let states = (0..self.sp.world_size()).filter_map(|rank| self.state_file(rank));
            let manifest = Manifest {
                step: self.steps,
                optimizer_steps: self.updater.steps,
                scopes: self.sp.scopes(),
                seed: self.sp.seed(),
                optimizer: kind(self.settings.optimizer).to_owned(),
                note: note.to_owned(),
                files: std::iter::once(PARAMETERS.to_owned())
                    .chain(states)
                    .map(|file| (file, 0))
                    .collect(),
            };
            files::finish(folder, &name, manifest)?;
            tracing::info!(path = %place.display(), step = self.steps, "checkpoint written");
        }
        barrier(self.sp.world_group(), Tag::new("checkpoint", "complete"))
    }

    /// Takes up the latest checkpoint of `folder`: call it right after [`new`](Self::new), with the model and the optimizer of the run
    /// that wrote it; mesh, ZeRO stage, policy and learning rate may be others. On the same mesh all later steps have the bits that they
    /// would have had without the interruption. `None` if there is no checkpoint.
    ///
    /// # Errors
    /// AS0561 if the checkpoint is of another model or optimizer; AS0501 and AS0502 if its files cannot be read. After an error nothing
    /// has changed.
    pub fn resume(&mut self, folder: impl AsRef<Path>) -> Result<Option<Resumed>> {
        let folder = folder.as_ref();
        let own = if self.sp.is_main() {
            Some(files::latest(folder)?.unwrap_or_default())
        } else {
            None
        };
        let name = self.said_by_main(Tag::new("checkpoint", "name"), own)?;
        if name.is_empty() {
            return Ok(None);
        }
        let Checkpoint { place, manifest } = files::open(folder, &name)?;
        if manifest.optimizer != kind(self.settings.optimizer) {
            let text = format!(
                "`{}`: expected the state of {}, found that of {}",
                place.display(),
                kind(self.settings.optimizer),
                manifest.optimizer
            );
            return Err(Error::new(codes::CHECKPOINT, text));
        }
        let parameters = self.read_parameters(&place)?;
        let states = self.read_states(&place, &manifest)?;
        for ((_, var), value) in self.parameters.all().iter().zip(&parameters) {
            var.set(value)?;
        }
        for (slot, parts) in states.iter().enumerate() {
            for (part, values) in Part::ALL.into_iter().zip(parts) {
                self.updater.set_part(slot, part, values.as_ref())?;
            }
        }
        self.updater.steps = manifest.optimizer_steps;
        self.steps = manifest.step;
        self.sp.set_scopes(manifest.scopes);
        self.sp.set_seed(manifest.seed);
        self.mark = self.sp.ledger().snapshot();
        tracing::info!(path = %place.display(), step = self.steps, "checkpoint resumed");
        Ok(Some(Resumed {
            step: manifest.step,
            note: manifest.note,
        }))
    }

    /// The file with the state that `rank` writes; `None` if another rank writes the same.
    fn state_file(&self, rank: usize) -> Option<String> {
        if self.sp.settings().zero().divides_state() {
            let size = self.sp.world_size();
            return Some(format!("optimizer-{rank}-of-{size}.safetensors"));
        }
        (rank == 0).then(|| "optimizer.safetensors".to_owned())
    }

    /// What a part of a piece's state is called in a file: `part:first element:variable`.
    fn entry(&self, part: Part, piece: &Piece) -> String {
        let (name, _) = &self.named[piece.var];
        format!("{}:{}:{name}", part.name(), piece.range.start)
    }

    /// A text of the main rank on all ranks.
    pub(super) fn said_by_main(&self, tag: Tag, own: Option<String>) -> Result<String> {
        let engine = self.sp.world_group();
        let bytes = own.unwrap_or_default().into_bytes();
        let count = bytes.len();
        let bytes = Tensor::from_vec(bytes, count, &Device::Cpu)?;
        let all = all_gather(engine, tag, &bytes, 0)?;
        Ok(String::from_utf8_lossy(&all.to_vec1::<u8>()?).into_owned())
    }

    /// The values of all variables, frozen ones included, in their order.
    fn read_parameters(&self, place: &Path) -> Result<Vec<Tensor>> {
        let path = place.join(PARAMETERS);
        let file = files::map(std::slice::from_ref(&path))?;
        let variables = self.parameters.all();
        let known: Vec<String> = file.tensors().into_iter().map(|(name, _)| name).collect();
        let differs = |what: String| Err(files::differs(&path, &what));
        if let Some(extra) = known
            .iter()
            .find(|name| !variables.iter().any(|(known, _)| known == *name))
        {
            return differs(format!(
                "the variables of this model, found `{extra}` as well"
            ));
        }
        let mut values = Vec::with_capacity(variables.len());
        for (name, var) in &variables {
            if !known.contains(name) {
                return differs(format!("a variable `{name}`, found none"));
            }
            let value = file.load(name, var.device())?;
            if value.shape() != var.shape() || value.dtype() != var.dtype() {
                return differs(format!(
                    "`{name}` of {:?} {:?}, found {:?} {:?}",
                    var.dtype(),
                    var.dims(),
                    value.dtype(),
                    value.dims()
                ));
            }
            values.push(value);
        }
        Ok(values)
    }

    /// The state of this rank's pieces, from the files of all ranks that wrote some.
    fn read_states(&self, place: &Path, manifest: &Manifest) -> Result<Vec<[Option<Tensor>; 3]>> {
        let paths: Vec<_> = manifest
            .files
            .iter()
            .filter(|(name, _)| name.as_str() != PARAMETERS)
            .map(|(name, _)| place.join(name))
            .collect();
        let store = Store::new(files::map(&paths)?);
        let mut states = Vec::new();
        for piece in self.pieces.iter().flatten() {
            let (name, var) = &self.named[piece.var];
            let mut parts = [None, None, None];
            for (part, slot) in Part::ALL.into_iter().zip(&mut parts) {
                let needed = match part {
                    Part::Master => var.dtype() != wide(var.dtype()),
                    Part::First => !matches!(
                        self.settings.optimizer,
                        Optimizer::Sgd { momentum, .. } if momentum == 0.0
                    ),
                    Part::Second => matches!(self.settings.optimizer, Optimizer::AdamW { .. }),
                };
                if needed && manifest.optimizer_steps > 0 {
                    let found = store.read(part, name, &piece.range)?;
                    *slot = Some(found.ok_or_else(|| {
                        files::differs(
                            place,
                            &format!(
                                "the optimizer's state `{}` of `{name}`, found none or a part of it",
                                part.name()
                            ),
                        )
                    })?);
                }
            }
            states.push(parts);
        }
        Ok(states)
    }
}

/// What an optimizer keeps decides whose state it can take up.
fn kind(optimizer: Optimizer) -> &'static str {
    match optimizer {
        Optimizer::AdamW { .. } => "adamw",
        Optimizer::Sgd { momentum: 0.0, .. } => "sgd",
        Optimizer::Sgd { .. } => "sgd with momentum",
    }
}

/// The states in the files of a checkpoint.
struct Store {
    file: MmapedSafetensors,
    /// Part, variable, first element, count, and name in the file; sorted.
    entries: Vec<(String, String, usize, usize, String)>,
}

impl Store {
    fn new(file: MmapedSafetensors) -> Self {
        let entry = |(key, view): (String, safetensors::tensor::TensorView<'_>)| {
            let (part, rest) = key.split_once(':')?;
            let (start, name) = rest.split_once(':')?;
            let count = view.shape().iter().product();
            Some((
                part.to_owned(),
                name.to_owned(),
                start.parse().ok()?,
                count,
                key.clone(),
            ))
        };
        let mut entries: Vec<_> = file.tensors().into_iter().filter_map(entry).collect();
        entries.sort();
        Self { file, entries }
    }

    /// Elements `range` of a part of a variable's state; `None` if not all of them are there.
    fn read(&self, part: Part, name: &str, range: &Range<usize>) -> Result<Option<Tensor>> {
        let mut found = Vec::new();
        let mut next = range.start;
        let begin = self
            .entries
            .partition_point(|(p, n, ..)| (p.as_str(), n.as_str()) < (part.name(), name));
        for (p, n, start, count, key) in &self.entries[begin..] {
            if p != part.name() || n != name || next == range.end {
                break;
            }
            let end = (start + count).min(range.end);
            if *start <= next && next < end {
                let whole = self.file.load(key, &Device::Cpu)?;
                found.push(whole.narrow(0, next - start, end - next)?);
                next = end;
            }
        }
        if next < range.end {
            return Ok(None);
        }
        Ok(Some(Tensor::cat(&found, 0)?))
    }
}

#[cfg(test)]
mod tests;
