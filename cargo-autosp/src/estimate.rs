//! `estimate`: what training a model needs in memory and time, without a GPU.

mod show;

use std::fs;
use std::path::{Path, PathBuf};

use autosp_plan::config::{ConfigError, Float, ModelConfig};
use autosp_plan::planner::{Abilities, Job, Layers, Machine, Model, Pins, Rates, estimate};
use autosp_plan::settings::{Place, Settings, Source};
use autosp_plan::{codes, io_reason, units};
use clap::Args;

use crate::{Failure, Format, Outcome, REFUSED};

/// What is to be trained, on what, and what is chosen already.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A Hugging Face config.json of a Llama, Qwen or Mistral, or its folder
    #[arg(long)]
    model: PathBuf,
    /// GPUs of all hosts together
    #[arg(long, default_value_t = 1)]
    gpus: usize,
    /// Memory of a GPU, such as 141GiB
    #[arg(long, value_parser = size, default_value = "141GiB")]
    memory: u64,
    /// Memory of a host, such as 2TiB
    #[arg(long, value_parser = size, default_value = "256GiB")]
    host_memory: u64,
    /// GPUs that share a host's memory
    #[arg(long, default_value_t = 8)]
    gpus_per_host: usize,
    /// Tokens of a sequence: 131072, 128K or 1M (1K = 1024)
    #[arg(long, value_parser = length)]
    seq: usize,
    /// Sequences of a step on each replica
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Type of parameters and activations: f64, f32, bf16 or f16; that of the file, else bf16
    #[arg(long, value_parser = float)]
    dtype: Option<Float>,
    /// A settings file, whose values are kept
    #[arg(long)]
    plan: Option<PathBuf>,
    /// Measured rates of the machine, as `doctor` writes them; `autosp-rates.toml` if it is there
    #[arg(long)]
    rates: Option<PathBuf>,
    /// Techniques to plan with beyond what the trainer of this version does: mixed, offload, mlp-tiles, loss-tiles, host-optimizer,
    /// zero-2, zero-3, or all
    #[arg(long, value_parser = Abilities::read, default_value = "")]
    assume: Abilities,
    /// Keep: ranks that share a sequence
    #[arg(long)]
    sp: Option<usize>,
    /// Keep: the ZeRO stage
    #[arg(long)]
    zero: Option<u8>,
    /// Keep: what blocks keep, such as qkv, input+offload or "all*4, input+offload"
    #[arg(long)]
    policy: Option<String>,
    /// Keep: head groups
    #[arg(long)]
    groups: Option<usize>,
    /// Keep: tiles of the feed-forward, 1 for none
    #[arg(long)]
    mlp_tiles: Option<usize>,
    /// Keep: tiles of the loss, 1 for none
    #[arg(long)]
    loss_tiles: Option<usize>,
    /// Keep: whether the optimizer's state lies on the host
    #[arg(long)]
    host_optimizer: Option<bool>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

fn size(text: &str) -> Result<u64, String> {
    units::size(text).ok_or_else(|| format!("expected a size such as 141GiB, found `{text}`"))
}

fn length(text: &str) -> Result<usize, String> {
    units::length(text).ok_or_else(|| format!("expected a length such as 128K, found `{text}`"))
}

fn float(text: &str) -> Result<Float, String> {
    let found = Float::ALL.into_iter().find(|float| float.name() == text);
    found.ok_or_else(|| format!("expected f32, bf16, f16 or f64, found `{text}`"))
}

/// Reads the model, plans and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let (job, sources) = job(arguments)?;
    let found = estimate(&job, arguments.seq).map_err(|text| wrong(&text))?;
    let code = if found.feasible { 0 } else { REFUSED };
    let name = arguments.model.display().to_string();
    let text = match arguments.format {
        Format::Text => show::text(&name, &job, &found, &sources),
        Format::Json => show::json(&name, &job, &found)?,
    };
    Ok(Outcome { text, code })
}

