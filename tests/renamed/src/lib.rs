//! The facade under another name: `crate = ..` says how emitted code calls it.

/// A model of the tests.
#[sequences::sequence_parallel(crate = sequences)]
#[allow(missing_docs, unreachable_pub, clippy::pedantic)]
pub mod window {
    include!("../../models/window.rs");
}

/// The same where the facade is reached through a module of one's own.
pub mod vendored {
    pub use sequences as of_others;

    /// A model of the tests.
    #[sequences::sequence_parallel(crate = crate::vendored::of_others)]
    #[allow(missing_docs, unreachable_pub, clippy::pedantic)]
    pub mod window {
        include!("../../models/window.rs");
    }
}

#[cfg(test)]
mod tests {
    use sequences::testing::{Cases, assert_equivalent};

    #[test]
    fn a_renamed_dependency_trains_the_same() {
        macro_rules! check {
            ($module:path) => {{
                use $module as model;
                let config = model::Config {
                    vocab: 32,
                    hidden: 16,
                    layers: 1,
                    heads: 4,
                    kv_heads: 2,
                    key_width: 4,
                    value_width: 6,
                    window: 5,
                    cap: 5.0,
                };
                let cases = Cases {
                    sp: vec![2],
                    vocabulary: 32,
                    seq_len: 10,
                    ..Cases::default()
                };
                assert_equivalent(&cases, |vb, tokens| {
                    model::Model::load(vb, &config)?.forward(tokens)
                });
            }};
        }
        check!(super::window);
        check!(super::vendored::window);
    }
}
