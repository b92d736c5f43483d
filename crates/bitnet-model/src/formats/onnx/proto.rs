//! The messages of an ONNX file that hold weights or say what they are: a subset of onnx.proto3.
//! Texts and numbers are slices of the file.

use bitnet_core::DType;

use super::super::{MAX_NAME_BYTES, MAX_RANK, MAX_TENSORS};
use crate::error::excerpt;
use crate::protobuf::{Broken, Fields, Wire, fields, packed_varints};

/// Most nodes of a graph. Exports of the largest dense models have some ten thousands.
const MAX_NODES: usize = 1 << 18;

/// A file that is not ONNX, or cut short.
impl From<Broken> for String {
    fn from(_: Broken) -> String {
        "is not an ONNX model, or is cut short".to_owned()
    }
}

/// What is read of a graph.
#[derive(Debug, Default)]
pub(super) struct Graph<'a> {
    /// Messages for [`Initializer::read`].
    pub(super) initializers: Vec<&'a [u8]>,
    /// The operations that weights pass through.
    pub(super) nodes: Vec<Node<'a>>,
}

/// A constant of the graph: `TensorProto`.
#[derive(Debug)]
pub(super) struct Initializer<'a> {
    pub(super) name: &'a str,
    /// Extents, outermost first.
    pub(super) shape: Vec<usize>,
    /// `TensorProto.DataType`.
    pub(super) data_type: u64,
    pub(super) data: Data<'a>,
}

