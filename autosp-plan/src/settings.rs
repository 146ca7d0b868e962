//! Settings: how many ranks, how they exchange, what they keep.
//!
//! One static table, [`KEYS`], says everything about a setting: its name, type, default, meaning and when it is read. The file
//! reader, the environment, the command line and the documentation all follow that table, so that a setting is added in
//! one place.
//!
//! A value comes from the first of these that names it, and remembers which: a flag of the command line, a variable
//! `AUTOSP_<NAME>`, the file `autosp.toml`, the program, the default.

mod build;
mod file;
mod keys;
mod policies;
mod source;
mod typed;
mod value;

use std::fmt::Write as _;
use std::path::Path;

pub use build::{BUILD_KEYS, BuildEntry, build, build_reference};
pub use keys::{KEYS, Key, Kind, ReadAt, find, reference};
pub use policies::{Keep, Policies};
pub use source::{SettingsError, Source};
pub use value::Value;

use crate::codes;

/// Prefix of the environment variables: `AUTOSP_SP=4` sets `sp`.
pub const VARIABLE_PREFIX: &str = "AUTOSP_";

/// The settings file that [`Settings::load`] looks for in the working folder.
pub const FILE: &str = "autosp.toml";

/// The variable that names another settings file.
pub const FILE_VARIABLE: &str = "AUTOSP_SETTINGS";

/// The variable with what only the processes of one launched run know; it is no setting.
pub const SECRET_VARIABLE: &str = "AUTOSP_SECRET";

/// The variable with the place, `host:port`, at which the processes of a launched run find rank 0; it is no setting.
pub const RENDEZVOUS_VARIABLE: &str = "AUTOSP_RENDEZVOUS";

/// Which attention computes the heads of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Tiles of keys with a running softmax: memory grows with the length, not with its square.
    Tiled,
    /// The whole score matrix at once: short to read, the yardstick of the others.
    Reference,
}

/// What the ranks compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
    /// A GPU for each rank.
    Cuda,
    /// The first GPU for all ranks.
    CudaShared,
}

/// What a forward keeps for its backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Every activation.
    All,
    /// Of each block its input, and of each site in it queries, keys, values and the attention's result. The rest is computed again
    /// in the backward.
    Qkv,
    /// Of each block its input, and of each site in it the attention's result. Queries, keys and values are computed and exchanged
    /// again; attention is not.
    Attention,
    /// The input of each block, which is computed again in the backward, attention and exchanges included.
    Input,
}

impl Policy {
    /// All policies, from the one that keeps most.
    pub const ALL: [Self; 4] = [Self::All, Self::Qkv, Self::Attention, Self::Input];

    /// As a settings file writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Qkv => "qkv",
            Self::Attention => "attention",
            Self::Input => "input",
        }
    }
}

/// What the ranks divide among them of what training keeps for each parameter (Rajbhandari et al., `ZeRO`, 2020).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// Nothing: every rank holds everything.
    Stage0,
    /// The optimizer's state and master weights.
    Stage1,
    /// The gradients too, while the backward runs.
    Stage2,
}

impl Zero {
    /// All stages.
    pub const ALL: [Self; 3] = [Self::Stage0, Self::Stage1, Self::Stage2];

    /// The number of the stage.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether each rank holds and updates its share of the optimizer's state.
    pub const fn divides_state(self) -> bool {
        !matches!(self, Self::Stage0)
    }

    /// As a settings file writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stage0 => "0",
            Self::Stage1 => "1",
            Self::Stage2 => "2",
        }
    }
}

/// Who says what a step keeps and cuts, where nobody has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// The planner, for a trainer that knows what it trains.
    Auto,
    /// The defaults.
    Fixed,
}

/// Which memory something is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// That of the device.
    Device,
    /// That of the host.
    Host,
}

impl Place {
    /// As a settings file writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
        }
    }
}

/// The bytes of a limit that is none, an EiB.
pub const NO_LIMIT: u64 = 1 << 60;

