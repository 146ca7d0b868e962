//! Random numbers by counter: number `i` of stream `key` is a function of the two, so that every rank, mesh and number of threads
//! draws the same ones, in any order.
//!
//! The generator is `SplitMix64` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), whose state is a
//! counter.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// One stream of numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream {
    key: u64,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Stream {
    /// The stream of `seed` for one purpose.
    pub(crate) fn new(seed: u64, purpose: &str) -> Self {
        // FNV-1a over the name, then mixed with the seed.
        let name = purpose.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3)
        });
        Self {
            key: mix(mix(seed.wrapping_add(GOLDEN)) ^ name),
        }
    }

    /// A stream of its own for each number.
    pub(crate) fn keyed(self, n: u64) -> Self {
        Self {
            key: mix(self.key ^ mix(n.wrapping_add(GOLDEN))),
        }
    }

    /// 64 random bits.
    pub(crate) fn bits(self, i: u64) -> u64 {
        mix(self
            .key
            .wrapping_add(i.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// Uniform in `[0, 1)`, with 53 bits.
    pub(crate) fn uniform(self, i: u64) -> f64 {
        (self.bits(i) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller.
    pub(crate) fn normal(self, i: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(2 * i)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(2 * i + 1)).cos()
    }

    /// Uniform in `0..n`; 0 for `n = 0`. The bias is below n / 2^64.
    pub(crate) fn below(self, i: u64, n: u64) -> u64 {
        ((u128::from(self.bits(i)) * u128::from(n)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_seed_and_purpose_and_repeat() {
        let draw = |seed, purpose| {
            (0..4)
                .map(|i| Stream::new(seed, purpose).bits(i))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let stream = Stream::new(7, "moments");
        let n = 100_000;
        let moments = |f: &dyn Fn(u64) -> f64| {
            let mean = (0..n).map(f).sum::<f64>() / n as f64;
            (
                mean,
                (0..n).map(|i| (f(i) - mean).powi(2)).sum::<f64>() / n as f64,
            )
        };
        let (mean, variance) = moments(&|i| stream.uniform(i));
        assert!(
            (mean - 0.5).abs() < 0.005 && (variance - 1.0 / 12.0).abs() < 0.002,
            "{mean} {variance}"
        );
        let (mean, variance) = moments(&|i| stream.normal(i));
        assert!(
            mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02,
            "{mean} {variance}"
        );
        let (mean, _) = moments(&|i| stream.below(i, 10) as f64);
        assert!((mean - 4.5).abs() < 0.05, "{mean}");
        assert!((0..n).all(|i| stream.below(i, 10) < 10));
    }
}