/// Where the numbers of a constant are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data<'a> {
    /// Here, little-endian.
    Here(&'a [u8]),
    /// Here, a varint for each.
    Varints(&'a [u8]),
    /// In another file, from a byte on; without a length up to the file's end.
    External { location: &'a str, offset: u64, length: Option<u64> },
    /// In a form that is not read.
    Unread(&'static str),
}

/// An operation.
#[derive(Debug, Default)]
pub(super) struct Node<'a> {
    pub(super) name: &'a str,
    pub(super) op: &'a str,
    /// The first inputs.
    pub(super) inputs: Vec<&'a str>,
    /// The first output.
    pub(super) output: &'a str,
    /// The modules that torch's exporter found the operation in, as it writes them.
    pub(super) scopes: Option<&'a str>,
    attributes: Vec<&'a [u8]>,
    /// Numbers among its free texts.
    numbers: Vec<(&'a str, usize)>,
}

/// The graph of a model.
pub(super) fn graph(model: &[u8]) -> Result<Graph<'_>, String> {
    let mut graph = None;
    for field in fields(model) {
        if let (7, Wire::Bytes(message)) = field?
            && graph.replace(message).is_some()
        {
            return Err("has two graphs".to_owned());
        }
    }
    let message = graph.ok_or("is not an ONNX model: it has no graph")?;
    let mut graph = Graph::default();
    for field in fields(message) {
        match field? {
            (1, Wire::Bytes(_)) if graph.nodes.len() == MAX_NODES => {
                return Err(format!("has more than {MAX_NODES} nodes"));
            }
            (1, Wire::Bytes(message)) => {
                let node = Node::read(message)?;
                if Node::READ.contains(&node.op) {
                    graph.nodes.push(node);
                }
            }
            (5, Wire::Bytes(_)) if graph.initializers.len() == MAX_TENSORS => {
                return Err(format!("has more than {MAX_TENSORS} initializers"));
            }
            (5, Wire::Bytes(tensor)) => graph.initializers.push(tensor),
            _ => {}
        }
    }
    Ok(graph)
}

impl<'a> Initializer<'a> {
    /// Reads a `TensorProto`.
    pub(super) fn read(message: &'a [u8]) -> Result<Self, String> {
        let mut tensor =
            Initializer { name: "", shape: Vec::new(), data_type: 0, data: Data::Here(&[]) };
        let (mut external, mut is_external) = ((None, 0, None), false);
        for field in fields(message) {
            match field? {
                (1, Wire::Varint(extent)) => tensor.push_extent(extent)?,
                (1, Wire::Bytes(extents)) => {
                    for extent in packed_varints(extents) {
                        tensor.push_extent(extent?)?;
                    }
                }
                (2, Wire::Varint(data_type)) => tensor.data_type = data_type,
                (3, Wire::Bytes(_)) => tensor.data = Data::Unread("in segments"),
                // Packed floats and doubles lie as they do in `raw_data`.
                (4 | 9 | 10, Wire::Bytes(data)) => tensor.data = tensor.only(Data::Here(data)),
                (5, Wire::Bytes(data)) => tensor.data = tensor.only(Data::Varints(data)),
                (4 | 5 | 7 | 10 | 11, _) => tensor.data = Data::Unread("in a typed field"),
                (8, Wire::Bytes(name)) => tensor.name = text(name)?,
                (13, Wire::Bytes(entry)) => read_external(entry, &mut external)?,
                (14, Wire::Varint(location)) => is_external = location == 1,
                _ => {}
            }
        }
        if tensor.name.len() > MAX_NAME_BYTES {
            return Err(format!("has an initializer with a name of {} bytes", tensor.name.len()));
        }
        if is_external {
            tensor.data = match external {
                (Some(location), offset, length) => Data::External { location, offset, length },
                _ => Data::Unread("in another file that is not named"),
            };
        }
        Ok(tensor)
    }

    fn push_extent(&mut self, extent: u64) -> Result<(), String> {
        let name = || excerpt(self.name);
        if self.shape.len() == MAX_RANK {
            return Err(format!("initializer `{}` has more than {MAX_RANK} extents", name()));
        }
        let extent = usize::try_from(extent)
            .map_err(|_| format!("initializer `{}` has an extent of {extent}", name()))?;
        self.shape.push(extent);
        Ok(())
    }

    /// `data`, unless there was some before it.
    fn only(&self, data: Data<'a>) -> Data<'a> {
        match self.data {
            Data::Here([]) => data,
            _ => Data::Unread("in several pieces"),
        }
    }

    /// The element type, if we read it. Booleans are their bytes.
    pub(super) fn dtype(&self) -> Option<DType> {
        Some(match self.data_type {
            1 => DType::F32,
            2 | 9 => DType::U8,
            3 => DType::I8,
            6 => DType::I32,
            7 => DType::I64,
            10 => DType::F16,
            11 => DType::F64,
            16 => DType::BF16,
            _ => return None,
        })
    }
}

fn read_external<'a>(
    entry: &'a [u8],
    (location, offset, length): &mut (Option<&'a str>, u64, Option<u64>),
) -> Result<(), String> {
    let (key, value) = key_and_value(entry)?;
    let number = || {
        let quoted = excerpt(value);
        value.parse().map_err(|_| format!("has external data with {key} `{quoted}`"))
    };
    match key {
        "location" => *location = Some(value),
        "offset" => *offset = number()?,
        "length" => *length = Some(number()?),
        _ => {}
    }
    Ok(())
}

impl<'a> Node<'a> {
    /// The operations that weights pass through.
    const READ: [&'static str; 8] =
        ["MatMul", "Gemm", "MatMulNBits", "Transpose", "Identity", "Cast", "Abs", "Gather"];

    /// Inputs and attributes that are looked at, more than any of them has.
    const MAX_INPUTS: usize = 16;

    /// Reads a `NodeProto`.
    pub(super) fn read(message: &'a [u8]) -> Result<Self, String> {
        let mut node = Node::default();
        let mut has_output = false;
        for field in fields(message) {
            match field? {
                (1, Wire::Bytes(input)) if node.inputs.len() < Self::MAX_INPUTS => {
                    node.inputs.push(text(input)?);
                }
                (2, Wire::Bytes(output)) if !has_output => {
                    (node.output, has_output) = (text(output)?, true);
                }
                (3, Wire::Bytes(name)) => node.name = text(name)?,
                (4, Wire::Bytes(op)) => node.op = text(op)?,
                (5, Wire::Bytes(attribute)) if node.attributes.len() < Self::MAX_INPUTS => {
                    node.attributes.push(attribute);
                }
                (9, Wire::Bytes(entry)) => {
                    let (key, value) = key_and_value(entry)?;
                    if key == "pkg.torch.onnx.name_scopes" {
                        node.scopes = Some(value);
                    } else if node.numbers.len() < Self::MAX_INPUTS
                        && let Ok(number) = value.parse()
                    {
                        node.numbers.push((key, number));
                    }
                }
                _ => {}
            }
        }
        Ok(node)
    }

    /// The fields of the attribute of that name.
    fn attribute(&self, name: &str) -> Option<Fields<'a>> {
        let is_it = |message: &&[u8]| {
            fields(message).any(|field| field == Ok((1, Wire::Bytes(name.as_bytes()))))
        };
        self.attributes.iter().copied().find(is_it).map(fields)
    }

    /// The whole number in an attribute.
    pub(super) fn integer(&self, name: &str) -> Option<u64> {
        self.attribute(name)?.find_map(|field| match field {
            Ok((3, Wire::Varint(value))) => Some(value),
            _ => None,
        })
    }

    /// The whole number in a free text.
    pub(super) fn number(&self, key: &str) -> Option<usize> {
        self.numbers.iter().find(|(name, _)| *name == key).map(|(_, number)| *number)
    }
}

/// A `StringStringEntryProto`.
fn key_and_value(entry: &[u8]) -> Result<(&str, &str), String> {
    let (mut key, mut value) = ("", "");
    for field in fields(entry) {
        match field? {
            (1, Wire::Bytes(bytes)) => key = text(bytes)?,
            (2, Wire::Bytes(bytes)) => value = text(bytes)?,
            _ => {}
        }
    }
    Ok((key, value))
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|_| "has a name that is not UTF-8".to_owned())
}
