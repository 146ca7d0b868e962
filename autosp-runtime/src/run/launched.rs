//! What a launcher says about this process: which rank it is, of how many, and where the others are found.

use std::fmt;

use autosp_plan::settings::{Device, RENDEZVOUS_VARIABLE, Source};
use autosp_plan::{Settings, codes};

use crate::{Error, Result};

/// Who started this process as one rank of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// torchrun, `cargo autosp launch`, or whoever else sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// mpirun of Open MPI.
    OpenMpi,
    /// srun of SLURM.
    Slurm,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torchrun => "torchrun's variables",
            Self::OpenMpi => "Open MPI's variables",
            Self::Slurm => "SLURM's variables",
        })
    }
}

impl Launcher {
    /// The variable that says how many ranks there are.
    pub(super) fn world_variable(self) -> &'static str {
        match self {
            Self::Torchrun => TORCHRUN.world[0],
            Self::OpenMpi => OPEN_MPI.world[0],
            Self::Slurm => SLURM.world[1],
        }
    }
}

/// This process as one rank of a launched run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Launched {
    /// Whose variables say so.
    pub by: Launcher,
    /// This process's rank.
    pub rank: usize,
    /// All ranks.
    pub world: usize,
    /// This process's place among those of its host.
    pub local_rank: usize,
    /// Its GPU, counted among those it is shown: that of its place, or the only one (`srun --gpus-per-task=1`).
    pub gpu: usize,
    /// Whether all ranks are on this host.
    pub one_host: bool,
    /// Where rank 0 is found: `host:port`.
    pub address: String,
}

impl Launched {
    /// The settings as a run of this launch has them: sp is what remains of the ranks if nobody has said it.
    ///
    /// # Errors
    /// AS0409 if they say another number of ranks; AS0312 if all ranks are to share one GPU.
    pub fn fit(&self, settings: &Settings) -> Result<Settings> {
        if settings.device() == Device::CudaShared {
            let text = "expected ranks on threads for `device` = \"cuda-shared\", found launched processes";
            return Err(Error::new(codes::SETTINGS_CONTRADICT, text)
                .with_help("AUTOSP_DEVICE=cuda, or run the program without a launcher"));
        }
        let (dp, sp, world) = (settings.dp(), settings.sp(), self.world);
        if dp.checked_mul(sp) == Some(world) {
            return Ok(settings.clone());
        }
        let unsaid = settings.source("sp") == Some(&Source::Default);
        if unsaid && world.is_multiple_of(dp) {
            let mut settings = settings.clone();
            let source = Source::Variable(self.by.world_variable().to_owned());
            settings.set("sp", &(world / dp).to_string(), source)?;
            return Ok(settings);
        }
        let source = |name| settings.source(name).map(ToString::to_string);
        let text = format!(
            "expected dp x sp = {world} ranks, as many as were launched, found dp {dp} ({}) x sp {sp} ({})",
            source("dp").unwrap_or_default(),
            source("sp").unwrap_or_default()
        );
        let help = if world.is_multiple_of(dp) {
            format!("AUTOSP_SP={} AUTOSP_DP={dp}", world / dp)
        } else {
            format!("cargo autosp launch --ranks {} -- PROGRAM", dp * sp)
        };
        Err(Error::new(codes::RANKS_DIFFER, text).with_help(help))
    }
}

/// What a launcher has said of this process; `None` if nothing has started several, as for a program that is run by itself.
///
/// # Errors
/// AS0314 if a launcher's variables are incomplete, make no sense, or contradict those of another; AS0408 if they leave open where
/// rank 0 is found.
pub fn launched() -> Result<Option<Launched>> {
    read(&|name| {
        std::env::var(name)
            .ok()
            .filter(|text| !text.trim().is_empty())
    })
}

/// The variables of a launcher: rank, world, place on the host.
struct Names {
    by: Launcher,
    rank: &'static str,
    world: &'static [&'static str],
    local_rank: &'static str,
    /// Ranks on this host, or hosts.
    local: Local,
}

