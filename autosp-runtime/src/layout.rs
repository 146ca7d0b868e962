//! The order of a site's axes, by name, and the way from it to (batch, heads, sequence, width) and back.

use autosp_plan::codes;
use candle_core::Tensor;

use crate::error::{Error, Result};

/// The axes of a site's tensors in the order in which the model has them: `b` batch, `h` query heads, `g` kv heads, `s` sequence,
/// `d` width (the values' width may be another one than the keys').
///
/// ```
/// use autosp_runtime::layout::Layout;
/// // q [b, h, s, d] times k, which the model has already transposed, and v as it was projected.
/// let layout = Layout { q: "b h s d", k: "b g d s", v: "b g s d" };
/// # let _ = layout;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(
    clippy::exhaustive_structs,
    reason = "emitted code writes it as a literal"
)]
pub struct Layout {
    /// The axes of the left operand of the first product.
    pub q: &'static str,
    /// The axes of the right operand of the first product.
    pub k: &'static str,
    /// The axes of the right operand of the second product, and so of the output, with `h` for `g`.
    pub v: &'static str,
}

/// Where (b, heads, s, d) are among the axes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Axes([usize; 4]);

impl Axes {
    /// Reads `"b h s d"`; the heads may be `h` or `g`.
    ///
    /// # Errors
    /// `AS0322` for merged, missing, repeated or unknown axes.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let refused = |why: &str| Error::new(codes::SITE_LAYOUT, format!("layout `{text}`: {why}"));
        if text.contains(['(', ')']) {
            return Err(refused("expected one dim for each axis, found merged axes")
                .with_help("reshape to four dims before q k^T"));
        }
        let mut at = [None; 4];
        for (dim, name) in text.split_whitespace().enumerate() {
            let axis = match name {
                "b" => 0,
                "h" | "g" => 1,
                "s" => 2,
                "d" => 3,
                _ => {
                    return Err(refused(&format!(
                        "expected axes among b, h, g, s and d, found `{name}`"
                    )));
                }
            };
            if at[axis].replace(dim).is_some() {
                return Err(refused(&format!(
                    "expected each axis once, found `{name}` again"
                )));
            }
        }
        match at {
            [Some(b), Some(h), Some(s), Some(d)] => Ok(Self([b, h, s, d])),
            _ => Err(refused("expected the four axes b, h or g, s and d")),
        }
    }

    /// Views a tensor as (b, heads, s, d).
    ///
    /// # Errors
    /// `AS0323`, naming `what`, for a tensor of another number of dims.
    pub(crate) fn normalise(self, what: &str, x: &Tensor) -> Result<Tensor> {
        if x.rank() != 4 {
            let text = format!("{what}: expected 4 dims, found {:?}", x.dims());
            return Err(Error::new(codes::SITE_SHAPE, text));
        }
        permuted(x, self.0)
    }

    /// Views (b, heads, s, d) in the order of these axes.
    pub(crate) fn restore(self, x: &Tensor) -> Result<Tensor> {
        let mut inverse = [0; 4];
        for (axis, &dim) in self.0.iter().enumerate() {
            inverse[dim] = axis;
        }
        permuted(x, inverse)
    }
}

/// Permutes, leaving a tensor that is in order without an operation in its graph.
fn permuted(x: &Tensor, order: [usize; 4]) -> Result<Tensor> {
    Ok(if order == [0, 1, 2, 3] {
        x.clone()
    } else {
        x.permute(order)?
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn every_permutation_goes_to_bhsd_and_back() {
        let axes = ["b", "h", "s", "d"];
        let sizes = [2, 3, 5, 7];
        let mut seen = 0;
        for code in 0..256 {
            let order = [code & 3, code >> 2 & 3, code >> 4 & 3, code >> 6 & 3];
            if (0..4).any(|axis| !order.contains(&axis)) {
                continue;
            }
            seen += 1;
            let text = order.map(|axis| axes[axis]).join(" ");
            let x = Tensor::arange(0u32, 210, &Device::Cpu)
                .unwrap()
                .reshape(order.map(|axis| sizes[axis]).to_vec())
                .unwrap();
            let axes = Axes::parse(&text).unwrap();
            let normal = axes.normalise("q", &x).unwrap();
            assert_eq!(normal.dims(), sizes, "{text}");
            let back = axes.restore(&normal).unwrap();
            assert_eq!(back.dims(), x.dims(), "{text}");
            let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<u32>().unwrap();
            assert_eq!(flat(&back), flat(&x), "{text}");
        }
        assert_eq!(seen, 24);
    }

    #[test]
    fn other_layouts_are_refused_in_words() {
        for (text, why) in [
            ("(b h) s d", "merged axes"),
            ("b h s", "four axes"),
            ("b h s s", "`s` again"),
            ("b h s w", "`w`"),
            ("b h g d", "`g` again"),
        ] {
            let error = Axes::parse(text).unwrap_err();
            assert_eq!(error.code().id, "AS0322");
            assert!(error.to_string().contains(why), "{error}");
        }
        let x = Tensor::zeros((2, 3, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            Axes::parse("b h s d")
                .unwrap()
                .normalise("q", &x)
                .unwrap_err()
                .code()
                .id,
            "AS0323"
        );
    }
}
