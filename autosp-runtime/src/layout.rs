//! The order of a site's axes, by name, and the way from it to (batch, heads, sequence, width) and back.

use autosp_plan::codes;
use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::ops::Recorded;

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
    /// The axes of the left operand of the first product. Axes that are merged in one dim stand in parentheses, outermost first:
    /// `"(b h) s d"`, `"b (s h) d"`. Axes of size one may be left out.
    pub q: &'static str,
    /// The axes of the right operand of the first product.
    pub k: &'static str,
    /// The axes of the right operand of the second product, and so of the output, with `h` for `g`.
    pub v: &'static str,
}

/// Batch, heads, sequence and width, in the order in which a site's tensors are brought.
pub(crate) const CANONICAL: usize = 4;
const BATCH: usize = 0;
const SEQUENCE: usize = 2;

/// What a tensor's dims are made of: for each dim its axes, outermost first. Axes that no dim has are of size one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Axes(Vec<Vec<usize>>);

/// Sizes that a merged dim does not tell by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// Rows of the batch, if the model said.
    pub(crate) batch: Option<usize>,
    /// Tokens of this rank.
    pub(crate) len: usize,
}

impl Axes {
    /// Reads `"b h s d"` or, with merged dims, `"(b h) s d"`; the heads may be `h` or `g`.
    ///
    /// # Errors
    /// `AS0322` for repeated or unknown axes, and without a sequence or a width.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let refused = |why: &str| Error::new(codes::SITE_LAYOUT, format!("layout `{text}`: {why}"));
        let mut dims: Vec<Vec<usize>> = Vec::new();
        let mut merged = false;
        let spaced = text.replace('(', " ( ").replace(')', " ) ");
        for name in spaced.split_whitespace() {
            let axis = match name {
                "(" if !merged => {
                    merged = true;
                    dims.push(Vec::new());
                    continue;
                }
                ")" if merged => {
                    merged = false;
                    continue;
                }
                "b" => BATCH,
                "h" | "g" => 1,
                "s" => SEQUENCE,
                "d" => 3,
                _ => {
                    return Err(refused(&format!(
                        "expected axes among b, h, g, s and d, found `{name}`"
                    )));
                }
            };
            if dims.iter().flatten().any(|a| *a == axis) {
                return Err(refused(&format!(
                    "expected each axis once, found `{name}` again"
                )));
            }
            match dims.last_mut() {
                Some(dim) if merged => dim.push(axis),
                _ => dims.push(vec![axis]),
            }
        }
        let has = |axis| dims.iter().flatten().any(|a| *a == axis);
        if merged || !has(SEQUENCE) || !has(3) {
            return Err(refused("expected the axes s and d, and closed parentheses"));
        }
        Ok(Self(dims))
    }

    pub(crate) fn of(dims: Vec<Vec<usize>>) -> Self {
        Self(dims)
    }

    pub(crate) fn dims(&self) -> &[Vec<usize>] {
        &self.0
    }

    /// The axes in the order in which they lie in memory, those that no dim has at the end.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = self.0.iter().flatten().copied().collect();
        order.extend((0..CANONICAL).filter(|axis| !self.0.iter().flatten().any(|a| a == axis)));
        order
    }

    /// The size of each axis in a tensor of these dims.
    fn sizes(&self, what: &str, dims: &[usize], known: Known) -> Result<[usize; CANONICAL]> {
        let refused = |why: String| Error::new(codes::SITE_SHAPE, format!("{what}: {why}"));
        if dims.len() != self.0.len() {
            return Err(refused(format!(
                "expected {} dims, found {dims:?}",
                self.0.len()
            )));
        }
        let mut sizes = [None; CANONICAL];
        for (axes, &size) in self.0.iter().zip(dims) {
            if let [axis] = axes.as_slice() {
                sizes[*axis] = Some(size);
            }
        }
        for (axes, &size) in self.0.iter().zip(dims) {
            if axes.len() == 1 {
                continue;
            }
            if axes.contains(&SEQUENCE) {
                sizes[SEQUENCE].get_or_insert(known.len);
            }
            if axes.contains(&BATCH) && sizes[BATCH].is_none() {
                sizes[BATCH] = known.batch;
            }
            let given: usize = axes.iter().filter_map(|axis| sizes[*axis]).product();
            let open: Vec<usize> = axes
                .iter()
                .copied()
                .filter(|axis| sizes[*axis].is_none())
                .collect();
            match open.as_slice() {
                [] if given == size => {}
                [axis] if given > 0 && size % given == 0 => sizes[*axis] = Some(size / given),
                _ => {
                    return Err(refused(format!(
                        "cannot take the merged dim of {size} apart, of which {given} is known ({dims:?})"
                    )));
                }
            }
        }
        Ok(sizes.map(|size| size.unwrap_or(1)))
    }

    /// Views a tensor as (b, heads, s, d).
    ///
    /// # Errors
    /// `AS0323`, naming `what`, for a tensor of another number of dims, or merged dims that do not divide.
    pub(crate) fn normalise(&self, what: &str, x: &Tensor, known: Known) -> Result<Tensor> {
        let sizes = self.sizes(what, x.dims(), known)?;
        let order = self.order();
        let apart: Vec<usize> = order.iter().map(|axis| sizes[*axis]).collect();
        let x = if x.dims() == apart {
            x.clone()
        } else {
            x.reshape__sp(apart)?
        };
        let mut places = [0; CANONICAL];
        for (place, axis) in order.into_iter().enumerate() {
            places[axis] = place;
        }
        permuted(&x, places)
    }

    /// Views (b, heads, s, d) in the order of these axes, merged as they are.
    pub(crate) fn restore(&self, x: &Tensor) -> Result<Tensor> {
        let sizes = x.dims().to_vec();
        let mut order = [0; CANONICAL];
        order.copy_from_slice(&self.order());
        let x = permuted(x, order)?;
        let merged: Vec<usize> = self
            .0
            .iter()
            .map(|axes| axes.iter().map(|axis| sizes[*axis]).product())
            .collect();
        Ok(if x.dims() == merged {
            x
        } else {
            x.reshape__sp(merged)?
        })
    }
}

