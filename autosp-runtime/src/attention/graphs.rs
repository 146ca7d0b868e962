//! Attention as graphs of small operations, which cuDNN recognises and runs as one kernel.
//!
//! The graphs are plain data, so that they can be looked at and compared without a GPU; `cuda::cudnn` builds them. Which operations in
//! which order is what cuDNN's engines match ("Developer Guide", fused flash attention; the same operations as NVIDIA's own front
//! end). Tensors are [b, h, s, d] with any strides; scores, and whatever else is as large as S x S, are virtual: they exist
//! inside the kernel alone.
//!
//! Forward: S = scale Q Kᵀ, band, LSE = max + log Σ exp(S - max), O = softmax(S) V. Backward, from the global O and LSE:
//! P = exp(S - LSE), dV = Pᵀ dO, dS = scale P (dO Vᵀ - rowsum(dO O)), dK = dSᵀ Q, dQ = dS K in fp32, then rounded. With grouped
//! queries dK and dV are per query head inside, then summed.

use std::fmt::{self, Write as _};

/// Element types of q, k, v and their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Element {
    Bf16,
    F16,
}

/// What a tensor of a graph holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Io,
    Float,
    Int,
    Bool,
}

/// Where a tensor's values are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Home {
    /// Nowhere: they exist inside the kernel.
    Virtual,
    /// In device memory, which is given when the graph runs.
    Device(Role),
    /// One number, given with the graph.
    Float(f32),
    /// One whole number.
    Int(i32),
}

/// What a tensor in device memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Q,
    K,
    V,
    O,
    Lse,
    GradO,
    GradQ,
    GradK,
    GradV,
    /// rowsum(dO O), fp32 [b, h, s, 1].
    Delta,
    /// dQ in fp32, [b, h, s, d].
    SumQ,
}

/// One tensor; its number in the graph is its identifier.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Node {
    pub(crate) dims: [i64; 4],
    pub(crate) strides: [i64; 4],
    pub(crate) kind: Kind,
    pub(crate) home: Home,
}

/// Elementwise operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pointwise {
    Mul,
    Add,
    Sub,
    Div,
    Exp,
    Log,
    Identity,
    /// The index along this dim.
    Index(i64),
    GreaterEqual,
    Greater,
    /// `t ? x : b`.
    Select,
}

/// One operation; operands are numbers of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// y = a b.
    MatMul { a: usize, b: usize, y: usize },
    /// y = op(x, b, t).
    Pointwise {
        op: Pointwise,
        x: usize,
        b: Option<usize>,
        t: Option<usize>,
        y: usize,
    },
    /// y = the sum (or the maximum) of x along what y has size 1 in, or fewer heads.
    Reduce { max: bool, x: usize, y: usize },
    /// y = x with other dims.
    Reshape { x: usize, y: usize },
}

/// One problem: everything that a plan of cuDNN depends on. Strides are in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Problem {
    pub(crate) element: Element,
    pub(crate) batch: i64,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) queries: i64,
    pub(crate) keys: i64,
    pub(crate) d: i64,
    pub(crate) dv: i64,
    /// Bits of the factor on q·k, an `f32`.
    pub(crate) scale: u32,
    /// Smallest and largest visible `key - query`.
    pub(crate) lo: Option<i32>,
    pub(crate) hi: Option<i32>,
    pub(crate) q: [i64; 4],
    pub(crate) k: [i64; 4],
    pub(crate) v: [i64; 4],
    pub(crate) o: [i64; 4],
    pub(crate) lse: [i64; 4],
}

/// Strides of the gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct GradientStrides {
    pub(crate) o: [i64; 4],
    pub(crate) q: [i64; 4],
    pub(crate) k: [i64; 4],
    pub(crate) v: [i64; 4],
}

/// A graph of operations.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Graph {
    pub(crate) element: Element,
    pub(crate) nodes: Vec<Node>,
    pub(crate) operations: Vec<Operation>,
}

