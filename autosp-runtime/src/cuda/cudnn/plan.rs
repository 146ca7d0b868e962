//! From a graph to an execution plan, and running it.

use std::ffi::c_void;

use candle_core::CudaDevice;
use cudarc::cudnn::sys;
use cudarc::driver::DevicePtr;
use sys::cudnnDataType_t as Data;
use sys::cudnnPointwiseMode_t as Mode;

use super::Handle;
use super::descriptor::{Descriptor, Name, Type};
use crate::Result;
use crate::attention::graphs::{Element, Graph, Home, Kind, Node, Operation, Pointwise, Role};
use crate::cuda::failure::failure;

/// Engine configurations that are tried, best first.
const CONFIGURATIONS: usize = 8;

/// A graph that cuDNN has a kernel for.
#[derive(Debug)]
pub(in crate::cuda) struct Plan {
    chosen: Descriptor,
    /// Bytes of device memory that a run needs besides the tensors.
    workspace: usize,
    /// Identifiers of what has an address when it runs.
    roles: Vec<(i64, Role)>,
    /// Identifiers and values of numbers; boxed, since cuDNN reads them where they are.
    numbers: Vec<(i64, Box<u32>)>,
    /// What the plan refers to.
    _parts: Vec<Descriptor>,
}

fn data(kind: Kind, element: Element) -> Data {
    match (kind, element) {
        (Kind::Io, Element::Bf16) => Data::CUDNN_DATA_BFLOAT16,
        (Kind::Io, Element::F16) => Data::CUDNN_DATA_HALF,
        (Kind::Float, _) => Data::CUDNN_DATA_FLOAT,
        (Kind::Int, _) => Data::CUDNN_DATA_INT32,
        (Kind::Bool, _) => Data::CUDNN_DATA_BOOLEAN,
    }
}

