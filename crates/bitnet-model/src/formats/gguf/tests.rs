use super::*;

/// Writes GGUF files, honest or not.
struct Builder {
    entries: Vec<Vec<u8>>,
    table: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn value(id: u32, bytes: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes(), bytes].concat()
}

fn array(element: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    value(9, &[&element.to_le_bytes(), &count.to_le_bytes()[..], bytes].concat())
}

impl Builder {
    fn new() -> Self {
        Builder { entries: Vec::new(), table: Vec::new(), data: Vec::new() }
    }

    fn entry(mut self, key: &str, value: Vec<u8>) -> Self {
        self.entries.push([string(key.as_bytes()), value].concat());
        self
    }

    /// A line of the table, extents innermost first, and no data.
    fn line(mut self, name: &str, extents: &[u64], type_id: u32, offset: u64) -> Self {
        let extents: Vec<_> = [extents.len() as u32]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .chain(extents.iter().flat_map(|extent| extent.to_le_bytes()))
            .collect();
        let line =
            [&string(name.as_bytes())[..], &extents, &type_id.to_le_bytes(), &offset.to_le_bytes()]
                .concat();
        self.table.push(line);
        self
    }

    /// A tensor with `bytes` bytes of data, padded to 32.
    fn tensor(mut self, name: &str, extents: &[u64], type_id: u32, bytes: usize) -> Self {
        let offset = self.data.len();
        self.data.extend((0..bytes).map(|byte| byte as u8));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.line(name, extents, type_id, offset as u64)
    }

    /// The part before the data, with its padding.
    fn head(&self) -> Vec<u8> {
        let mut bytes = [MAGIC, &3u32.to_le_bytes()].concat();
        bytes.extend_from_slice(&(self.table.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        bytes.extend(self.entries.concat());
        bytes.extend(self.table.concat());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        [self.head(), self.data.clone()].concat()
    }

    fn parse(&self) -> Result<GgufFile, String> {
        parse(self.bytes())
    }

    fn refusal(&self) -> String {
        self.parse().expect_err("the file lies")
    }
}

fn parse(bytes: Vec<u8>) -> Result<GgufFile, String> {
    from_bytes(bytes.into(), Path::new("m.gguf")).map_err(|error| error.to_string())
}

#[test]
fn values_of_every_type_are_read() {
    let texts = [string(b"a"), string("é".as_bytes())].concat();
    let file = Builder::new()
        .entry("u8", value(0, &[200]))
        .entry("i8", value(1, &[0xff]))
        .entry("u16", value(2, &[1, 2]))
        .entry("i16", value(3, &[0xfe, 0xff]))
        .entry("u32", value(4, &[0xff; 4]))
        .entry("i32", value(5, &[0xfd, 0xff, 0xff, 0xff]))
        .entry("f32", value(6, &1e-5f32.to_le_bytes()))
        .entry("yes", value(7, &[1]))
        .entry("text", value(8, &string(b"words")))
        .entry("texts", array(8, 2, &texts))
        .entry("ints", array(5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]))
        .entry("floats", array(6, 1, &0.5f32.to_le_bytes()))
        .entry("none", array(8, 0, &[]))
        .entry("u64", value(10, &[0xff; 8]))
        .entry("i64", value(11, &i64::MIN.to_le_bytes()))
        .entry("f64", value(12, &0.1f64.to_le_bytes()))
        .parse()
        .unwrap();
    let m = &file.metadata;
    assert_eq!(m.require::<u64>("u8").unwrap(), 200);
    assert_eq!(m.require::<i64>("i8").unwrap(), -1);
    assert_eq!(m.require::<u32>("u16").unwrap(), 513);
    assert_eq!(m.require::<i64>("i16").unwrap(), -2);
    assert_eq!(m.require::<usize>("u32").unwrap(), u32::MAX as usize);
    assert_eq!(m.require::<i64>("i32").unwrap(), -3);
    assert_eq!(m.require::<f32>("f32").unwrap(), 1e-5);
    assert_eq!(m.require::<f64>("f32").unwrap(), f64::from(1e-5f32));
    assert!(m.require::<bool>("yes").unwrap());
    assert_eq!(m.require::<&str>("text").unwrap(), "words");
    assert_eq!(m.require::<Vec<&str>>("texts").unwrap(), ["a", "é"]);
    assert_eq!(m.require::<Vec<i64>>("ints").unwrap(), [1, -1]);
    assert_eq!(m.require::<Vec<f32>>("floats").unwrap(), [0.5]);
    assert!(m.require::<Vec<&str>>("none").unwrap().is_empty());
    assert_eq!(m.require::<u64>("u64").unwrap(), u64::MAX);
    assert_eq!(m.require::<i64>("i64").unwrap(), i64::MIN);
    assert_eq!(m.require::<f64>("f64").unwrap(), 0.1);
    assert!(matches!(m.value("texts"), Some(Value::Array(array)) if array.len() == 2));
    assert_eq!(m.keys().count(), 16);
}

#[test]
fn a_value_of_another_type_or_none_is_refused_by_key() {
    let file = Builder::new()
        .entry("n", value(5, &[0xff; 4]))
        .entry("text", value(8, &string(&[0xff])))
        .entry("texts", array(8, 1, &string(&[0xff])))
        .parse()
        .unwrap();
    let m = &file.metadata;
    let message = m.require::<u32>("n").unwrap_err().to_string();
    let expected = "m.gguf: metadata `n` is the number -1, not an unsigned integer of 32 bits";
    assert_eq!(message, expected);
    assert!(m.require::<f32>("n").is_err() && m.require::<bool>("n").is_err());
    assert!(m.require::<&str>("n").is_err() && m.require::<Vec<i64>>("n").is_err());
    assert!(m.get::<&str>("text").unwrap_err().to_string().contains("not UTF-8"));
    assert!(m.get::<Vec<&str>>("texts").is_err() && m.get::<Vec<f32>>("texts").is_err());
    assert!(m.get::<u32>("absent").unwrap().is_none());
    let message = m.require::<u32>("absent").unwrap_err().to_string();
    assert_eq!(message, "m.gguf: metadata `absent` is missing");
}

#[test]
fn other_versions_and_byte_orders_are_refused() {
    let good = Builder::new().bytes();
    for (version, word) in [
        ([1, 0, 0, 0], "version 1, which"),
        ([0, 0, 0, 3], "big-endian"),
        ([4, 0, 0, 0], "version 4"),
        ([0, 0, 0, 0], "version 0"),
    ] {
        let mut bytes = good.clone();
        bytes[4..8].copy_from_slice(&version);
        let error = parse(bytes).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let mut second = good.clone();
    second[4] = 2;
    parse(second).unwrap();
    assert!(parse(b"GGUG".to_vec()).unwrap_err().contains("does not begin with"));
}

#[test]
fn tensors_of_every_type_have_their_bytes_and_shapes_outermost_first() {
    let types = [
        (0, DType::F32, 512 * 4),
        (1, DType::F16, 512 * 2),
        (8, DType::Q8_0, 16 * 34),
        (12, DType::Q4K, 2 * 144),
        (14, DType::Q6K, 2 * 210),
        (24, DType::I8, 512),
        (26, DType::I32, 512 * 4),
        (27, DType::I64, 512 * 8),
        (28, DType::F64, 512 * 8),
        (30, DType::BF16, 512 * 2),
        (34, DType::Tq1_0, 2 * 54),
        (35, DType::Tq2_0, 2 * 66),
        (36, DType::I2S, 512 / 4 + 32),
    ];
    let mut builder = Builder::new();
    for (id, _, bytes) in types {
        builder = builder.tensor(&format!("t{id}"), &[256, 2], id, bytes);
    }
    let tensors = builder.parse().unwrap().tensors;
    for (id, dtype, bytes) in types {
        let tensor = tensors.get(&format!("t{id}")).unwrap().unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &[2, 256][..]));
        let expected: Vec<u8> = (0..bytes).map(|byte| byte as u8).collect();
        assert_eq!(tensor.data()[..], expected, "{dtype}");
    }
}