/// Strides of a contiguous tensor.
pub(crate) fn contiguous([_, b, c, d]: [i64; 4]) -> [i64; 4] {
    [b * c * d, c * d, d, 1]
}

/// The last two dims exchanged.
fn transposed([a, b, c, d]: [i64; 4]) -> [i64; 4] {
    [a, b, d, c]
}

impl Graph {
    fn new(element: Element) -> Self {
        Self {
            element,
            nodes: Vec::new(),
            operations: Vec::new(),
        }
    }

    fn node(&mut self, dims: [i64; 4], strides: [i64; 4], kind: Kind, home: Home) -> usize {
        self.nodes.push(Node {
            dims,
            strides,
            kind,
            home,
        });
        self.nodes.len() - 1
    }

    fn device(&mut self, role: Role, dims: [i64; 4], strides: [i64; 4], kind: Kind) -> usize {
        self.node(dims, strides, kind, Home::Device(role))
    }

    fn inner(&mut self, dims: [i64; 4], kind: Kind) -> usize {
        self.node(dims, contiguous(dims), kind, Home::Virtual)
    }

    fn number(&mut self, x: f32) -> usize {
        self.node([1; 4], [1; 4], Kind::Float, Home::Float(x))
    }

    fn pointwise(&mut self, op: Pointwise, x: usize, b: Option<usize>, kind: Kind) -> usize {
        let y = self.inner(self.wider(x, b), kind);
        self.operations.push(Operation::Pointwise {
            op,
            x,
            b,
            t: None,
            y,
        });
        y
    }

    /// The dims of a result: those of the larger operand.
    fn wider(&self, x: usize, b: Option<usize>) -> [i64; 4] {
        let x = self.nodes[x].dims;
        b.map_or(x, |b| {
            std::array::from_fn(|i| x[i].max(self.nodes[b].dims[i]))
        })
    }

    fn matmul(&mut self, a: usize, b: usize, kind: Kind) -> usize {
        let ([n, h, rows, _], [.., columns]) = (self.nodes[a].dims, self.nodes[b].dims);
        let y = self.inner([n, h, rows, columns], kind);
        self.operations.push(Operation::MatMul { a, b, y });
        y
    }

    fn reduce(&mut self, max: bool, x: usize) -> usize {
        let [n, h, s, _] = self.nodes[x].dims;
        let y = self.inner([n, h, s, 1], Kind::Float);
        self.operations.push(Operation::Reduce { max, x, y });
        y
    }

    /// Scores outside of the band become -inf: first what lies after it, then what lies before.
    fn band(&mut self, mut scores: usize, lo: Option<i32>, hi: Option<i32>) -> usize {
        use Pointwise::{Add, Greater, GreaterEqual, Index, Select};
        let bounds = [hi.map(|hi| (true, hi)), lo.map(|lo| (false, 1 - lo))];
        for (after, distance) in bounds.into_iter().flatten() {
            let row = self.pointwise(Index(2), scores, None, Kind::Int);
            let column = self.pointwise(Index(3), scores, None, Kind::Int);
            let mut moved = if after { row } else { column };
            if distance != 0 {
                let by = self.node([1; 4], [1; 4], Kind::Int, Home::Int(distance));
                moved = self.pointwise(Add, moved, Some(by), Kind::Int);
            }
            // After: row + hi >= column. Before: column + (1 - lo) > row.
            let (op, other) = if after {
                (GreaterEqual, column)
            } else {
                (Greater, row)
            };
            let visible = self.pointwise(op, moved, Some(other), Kind::Bool);
            let hidden = self.number(f32::NEG_INFINITY);
            let y = self.inner(self.nodes[scores].dims, Kind::Float);
            self.operations.push(Operation::Pointwise {
                op: Select,
                x: scores,
                b: Some(hidden),
                t: Some(visible),
                y,
            });
            scores = y;
        }
        scores
    }
}