fn tensor(id: usize, node: &Node, element: Element) -> Result<Descriptor> {
    let by_value = matches!(node.home, Home::Float(_) | Home::Int(_));
    let alignment = if by_value || node.kind != Kind::Io {
        4
    } else {
        16
    };
    Descriptor::new(Type::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
        .set(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[id as i64])?
        .set(
            Name::CUDNN_ATTR_TENSOR_DATA_TYPE,
            &[data(node.kind, element)],
        )?
        .set(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[alignment])?
        .set(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &node.dims)?
        .set(Name::CUDNN_ATTR_TENSOR_STRIDES, &node.strides)?
        .set(
            Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL,
            &[node.home == Home::Virtual],
        )?
        .set(Name::CUDNN_ATTR_TENSOR_IS_BY_VALUE, &[by_value])?
        .finish()
}

fn mode(op: Pointwise) -> Mode {
    match op {
        Pointwise::Mul => Mode::CUDNN_POINTWISE_MUL,
        Pointwise::Add => Mode::CUDNN_POINTWISE_ADD,
        Pointwise::Sub => Mode::CUDNN_POINTWISE_SUB,
        Pointwise::Div => Mode::CUDNN_POINTWISE_DIV,
        Pointwise::Exp => Mode::CUDNN_POINTWISE_EXP,
        Pointwise::Log => Mode::CUDNN_POINTWISE_LOG,
        Pointwise::Identity => Mode::CUDNN_POINTWISE_IDENTITY,
        Pointwise::Index(_) => Mode::CUDNN_POINTWISE_GEN_INDEX,
        Pointwise::GreaterEqual => Mode::CUDNN_POINTWISE_CMP_GE,
        Pointwise::Greater => Mode::CUDNN_POINTWISE_CMP_GT,
        Pointwise::Select => Mode::CUDNN_POINTWISE_BINARY_SELECT,
    }
}

/// The descriptor of an operation, and the one that it is configured by.
fn operation(
    graph: &Graph,
    operation: Operation,
    tensors: &[Descriptor],
) -> Result<(Descriptor, Option<Descriptor>)> {
    match operation {
        Operation::MatMul { a, b, y } => {
            let matmul = Descriptor::new(Type::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?
                .set(Name::CUDNN_ATTR_MATMUL_COMP_TYPE, &[Data::CUDNN_DATA_FLOAT])?
                .finish()?;
            let node = Descriptor::new(Type::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)?
                .refer(Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, &[&tensors[a]])?
                .refer(Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, &[&tensors[b]])?
                .refer(Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, &[&tensors[y]])?
                .refer(Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, &[&matmul])?
                .finish()?;
            Ok((node, Some(matmul)))
        }
        Operation::Reduce { max, x, y } => {
            let kind = if max {
                sys::cudnnReduceTensorOp_t::CUDNN_REDUCE_TENSOR_MAX
            } else {
                sys::cudnnReduceTensorOp_t::CUDNN_REDUCE_TENSOR_ADD
            };
            let reduction = Descriptor::new(Type::CUDNN_BACKEND_REDUCTION_DESCRIPTOR)?
                .set(
                    Name::CUDNN_ATTR_REDUCTION_COMP_TYPE,
                    &[Data::CUDNN_DATA_FLOAT],
                )?
                .set(Name::CUDNN_ATTR_REDUCTION_OPERATOR, &[kind])?
                .finish()?;
            let node = Descriptor::new(Type::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR)?
                .refer(Name::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &[&tensors[x]])?
                .refer(Name::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &[&tensors[y]])?
                .refer(Name::CUDNN_ATTR_OPERATION_REDUCTION_DESC, &[&reduction])?
                .finish()?;
            Ok((node, Some(reduction)))
        }
        Operation::Reshape { x, y } => {
            let node = Descriptor::new(Type::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR)?
                .refer(Name::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &[&tensors[x]])?
                .refer(Name::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &[&tensors[y]])?
                .finish()?;
            Ok((node, None))
        }
        Operation::Pointwise { op, x, b, t, y } => {
            let precision = match (op, graph.nodes[y].kind) {
                (_, Kind::Bool) => Data::CUDNN_DATA_BOOLEAN,
                (Pointwise::Index(_), _) | (_, Kind::Int) => Data::CUDNN_DATA_INT32,
                _ => Data::CUDNN_DATA_FLOAT,
            };
            let mut pointwise = Descriptor::new(Type::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
                .set(Name::CUDNN_ATTR_POINTWISE_MODE, &[mode(op)])?
                .set(Name::CUDNN_ATTR_POINTWISE_MATH_PREC, &[precision])?;
            if let Pointwise::Index(axis) = op {
                pointwise = pointwise.set(Name::CUDNN_ATTR_POINTWISE_AXIS, &[axis])?;
            }
            let pointwise = pointwise.finish()?;
            let mut node = Descriptor::new(Type::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?
                .refer(
                    Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR,
                    &[&pointwise],
                )?
                .refer(Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &[&tensors[x]])?;
            if let Some(b) = b {
                node = node.refer(Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &[&tensors[b]])?;
            }
            if let Some(t) = t {
                node = node.refer(Name::CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &[&tensors[t]])?;
            }
            let node = node
                .refer(Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &[&tensors[y]])?
                .finish()?;
            Ok((node, Some(pointwise)))
        }
    }
}

impl Plan {
    /// The best plan that cuDNN has for a graph.
    ///
    /// # Errors
    /// AS0411 in cuDNN's words if it has none.
    pub(super) fn build(handle: &Handle, graph: &Graph) -> Result<Self> {
        let tensors = graph
            .nodes
            .iter()
            .enumerate()
            .map(|(at, node)| tensor(at + 1, node, graph.element))
            .collect::<Result<Vec<_>>>()?;
        let (mut operations, mut parts) = (Vec::new(), Vec::new());
        for &each in &graph.operations {
            let (node, configuration) = operation(graph, each, &tensors)?;
            operations.push(node);
            parts.extend(configuration);
        }
        let whole = Descriptor::new(Type::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .refer(
                Name::CUDNN_ATTR_OPERATIONGRAPH_OPS,
                &operations.iter().collect::<Vec<_>>(),
            )?
            .set(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[handle.0])?
            .finish()?;
        let heuristics = Descriptor::new(Type::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .refer(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[&whole])?
            .set(
                Name::CUDNN_ATTR_ENGINEHEUR_MODE,
                &[sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A],
            )?
            .finish()?;
        let configurations = heuristics.list(
            Name::CUDNN_ATTR_ENGINEHEUR_RESULTS,
            Type::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR,
            CONFIGURATIONS,
        )?;
        let mut refused = failure("planning attention", "cuDNN: no engine takes this graph");
        for configuration in configurations {
            let built = Descriptor::new(Type::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
                .set(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[handle.0])?
                .refer(
                    Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                    &[&configuration],
                )?
                .finish();
            let plan = match built {
                Ok(plan) => plan,
                Err(error) => {
                    refused = error;
                    continue;
                }
            };
            let workspace = plan
                .number(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?
                .max(0) as usize;
            let named = || {
                graph
                    .nodes
                    .iter()
                    .enumerate()
                    .map(|(at, node)| (at as i64 + 1, node.home))
            };
            let roles = named().filter_map(|(id, home)| match home {
                Home::Device(role) => Some((id, role)),
                _ => None,
            });
            let numbers = named().filter_map(|(id, home)| match home {
                Home::Float(x) => Some((id, Box::new(x.to_bits()))),
                Home::Int(x) => Some((id, Box::new(x.cast_unsigned()))),
                _ => None,
            });
            let (roles, numbers) = (roles.collect(), numbers.collect());
            parts.extend(operations);
            parts.extend(tensors);
            parts.extend([whole, heuristics, configuration]);
            return Ok(Self {
                chosen: plan,
                workspace,
                roles,
                numbers,
                _parts: parts,
            });
        }
        Err(refused)
    }

    /// Runs the plan on its handle's stream; `address` gives where each tensor is. The workspace comes from the pool of `device`,
    /// whose stream is the handle's.
    ///
    /// # Errors
    /// AS0411 if cuDNN refuses, candle's error if memory runs out.
    pub(in crate::cuda) fn run(
        &self,
        handle: &Handle,
        device: &CudaDevice,
        address: impl Fn(Role) -> Option<u64>,
    ) -> Result<()> {
        let mut ids = Vec::with_capacity(self.roles.len() + self.numbers.len());
        let mut pointers: Vec<*mut c_void> = Vec::with_capacity(ids.capacity());
        for &(id, role) in &self.roles {
            let Some(at) = address(role) else {
                return Err(failure(
                    "attention",
                    format_args!("expected an address of {role:?}, found none"),
                ));
            };
            ids.push(id);
            pointers.push(at as *mut c_void);
        }
        for (id, number) in &self.numbers {
            ids.push(*id);
            pointers.push(std::ptr::from_ref::<u32>(number).cast_mut().cast());
        }
        // SAFETY: the workspace is scratch, which the kernel writes before it reads; it is freed in the order of the stream.
        let workspace = unsafe { device.alloc::<u8>(self.workspace.max(16)) }?;
        let stream = device.cuda_stream();
        let at = workspace.device_ptr(&stream).0;
        let pack = Descriptor::new(Type::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &ids)?
            .set(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &pointers)?
            .set(
                Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                &[at as *mut c_void],
            )?
            .finish()?;
        self.chosen.execute(handle.0, &pack)
    }
}