#[test]
fn the_two_kinds_of_q2_0_are_told_apart_by_their_size() {
    let after = |bytes| {
        Builder::new()
            .tensor("w", &[256, 32], Q2_0, bytes)
            .tensor("norm", &[8], 0, 32)
            .tensor("v", &[128], Q2_0, if bytes == 8192 / 64 * 18 { 36 } else { 34 })
            .parse()
            .unwrap()
            .tensors
    };
    for (bytes, dtype) in [(8192 / 64 * 18, DType::Q2_0), (8192 / 128 * 34, DType::Q2_0Wide)] {
        let tensors = after(bytes);
        assert_eq!(tensors.get("w").unwrap().unwrap().dtype(), dtype);
        assert_eq!(tensors.get("v").unwrap().unwrap().dtype(), dtype);
    }
    let error = after(4000).get("w").unwrap_err().to_string();
    assert!(error.contains("fit neither the 64-wide nor the 128-wide"), "{error}");
    let tensors = Builder::new().tensor("w", &[128], Q2_0, 36).parse().unwrap().tensors;
    assert!(tensors.get("w").unwrap_err().to_string().contains("fit both the 64-wide and"));
}

#[test]
fn types_that_are_not_read_are_named_when_their_tensor_is_asked_for() {
    for (id, word) in [
        (2, "Q4_0 is not read"),
        (
            38,
            "TL1, whose tiling depends on a file that is not in the GGUF; convert the original checkpoint to I2_S",
        ),
        (39, "MXFP4 (llama.cpp) or TL2 (bitnet.cpp)"),
        (4, "type id 4 is unknown"),
        (u32::MAX, "type id 4294967295 is unknown"),
    ] {
        let file =
            Builder::new().tensor("w", &[64], id, 7).tensor("n", &[1], 0, 4).parse().unwrap();
        let error = file.tensors.get("w").unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert!(file.tensors.get("n").unwrap().is_some());
    }
}

