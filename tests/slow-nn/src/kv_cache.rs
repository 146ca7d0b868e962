//! `candle_nn::kv_cache` for one forward over a whole sequence: candle's caches copy into buffers or detach what they are given,
//! either of which ends the gradient. These give back what is appended to an empty cache and keep nothing.

use candle_core::{Result, Tensor};

pub use candle_nn::kv_cache::*;

macro_rules! empty {
    ($($(#[$doc:meta])* $name:ident($($arg:ident),*);)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name;

        impl $name {
            /// An empty cache.
            pub fn new($($arg: usize),*) -> Self {
                let _ = ($($arg),*);
                Self
            }

            /// Keys and values as they are.
            ///
            /// # Errors
            /// None.
            pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
                Ok((k.clone(), v.clone()))
            }

            /// There is nothing to forget.
            pub fn reset(&mut self) {}

            /// Tokens that it holds: none.
            pub fn current_seq_len(&self) -> usize {
                0
            }
        }
    )*};
}

empty! {
    /// A growing buffer.
    KvCache(dim, max_seq_len);
    /// A buffer of the last tokens.
    RotatingKvCache(dim, max_seq_len);
    /// A list that is joined anew.
    ConcatKvCache(dim);
}