/// Permutes, leaving a tensor that is in order without an operation in its graph.
fn permuted(x: &Tensor, order: [usize; CANONICAL]) -> Result<Tensor> {
    Ok(if order == [0, 1, 2, 3] {
        x.clone()
    } else {
        x.permute__sp(order)?
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    const KNOWN: Known = Known {
        batch: Some(2),
        len: 5,
    };

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
            let normal = axes.normalise("q", &x, KNOWN).unwrap();
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
            ("(b h s d", "closed"),
            ("b h s", "axes s and d"),
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
                .normalise("q", &x, KNOWN)
                .unwrap_err()
                .code()
                .id,
            "AS0323"
        );
        let odd = Axes::parse("(b h) s d").unwrap();
        assert!(
            odd.normalise(
                "q",
                &Tensor::zeros((3, 5, 4), DType::F32, &Device::Cpu).unwrap(),
                KNOWN
            )
            .is_err()
        );
    }

    #[test]
    fn merged_dims_come_apart_and_together_again() {
        let apart = Tensor::arange(0u32, 210, &Device::Cpu)
            .unwrap()
            .reshape((2, 3, 5, 7))
            .unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        for (text, order, dims) in [
            ("(b h) s d", [0, 1, 2, 3], vec![6, 5, 7]),
            ("b (s h) d", [0, 2, 1, 3], vec![2, 15, 7]),
            ("(h b) d s", [1, 0, 3, 2], vec![6, 7, 5]),
            ("s (b h) d", [2, 0, 1, 3], vec![5, 6, 7]),
            ("s b (h d)", [2, 0, 1, 3], vec![5, 2, 21]),
        ] {
            let axes = Axes::parse(text).unwrap();
            let x = apart.permute(order).unwrap().reshape(dims.clone()).unwrap();
            if text.ends_with("(h d)") {
                // Nothing says how many heads there are.
                assert!(axes.normalise("q", &x, KNOWN).is_err());
                continue;
            }
            let normal = axes.normalise("q", &x, KNOWN).unwrap();
            assert_eq!(flat(&normal), flat(&apart), "{text}");
            let back = axes.restore(&normal).unwrap();
            assert_eq!(
                (back.dims(), flat(&back)),
                (dims.as_slice(), flat(&x)),
                "{text}"
            );
        }
        let one_head = Tensor::zeros((2, 5, 7), DType::F32, &Device::Cpu).unwrap();
        let normal = Axes::parse("b s d")
            .unwrap()
            .normalise("k", &one_head, KNOWN);
        assert_eq!(normal.unwrap().dims(), [2, 1, 5, 7]);
    }
}