impl Problem {
    fn q_dims(&self) -> [i64; 4] {
        [self.batch, self.heads, self.queries, self.d]
    }

    fn k_dims(&self) -> [i64; 4] {
        [self.batch, self.kv_heads, self.keys, self.d]
    }

    fn v_dims(&self) -> [i64; 4] {
        [self.batch, self.kv_heads, self.keys, self.dv]
    }

    fn o_dims(&self) -> [i64; 4] {
        [self.batch, self.heads, self.queries, self.dv]
    }

    fn row_dims(&self) -> [i64; 4] {
        [self.batch, self.heads, self.queries, 1]
    }

    /// O and LSE from q, k and v.
    pub(crate) fn forward(&self) -> Graph {
        use Pointwise::{Add, Div, Exp, Log, Mul, Sub};
        let mut g = Graph::new(self.element);
        let q = g.device(Role::Q, self.q_dims(), self.q, Kind::Io);
        let k = g.device(
            Role::K,
            transposed(self.k_dims()),
            transposed(self.k),
            Kind::Io,
        );
        let v = g.device(Role::V, self.v_dims(), self.v, Kind::Io);
        let scale = g.number(f32::from_bits(self.scale));
        let scores = g.matmul(q, k, Kind::Float);
        let scores = g.pointwise(Mul, scores, Some(scale), Kind::Float);
        let scores = g.band(scores, self.lo, self.hi);
        let top = g.reduce(true, scores);
        let below = g.pointwise(Sub, scores, Some(top), Kind::Float);
        let weights = g.pointwise(Exp, below, None, Kind::Float);
        let total = g.reduce(false, weights);
        let log = g.pointwise(Log, total, None, Kind::Float);
        let lse = g.device(Role::Lse, self.row_dims(), self.lse, Kind::Float);
        g.operations.push(Operation::Pointwise {
            op: Add,
            x: top,
            b: Some(log),
            t: None,
            y: lse,
        });
        let weights = g.pointwise(Div, weights, Some(total), Kind::Io);
        let o = g.device(Role::O, self.o_dims(), self.o, Kind::Io);
        g.operations.push(Operation::MatMul {
            a: weights,
            b: v,
            y: o,
        });
        g
    }

    /// dQ, dK and dV from q, k, v, O, LSE and dO.
    pub(crate) fn backward(&self, grads: &GradientStrides) -> Graph {
        use Pointwise::{Exp, Identity, Mul, Sub};
        let mut g = Graph::new(self.element);
        let q = g.device(Role::Q, self.q_dims(), self.q, Kind::Io);
        let k = g.device(
            Role::K,
            transposed(self.k_dims()),
            transposed(self.k),
            Kind::Io,
        );
        let v = g.device(
            Role::V,
            transposed(self.v_dims()),
            transposed(self.v),
            Kind::Io,
        );
        let o = g.device(Role::O, self.o_dims(), self.o, Kind::Io);
        let lse = g.device(Role::Lse, self.row_dims(), self.lse, Kind::Float);
        let grad = g.device(Role::GradO, self.o_dims(), grads.o, Kind::Io);
        let scale = g.number(f32::from_bits(self.scale));
        let one = g.number(1.0);

        let product = g.pointwise(Mul, grad, Some(o), Kind::Float);
        let sum = g.reduce(false, product);
        let delta = g.device(
            Role::Delta,
            self.row_dims(),
            contiguous(self.row_dims()),
            Kind::Float,
        );
        g.operations.push(Operation::Pointwise {
            op: Mul,
            x: sum,
            b: Some(one),
            t: None,
            y: delta,
        });

        let scores = g.matmul(q, k, Kind::Float);
        let scores = g.pointwise(Mul, scores, Some(scale), Kind::Float);
        let scores = g.pointwise(Sub, scores, Some(lse), Kind::Float);
        let scores = g.band(scores, self.lo, self.hi);
        let weights = g.pointwise(Exp, scores, None, Kind::Float);
        self.summed_product(&mut g, weights, grad, (Role::GradV, self.v_dims(), grads.v));

        let slope = g.matmul(grad, v, Kind::Float);
        let slope = g.pointwise(Sub, slope, Some(delta), Kind::Float);
        let slope = g.pointwise(Mul, slope, Some(weights), Kind::Float);
        let slope = g.pointwise(Mul, slope, Some(scale), Kind::Float);
        self.summed_product(&mut g, slope, q, (Role::GradK, self.k_dims(), grads.k));

        let rows = g.node(self.k_dims(), self.k, Kind::Float, Home::Virtual);
        g.operations.push(Operation::Reshape { x: k, y: rows });
        let sum = g.device(
            Role::SumQ,
            self.q_dims(),
            contiguous(self.q_dims()),
            Kind::Float,
        );
        g.operations.push(Operation::MatMul {
            a: slope,
            b: rows,
            y: sum,
        });
        let dq = g.device(Role::GradQ, self.q_dims(), grads.q, Kind::Io);
        g.operations.push(Operation::Pointwise {
            op: Identity,
            x: sum,
            b: None,
            t: None,
            y: dq,
        });
        g
    }

