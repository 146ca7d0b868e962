//! How fast a machine is, and how much traffic the runtime makes on it.

use std::fmt;
use std::fmt::Write as _;

use toml::de::{DeTable, DeValue};

/// Measured rates of a machine, in FLOP/s and bytes/s of one GPU.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::exhaustive_structs, reason = "plain numbers")]
pub struct Rates {
    /// Matrix products in the type of the parameters.
    pub gemm: f64,
    /// Causal attention by length: tokens, forward and backward FLOP/s, in the order of the lengths. FLOPs are those that are executed,
    /// `2 S^2 d` a head forward and `5 S^2 d` backward.
    pub attention: Vec<[f64; 3]>,
    /// Copies within device memory, read and written bytes together.
    pub copy: f64,
    /// Bytes that a GPU sends to its peers in an exchange.
    pub link: f64,
    /// Bytes between device and pinned host memory, one way, while all GPUs of a host do the same.
    pub host_link: f64,
    /// Bytes of a host's memory that its processors read and write, all of them together.
    pub host_memory: f64,
}

impl Default for Rates {
    /// An H200 on `NVLink`, in bf16: matrix product of 32768 x 4096 x 14336, cuDNN 9.14's attention (d 128, 32 of 8 heads), a device copy,
    /// all-to-all of 1 GiB a rank over two GPUs, pinned copies of both GPUs at once; the rate of the host's memory is an assumption.
    fn default() -> Self {
        Self {
            gemm: 768e12,
            attention: vec![
                [16_384.0, 669e12, 539e12],
                [32_768.0, 686e12, 532e12],
                [65_536.0, 606e12, 529e12],
                [131_072.0, 574e12, 535e12],
            ],
            copy: 4.2e12,
            link: 300e9,
            host_link: 55e9,
            host_memory: 200e9,
        }
    }
}

/// What of the rates cannot be known from the machine: traffic of the runtime, fitted to measured steps (docs/memory.md).
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(clippy::exhaustive_structs, reason = "plain numbers")]
pub struct Coefficients {
    /// How often the bytes of a block's graph go through memory in its forward.
    pub forward: f64,
    /// The same in its backward, the loss included.
    pub backward: f64,
    /// Bytes of traffic a parameter in the reduction and the update.
    pub update: f64,
    /// The part of a transfer's time that computing beside it loses.
    pub beside: f64,
}

impl Default for Coefficients {
    /// Fitted to docs/device-runs/step-2xh200.json; `beside` is what attention lost to exchanges beside it (2 to 4 %).
    fn default() -> Self {
        Self {
            forward: 8.8,
            backward: 25.7,
            update: 117.0,
            beside: 0.03,
        }
    }
}

/// Why a file of rates cannot be used: what was expected and found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RatesError(String);

impl fmt::Display for RatesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for RatesError {}

impl Rates {
    /// The file that `cargo autosp doctor` writes and `cargo autosp estimate` reads, in the working folder.
    pub const FILE: &'static str = "autosp-rates.toml";

    /// Forward and backward rates of attention over `seq` tokens: between two measured lengths on a line over the logarithm, beyond
    /// them the nearest.
    pub fn attention(&self, seq: f64) -> [f64; 2] {
        let at = |row: &[f64; 3]| [row[1], row[2]];
        let after = self.attention.iter().position(|row| row[0] >= seq);
        let Some(after) = after else {
            return self.attention.last().map_or([self.gemm; 2], at);
        };
        let Some(before) = after.checked_sub(1) else {
            return at(&self.attention[0]);
        };
        let (low, high) = (self.attention[before], self.attention[after]);
        let part = (seq / low[0]).ln() / (high[0] / low[0]).ln();
        [1, 2].map(|i| low[i] + part * (high[i] - low[i]))
    }

    /// As the file has them; [`read`](Self::read) reads it back.
    pub fn to_toml(&self) -> String {
        let mut text = "# Rates of one GPU: FLOP/s and bytes/s.\n".to_owned();
        for (name, value) in self.numbers() {
            let _ = writeln!(text, "{name} = {value:?}");
        }
        text += "# Tokens, forward and backward FLOP/s of causal attention.\nattention = [\n";
        for [length, forward, backward] in &self.attention {
            let _ = writeln!(text, "  [{length:?}, {forward:?}, {backward:?}],");
        }
        text + "]\n"
    }

