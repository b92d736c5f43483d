use std::io::Write as _;

use super::machine::{MAX_PICKLE_BYTES, MAX_STACK};
use super::*;

/// An archive as torch writes it, with the given entries below `m/`.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = ::zip::write::SimpleFileOptions::default()
        .compression_method(::zip::CompressionMethod::Stored);
    for (name, data) in entries {
        writer.start_file(format!("m/{name}"), options).unwrap();
        writer.write_all(data).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn parse(bytes: Vec<u8>) -> Result<Tensors, String> {
    let mut tensors = Tensors::default();
    match from_bytes(bytes.into(), Path::new("m.bin"), &mut tensors) {
        Ok(()) => Ok(tensors),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads a pickle next to one storage `0` of six bytes.
fn run(pickle: &[u8]) -> Result<Tensors, String> {
    parse(archive(&[("data.pkl", pickle), ("data/0", &[1, 2, 3, 4, 5, 6])]))
}

fn refusal(pickle: &[u8]) -> String {
    run(pickle).expect_err("the pickle lies")
}

fn text(text: &str) -> Vec<u8> {
    [&[b'X'][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// Instructions that leave the tuple of those numbers on the stack.
fn numbers(values: &[i32]) -> Vec<u8> {
    let pushes = values.iter().flat_map(|v| [&b"J"[..], &v.to_le_bytes()].concat());
    [b"(".to_vec(), pushes.collect(), b"t".to_vec()].concat()
}

fn storage(class: &str, key: &str, elements: i32) -> Vec<u8> {
    [
        b"(".to_vec(),
        text("storage"),
        format!("ctorch\n{class}\n").into_bytes(),
        text(key),
        text("cpu"),
        [&b"J"[..], &elements.to_le_bytes(), b"tQ"].concat(),
    ]
    .concat()
}

fn tensor(storage: Vec<u8>, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
        storage,
        [&b"J"[..], &offset.to_le_bytes()].concat(),
        numbers(shape),
        numbers(strides),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

/// A state dictionary with one entry `w`.
fn state(value: Vec<u8>) -> Vec<u8> {
    [b"\x80\x02}(".to_vec(), text("w"), value, b"u.".to_vec()].concat()
}

fn bytes(offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    state(tensor(storage("ByteStorage", "0", 6), offset, shape, strides))
}

#[test]
fn a_tensor_is_a_slice_of_its_storage() {
    let tensors = run(&bytes(2, &[2, 1, 2], &[2, 9, 1])).unwrap();
    let tensor = tensors.get("w").unwrap().unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (DType::U8, &[2, 1, 2][..]));
    assert_eq!(tensor.data()[..], [3, 4, 5, 6]);
}

#[test]
fn parameters_and_version_numbers_on_the_dictionary_are_read_through() {
    let inner = tensor(storage("HalfStorage", "0", 3), 0, &[3], &[1]);
    let parameter = [
        b"ctorch._utils\n_rebuild_parameter\n(".to_vec(),
        inner,
        b"\x88ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat();
    let pickle = [
        b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec(),
        text("w"),
        parameter,
        b"u}".to_vec(),
        text("_metadata"),
        b"}sb.".to_vec(),
    ]
    .concat();
    assert_eq!(run(&pickle).unwrap().get("w").unwrap().unwrap().dtype(), DType::F16);
}

#[test]
fn protocol_4_says_the_same_with_other_instructions() {
    let short = |text: &str| [&[0x8c, text.len() as u8][..], text.as_bytes()].concat();
    let import =
        |module: &str, name: &str| [short(module), short(name), b"\x93\x94".to_vec()].concat();
    let pickle = [
        b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94".to_vec(),
        short("w"),
        import("torch._utils", "_rebuild_tensor_v2"),
        b"((".to_vec(),
        short("storage"),
        import("torch", "CharStorage"),
        short("0"),
        short("cpu"),
        b"K\x06tQK\0K\x06\x85\x8a\x01\x01\x85\x89]tRs.".to_vec(),
    ]
    .concat();
    let tensors = run(&pickle).unwrap();
    assert_eq!(tensors.get("w").unwrap().unwrap().dtype(), DType::I8);
}

#[test]
fn a_table_of_twenty_thousand_tensors_is_within_the_budget() {
    let mut memo = 0u32;
    let mut put = || {
        memo += 1;
        [&b"r"[..], &(memo - 1).to_le_bytes()].concat()
    };
    let mut pickle = [&b"}"[..], &put(), b"("].concat();
    for number in 0..20_000 {
        // As torch does it: everything is remembered, whether it is needed again or not.
        for part in [
            text(&format!("model.layers.{number}.weight")),
            put(),
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text("storage"),
            b"ctorch\nByteStorage\n".to_vec(),
            text("0"),
            put(),
            text("cpu"),
            b"K\x06t".to_vec(),
            put(),
            b"QK\0K\x06\x85".to_vec(),
            put(),
            b"K\x01\x85".to_vec(),
            put(),
            b"\x89ccollections\nOrderedDict\n)R".to_vec(),
            put(),
            b"t".to_vec(),
            put(),
            b"R".to_vec(),
            put(),
        ] {
            pickle.extend(part);
        }
    }
    pickle.extend(b"u.");
    assert_eq!(run(&pickle).unwrap().len(), 20_000);
}

#[test]
fn whatever_could_run_code_is_refused_by_name() {
    let call = b"\x80\x02cos\nsystem\n(X\x02\0\0\0ls\x85R.";
    let error = refusal(call);
    let expected = "it imports `os.system`, which could run code; only tensors are read";
    assert!(error.contains(expected), "{error}");
    let stacked = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.";
    assert!(refusal(stacked).contains("`builtins.eval`"));
    for name in ["torch\nload\n", "torch\nx.Storage\n", "torch.Tensor\nStorage\n"] {
        assert!(refusal(format!("c{name}.").as_bytes()).contains("could run code"));
    }
    // INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1, PERSID, text-mode instructions
    for instruction in b"io\x81\x92\x82PILVFSpg012" {
        let error = refusal(&[*instruction, b'\n', b'.']);
        assert!(error.contains("is not one that a table of tensors needs"), "{error}");
    }
}

#[test]
fn calls_of_known_names_with_other_arguments_are_refused() {
    for (pickle, word) in [
        (&b"ctorch\nFloatStorage\n)R."[..], "it calls Storage"),
        (b"ccollections\nOrderedDict\nN\x85R.", "it calls OrderedDict with 1"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.", "a tensor without storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(}K\0))N}tR.", "without a storage"),
        (b"ctorch._utils\n_rebuild_parameter\nN)}\x87R.", "not a tensor"),
        (b"N)R.", "not a function"),
        (b"ccollections\nOrderedDict\n}R.", "should be"),
        (b")Q.", "persistent id"),
        (b"NQ.", "single value"),
        (b"]}b.", "state of something"),
    ] {
        let error = refusal(pickle);
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_machine_that_runs_wild_is_stopped() {
    let many = |unit: &[u8], count: usize| [&unit.repeat(count)[..], b"."].concat();
    for (pickle, word) in [
        (b"".to_vec(), "ends too early"),
        (b"}".to_vec(), "ends too early"),
        (b"X\xff\xff\xff\xff.".to_vec(), "ends too early"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.".to_vec(), "ends too early"),
        (b"cos\n".to_vec(), "ends too early"),
        (b".".to_vec(), "without a single result"),
        (b"NN.".to_vec(), "without a single result"),
        (b"(N.".to_vec(), "without a single result"),
        (b"\x80\x06}.".to_vec(), "protocol 6"),
        (b"t.".to_vec(), "mark that is not open"),
        (b"N(s.".to_vec(), "empty stack"),
        (b"}NN(st.".to_vec(), "empty stack"),
        (b"}(Nu.".to_vec(), "key without a value"),
        (b"](u.".to_vec(), "not a dictionary"),
        (b"NNNs.".to_vec(), "container should be"),
        (b"}Na.".to_vec(), "not a list"),
        (b"h\0.".to_vec(), "memo 0 is empty"),
        (b"Nr\xff\xff\xff\x7f.".to_vec(), "comes too early"),
        (b"X\x01\0\0\0\xff.".to_vec(), "not UTF-8"),
        (b"\x8a\x09123456789.".to_vec(), "number of 9 bytes"),
        (many(b"N", MAX_STACK + 1), "values on the stack"),
        (many(b"(", MAX_STACK + 1), "too many marks"),
        (many(b"]]\x86", 1_000_000), "than a table of tensors"),
        (many(b")", MAX_PICKLE_BYTES), "more than 8388608"),
    ] {
        let error = refusal(&pickle);
        assert!(error.contains(word), "{word}: {error}");
    }
    // Nesting costs no stack of ours, neither to build nor to drop.
    assert!(refusal(&many(b")\x85", 1)).contains("not a dictionary"));
    let nested = [&b")"[..], &b"\x85".repeat(100_000), b"."].concat();
    assert!(refusal(&nested).contains("not a dictionary"));
}

#[test]
fn views_that_reach_past_their_storage_are_refused() {
    for (offset, shape, strides) in [
        (0, &[7][..], &[1][..]),
        (1, &[6], &[1]),
        (i32::MAX, &[1], &[1]),
        (0, &[i32::MAX, i32::MAX, i32::MAX], &[1, 1, 1]),
    ] {
        let error = refusal(&bytes(offset, shape, strides));
        assert!(error.contains("tensor `w`"), "{error}");
    }
    for (offset, shape, strides) in
        [(-1, &[1][..], &[1][..]), (0, &[-1], &[1]), (0, &[1], &[-1]), (0, &[1], &[1, 1])]
    {
        assert!(refusal(&bytes(offset, shape, strides)).contains("its pickle cannot be read"));
    }
    assert!(refusal(&bytes(0, &[1; 9], &[1; 9])).contains("9 extents"));
    let missing = state(tensor(storage("ByteStorage", "1", 6), 0, &[1], &[1]));
    assert!(refusal(&missing).contains("storage `1` is not in the file"));
    for elements in [5, 7, i32::MAX] {
        let wrong = state(tensor(storage("ByteStorage", "0", elements), 0, &[1], &[1]));
        assert!(refusal(&wrong).contains("and has 6 bytes"));
    }
    let negative = state(tensor(storage("ByteStorage", "0", -1), 0, &[1], &[1]));
    assert!(refusal(&negative).contains("storage of -1 elements"));
}

#[test]
fn what_is_no_contiguous_tensor_of_a_known_type_is_an_error_only_when_asked_for() {
    let short = state(tensor(storage("ShortStorage", "0", 3), 0, &[3], &[1]));
    for (pickle, word) in [
        (bytes(0, &[2, 3], &[1, 2]), "is not contiguous"),
        (short, "ShortStorage is not read"),
        (state(b"}".to_vec()), "is a dictionary, not a tensor"),
        (state(b"K\x01".to_vec()), "is a number"),
    ] {
        let tensors = run(&pickle).unwrap();
        let error = tensors.get("w").unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn what_is_not_a_dictionary_of_tensors_is_refused() {
    for pickle in [&b"N."[..], b"]."] {
        assert!(refusal(pickle).contains("not a dictionary"));
    }
    assert!(refusal(b"}(K\x01Nu.").contains("key that is not a text"));
    let twice = [b"}(".to_vec(), text("w"), b"N".to_vec(), text("w"), b"Nu.".to_vec()].concat();
    assert!(refusal(&twice).contains("appears twice"));
}

#[test]
fn archives_that_torch_does_not_write_are_refused() {
    let good = bytes(0, &[6], &[1]);
    let order = archive(&[("data.pkl", &good), ("byteorder", b"big")]);
    assert!(parse(order).unwrap_err().contains("byte order"));
    let none = archive(&[("data/0", &[1])]);
    assert!(parse(none).unwrap_err().contains("exactly one `data.pkl`"));
    let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.rest".to_vec();
    assert!(is_torch(&legacy));
    assert!(parse(legacy).unwrap_err().contains("before version 1.6"));
    assert!(parse(b"GGUF".to_vec()).unwrap_err().contains("not a file written by"));
    assert!(parse(b"PK\x03\x04".to_vec()).unwrap_err().contains("truncated"));
}
