//! The table of operations: `ops/candle.toml`, one row for each operation of the library that models are written in.
//!
//! A second front end is a second table. A row that is deleted makes the models that use it refuse.

use std::collections::HashMap;
use std::sync::OnceLock;

use toml::de::{DeTable, DeValue};

macro_rules! rules {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl $name {
            fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

rules! {
    /// How the result's shape follows from the operands.
    ShapeRule {
        /// The shape of the first tensor.
        Same = "same",
        /// Tensors broadcast against each other from the right.
        Broadcast = "broadcast",
        /// `[.., m, k] x [.., k, n]`.
        Matmul = "matmul",
        /// `[.., in]` to `[.., out]`, `out` a width of the layer.
        Linear = "linear",
        /// `[..]` of indices to `[.., width]`.
        Embedding = "embedding",
        /// To the sizes of the first argument, `()` for what is left.
        Reshape = "reshape",
        /// Several dimensions in one.
        Flatten = "flatten",
        /// Two dimensions change places.
        Transpose = "transpose",
        /// The last two dimensions change places.
        T = "t",
        /// All dimensions in the order of the first argument.
        Permute = "permute",
        /// A dimension of size one is put in.
        Unsqueeze = "unsqueeze",
        /// A dimension of size one is taken out.
        Squeeze = "squeeze",
        /// `(dim, start, length)`.
        Narrow = "narrow",
        /// Equal parts along a dimension: `(parts, dim)`.
        Chunk = "chunk",
        /// To the sizes of the first argument, repeating dimensions of size one.
        Expand = "expand",
        /// To the sizes of the first argument and then its own, repeating along new dimensions.
        BroadcastLeft = "broadcast_left",
        /// A list of tensors put one behind the other along a dimension.
        Cat = "cat",
        /// A list of tensors along a new dimension.
        Stack = "stack",
        /// The dimension of the first argument is reduced away.
        Reduce = "reduce",
        /// The dimension of the first argument is reduced to one.
        ReduceKeep = "reduce_keep",
        /// Everything is reduced to a scalar.
        ReduceAll = "reduce_all",
        /// Computed along the dimension of the first argument.
        Along = "along",
        /// Computed along the last dimension.
        AlongLast = "along_last",
        /// Rotary embedding: `(x, cos, sin)`, x `[b, h, s, d]`.
        Rope = "rope",
        /// Rotary embedding: `(x, cos, sin)`, x `[b, s, h, d]`.
        RopeThd = "rope_thd",
        /// Indexing by numbers and ranges, one per dimension.
        Index = "index",
        /// One index along the dimension of the first argument.
        GetOnDim = "get_on_dim",
        /// A scalar tensor.
        Scalar = "scalar",
        /// The sizes of the first argument, all elements alike.
        Filled = "filled",
        /// The sizes of the second argument, all elements the number that the first argument is.
        FilledWith = "filled_with",
        /// The size of the first argument twice, elements by their place.
        Square = "square",
        /// The sizes of the second argument, from host data.
        FromHost = "from_host",
        /// `[end - start]` consecutive numbers.
        Arange = "arange",
        /// `(x, index, dim)`: the dimension of x has the length of the index.
        IndexSelect = "index_select",
        /// `(x, index, y, dim)`: the shape of x.
        IndexAdd = "index_add",
        /// `(x, index, dim)`: the shape of the index.
        Gather = "gather",
        /// A tuple of the operands as they are.
        Each = "each",
        /// Where the first tensor is set the second, else the third.
        Select = "select",
        /// Anything else: the shape is not followed.
        Opaque = "opaque",
    }
}

rules! {
    /// When the operation on shards gives the shard of the operation. Each rule is sound because:
    PlaceRule {
        /// each element of the result depends on the elements at the same place alone.
        Each = "each",
        /// elements are only moved, and the shape rule says where the sequence goes.
        Move = "move",
        /// every token is computed by itself: only the dimensions that the shape rule touches are mixed.
        Tokenwise = "tokenwise",
        /// it runs along the dimensions that it touches and may not run along the sequence.
        Mix = "mix",
        /// there is no tensor operand: every rank makes the same.
        Make = "make",
        /// the value leaves the device: every rank must hold the same.
        Host = "host",
        /// it draws random numbers, which differ between ranks, and is refused on shards.
        Random = "random",
        /// it draws random numbers by element, for which the runtime has a form over all ranks.
        Dropout = "dropout",
        /// it slides a window along a dimension, and is refused on shards.
        Window = "window",
        /// it goes from token to token, and is refused on shards.
        Scan = "scan",
    }
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Absolute path, such as `candle_core::Tensor::matmul`.
    pub path: String,
    /// How the shape follows.
    pub shape: ShapeRule,
    /// When it may run on shards.
    pub place: PlaceRule,
    /// Whether the library gives it a backward.
    pub grad: bool,
    /// The replacement in a sharded scope, below `rt::`.
    pub twin: Option<String>,
    /// Whether attention scores, attention weights or masks may pass through it.
    pub scores: bool,
    /// How a block puts it on its tape.
    pub recorded: Option<Recorded>,
}

/// An operation that the runtime records in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// By the method of `rt::Recorded` that has its name with `__sp`.
    Method,
    /// By the function of `rt::ops` that has its name; it is an operator as well.
    Operator,
}

impl Row {
    /// The last segment of the path: the name of the method or function.
    pub fn name(&self) -> &str {
        self.path.rsplit("::").next().unwrap_or(&self.path)
    }
}

/// The row for what a user says is computed token by token.
pub(crate) fn tokenwise() -> &'static Row {
    static ROW: OnceLock<Row> = OnceLock::new();
    ROW.get_or_init(|| Row {
        path: "autosp::tokenwise".to_string(),
        shape: ShapeRule::Linear,
        place: PlaceRule::Tokenwise,
        grad: true,
        twin: None,
        scores: false,
        recorded: None,
    })
}

