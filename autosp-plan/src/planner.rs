//! What a training step needs in memory and time, and which choices make it fit.
//!
//! [`Model`] has the sizes of a model, [`Machine`] those of the machine, [`Rates`] how fast it is. From a [`Choice`] (mesh, `ZeRO` stage,
//! policies, groups, tiles) follow [`Memory`] and [`Time`] by formulas that are written where they are computed; docs/memory.md has them
//! together, with how well they do against measured steps. [`estimate`] finds the fastest choice that fits, the longest sequence, and
//! what would let it be longer.
//!
//! Everything here is plain data: nothing is measured and nothing is run.

mod ability;
mod advice;
mod auto;
mod case;
mod choice;
mod graph;
mod keep;
mod machine;
mod memory;
mod model;
mod rates;
mod search;
mod time;

pub use crate::settings::Keep;
pub use ability::{Abilities, Ability};
pub use advice::Advice;
pub use choice::{Choice, Pins};
pub use keep::Layers;
pub use machine::Machine;
pub use memory::{Limiter, Memory, Part};
pub use model::{Model, Window};
pub use rates::{Coefficients, Rates, RatesError};
pub use search::{Estimate, Job, choose, estimate};
pub use time::Time;

#[cfg(test)]
mod tests;
