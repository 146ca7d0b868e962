//! How the scores of a site look to the model: which of batch, heads, queries and keys are in which dim.

use crate::layout::{Axes, CANONICAL};

const QUERY: usize = 2;
const KEY: usize = 3;

/// The dims of scores `[b, H, S, S]` as the model has shaped them; the keys are the last dim, alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct View {
    dims: Vec<Vec<usize>>,
    sizes: [usize; CANONICAL],
}

impl View {
    /// The scores of queries with these axes, whose width becomes the keys; None for queries that are no operand of a matrix product,
    /// with the sequence and the width at the end.
    pub(crate) fn of(queries: &Axes, sizes: [usize; CANONICAL]) -> Option<Self> {
        let [.., rows, width] = queries.dims() else {
            return None;
        };
        (rows.contains(&QUERY) && *width == [KEY]).then(|| Self {
            dims: queries.dims().to_vec(),
            sizes,
        })
    }

    /// One dim for each axis.
    pub(crate) fn plain(batch: usize, heads: usize, length: usize) -> Self {
        Self {
            dims: (0..CANONICAL).map(|axis| vec![axis]).collect(),
            sizes: [batch, heads, length, length],
        }
    }

    /// The axes of what comes out of the product with the values: the width in the place of the keys.
    pub(crate) fn output(&self) -> Axes {
        Axes::of(self.dims.clone())
    }

    pub(crate) fn sizes(&self) -> [usize; CANONICAL] {
        self.sizes
    }

    pub(crate) fn dims(&self) -> Vec<usize> {
        let size = |axes: &Vec<usize>| axes.iter().map(|axis| self.sizes[*axis]).product();
        self.dims.iter().map(size).collect()
    }

    /// The axes of dim `d` that are longer than one.
    fn long(&self, d: usize) -> impl Iterator<Item = usize> + '_ {
        self.dims[d]
            .iter()
            .copied()
            .filter(|axis| self.sizes[*axis] > 1)
    }

    /// The same elements in other dims, if every new dim holds whole axes and the keys stay alone at the end.
    pub(crate) fn reshape(&self, dims: &[usize]) -> Option<Self> {
        let mut axes = self.dims.iter().flatten().copied().peekable();
        let mut out: Vec<Vec<usize>> = Vec::with_capacity(dims.len());
        for &size in dims {
            let mut dim = Vec::new();
            let mut have = 1;
            while have < size {
                let axis = axes.next()?;
                have *= self.sizes[axis];
                dim.push(axis);
            }
            if have != size {
                return None;
            }
            out.push(dim);
        }
        let rest: Vec<usize> = axes.collect();
        if rest.iter().any(|axis| self.sizes[*axis] > 1) {
            return None;
        }
        out.last_mut()?.extend(rest);
        let view = Self { dims: out, ..*self };
        let last = view.dims.len() - 1;
        (self.sizes[KEY] == 1 || view.long(last).eq([KEY])).then_some(view)
    }

    /// Whether a dim counted from the end is the queries and nothing else.
    fn is_query(&self, back: usize) -> bool {
        let Some(d) = self.dims.len().checked_sub(back) else {
            return false;
        };
        self.sizes[QUERY] == 1 || self.long(d).eq([QUERY])
    }

    /// Whether a mask with these dims can be put beside the scores. `query` is the dim of its queries from the end, where it has one.
    pub(crate) fn takes(&self, mask: &[usize], query: Option<usize>) -> bool {
        let own = self.dims();
        let fits = mask.len() <= own.len()
            && mask
                .iter()
                .rev()
                .zip(own.iter().rev())
                .all(|(&m, &s)| m == s || m == 1);
        fits && query.is_none_or(|back| self.is_query(back))
    }

    /// The steps along (b, h, query, key) in a mask of these sizes and steps, aligned from the right. Dims of size one are not stepped along.
    pub(crate) fn strides(&self, mask: &[usize], steps: &[usize]) -> [usize; CANONICAL] {
        let mut strides = [0; CANONICAL];
        for ((axes, &size), &step) in self
            .dims
            .iter()
            .rev()
            .zip(mask.iter().rev())
            .zip(steps.iter().rev())
        {
            let mut step = if size == 1 { 0 } else { step };
            for axis in axes.iter().rev() {
                strides[*axis] = step;
                step *= self.sizes[*axis];
            }
        }
        strides
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(text: &str) -> View {
        View::of(&Axes::parse(text).unwrap(), [2, 3, 5, 5]).unwrap()
    }

    #[test]
    fn dims_are_merged_and_split_at_whole_axes() {
        let merged = view("(b h) s d");
        assert_eq!(merged.dims(), [6, 5, 5]);
        let apart = merged.reshape(&[2, 3, 5, 5]).unwrap();
        assert_eq!(apart, View::plain(2, 3, 5));
        assert_eq!(apart.reshape(&[6, 5, 5]), Some(merged.clone()));
        assert_eq!(
            apart.reshape(&[1, 2, 3, 5, 5]).unwrap().dims(),
            [1, 2, 3, 5, 5]
        );
        for dims in [vec![3, 2, 5, 5], vec![6, 25], vec![30, 5, 1], vec![2, 3, 5]] {
            assert_eq!(merged.reshape(&dims), None, "{dims:?}");
        }
        let folded = view("b (s h) d");
        assert_eq!(folded.reshape(&[2, 5, 3, 5]).unwrap().dims(), [2, 5, 3, 5]);
        assert_eq!(folded.reshape(&[2, 3, 5, 5]), None);
    }

    #[test]
    fn a_mask_lies_beside_the_axes_it_means() {
        let folded = view("b (s h) d").reshape(&[2, 5, 3, 5]).unwrap();
        assert!(folded.takes(&[1, 5, 1, 5], Some(3)) && !folded.takes(&[1, 3, 5], Some(2)));
        assert_eq!(folded.strides(&[1, 5, 1, 5], &[25, 5, 5, 1]), [0, 0, 5, 1]);
        let merged = view("(b h) s d");
        assert!(merged.takes(&[5, 5], Some(2)) && merged.takes(&[6, 5, 5], Some(2)));
        assert!(!merged.takes(&[2, 5, 5], Some(2)));
        assert_eq!(merged.strides(&[6, 5, 5], &[25, 5, 1]), [75, 25, 5, 1]);
        assert_eq!(merged.strides(&[6, 1, 5], &[5, 5, 1]), [15, 5, 0, 1]);
    }
}
