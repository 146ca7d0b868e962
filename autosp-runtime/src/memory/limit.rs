//! Memory that has run out: what for, what else is held, and which setting makes it less.

use std::cell::Cell;
use std::fmt::Write as _;

use autosp_plan::codes;
use autosp_plan::settings::{Place, Policy};
use autosp_plan::units::show_size;

use crate::{Error, Purpose, Result, Sp};

/// What a step does. The memory that is asked for in it is for its purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Blocks run and keep; the loss.
    Forward,
    /// Blocks walk back.
    Backward,
    /// Gradients are summed.
    Reduction,
    /// The optimizer steps.
    Update,
}

thread_local! {
    static DOING: Cell<Doing> = const { Cell::new(Doing::Forward) };
}

/// This thread, one rank, goes on to `doing`.
pub(crate) fn go_on_to(doing: Doing) {
    DOING.set(doing);
}

/// Makes sure that this rank holds no more than the setting `memory_limit`, and has not since this was asked last.
///
/// # Errors
/// AS0562 if it does.
pub(crate) fn expect_within(sp: &Sp) -> Result<()> {
    if let Some((purpose, bytes)) = sp.ledger().take_breach() {
        let limit = sp.settings().memory_limit().unwrap_or(u64::MAX);
        let text = format!(
            "expected at most {} on the device (`memory_limit`), found {}",
            show_size(limit),
            show_size(bytes)
        );
        return Err(refusal(sp, purpose, &text));
    }
    #[cfg(feature = "cuda")]
    if let Some(limit) = sp.settings().memory_limit()
        && sp.device().is_cuda()
    {
        let found = crate::cuda::memory(sp.device(), false)?.used;
        if found > limit {
            let text = format!(
                "expected at most {} on the device (`memory_limit`), found {}",
                show_size(limit),
                show_size(found)
            );
            return Err(refusal(sp, in_progress(), &text));
        }
    }
    Ok(())
}

/// The error with what the memory was wanted for, if it says that the device has none left.
pub(crate) fn explained(sp: &Sp, error: Error) -> Error {
    if error.code() == codes::OUT_OF_MEMORY || !is_out_of_memory(error.message()) {
        return error;
    }
    let text = format!("the device has no memory left ({})", error.message());
    refusal(sp, in_progress(), &text)
}

/// Whether a message of candle, of the driver or of a library says so.
fn is_out_of_memory(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    ["out_of_memory", "out of memory", "alloc_failed"]
        .iter()
        .any(|part| message.contains(part))
}

/// What memory is asked for now.
fn in_progress() -> Purpose {
    match DOING.get() {
        Doing::Forward => Purpose::Kept,
        Doing::Backward => Purpose::Working,
        Doing::Reduction => Purpose::Gradients,
        Doing::Update => Purpose::Optimizer,
    }
}

fn refusal(sp: &Sp, purpose: Purpose, text: &str) -> Error {
    let wanted = match purpose {
        Purpose::Parameters => "the parameters",
        Purpose::Gradients => "gradients",
        Purpose::Optimizer => "the optimizer",
        Purpose::Working => "the working set of a block",
        Purpose::Kept | Purpose::Host => "what the forward keeps",
    };
    let mut text = format!("memory for {wanted}: {text}; held:");
    let mut separator = "";
    for purpose in Purpose::ALL {
        let bytes = sp.ledger().bytes(purpose);
        if bytes > 0 {
            let _ = write!(text, "{separator} {} {}", purpose.name(), show_size(bytes));
            separator = ",";
        }
    }
    Error::new(codes::OUT_OF_MEMORY, text).with_help(help(sp, purpose))
}

/// The setting that makes it less.
fn help(sp: &Sp, purpose: Purpose) -> String {
    let settings = sp.settings();
    let several = sp.world_size() > 1;
    let more = || format!("AUTOSP_SP={}", 2 * settings.sp());
    match purpose {
        Purpose::Gradients if several && settings.zero().number() < 2 => "AUTOSP_ZERO=2".to_owned(),
        Purpose::Optimizer if several && settings.zero().number() < 1 => "AUTOSP_ZERO=1".to_owned(),
        Purpose::Optimizer | Purpose::Parameters | Purpose::Gradients
            if settings.optimizer() == Place::Device =>
        {
            "AUTOSP_OPTIMIZER=host".to_owned()
        }
        Purpose::Working if settings.tile() > 1024 => {
            format!("AUTOSP_TILE={}, or {}", settings.tile() / 4, more())
        }
        Purpose::Kept | Purpose::Host => match settings.policies().single() {
            Some(keep) if keep.offload => more(),
            Some(keep) if keep.policy == Policy::Input => "AUTOSP_POLICY=input+offload".to_owned(),
            Some(keep) => {
                let next = Policy::ALL.iter().position(|one| *one == keep.policy);
                let next = Policy::ALL[(next.unwrap_or(0) + 1).min(3)];
                format!("AUTOSP_POLICY={}", next.name())
            }
            None => "AUTOSP_POLICY=input".to_owned(),
        },
        _ => more(),
    }
}

#[cfg(test)]
mod tests {
    use autosp_plan::Settings;

    use super::*;
    use crate::run_with;

    #[test]
    fn what_ran_out_is_named_with_a_setting_that_helps() {
        run_with(Settings::default().with_dp(2), |sp| {
            let native = || {
                Error::new(
                    codes::CANDLE,
                    "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
                )
            };
            for (doing, wanted, help) in [
                (
                    Doing::Forward,
                    "what the forward keeps",
                    "AUTOSP_POLICY=qkv",
                ),
                (
                    Doing::Backward,
                    "the working set of a block",
                    "AUTOSP_TILE=16384, or AUTOSP_SP=2",
                ),
                (Doing::Reduction, "gradients", "AUTOSP_ZERO=2"),
                (Doing::Update, "the optimizer", "AUTOSP_ZERO=1"),
            ] {
                go_on_to(doing);
                let error = explained(sp, native());
                assert_eq!(error.code(), codes::OUT_OF_MEMORY);
                assert!(
                    error
                        .message()
                        .starts_with(&format!("memory for {wanted}: ")),
                    "{error}"
                );
                assert!(error.message().contains("OUT_OF_MEMORY"), "{error}");
                assert_eq!(error.help(), Some(help));
                // Said once.
                assert_eq!(explained(sp, error.copy()).message(), error.message());
            }
            let other = Error::new(codes::CANDLE, "shape mismatch");
            assert_eq!(explained(sp, other).message(), "shape mismatch");
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn settings_that_are_used_up_lead_to_the_next() {
        for (settings, purpose, expected) in [
            (
                Settings::default(),
                Purpose::Optimizer,
                "AUTOSP_OPTIMIZER=host",
            ),
            (
                Settings::default().with_optimizer(Place::Host),
                Purpose::Optimizer,
                "AUTOSP_SP=2",
            ),
            (
                Settings::default().with_policy(Policy::Input),
                Purpose::Kept,
                "AUTOSP_POLICY=input+offload",
            ),
            (
                Settings::default().with("policy", "input+offload").unwrap(),
                Purpose::Kept,
                "AUTOSP_SP=2",
            ),
            (
                Settings::default().with("policy", "all*2, qkv").unwrap(),
                Purpose::Kept,
                "AUTOSP_POLICY=input",
            ),
            (
                Settings::default().with_tile(64),
                Purpose::Working,
                "AUTOSP_SP=2",
            ),
        ] {
            run_with(settings, |sp| {
                assert_eq!(help(sp, purpose), expected);
                Ok(())
            })
            .unwrap();
        }
    }
}