enum Local {
    Ranks(&'static str),
    Hosts(&'static [&'static str]),
}

const TORCHRUN: Names = Names {
    by: Launcher::Torchrun,
    rank: "RANK",
    world: &["WORLD_SIZE"],
    local_rank: "LOCAL_RANK",
    local: Local::Ranks("LOCAL_WORLD_SIZE"),
};

const OPEN_MPI: Names = Names {
    by: Launcher::OpenMpi,
    rank: "OMPI_COMM_WORLD_RANK",
    world: &["OMPI_COMM_WORLD_SIZE"],
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local: Local::Ranks("OMPI_COMM_WORLD_LOCAL_SIZE"),
};

/// A step may have fewer tasks than its job.
const SLURM: Names = Names {
    by: Launcher::Slurm,
    rank: "SLURM_PROCID",
    world: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
    local_rank: "SLURM_LOCALID",
    local: Local::Hosts(&["SLURM_STEP_NUM_NODES", "SLURM_NNODES"]),
};

/// A variable of the environment, if it is set and not empty.
type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

fn refuse(text: String) -> Error {
    Error::new(codes::LAUNCH_VARIABLES, text)
}

fn read(get: Get<'_>) -> Result<Option<Launched>> {
    let has = |name: &str| get(name).is_some();
    let torchrun = [
        TORCHRUN.rank,
        "WORLD_SIZE",
        TORCHRUN.local_rank,
        "LOCAL_WORLD_SIZE",
    ];
    // A batch script has SLURM's variables as well, but is one process: only a step of srun counts.
    let claims = [
        (torchrun.iter().any(|name| has(name)), &TORCHRUN),
        (has(OPEN_MPI.rank), &OPEN_MPI),
        (has(SLURM.rank) && has("SLURM_STEP_ID"), &SLURM),
    ];
    let mut sets = Vec::new();
    for (_, names) in claims.iter().filter(|(claims, _)| *claims) {
        sets.push(names.read(get)?);
    }
    let Some(first) = sets.first().cloned() else {
        return Ok(None);
    };
    // torchrun says that it started this process, and srun starts torchruns, one a host; so does mpirun, and srun mpirun's daemons.
    let is_innermost = first.by == Launcher::OpenMpi
        || first.by == Launcher::Torchrun && has("TORCHELASTIC_RUN_ID");
    let place = |set: &Launched| (set.rank, set.world, set.local_rank);
    if let Some(other) = sets.iter().find(|other| place(other) != place(&first))
        && !is_innermost
    {
        let say = |set: &Launched| {
            format!(
                "rank {} of {}, {} on its host ({})",
                set.rank, set.world, set.local_rank, set.by
            )
        };
        return Err(refuse(format!(
            "expected launchers that agree, found {} and {}",
            say(&first),
            say(other)
        ))
        .with_help("env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u LOCAL_WORLD_SIZE PROGRAM, if those are left over"));
    }
    if first.world == 1 {
        return Ok(None);
    }
    let address = address(get, &first)?;
    Ok(Some(Launched { address, ..first }))
}

impl Names {
    fn read(&self, get: Get<'_>) -> Result<Launched> {
        let number = |name: &str| -> Result<usize> {
            let Some(text) = get(name) else {
                let text = format!("expected {name} beside {}, found none", self.rank);
                return Err(refuse(text).with_help(self.help()));
            };
            text.trim().parse().map_err(|_| {
                refuse(format!(
                    "expected {name} to be a whole number, found `{text}`"
                ))
            })
        };
        let first_of = |names: &[&'static str]| {
            let known = names.iter().copied().find(|name| get(name).is_some());
            known.unwrap_or(names[names.len() - 1])
        };
        let (rank, world) = (number(self.rank)?, number(first_of(self.world))?);
        let local_rank = number(self.local_rank)?;
        let (one_host, local_size) = match self.local {
            Local::Ranks(name) => {
                let local = number(name)?;
                (local == world, local)
            }
            Local::Hosts(names) => (number(first_of(names))? == 1, world),
        };
        if rank >= world || local_rank >= local_size || local_size > world {
            return Err(refuse(format!(
                "expected ranks below their number, found rank {rank} of {world} and {local_rank} of at most {local_size} on its host ({})",
                self.by
            )));
        }
        let shown = get("CUDA_VISIBLE_DEVICES").map(|list| list.split(',').count());
        Ok(Launched {
            by: self.by,
            rank,
            world,
            local_rank,
            gpu: if shown == Some(1) { 0 } else { local_rank },
            one_host,
            address: String::new(),
        })
    }

