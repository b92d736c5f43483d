//! Files made field by field.

use std::path::Path;

use bitnet_core::DType;
use bytes::Bytes;

use super::*;
use crate::protobuf::Message;

/// A `TensorProto` without numbers.
fn tensor(name: &str, data_type: u64, shape: &[u64]) -> Message {
    Message::default()
        .each(shape, |message, extent| message.varint(1, *extent))
        .varint(2, data_type)
        .bytes(8, name)
}

fn floats(name: &str, shape: &[u64], values: &[f32]) -> Message {
    tensor(name, 1, shape).bytes(9, bytes_of(values))
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn external(name: &str, shape: &[u64], entries: &[(&str, &str)]) -> Message {
    let entry = |message: Message, (key, value): &(&str, &str)| {
        message.message(13, Message::default().bytes(1, key).bytes(2, value))
    };
    tensor(name, 1, shape).each(entries, entry).varint(14, 1)
}

fn node(op: &str, name: &str, inputs: &[&str], output: &str) -> Message {
    Message::default()
        .each(inputs, |message, input| message.bytes(1, input))
        .bytes(2, output)
        .bytes(3, name)
        .bytes(4, op)
}

fn int(name: &str, value: u64) -> Message {
    Message::default().bytes(1, name).varint(3, value).varint(20, 2)
}

fn model(nodes: Vec<Message>, tensors: Vec<Message>) -> Vec<u8> {
    let graph = Message::default()
        .each(nodes, |message, node| message.message(1, node))
        .each(tensors, |message, tensor| message.message(5, tensor));
    Message::default().varint(1, 8).message(7, graph).into_bytes()
}

fn parse_at(path: &Path, bytes: Vec<u8>) -> Result<Tensors, String> {
    let mut tensors = Tensors::default();
    let read = from_bytes(bytes.into(), path, &mut tensors);
    read.map(|()| tensors).map_err(|error| error.to_string())
}

fn parse(bytes: Vec<u8>) -> Result<Tensors, String> {
    parse_at(Path::new("m.onnx"), bytes)
}

fn values(tensors: &Tensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = tensors.get(name).unwrap().unwrap_or_else(|| panic!("{name} is missing"));
    let values = tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    (tensor.shape().to_vec(), values.collect())
}

#[test]
fn parameters_are_slices_of_the_file_whatever_the_model_was_a_part_of() {
    let typed = tensor("m.model.norm.weight", 1, &[2]).bytes(4, bytes_of(&[5.0, 6.0]));
    let bytes = Bytes::from(model(
        vec![],
        vec![
            floats("m.model.layers.1.self_attn.q_proj.weight", &[1, 2], &[1.0, 2.0]),
            typed,
            floats("m.lm_head.weight", &[1, 1], &[3.0]),
            floats("val_7", &[1], &[4.0]),
        ],
    ));
    let mut tensors = Tensors::default();
    from_bytes(bytes.clone(), Path::new("m.onnx"), &mut tensors).unwrap();
    let names: Vec<&str> = tensors.names().collect();
    let expected =
        ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"];
    assert_eq!(names, expected);
    for name in names {
        let data = tensors.get(name).unwrap().unwrap().data().as_ptr_range();
        assert!(bytes.as_ptr_range().contains(&data.start), "{name}");
    }
    assert_eq!(values(&tensors, "model.norm.weight"), (vec![2], vec![5.0, 6.0]));
}

#[test]
fn constants_of_linear_layers_are_found_by_their_operation_and_turned_around() {
    let turned = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let gemm = node("Gemm", "/model/layers.0/mlp/up_proj/Gemm", &["x", "c"], "g")
        .message(5, int("transB", 1));
    // torch's newer exporter names modules apart from its nodes.
    let scopes = "['', 'model', 'model.layers.0', 'model.layers.0.mlp', \
                  'model.layers.0.mlp.gate_proj', 'linear_4']";
    let entry = Message::default().bytes(1, "pkg.torch.onnx.name_scopes").bytes(2, scopes);
    let tensors = parse(model(
        vec![
            node("MatMul", "/model/layers.0/self_attn/q_proj/MatMul", &["x", "a"], "q"),
            node("Transpose", "/model/layers.0/self_attn/k_proj/Transpose", &["b"], "t"),
            node("Cast", "/model/layers.0/self_attn/k_proj/Cast", &["t"], "u"),
            node("MatMul", "/model/layers.0/self_attn/k_proj/MatMul", &["x", "u"], "k"),
            gemm,
            node("MatMul", "node_linear_4", &["x", "d"], "y").message(9, entry),
            // Not a constant, and not a linear layer.
            node("MatMul", "/model/layers.0/self_attn/MatMul", &["q", "k"], "s"),
            node("MatMul", "/model/layers.0/mlp/down_proj/MatMul", &["x", "computed"], "z"),
        ],
        ["a", "b", "c", "d"].map(|name| floats(name, &[2, 3], &turned)).to_vec(),
    ))
    .unwrap();
    assert_eq!(tensors.len(), 4);
    let back = (vec![3, 2], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    let plain = (vec![2, 3], turned.to_vec());
    for (module, expected) in [
        ("self_attn.q_proj", &back),
        ("self_attn.k_proj", &plain),
        ("mlp.up_proj", &plain),
        ("mlp.gate_proj", &back),
    ] {
        let name = format!("model.layers.0.{module}.weight");
        assert_eq!(values(&tensors, &name), *expected, "{module}");
    }
    assert_eq!(tensors.size("").1, 4 * 24);
}

#[test]
fn master_weights_and_a_tied_table_are_found_by_who_reads_them() {
    let tensors = parse(model(
        vec![
            node("Abs", "/model/layers.0/mlp/up_proj/Abs", &["onnx::Abs_1"], "a"),
            node("Gather", "/model/embed_tokens/Gather", &["lm_head.weight", "ids"], "e"),
        ],
        vec![
            floats("onnx::Abs_1", &[1, 2], &[1.0, 2.0]),
            floats("lm_head.weight", &[2, 1], &[3.0, 4.0]),
        ],
    ))
    .unwrap();
    assert_eq!(values(&tensors, "model.layers.0.mlp.up_proj.weight").0, [1, 2]);
    assert_eq!(values(&tensors, "model.embed_tokens.weight"), values(&tensors, "lm_head.weight"));
}

#[test]
fn numbers_with_a_scale_beside_them_are_packed_if_they_are_ternary() {
    let scale = || floats("model.layers.0.mlp.up_proj.weight_scale", &[1], &[0.5]);
    let of = |tensor| parse(model(vec![], vec![tensor, scale()])).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let expected = [2 | 1 << 2, 1, 0];
    for tensor in [
        of(floats(name, &[2, 3], &[1.0, 0.0, -1.0, 0.0, -1.0, -1.0])),
        of(tensor(name, 3, &[2, 3]).bytes(9, [1, 0, 255, 0, 255, 255])),
        // A byte is two bytes as a varint where it is 128 or more, and ten where it is negative.
        of(tensor(name, 3, &[2, 3]).bytes(5, {
            let minus = [&[255; 9][..], &[1]].concat();
            [&[1, 0][..], &minus, &[0], &minus, &minus].concat()
        })),
    ] {
        let tensor = tensor.get(name).unwrap().unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (DType::U8, &[1, 3][..]));
        assert_eq!(tensor.data()[..], expected);
    }
    let dense = of(floats(name, &[1, 2], &[0.5, 1.0]));
    assert!(dense.get(name).unwrap_err().to_string().contains("is not ternary"));
}

/// A `MatMulNBits` of two rows and eight columns in blocks of four, which no kernel has but the
/// format allows; with what `changed` adds.
fn packed(codes: &[u8], scales: &[f32], zero_points: Option<&[u8]>, columns: u64) -> Vec<u8> {
    let mut inputs = vec!["x", "codes", "scales"];
    let mut tensors = vec![
        tensor("codes", 2, &[2, 2, 1]).bytes(9, codes),
        floats("scales", &[scales.len() as u64], scales),
    ];
    if let Some(points) = zero_points {
        inputs.push("points");
        tensors.push(tensor("points", 2, &[points.len() as u64]).bytes(9, points));
    }
    let node = node("MatMulNBits", "/model/layers.0/mlp/up_proj/MatMul_Q2", &inputs, "y")
        .message(5, int("K", columns))
        .message(5, int("bits", 2))
        .message(5, int("block_size", 4));
    model(vec![node], tensors)
}

#[test]
fn operands_of_matmulnbits_become_codes_and_scales() {
    let (weight, scale) =
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale");
    let codes = [0b00_01_10_01, 0b01_01_01_01, 0b10_10_00_00, 0b01_00_01_10];
    // Zero points of 1; those of the two blocks of a row share a byte.
    let tensors = parse(packed(&codes, &[0.5, 0.25, 2.0, 2.0], Some(&[5, 5]), 8)).unwrap();
    let rows: [[u8; 8]; 2] = [[1, 2, 1, 0, 1, 1, 1, 1], [0, 0, 2, 2, 2, 1, 0, 1]];
    let expected: Vec<u8> = (0..8).map(|col| rows[0][col] | rows[1][col] << 2).collect();
    assert_eq!(tensors.get(weight).unwrap().unwrap().data()[..], expected);
    assert_eq!(values(&tensors, scale), (vec![2, 2], vec![0.5, 0.25, 2.0, 2.0]));

    // Without zero points, 2 is zero. Blocks with one scale are one group.
    let codes = codes.map(|byte| byte + 0b01_01_01_01);
    let tensors = parse(packed(&codes, &[0.5, 0.5, 2.0, 2.0], None, 7)).unwrap();
    assert_eq!(tensors.get(weight).unwrap().unwrap().data()[..], expected[..7]);
    assert_eq!(values(&tensors, scale), (vec![2, 1], vec![0.5, 2.0]));
}

#[test]
fn operands_that_are_not_ternary_or_do_not_fit_are_refused() {
    let weight = "model.layers.0.mlp.up_proj.weight";
    let reason = |bytes| parse(bytes).unwrap().get(weight).unwrap_err().to_string();
    assert!(reason(packed(&[0; 4], &[1.0; 4], None, 8)).contains("is not ternary"));
    for (codes, scales, points, columns) in
        [(4, 3, None, 8), (4, 4, Some(3), 8), (4, 4, None, 9), (4, 4, None, 4), (4, 4, None, 0)]
    {
        let (codes, scales) = (vec![0; codes], vec![1.0; scales]);
        let points = points.map(|len| vec![0; len]);
        let reason = reason(packed(&codes, &scales, points.as_deref(), columns));
        assert!(reason.contains("do not fit"), "{reason}");
    }
}

#[test]
fn external_data_is_mapped_from_the_same_folder_and_from_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("m.data"), bytes_of(&[1.0, 2.0, 3.0])).unwrap();
    let path = folder.path().join("m.onnx");
    let read = |entries: &[(&str, &str)]| {
        parse_at(&path, model(vec![], vec![external("model.norm.weight", &[2], entries)]))
    };
    for entries in [
        &[("location", "m.data"), ("offset", "4"), ("length", "8")][..],
        &[("location", "m.data"), ("offset", "4")],
    ] {
        let tensors = read(entries).unwrap();
        assert_eq!(values(&tensors, "model.norm.weight").1, [2.0, 3.0]);
        let tensor = tensors.get("model.norm.weight").unwrap().unwrap();
        assert!(bitnet_core::mmap::is_mapped(tensor.data()));
    }
    for (entries, word) in [
        (&[("location", "m.data"), ("offset", "8"), ("length", "8")][..], "truncated"),
        (&[("location", "m.data"), ("offset", "18446744073709551615"), ("length", "8")], "truncat"),
        (&[("location", "m.data"), ("offset", "4"), ("length", "18446744073709551615")], "truncat"),
        (&[("location", "m.data"), ("offset", "-4")], "`-4`"),
        (&[("location", "../m.data")], "not a plain file name"),
        (&[("location", "/etc/passwd")], "not a plain file name"),
        (&[("location", "absent")], "is not there"),
        (&[("location", "m.data")], "12"),
    ] {
        let error = read(entries).err().unwrap_or_else(|| panic!("{entries:?} was read"));
        assert!(error.contains(word), "{error}");
        assert!(error.contains("m.onnx") && error.len() < 400, "{error}");
    }
    let unnamed = read(&[]).unwrap().get("model.norm.weight").unwrap_err().to_string();
    assert!(unnamed.contains("not named"), "{unnamed}");
}

