//! Where ranks compute: each on the processor, on a GPU of its own, or all on one GPU.

use std::sync::Arc;

use autosp_plan::Settings;
use autosp_plan::settings::Device as Kind;
use candle_core::Device;

use super::launched::launched;
use super::sp::{Groups, Sp};
use crate::comm::{Engine, Group, LocalEngine, World};
use crate::{Ledger, Mesh, Result};

/// What the ranks of a run compute on.
pub(super) enum Place {
    /// All ranks on one device: parts are handed over by reference.
    Shared(Device),
    /// A GPU for each rank: the first rank of this process has the one of this number.
    #[cfg(feature = "cuda")]
    Own { first_rank: usize, first: usize },
}

impl Place {
    /// The place that the settings ask for, in a process of all ranks.
    ///
    /// # Errors
    /// As [`of_process`](Self::of_process).
    pub(super) fn of(settings: &Settings) -> Result<Self> {
        // Each process of a launched run has a GPU of its own, also for what it does by itself.
        let own = launched().ok().flatten();
        Self::of_process(settings, 0, own.map_or(0, |launched| launched.gpu))
    }

    /// The place of the process whose first rank is `first_rank`, and whose first GPU is `first`.
    ///
    /// # Errors
    /// AS0410 if there is no GPU that can be used.
    #[cfg_attr(
        not(feature = "cuda"),
        allow(unused_variables, reason = "only GPUs have numbers")
    )]
    pub(super) fn of_process(settings: &Settings, first_rank: usize, first: usize) -> Result<Self> {
        match settings.device() {
            Kind::Cpu => Ok(Self::Shared(Device::Cpu)),
            #[cfg(feature = "cuda")]
            Kind::Cuda => Ok(Self::Own { first_rank, first }),
            #[cfg(feature = "cuda")]
            Kind::CudaShared => Ok(Self::Shared(crate::cuda::open(0)?.0)),
            #[cfg(not(feature = "cuda"))]
            Kind::Cuda | Kind::CudaShared => Err(crate::Error::new(
                autosp_plan::codes::CUDA_LIBRARY,
                "expected a program with the feature `cuda`, found one without",
            )
            .with_help("cargo run --features cuda")),
        }
    }

    /// The view of the run that `rank` has, on the thread of that rank.
    ///
    /// # Errors
    /// AS0410 and AS0411 if its GPU cannot be used; as [`Engine::wait`].
    #[cfg_attr(
        not(feature = "cuda"),
        allow(clippy::unnecessary_wraps, reason = "only a GPU can refuse")
    )]
    pub(super) fn connect(
        &self,
        world: &Arc<World>,
        mesh: Mesh,
        rank: usize,
        settings: &Settings,
    ) -> Result<Sp> {
        let ledger = Arc::new(Ledger::default());
        let mail = |kind: &'static str, members: Vec<usize>, place: usize| {
            let group = Group { kind, members };
            LocalEngine::new(Arc::clone(world), group, place, Arc::clone(&ledger))
        };
        let sp = mail("sp", mesh.sp_members(rank).collect(), mesh.sp_rank(rank));
        let dp = mail("dp", mesh.dp_members(rank), mesh.dp_rank(rank));
        let all = mail("world", (0..mesh.world()).collect(), rank);
        let (groups, device) = match self {
            Self::Shared(device) => {
                let boxed = |engine| -> Box<dyn Engine> { Box::new(engine) };
                let groups = Groups {
                    sp: boxed(sp),
                    dp: boxed(dp),
                    world: boxed(all),
                };
                (groups, device.clone())
            }
            #[cfg(feature = "cuda")]
            Self::Own { first_rank, first } => {
                use crate::comm::{NcclEngine, connect};
                let (device, gpu) = crate::cuda::open(rank - first_rank + first)?;
                let wires = connect(world, mesh, rank)?;
                let boxed = |mail, group| -> Box<dyn Engine> {
                    Box::new(NcclEngine::new(
                        mail,
                        gpu.clone(),
                        group,
                        wires.watch.clone(),
                    ))
                };
                let groups = Groups {
                    sp: boxed(sp, wires.sp.clone()),
                    dp: boxed(dp, wires.dp.clone()),
                    world: boxed(all, wires.world.clone()),
                };
                (groups, device)
            }
        };
        Ok(Sp::new(
            mesh,
            rank,
            groups,
            device,
            settings.clone(),
            ledger,
            Arc::clone(world),
        ))
    }
}
