//! The variables of a model, by name.
//!
//! A model asks a candle `VarBuilder` for its tensors; [`Parameters`] is the backend that answers, from a seed or from safetensors
//! files, and remembers every tensor it handed out as a variable.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use autosp_plan::codes;
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::VarBuilder;
use candle_nn::init::{Init, NormalOrUniform};
use candle_nn::var_builder::SimpleBackend;
use rayon::prelude::*;

use crate::random::Stream;
use crate::{Error, Result};
use files::Files;

mod files;

/// Named variables in the order of their names, which is the order of every reduction and of the optimizer.
///
/// A clone shares the variables.
///
/// ```
/// use autosp_runtime::Parameters;
/// use candle_core::{DType, Device};
///
/// # fn main() -> autosp_runtime::Result<()> {
/// let parameters = Parameters::init(7, DType::F32, &Device::Cpu);
/// let layer = candle_nn::linear(8, 4, parameters.builder().pp("out"))?;
/// assert_eq!(parameters.named().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["out.bias", "out.weight"]);
/// # let _ = layer;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Parameters {
    shared: Arc<Shared>,
    dtype: DType,
    device: Device,
}

struct Shared {
    vars: Mutex<BTreeMap<String, Var>>,
    source: Source,
    frozen: Mutex<Option<Rule>>,
    ignored: Mutex<Option<Rule>>,
}

type Rule = Box<dyn Fn(&str) -> bool + Send + Sync>;

enum Source {
    Seed(u64),
    Files(Files),
}

/// Reads safetensors files as trainable parameters: `vars.builder()` gives a model its tensors, converted to `dtype` on `device`.
///
/// Each path is a safetensors file, an index such as `model.safetensors.index.json`, or a folder as it is downloaded, with an index or
/// a file `model.safetensors` in it. Together they hold each tensor once.
///
/// The files are mapped into memory and must not be changed by others meanwhile; [`Parameters::save`] may replace them. A tensor
/// that the model never asks for is refused by [`Trainer::new`](crate::Trainer::new), since the model would be another one than the
/// file's; [`Parameters::ignore`] passes over those that are left out on purpose.
///
/// # Errors
/// AS0501 if a file is missing or cannot be read; AS0502 if it is not a safetensors file or was cut short; AS0541 if two files hold
/// the same tensor; AS0542 if `dtype` is no floating-point type; AS0543 if an index is broken or does not fit its files. The
/// builder reports a tensor that is missing (AS0503), has another shape (AS0504), or does not hold floating-point numbers (AS0542).
pub fn load_trainable<P: AsRef<Path>>(
    files: &[P],
    dtype: DType,
    device: &Device,
) -> Result<Parameters> {
    if !dtype.is_float() {
        let text = format!("expected a floating-point type for parameters, found {dtype:?}");
        return Err(Error::new(codes::TENSOR_DTYPE, text).with_help("DType::F32"));
    }
    let paths: Vec<PathBuf> = files.iter().map(|path| path.as_ref().to_owned()).collect();
    let files = Files::open(&paths)?;
    Ok(Parameters::new(Source::Files(files), dtype, device))
}

impl Parameters {
    fn new(source: Source, dtype: DType, device: &Device) -> Self {
        let shared = Shared {
            vars: Mutex::default(),
            source,
            frozen: Mutex::default(),
            ignored: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            dtype,
            device: device.clone(),
        }
    }

    /// Parameters that are drawn when the model asks for them, as its `Init` says.
    ///
    /// The numbers depend on the seed and on the tensor's name and shape alone: not on the rank, the mesh, the number of threads
    /// or the order of construction.
    pub fn init(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::new(Source::Seed(seed), dtype, device)
    }