    fn help(&self) -> String {
        match self.by {
            Launcher::Torchrun => format!(
                "cargo autosp launch --ranks N -- PROGRAM, or `env -u {}` for a run of its own",
                self.rank
            ),
            _ => format!("env -u {} PROGRAM for a run of its own", self.rank),
        }
    }
}

/// Where rank 0 is found.
fn address(get: Get<'_>, set: &Launched) -> Result<String> {
    if let Some(address) = get(RENDEZVOUS_VARIABLE) {
        let port = address
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse::<u16>().ok());
        return match port {
            Some(_) => Ok(address),
            None => Err(refuse(format!(
                "expected {RENDEZVOUS_VARIABLE} to be host:port, found `{address}`"
            ))),
        };
    }
    match (get("MASTER_ADDR"), get("MASTER_PORT")) {
        (Some(host), Some(text)) => {
            let port: u16 = text.trim().parse().map_err(|_| {
                refuse(format!("expected MASTER_PORT to be a port, found `{text}`"))
            })?;
            // torchrun's own store may listen at that port.
            let taken = get("TORCHELASTIC_USE_AGENT_STORE")
                .is_some_and(|text| text.eq_ignore_ascii_case("true"));
            Ok(join(
                &host,
                if taken {
                    port.wrapping_add(1).max(1024)
                } else {
                    port
                },
            ))
        }
        (None, None) if set.by == Launcher::Slurm => {
            let hosts = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"));
            let number = |name: &str| get(name).and_then(|text| text.parse::<u64>().ok());
            match (
                hosts.as_deref().and_then(first_host),
                number("SLURM_JOB_ID"),
            ) {
                (Some(host), Some(job)) => {
                    // Below the ports that systems give away by themselves; jobs and steps that share a host differ.
                    let step = number("SLURM_STEP_ID").unwrap_or(0);
                    Ok(join(
                        &host,
                        12_000 + (job.wrapping_mul(37).wrapping_add(step) % 20_000) as u16,
                    ))
                }
                _ => Err(no_address(set)),
            }
        }
        (None, None) => Err(no_address(set)),
        (host, _) => {
            let (there, missing) = if host.is_some() {
                ("MASTER_ADDR", "MASTER_PORT")
            } else {
                ("MASTER_PORT", "MASTER_ADDR")
            };
            Err(refuse(format!(
                "expected {missing} beside {there}, found none"
            )))
        }
    }
}

fn no_address(set: &Launched) -> Error {
    let pass = match set.by {
        Launcher::OpenMpi => "mpirun -x AUTOSP_RENDEZVOUS=HOST:PORT",
        _ => "export AUTOSP_RENDEZVOUS=HOST:PORT",
    };
    Error::new(
        codes::RENDEZVOUS,
        format!("expected the place of rank 0 in {RENDEZVOUS_VARIABLE}, or in MASTER_ADDR and MASTER_PORT, found none ({})", set.by),
    )
    .with_help(pass)
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        return format!("[{host}]:{port}");
    }
    format!("{host}:{port}")
}

/// The first of a list of hosts as SLURM writes it: `gpu01` of `gpu[01-04,07],login`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let Some(numbers) = rest.strip_prefix('[') else {
        return (!name.is_empty()).then(|| name.to_owned());
    };
    let (numbers, rest) = numbers.split_once(']')?;
    let first = numbers.split([',', '-']).next()?;
    let end = rest.find(',').unwrap_or(rest.len());
    Some(format!("{name}{first}{}", &rest[..end]))
}

#[cfg(test)]
pub(super) mod tests;
