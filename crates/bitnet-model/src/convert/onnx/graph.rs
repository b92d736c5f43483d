//! An ONNX graph that is being built: nodes, constants, inputs and outputs, as `onnx.proto3` has them.

use std::collections::BTreeMap;

use bitnet_core::DType;

use crate::protobuf::Message;

/// The version of the standard operations: the first in which `ReduceMax` and `Split` are as they are
/// used here.
const OPSET: u64 = 18;

/// The version of the file format: the first whose nodes have free texts.
const IR_VERSION: u64 = 10;

/// Name of the graph's other set of operations, ONNX Runtime's own.
const MICROSOFT: &str = "com.microsoft";

/// A value of the graph, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value(pub(super) String);

/// An attribute of a node.
#[derive(Debug, Clone, Copy)]
pub(super) enum Attribute<'a> {
    Int(u64),
    Ints(&'a [u64]),
}

/// An extent of an input or output: a number, or a name where it is free.
#[derive(Debug, Clone, Copy)]
pub(super) enum Extent {
    Is(usize),
    Free(&'static str),
}

/// Bytes of the file of external data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// A graph that is being built.
#[derive(Default)]
pub(super) struct Graph {
    nodes: Vec<Message>,
    initializers: Vec<Message>,
    inputs: Vec<Message>,
    outputs: Vec<Message>,
    /// Where the next nodes are, such as `/model/layers.0/self_attn`.
    scope: String,
    /// How many nodes each scope has of each operation.
    counts: BTreeMap<String, usize>,
    /// Small constants that are there already.
    constants: BTreeMap<String, Value>,
}

impl Graph {
    /// Sets where the next nodes are, for people and readers.
    pub(super) fn enter(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    /// A standard operation; its first output.
    pub(super) fn op(&mut self, op: &str, inputs: &[&Value]) -> Value {
        self.op_with(op, inputs, &[])
    }

    /// As [`op`](Self::op), with attributes.
    pub(super) fn op_with(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: &[(&str, Attribute<'_>)],
    ) -> Value {
        let [output] = self.outputs_of(op, inputs, attributes);
        output
    }

    /// The outputs of a standard operation that has several.
    pub(super) fn outputs_of<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: &[(&str, Attribute<'_>)],
    ) -> [Value; N] {
        let (message, outputs) = self.node(op, inputs, attributes);
        self.nodes.push(message);
        outputs
    }

    /// One of ONNX Runtime's own operations, with free texts.
    pub(super) fn microsoft_op(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: &[(&str, Attribute<'_>)],
        texts: &[(&str, String)],
    ) -> Value {
        let (message, [output]) = self.node(op, inputs, attributes);
        let entry = |message: Message, (key, text): &(&str, String)| {
            message.message(9, Message::default().bytes(1, key).bytes(2, text))
        };
        self.nodes.push(message.bytes(7, MICROSOFT).each(texts, entry));
        output
    }

    fn node<const N: usize>(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: &[(&str, Attribute<'_>)],
    ) -> (Message, [Value; N]) {
        let mut name = format!("{}/{op}", self.scope);
        let count = self.counts.entry(name.clone()).or_default();
        if *count > 0 {
            name = format!("{name}_{count}");
        }
        *count += 1;
        let outputs = std::array::from_fn(|index| Value(format!("{name}_output_{index}")));
        let attribute = |message: Message, (key, value): &(&str, Attribute<'_>)| {
            let named = Message::default().bytes(1, key);
            let attribute = match value {
                Attribute::Int(value) => named.varint(3, *value).varint(20, 2),
                Attribute::Ints(values) => {
                    named.each(*values, |message, value| message.varint(8, *value)).varint(20, 7)
                }
            };
            message.message(5, attribute)
        };
        let message = Message::default()
            .each(inputs, |message, input| message.bytes(1, &input.0))
            .each(&outputs, |message, output: &Value| message.bytes(2, &output.0))
            .bytes(3, &name)
            .bytes(4, op)
            .each(attributes, attribute);
        (message, outputs)
    }

    /// A single f32.
    pub(super) fn float(&mut self, value: f32) -> Value {
        self.constant(format!("float_{value:?}"), DType::F32, &[], &value.to_le_bytes())
    }

    /// A list of whole numbers.
    pub(super) fn ints(&mut self, values: &[i64]) -> Value {
        let name = values.iter().fold("ints".to_owned(), |name, value| format!("{name}_{value}"));
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, DType::I64, &[values.len()], &bytes)
    }

    /// A single whole number.
    pub(super) fn int(&mut self, value: i64) -> Value {
        self.constant(format!("int_{value}"), DType::I64, &[], &value.to_le_bytes())
    }

    fn constant(&mut self, name: String, dtype: DType, shape: &[usize], data: &[u8]) -> Value {
        if let Some(value) = self.known(&name) {
            return value;
        }
        let value = self.initializer(name, dtype, shape, data);
        self.know(&value);
        value
    }

    /// The constant of that name that is shared, if it is there.
    pub(super) fn known(&self, name: &str) -> Option<Value> {
        self.constants.get(name).cloned()
    }

    /// Shares a constant from now on.
    pub(super) fn know(&mut self, value: &Value) {
        self.constants.insert(value.0.clone(), value.clone());
    }

    /// A constant whose numbers are in the graph's own file.
    pub(super) fn initializer(
        &mut self,
        name: String,
        dtype: DType,
        shape: &[usize],
        data: &[u8],
    ) -> Value {
        let message = tensor(&name, dtype, shape).bytes(9, data);
        self.initializers.push(message);
        Value(name)
    }

    /// A constant whose numbers are in the file `location` beside the graph's.
    pub(super) fn external(
        &mut self,
        name: String,
        dtype: DType,
        shape: &[usize],
        location: &str,
        place: Place,
    ) -> Value {
        let entry = |key: &str, value: &str| Message::default().bytes(1, key).bytes(2, value);
        let message = tensor(&name, dtype, shape)
            .message(13, entry("location", location))
            .message(13, entry("offset", &place.offset.to_string()))
            .message(13, entry("length", &place.length.to_string()))
            .varint(14, 1);
        self.initializers.push(message);
        Value(name)
    }

    /// An input of the graph.
    pub(super) fn input(&mut self, name: &str, dtype: DType, shape: &[Extent]) -> Value {
        self.inputs.push(described(name, dtype, shape));
        Value(name.to_owned())
    }

    /// Makes a value an output of the graph, under this name.
    pub(super) fn output(&mut self, name: &str, value: &Value, dtype: DType, shape: &[Extent]) {
        self.outputs.push(described(name, dtype, shape));
        let node = Message::default()
            .bytes(1, &value.0)
            .bytes(2, name)
            .bytes(3, format!("/{name}"))
            .bytes(4, "Identity");
        self.nodes.push(node);
    }

    /// The whole model: the bytes of an ONNX file.
    pub(super) fn into_model(self) -> Vec<u8> {
        let field = |number| move |message: Message, part| message.message(number, part);
        let graph = Message::default()
            .each(self.nodes, field(1))
            .bytes(2, "model")
            .each(self.initializers, field(5))
            .each(self.inputs, field(11))
            .each(self.outputs, field(12));
        let operations =
            |domain: &str, version| Message::default().bytes(1, domain).varint(2, version);
        Message::default()
            .varint(1, IR_VERSION)
            .bytes(2, "bitnet")
            .bytes(3, env!("CARGO_PKG_VERSION"))
            .message(7, graph)
            .message(8, operations("", OPSET))
            .message(8, operations(MICROSOFT, 1))
            .into_bytes()
    }
}

/// The beginning of a `TensorProto`.
fn tensor(name: &str, dtype: DType, shape: &[usize]) -> Message {
    Message::default()
        .each(shape, |message, extent| message.varint(1, *extent as u64))
        .varint(2, data_type(dtype))
        .bytes(8, name)
}

/// A `ValueInfoProto`.
fn described(name: &str, dtype: DType, shape: &[Extent]) -> Message {
    let extent = |message: Message, extent: &Extent| {
        let dimension = match extent {
            Extent::Is(number) => Message::default().varint(1, *number as u64),
            Extent::Free(name) => Message::default().bytes(2, name),
        };
        message.message(1, dimension)
    };
    let tensor = Message::default()
        .varint(1, data_type(dtype))
        .message(2, Message::default().each(shape, extent));
    Message::default().bytes(1, name).message(2, Message::default().message(1, tensor))
}

/// `TensorProto.DataType`.
///
/// # Panics
/// For a type that only other formats have.
pub(super) fn data_type(dtype: DType) -> u64 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::I8 => 3,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::F16 => 10,
        DType::F64 => 11,
        DType::BF16 => 16,
        other => panic!("ONNX has no {other}"),
    }
}