    /// Keeps the tensors whose names the rule accepts out of training: the model gets them as constants. To be called before the
    /// model is built.
    ///
    /// ```
    /// use autosp_runtime::Parameters;
    /// use candle_core::{DType, Device};
    ///
    /// # fn main() -> autosp_runtime::Result<()> {
    /// let parameters = Parameters::init(7, DType::F32, &Device::Cpu).freeze(|name| name.ends_with("bias"));
    /// candle_nn::linear(8, 4, parameters.builder())?;
    /// assert_eq!(parameters.named().len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn freeze(self, rule: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        *self
            .shared
            .frozen
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Box::new(rule));
        self
    }

    /// Passes over tensors of the files that the model does not ask for, where the rule accepts their names. Without a rule,
    /// [`Trainer::new`](crate::Trainer::new) refuses what is left.
    #[must_use]
    pub fn ignore(self, rule: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        *self
            .shared
            .ignored
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Box::new(rule));
        self
    }

    /// Tensors of the files that the model has not asked for by now, with their files, in name order; without those that are
    /// [ignored](Self::ignore) and those of whole numbers, which are no parameters.
    pub fn unused(&self) -> Vec<(String, PathBuf)> {
        let Source::Files(files) = &self.shared.source else {
            return Vec::new();
        };
        let ignored = self
            .shared
            .ignored
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let vars = self.shared.vars();
        files
            .parameters()
            .filter(|(name, _)| !vars.contains_key(*name))
            .filter(|(name, _)| !ignored.as_ref().is_some_and(|rule| rule(name)))
            .map(|(name, path)| (name.to_owned(), path.to_owned()))
            .collect()
    }

    /// # Errors
    /// AS0540 naming what the model has not asked for.
    pub(crate) fn expect_all_used(&self) -> Result<()> {
        let unused = self.unused();
        let Some((first, path)) = unused.first() else {
            return Ok(());
        };
        let more = match unused.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let text = format!(
            "expected a model that uses every tensor of its files, found `{first}` in `{}`{more} unused",
            path.display()
        );
        Err(Error::new(codes::TENSOR_EXTRA, text)
            .with_help(format!("parameters.ignore(|name| name == {first:?})")))
    }

    /// What a model's constructor takes.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(
            Box::new(Backend(Arc::clone(&self.shared))),
            self.dtype,
            self.device.clone(),
        )
    }

    /// The trainable variables, in name order.
    pub fn vars(&self) -> Vec<Var> {
        self.named().into_iter().map(|(_, var)| var).collect()
    }

    /// The trainable variables with their names, in name order.
    pub fn named(&self) -> Vec<(String, Var)> {
        let vars = self.shared.vars();
        vars.iter()
            .filter(|(name, _)| !self.shared.is_frozen(name))
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect()
    }

    /// All variables, frozen ones included, in name order.
    pub fn all(&self) -> Vec<(String, Var)> {
        self.shared
            .vars()
            .iter()
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect()
    }

    /// Number of trainable elements.
    pub fn element_count(&self) -> usize {
        self.vars().iter().map(|var| var.elem_count()).sum()
    }

    /// The type in which the builder makes variables.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the variables live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Writes all variables, frozen ones included, as a safetensors file.
    ///
    /// The file appears whole or not at all: it is written beside its place, synchronised to the disk, and renamed.
    ///
    /// # Errors
    /// AS0505 if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let tensors: HashMap<String, Tensor> = self
            .all()
            .into_iter()
            .map(|(name, var)| (name, var.as_detached_tensor()))
            .collect();
        replace_file(path, |temporary| {
            candle_core::safetensors::save(&tensors, temporary)
                .map_err(|error| Error::from(error).message().to_owned())
        })
    }
}