/// All rows, by path.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Row>,
    index: HashMap<String, usize>,
}

impl Table {
    /// Parses a table.
    ///
    /// # Errors
    /// A message naming the row, if the text is no TOML or a row has an unknown rule or lacks a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table = DeTable::parse(text).map_err(|e| e.to_string())?;
        let list = table
            .get_ref()
            .get("op")
            .and_then(|v| v.get_ref().as_array())
            .ok_or("expected an array `op`")?;
        let mut rows = Vec::with_capacity(list.len());
        for value in list {
            let get = |key: &str| value.get_ref().get(key).map(toml::Spanned::get_ref);
            let text = |key: &str| get(key).and_then(DeValue::as_str);
            let flag = |key: &str| get(key).and_then(DeValue::as_bool).unwrap_or(false);
            let shape = text("shape").and_then(ShapeRule::parse);
            let place = text("place").and_then(PlaceRule::parse);
            let owner = text("owner").unwrap_or_default();
            let names = get("names").and_then(DeValue::as_array);
            let (Some(names), Some(shape), Some(place)) = (names, shape, place) else {
                return Err(format!(
                    "expected `owner`, `names` and known rules for `shape` and `place`, found {:?}",
                    value.get_ref()
                ));
            };
            for name in names.iter().filter_map(|n| n.get_ref().as_str()) {
                rows.push(Row {
                    path: format!("{owner}::{name}"),
                    shape,
                    place,
                    grad: flag("grad"),
                    twin: text("twin").map(String::from),
                    scores: flag("scores"),
                    recorded: None,
                });
            }
        }
        let index: HashMap<String, usize> = rows
            .iter()
            .enumerate()
            .map(|(i, row)| (row.path.clone(), i))
            .collect();
        if let Some(recorded) = table.get_ref().get("recorded") {
            let get = |key: &str| recorded.get_ref().get(key).map(toml::Spanned::get_ref);
            let owner = get("owner").and_then(DeValue::as_str).unwrap_or_default();
            for (key, how) in [
                ("methods", Recorded::Method),
                ("operators", Recorded::Operator),
            ] {
                let names = get(key).and_then(DeValue::as_array);
                for name in names.into_iter().flatten() {
                    let path = format!("{owner}::{}", name.get_ref().as_str().unwrap_or_default());
                    let row = index.get(&path).and_then(|i| rows.get_mut(*i));
                    let Some(row) = row else {
                        return Err(format!("`{path}` is recorded, but has no row"));
                    };
                    row.recorded = Some(how);
                }
            }
        }
        Ok(Self { rows, index })
    }

    /// The rows in the order of the file.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(crate) fn get(&self, path: &str) -> Option<&Row> {
        self.index.get(path).map(|i| &self.rows[*i])
    }
}

/// The table for candle.
///
/// # Panics
/// If the file that is built into this crate is malformed, which a test excludes.
pub fn candle() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        Table::parse(include_str!("../../ops/candle.toml"))
            .unwrap_or_else(|e| panic!("ops/candle.toml: {e}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_parses_and_names_each_operation_once() {
        let table = candle();
        assert!(table.rows().len() > 90);
        assert_eq!(table.index.len(), table.rows.len(), "a path stands twice");
        assert_eq!(
            table.get("candle_core::Tensor::matmul").map(Row::name),
            Some("matmul")
        );
    }

    #[test]
    fn a_broken_row_is_named() {
        let err =
            Table::parse("[[op]]\nowner = 'a'\nnames = ['b']\nshape = 'nonsense'\nplace = 'each'")
                .unwrap_err();
        assert!(err.contains("nonsense"), "{err}");
    }
}
