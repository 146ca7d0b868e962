//! Drives candle-transformers' models, as their files stand, under `#[autosp::sequence_parallel]`, and holds them against the
//! same files without it on one device.
//!
//! A model is a line in `models.txt`, its name in one of the `models!` lists of `tests/`, and an adapter there.

mod driver;
mod numbers;

pub use driver::{Kind, Loss, Model, Zoo};
pub use numbers::{config, decoder, tokens, with};

/// candle-transformers' shared layers and helpers on candle's slow operations.
#[allow(warnings)]
pub mod slow {
    pub mod models {
        include!(concat!(env!("OUT_DIR"), "/with_tracing_slow.rs"));
    }
    include!(concat!(env!("OUT_DIR"), "/utils_slow.rs"));
}

/// The modules of some models, annotated below `models` and plain below `slow::models`, where the files' own paths lead.
#[macro_export]
macro_rules! models {
    ($($file:literal),* $(,)?) => {
        #[allow(unused)]
        pub mod models {
            pub use candle_transformers::models::with_tracing;
            $(include!(concat!(env!("OUT_DIR"), "/", $file, ".rs"));)*
        }
        #[allow(unused)]
        pub use candle_transformers::utils;
        #[allow(unused)]
        pub mod slow {
            pub mod models {
                pub use $crate::slow::models::with_tracing;
                $(include!(concat!(env!("OUT_DIR"), "/", $file, "_slow.rs"));)*
            }
            pub use $crate::slow::utils;
        }
    };
}

/// A test of one model. The adapter is written once, for the annotated and for the plain module `m`: it makes the model from a
/// config (JSON) and a `VarBuilder` and calls it with tokens `[b, s]`.
#[macro_export]
#[allow(
    clippy::crate_in_macro_def,
    reason = "the modules stand in the test's own crate"
)]
macro_rules! zoo {
    ($name:ident: $module:ident, $zoo:expr, |$m:ident, $config:ident, $vb:ident, $tokens:ident| $body:block) => {
        #[test]
        fn $name() {
            fn annotated(
                $config: &serde_json::Value,
                $vb: candle_nn::VarBuilder,
                $tokens: &candle::Tensor,
            ) -> candle::Result<candle::Tensor> {
                use crate::models::$module as $m;
                $body
            }
            fn plain(
                $config: &serde_json::Value,
                $vb: candle_nn::VarBuilder,
                $tokens: &candle::Tensor,
            ) -> candle::Result<candle::Tensor> {
                use crate::slow::models::$module as $m;
                $body
            }
            $crate::Zoo::check(&$zoo, stringify!($name), annotated, plain);
        }
    };
}

/// A test of the loss over all tokens of a model that gives a row for the last one alone. The first adapter calls the function
/// that the argument `loss` adds; the second gives the plain model's last row, and is asked for every beginning of the sequence.
#[macro_export]
#[allow(
    clippy::crate_in_macro_def,
    reason = "the modules stand in the test's own crate"
)]
macro_rules! zoo_loss {
    ($name:ident: $module:ident, $zoo:expr, |$m:ident, $config:ident, $vb:ident, $tokens:ident, $labels:ident| $loss:block, $last:block) => {
        #[test]
        fn $name() {
            fn annotated(
                $config: &serde_json::Value,
                $vb: candle_nn::VarBuilder,
                $tokens: &candle::Tensor,
                $labels: &candle::Tensor,
            ) -> candle::Result<candle::Tensor> {
                use crate::models::$module as $m;
                $loss
            }
            fn plain(
                $config: &serde_json::Value,
                $vb: candle_nn::VarBuilder,
                $tokens: &candle::Tensor,
            ) -> candle::Result<candle::Tensor> {
                use crate::slow::models::$module as $m;
                $last
            }
            $crate::Zoo::check_loss(&$zoo, stringify!($name), annotated, plain);
        }
    };
}