#[test]
fn every_cut_is_refused() {
    let builder = Builder::new()
        .entry("general.name", value(8, &string(b"model")))
        .entry("texts", array(8, 2, &[string(b"a"), string(b"b")].concat()))
        .entry("ints", array(5, 3, &[0; 12]))
        .tensor("w", &[8], 0, 32);
    let bytes = builder.bytes();
    for length in 0..bytes.len() {
        let error = parse(bytes[..length].to_vec()).expect_err("the file is cut");
        let told = error.contains("truncated") || error.contains("empty") || length < 4;
        assert!(told, "{length} bytes: {error}");
    }
    let error = parse(bytes[..bytes.len() - 1].to_vec()).unwrap_err();
    let (end, len) = (bytes.len(), bytes.len() - 1);
    let expected = format!(
        "m.gguf: tensor `w`: truncated: it ends at byte {end} but the file has {len} bytes; download the file again"
    );
    assert_eq!(error, expected);
}

#[test]
fn counts_and_lengths_that_cannot_be_are_refused_before_anything_is_allocated() {
    let good = Builder::new().entry("k", value(4, &[0; 4])).tensor("w", &[8], 0, 32).bytes();
    for at in [8, 16] {
        for count in [MAX_TENSORS as u64 + 1, i64::MAX as u64, u64::MAX] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            assert!(parse(bytes).unwrap_err().contains("at most 262144 and 65536 are read"));
        }
    }
    let mut bytes = good.clone();
    bytes[8..16].copy_from_slice(&(MAX_TENSORS as u64).to_le_bytes());
    assert!(parse(bytes).unwrap_err().contains("a table of 262144 tensors does not fit"));
    for count in [1 << 40, i64::MAX as u64, u64::MAX] {
        for builder in [
            Builder::new().entry("k", value(8, &count.to_le_bytes())),
            Builder::new().entry("k", array(8, count, &[])),
            Builder::new().entry("k", array(12, count, &[])),
            Builder::new().entry("k", array(0, count, &[])),
        ] {
            let error = builder.refusal();
            assert!(error.contains("truncated: metadata `k` begins at"), "{error}");
        }
    }
}

#[test]
fn metadata_that_lies_is_refused() {
    let one = || value(4, &[1, 0, 0, 0]);
    for (builder, word) in [
        (Builder::new().entry("k", one()).entry("k", one()), "metadata `k` appears twice"),
        (Builder::new().entry("k", value(13, &[])), "unknown value type 13"),
        (Builder::new().entry("k", array(13, 1, &[])), "unknown value type 13"),
        (Builder::new().entry("k", array(9, 1, &[])), "a list of lists"),
        (Builder::new().entry(&"k".repeat(65_536), one()), "more than 65535"),
        (Builder::new().entry("split.count", value(2, &[2, 0])), "one part of a split GGUF"),
    ] {
        let error = builder.refusal();
        assert!(error.contains(word), "{error}");
    }
    for alignment in [0u32, 1, 24, 1 << 21, u32::MAX] {
        let builder = Builder::new().entry("general.alignment", value(4, &alignment.to_le_bytes()));
        assert!(builder.refusal().contains("not a power of two from 8 to 1048576"));
    }
    let text = Builder::new().entry("general.alignment", value(8, &string(b"32")));
    assert!(text.refusal().contains("is the text \"32\", not an unsigned integer"));
    let wide = Builder::new()
        .entry("general.alignment", value(4, &[64, 0, 0, 0]))
        .tensor("a", &[8], 0, 32)
        .tensor("b", &[8], 0, 32);
    assert!(wide.refusal().contains("tensor `b`: begins at byte 32, not a multiple of 64"));
}

#[test]
fn tensors_that_lie_are_refused() {
    let base = || Builder::new().tensor("a", &[8], 0, 32);
    for (builder, word) in [
        (base().line("a", &[8], 0, 0), "the next tensor"),
        (base().tensor("a", &[8], 0, 32), "tensor `a`: appears twice"),
        (base().line("b", &[9], 0, 0), "the next tensor"),
        (base().line("b", &[8], 0, 33), "not a multiple of 32"),
        (base().line("b", &[8], 0, u64::MAX - 31), "truncated"),
        (base().line("b", &[0], 0, 32), "extent of 0"),
        (base().line("b", &[u64::MAX, 2], 0, 32), "overflows"),
        (base().line("b", &[1 << 62], 28, 32), "overflows"),
        (base().line("b", &[u64::MAX], 24, 32), "truncated"),
        (base().line("b", &[1, 1, 1, 1, 1], 0, 32), "5 extents"),
        (base().line("b", &[100], 35, 32), "whole blocks of 256"),
        (base().line("b", &[3], 36, 32), "do not fill whole bytes"),
        (base().tensor("", &[1], 0, 4), "a name of 0 bytes"),
        (base().line(&"n".repeat(1025), &[1], 0, 32), "1025 bytes, more than 1024"),
    ] {
        let error = builder.refusal();
        assert!(error.contains(word), "{word}: {error}");
    }
}