/// The settings of a run. Each value remembers its [`Source`].
///
/// ```
/// use autosp_plan::Settings;
///
/// let settings = Settings::default().with_sp(4).with_groups(2);
/// assert_eq!((settings.sp(), settings.dp(), settings.groups()), (4, 1, 2));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// One entry a row of [`KEYS`], in its order.
    values: Vec<(Value, Source)>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            values: KEYS
                .iter()
                .map(|key| (key.default.clone(), Source::Default))
                .collect(),
        }
    }
}

impl Settings {
    /// The settings file, overridden by the variables `AUTOSP_*`. The file is the one that `AUTOSP_SETTINGS` names, else `autosp.toml`
    /// of the working folder if there is one.
    ///
    /// # Errors
    /// As [`with_path`](Self::with_path) and [`from_env`](Self::from_env).
    pub fn load() -> Result<Self, SettingsError> {
        Self::default().loaded()
    }

    /// As [`load`](Self::load), with what the program has set in place of the defaults.
    ///
    /// ```
    /// use autosp_plan::Settings;
    ///
    /// # fn main() -> Result<(), autosp_plan::settings::SettingsError> {
    /// let settings = Settings::default().with_sp(4).loaded()?; // 4 ranks, unless the user says otherwise
    /// # assert!(settings.sp() > 0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn loaded(self) -> Result<Self, SettingsError> {
        let settings = match std::env::var_os(FILE_VARIABLE) {
            Some(path) => self.with_path(Path::new(&path))?,
            None if Path::new(FILE).is_file() => self.with_path(Path::new(FILE))?,
            None => self,
        };
        settings.with_environment()
    }

    /// The defaults, overridden by the variables `AUTOSP_*` of this process.
    ///
    /// # Errors
    /// A variable with the prefix that names no setting, or whose value does not fit its type.
    pub fn from_env() -> Result<Self, SettingsError> {
        Self::default().with_environment()
    }

    /// Takes the variables `AUTOSP_*` of this process.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn with_environment(self) -> Result<Self, SettingsError> {
        self.with_variables(std::env::vars_os().filter_map(|(name, value)| {
            Some((
                name.into_string().ok()?,
                value.to_string_lossy().into_owned(),
            ))
        }))
    }

    /// Takes the variables `AUTOSP_*` out of `variables`; others are left alone.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn with_variables(
        mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, SettingsError> {
        for (name, text) in variables {
            if [FILE_VARIABLE, SECRET_VARIABLE, RENDEZVOUS_VARIABLE].contains(&name.as_str()) {
                continue;
            }
            if let Some(key) = name.strip_prefix(VARIABLE_PREFIX) {
                self.set(
                    &key.to_ascii_lowercase(),
                    &text,
                    Source::Variable(name.clone()),
                )?;
            }
        }
        Ok(self)
    }

    /// Takes the values of a settings file.
    ///
    /// # Errors
    /// AS0310 if it cannot be read; else as [`with_file`](Self::with_file).
    pub fn with_path(self, path: &Path) -> Result<Self, SettingsError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| SettingsError {
            code: codes::SETTINGS_FILE,
            message: format!("{name}: {}", crate::io_reason(&error)),
            help: None,
        })?;
        self.with_file(&name, &text)
    }

    /// Takes the values of a settings file, given as its text; `path` is only named in messages.
    ///
    /// # Errors
    /// The text is not TOML (with line and column), names no setting, or holds a value of the wrong type.
    pub fn with_file(mut self, path: &str, text: &str) -> Result<Self, SettingsError> {
        // `[build]` is for the compiler.
        let entries = file::read(path, text)?.into_iter();
        for entry in entries.filter(|entry| !entry.is_build()) {
            let source = Source::File {
                path: path.to_owned(),
                line: entry.line,
            };
            let place = format!("{path}:{}:{}", entry.line, entry.column);
            let index = lookup(&entry.name, &place)?;
            let value = KEYS[index]
                .accept(&entry.value)
                .map_err(|found| KEYS[index].refuse(&found, &place))?;
            self.put(index, value, source)?;
        }
        Ok(self)
    }

    /// Sets `name` to the value written as `text`, unless a stronger source has set it.
    ///
    /// # Errors
    /// No setting has that name, the text does not fit its type, or an equally strong source has said something else.
    pub fn set(&mut self, name: &str, text: &str, source: Source) -> Result<(), SettingsError> {
        let index = lookup(name, &source.to_string())?;
        let value = KEYS[index]
            .parse(text)
            .map_err(|found| KEYS[index].refuse(&found, &source.to_string()))?;
        self.put(index, value, source)
    }

    /// Sets `name` from the program, as text.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn with(mut self, name: &str, text: &str) -> Result<Self, SettingsError> {
        self.set(name, text, Source::Program)?;
        Ok(self)
    }

    /// Every setting with its value and where it came from, in the order of [`KEYS`].
    pub fn entries(&self) -> impl Iterator<Item = (&'static Key, Value, &Source)> {
        KEYS.iter()
            .zip(&self.values)
            .map(|(key, (value, source))| (key, value.clone(), source))
    }

    /// Where the value of `name` came from; `None` if there is no such setting.
    pub fn source(&self, name: &str) -> Option<&Source> {
        find(name).map(|index| &self.values[index].1)
    }

    /// The same settings on a mesh that the program needs, whoever said otherwise.
    #[must_use]
    pub fn on_mesh(mut self, dp: usize, sp: usize) -> Self {
        for (name, n) in [("dp", dp), ("sp", sp)] {
            if let Some(index) = find(name) {
                self.values[index] = (Value::Count(n), Source::Program);
            }
        }
        self
    }

    /// Every setting, one a line: its value as a file writes it, and where it came from.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (key, value, source) in self.entries() {
            let value = value.to_string();
            let _ = writeln!(text, "{:<14} = {value:<12} {source}", key.name);
        }
        text
    }

    fn program(mut self, name: &str, value: Value) -> Self {
        if let Some(index) = find(name)
            && self.values[index].1.strength() <= Source::Program.strength()
        {
            self.values[index] = (value, Source::Program);
        }
        self
    }

    /// Takes a value that the planner has chosen, unless somebody has said another.
    pub(crate) fn choose(&mut self, name: &str, value: Value) {
        if let Some(index) = find(name)
            && matches!(self.values[index].1, Source::Default | Source::Chosen)
        {
            self.values[index] = (value, Source::Chosen);
        }
    }

    /// What the planner has chosen, for other ranks: a line each.
    pub fn chosen(&self) -> String {
        let chosen = self
            .entries()
            .filter(|(_, _, source)| **source == Source::Chosen);
        let line = |(key, value, _): (&Key, Value, &Source)| {
            format!("{}={}\n", key.name, value.to_string().trim_matches('"'))
        };
        chosen.map(line).collect()
    }

    /// Takes what the planner has [chosen](Self::chosen) on another rank.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn with_chosen(mut self, text: &str) -> Result<Self, SettingsError> {
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            self.set(name, value, Source::Chosen)?;
        }
        Ok(self)
    }

    /// Whether somebody has said the value of `name`: it is neither the default nor chosen.
    pub fn is_said(&self, name: &str) -> bool {
        !matches!(
            self.source(name),
            None | Some(Source::Default | Source::Chosen)
        )
    }

    /// A program may change its mind; two files, two spellings of a variable or two flags that disagree are refused, since which of
    /// them was meant cannot be known.
    fn put(&mut self, index: usize, value: Value, source: Source) -> Result<(), SettingsError> {
        let (known, from) = &self.values[index];
        let own = matches!(source, Source::Program | Source::Chosen);
        if source.strength() == from.strength() && !own && *known != value {
            return Err(SettingsError {
                code: codes::SETTINGS_CONTRADICT,
                message: format!(
                    "setting `{}`: expected one value, found {known} ({from}) and {value} ({source})",
                    KEYS[index].name
                ),
                help: None,
            });
        }
        if source.strength() >= from.strength() {
            self.values[index] = (value, source);
        }
        Ok(())
    }
}

/// The row of `name`, or a refusal that lists the rows.
fn lookup(name: &str, place: &str) -> Result<usize, SettingsError> {
    find(name).ok_or_else(|| SettingsError {
        code: codes::UNKNOWN_SETTING,
        message: format!(
            "unknown setting `{name}` ({place}), expected one of {}",
            keys::names()
        ),
        help: keys::nearest(name).map(|known| format!("did you mean `{known}`?")),
    })
}

#[cfg(test)]
mod tests;