    /// The gradient of a kv operand: xᵀ `rows`, summed over the query heads that share a kv head.
    fn summed_product(
        &self,
        g: &mut Graph,
        x: usize,
        rows: usize,
        (role, dims, strides): (Role, [i64; 4], [i64; 4]),
    ) {
        let scores = g.nodes[x].dims;
        let turned = g.node(
            transposed(scores),
            transposed(contiguous(scores)),
            Kind::Io,
            Home::Virtual,
        );
        g.operations.push(Operation::Reshape { x, y: turned });
        let out = g.device(role, dims, strides, Kind::Io);
        if self.heads == self.kv_heads {
            g.operations.push(Operation::MatMul {
                a: turned,
                b: rows,
                y: out,
            });
        } else {
            let each = g.matmul(turned, rows, Kind::Io);
            g.operations.push(Operation::Reduce {
                max: false,
                x: each,
                y: out,
            });
        }
    }

    /// Bytes of device memory that the backward needs besides its operands, about: what cuDNN asks for and the two sums in fp32.
    pub(crate) fn scratch(&self) -> u64 {
        let rows = self.batch * self.heads * self.queries;
        let shared = if self.heads == self.kv_heads {
            0
        } else {
            2 * (self.d + self.dv) * self.batch * self.heads * self.keys
        };
        (rows * (4 * self.d + 4) + shared) as u64
    }
}

/// As JSON, one tensor or operation a line: for snapshots.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{{\"element\": \"{:?}\", \"tensors\": [", self.element);
        for (
            id,
            Node {
                dims,
                strides,
                kind,
                home,
            },
        ) in self.nodes.iter().enumerate()
        {
            let comma = if id == 0 { "" } else { "," };
            write!(
                text,
                "{comma}\n  {{\"id\": {id}, \"home\": \"{home:?}\", \"kind\": \"{kind:?}\", \"dims\": {dims:?}, \"strides\": {strides:?}}}"
            )?;
        }
        text.push_str("\n], \"operations\": [");
        for (at, operation) in self.operations.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let (name, operands) = match *operation {
                Operation::MatMul { a, b, y } => ("MatMul".to_owned(), vec![a, b, y]),
                Operation::Reduce { max, x, y } => {
                    ((if max { "Max" } else { "Sum" }).to_owned(), vec![x, y])
                }
                Operation::Reshape { x, y } => ("Reshape".to_owned(), vec![x, y]),
                Operation::Pointwise { op, x, b, t, y } => (
                    format!("{op:?}"),
                    [Some(x), b, t, Some(y)].into_iter().flatten().collect(),
                ),
            };
            write!(
                text,
                "{comma}\n  {{\"op\": \"{name}\", \"tensors\": {operands:?}}}"
            )?;
        }
        text.push_str("\n]}");
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests;