#[test]
fn what_is_no_model_or_contradicts_itself_is_refused() {
    let weight = || floats("model.norm.weight", &[1], &[1.0]);
    let two = [model(vec![], vec![]), model(vec![], vec![])].concat();
    for (bytes, word) in [
        (b"PK\x03\x04".to_vec(), "is not an ONNX model"),
        (Message::default().varint(1, 8).into_bytes(), "no graph"),
        (two, "two graphs"),
        (model(vec![], vec![weight(), weight()]), "appears twice"),
        (model(vec![], vec![weight(), floats("x.norm.weight", &[1], &[1.0])]), "two initializers"),
        (model(vec![], vec![floats("w", &[3], &[1.0])]), "tensor `w`"),
        (model(vec![], vec![tensor("w", 1, &[1 << 40, 1 << 40])]), "tensor `w`"),
        (model(vec![], vec![tensor("w", 1, &[1; 9])]), "more than 8 extents"),
        (model(vec![], vec![tensor(&"w".repeat(2000), 1, &[1])]), "2000 bytes"),
        (model(vec![node("MatMul", "\u{1b}", &[], "y")], vec![weight()])[..20].to_vec(), "cut"),
    ] {
        let error = parse(bytes).err().unwrap_or_else(|| panic!("{word}: it was read"));
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn types_and_forms_that_are_not_read_spoil_only_their_own_tensor() {
    let tensors = parse(model(
        vec![],
        vec![
            floats("model.norm.weight", &[1], &[1.0]),
            tensor("model.layers.0.a.weight", 17, &[1]).bytes(9, [0]),
            tensor("model.layers.0.b.weight", 7, &[1]).bytes(7, [0]),
            tensor("model.layers.0.c.weight", 1, &[2]).bytes(4, [0; 4]).bytes(4, [0; 4]),
        ],
    ))
    .unwrap();
    assert!(tensors.get("model.norm.weight").unwrap().is_some());
    for (name, word) in [("a", "type 17"), ("b", "typed field"), ("c", "several pieces")] {
        let name = format!("model.layers.0.{name}.weight");
        let error = tensors.get(&name).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn chains_of_operations_without_an_end_are_left_alone() {
    let tensors = parse(model(
        vec![
            node("Identity", "/a", &["b"], "a"),
            node("Identity", "/b", &["a"], "b"),
            node("MatMul", "/model/layers.0/mlp/up_proj/MatMul", &["x", "a"], "y"),
        ],
        vec![],
    ));
    assert!(tensors.unwrap().is_empty());
}