/// Writes a file beside its place, synchronises it to the disk, and renames it.
pub(crate) fn replace_file(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<()> {
    let failed = |error: String| {
        Error::new(
            codes::FILE_UNWRITABLE,
            format!("cannot write `{}`: {error}", path.display()),
        )
    };
    let io = |error: std::io::Error| crate::io_reason(&error);
    let Some(name) = path.file_name() else {
        return Err(failed("it does not name a file".to_owned()));
    };
    if path.is_dir() {
        return Err(failed("it is a folder".to_owned()));
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    let temporary = folder.join(format!(
        ".{}.{}.tmp",
        name.to_string_lossy(),
        std::process::id()
    ));
    let written = write(&temporary)
        .and_then(|()| {
            File::open(&temporary)
                .and_then(|file| file.sync_all())
                .map_err(io)
        })
        .and_then(|()| fs::rename(&temporary, path).map_err(io));
    if let Err(error) = written {
        // The file may not exist; the first error is the one to report.
        let _ = fs::remove_file(&temporary);
        return Err(failed(error));
    }
    // The rename itself lasts once the folder is on the disk; not every system can synchronise a folder.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

impl Shared {
    fn vars(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        self.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_frozen(&self, name: &str) -> bool {
        self.frozen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_some_and(|rule| rule(name))
    }

    /// The tensor of a name, made on the first request; `shape` is `None` where the model takes whatever the file holds.
    fn get(
        &self,
        shape: Option<&Shape>,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let mut vars = self.vars();
        let var = if let Some(var) = vars.get(name) {
            var.clone()
        } else {
            let tensor = match (&self.source, shape) {
                (Source::Seed(seed), Some(shape)) => draw(*seed, name, init, shape)?
                    .to_dtype(dtype)?
                    .to_device(device)?,
                (Source::Seed(_), None) => {
                    return Err(Error::new(
                        codes::TENSOR_MISSING,
                        format!("expected a shape for `{name}`, which is to be drawn, found none"),
                    ));
                }
                (Source::Files(files), _) => files.load(name, dtype, device)?,
            };
            let var = Var::from_tensor(&tensor)?;
            vars.insert(name.to_owned(), var.clone());
            var
        };
        drop(vars);
        if let Some(shape) = shape
            && var.shape() != shape
        {
            return Err(Error::new(
                codes::TENSOR_SHAPE,
                format!(
                    "expected `{name}` of shape {:?}, found {:?}",
                    shape.dims(),
                    var.dims()
                ),
            ));
        }
        let tensor = if self.is_frozen(name) {
            var.as_detached_tensor()
        } else {
            var.as_tensor().clone()
        };
        // The same variable, seen in another type; its gradient comes back in its own.
        Ok(if tensor.dtype() == dtype {
            tensor
        } else {
            tensor.to_dtype(dtype)?
        })
    }
}

struct Backend(Arc<Shared>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.get(Some(&shape), name, init, dtype, device)?)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.0.get(None, name, Init::default(), dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        match &self.0.source {
            Source::Seed(_) => self.0.vars().contains_key(name),
            Source::Files(files) => files.contains(name),
        }
    }
}

/// Draws a tensor as candle's `Init::var` would, from the stream of (seed, name).
fn draw(seed: u64, name: &str, init: Init, shape: &Shape) -> Result<Tensor> {
    let stream = Stream::new(seed, name);
    let count = shape.elem_count();
    let numbers = |f: &(dyn Fn(u64) -> f64 + Sync)| -> Result<Tensor> {
        let data: Vec<f32> = (0..count as u64)
            .into_par_iter()
            .map(|i| f(i) as f32)
            .collect();
        Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
    };
    match init {
        Init::Const(value) => Ok(Tensor::full(value as f32, shape, &Device::Cpu)?),
        Init::Randn { mean, stdev } => numbers(&|i| mean + stdev * stream.normal(i)),
        Init::Uniform { lo, up } => numbers(&|i| lo + (up - lo) * stream.uniform(i)),
        Init::Kaiming {
            dist,
            fan,
            non_linearity,
        } => {
            let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            let bound = 3_f64.sqrt() * stdev;
            match dist {
                NormalOrUniform::Normal => numbers(&|i| stdev * stream.normal(i)),
                NormalOrUniform::Uniform => numbers(&|i| bound * (2.0 * stream.uniform(i) - 1.0)),
            }
        }
    }
}

#[cfg(test)]
mod tests;