    /// Reads what [`to_toml`](Self::to_toml) writes; what is left out stays as it is by default.
    ///
    /// # Errors
    /// If the text is not TOML, names no rate, or has a rate that is no number above 0.
    pub fn read(text: &str) -> Result<Self, RatesError> {
        let table = DeTable::parse(text).map_err(|error| RatesError(error.message().to_owned()))?;
        let mut rates = Self::default();
        for (name, value) in table.get_ref() {
            let name = name.get_ref().as_ref();
            if name == "attention" {
                rates.attention = attention(value.get_ref())?;
                continue;
            }
            let known = rates.slots().into_iter().find(|(slot, _)| *slot == name);
            let Some((_, slot)) = known else {
                let names = Self::default().numbers().map(|(name, _)| name).join("`, `");
                let text = format!("expected `{names}` or `attention`, found `{name}`");
                return Err(RatesError(text));
            };
            *slot = number(name, value.get_ref())?;
        }
        Ok(rates)
    }

    fn numbers(&self) -> [(&'static str, f64); 5] {
        [
            ("gemm", self.gemm),
            ("copy", self.copy),
            ("link", self.link),
            ("host_link", self.host_link),
            ("host_memory", self.host_memory),
        ]
    }

    fn slots(&mut self) -> [(&'static str, &mut f64); 5] {
        [
            ("gemm", &mut self.gemm),
            ("copy", &mut self.copy),
            ("link", &mut self.link),
            ("host_link", &mut self.host_link),
            ("host_memory", &mut self.host_memory),
        ]
    }
}

fn attention(value: &DeValue<'_>) -> Result<Vec<[f64; 3]>, RatesError> {
    let wrong = || {
        let text = "expected `attention` to be rows of tokens, forward and backward FLOP/s, by length, found something else";
        RatesError(text.to_owned())
    };
    let mut rows = Vec::new();
    for row in value.as_array().ok_or_else(wrong)? {
        let row = row.get_ref().as_array().ok_or_else(wrong)?.iter();
        let row: Vec<f64> = row
            .map(|cell| number("attention", cell.get_ref()))
            .collect::<Result<_, _>>()?;
        let row: [f64; 3] = row.try_into().map_err(|_| wrong())?;
        if rows.last().is_some_and(|last: &[f64; 3]| last[0] >= row[0]) {
            return Err(wrong());
        }
        rows.push(row);
    }
    if rows.is_empty() {
        Err(wrong())
    } else {
        Ok(rows)
    }
}

fn number(name: &str, value: &DeValue<'_>) -> Result<f64, RatesError> {
    let found = match value {
        DeValue::Integer(n) => n.as_str().replace('_', ""),
        DeValue::Float(x) => x.as_str().replace('_', ""),
        _ => String::new(),
    };
    let parsed = found.parse().ok();
    parsed
        .filter(|x: &f64| x.is_finite() && *x > 0.0)
        .ok_or_else(|| {
            RatesError(format!(
                "expected a number above 0 for `{name}`, found another value"
            ))
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attention_is_read_between_lengths() {
        let rates = Rates::default();
        let near = |[a, b]: [f64; 2], [c, d]: [f64; 2]| (a - c).abs() < 1e6 && (b - d).abs() < 1e6;
        assert!(near(rates.attention(100.0), [669e12, 539e12]));
        assert!(near(rates.attention(65_536.0), [606e12, 529e12]));
        assert!(near(rates.attention(1e9), [574e12, 535e12]));
        // Half-way between 64K and 128K on a logarithmic scale.
        assert!(near(
            rates.attention(65_536.0 * 2f64.sqrt()),
            [590e12, 532e12]
        ));
    }

    #[test]
    fn what_is_no_rate_is_refused() {
        for (text, part) in [
            ("gemm = ", ""),
            ("gem = 1.0", "found `gem`"),
            ("gemm = 0", "above 0 for `gemm`"),
            ("gemm = \"fast\"", "above 0 for `gemm`"),
            ("attention = []", "rows of tokens"),
            ("attention = [[1.0, 2.0]]", "rows of tokens"),
            (
                "attention = [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]",
                "by length",
            ),
            ("attention = [[1.0, -2.0, 3.0]]", "above 0"),
        ] {
            let error = Rates::read(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let some = Rates::read("copy = 1_000_000\n").unwrap();
        assert_eq!(
            some,
            Rates {
                copy: 1e6,
                ..Rates::default()
            }
        );
    }

    proptest! {
        #[test]
        fn a_file_is_read_back(numbers in prop::array::uniform5(1e-3f64..1e18), forward in prop::collection::vec(1e9f64..1e16, 1..5)) {
            let [gemm, copy, link, host_link, host_memory] = numbers;
            let attention = forward.iter().enumerate().map(|(i, f)| [(i + 1) as f64, *f, f / 2.0]).collect();
            let rates = Rates { gemm, attention, copy, link, host_link, host_memory };
            prop_assert_eq!(Rates::read(&rates.to_toml()).unwrap(), rates);
        }
    }
}