/// Who chose what is pinned: name and source.
type Sources = Vec<(&'static str, String)>;

fn job(arguments: &Arguments) -> Result<(Job, Sources), Failure> {
    let config = ModelConfig::open(&arguments.model).map_err(refused)?;
    let name = arguments.model.display().to_string();
    let model = Model::from_config(&name, &config).map_err(refused)?;
    let dtype = arguments.dtype.or(config.dtype).unwrap_or(Float::BF16);
    let machine = Machine {
        gpus: arguments.gpus,
        gpus_per_host: arguments.gpus_per_host.max(1),
        device_bytes: arguments.memory,
        host_bytes: arguments.host_memory,
    };
    let (pins, sources) = pins(arguments, &model)?;
    let mut abilities = Abilities::TRAINER;
    for ability in arguments.assume.iter() {
        abilities = abilities.with(ability);
    }
    let job = Job {
        rates: rates(arguments.rates.as_deref())?,
        dtype_bytes: dtype.bytes(),
        batch: arguments.batch,
        abilities,
        pins,
        ..Job::new(model, machine)
    };
    Ok((job, sources))
}

/// Flags, then what the settings file says.
fn pins(arguments: &Arguments, model: &Model) -> Result<(Pins, Sources), Failure> {
    let mut pins = Pins::default();
    let mut sources = Sources::new();
    if let Some(path) = &arguments.plan {
        let settings = Settings::default().with_path(path).map_err(|error| {
            let code = codes::find(error.code.id).unwrap_or(&codes::SETTINGS_FILE);
            Failure::new(code, error.message)
        })?;
        let said = |name: &str| match settings.source(name) {
            Some(source @ Source::File { .. }) => Some(source.to_string()),
            _ => None,
        };
        for name in ["sp", "groups", "zero", "policy", "optimizer"] {
            let Some(source) = said(name) else { continue };
            match name {
                "sp" => pins.sp = Some(settings.sp()),
                "groups" => pins.groups = Some(settings.groups()),
                "zero" => pins.stage = Some(settings.zero().number()),
                "optimizer" => pins.host_optimizer = Some(settings.optimizer() == Place::Host),
                _ => {
                    let layers = Layers::of_settings(settings.policies(), model.layers);
                    let refuse = |text| wrong(&format!("{}: `policy`: {text}", path.display()));
                    pins.layers = Some(layers.map_err(refuse)?);
                }
            }
            let name = if name == "optimizer" {
                "host_optimizer"
            } else {
                name
            };
            sources.push((name, source));
        }
    }
    let layers = arguments.policy.as_ref().map(|text| {
        Layers::read(text, model.layers).map_err(|text| wrong(&format!("--policy: {text}")))
    });
    let flags = Pins {
        sp: arguments.sp,
        stage: arguments.zero,
        host_optimizer: arguments.host_optimizer,
        layers: layers.transpose()?,
        groups: arguments.groups,
        mlp_tiles: arguments.mlp_tiles,
        loss_tiles: arguments.loss_tiles,
    };
    for name in flags.names() {
        sources.retain(|(known, _)| *known != name);
        sources.push((name, format!("flag --{}", name.replace('_', "-"))));
    }
    let pins = Pins {
        sp: flags.sp.or(pins.sp),
        stage: flags.stage.or(pins.stage),
        host_optimizer: flags.host_optimizer.or(pins.host_optimizer),
        layers: flags.layers.or(pins.layers),
        groups: flags.groups.or(pins.groups),
        ..flags
    };
    Ok((pins, sources))
}

/// Those of a file, or the defaults.
fn rates(path: Option<&Path>) -> Result<Rates, Failure> {
    let own = Path::new(Rates::FILE);
    let path = match path {
        Some(path) => path,
        None if own.is_file() => own,
        None => return Ok(Rates::default()),
    };
    let name = path.display();
    let text = fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot read `{name}`: {}", io_reason(&error));
        Failure::new(&codes::UNREADABLE_FILE, message)
    })?;
    Rates::read(&text).map_err(|error| Failure::new(&codes::RATES, format!("`{name}`: {error}")))
}

fn wrong(text: &str) -> Failure {
    Failure::new(&codes::ARGUMENT, text)
}

fn refused(error: ConfigError) -> Failure {
    let code = codes::find(error.code.id).unwrap_or(&codes::CONFIG);
    Failure::new(code, error.message)
}
