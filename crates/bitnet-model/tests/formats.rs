//! The readers on files that other programs wrote: `transformers`, the `safetensors` and `torch`
//! packages, the `gguf` package and bitnet.cpp's converter.

use std::path::Path;

use ::safetensors::SafeTensors;
use bitnet_core::DType;
use bitnet_model::formats::index::ShardIndex;
use bitnet_model::formats::{Tensors, gguf, pickle, read_checkpoint, safetensors};
use bitnet_testing::{golden, shared_data};

const DIRECTORIES: [&str; 9] = [
    "bitnet-1bitllm",
    "bitnet-bf16",
    "bitnet-odd",
    "bitnet-packed",
    "bitnet-packed-bitlinear",
    "llama-1.58-packed",
    "llama-1.58-rmsnorm",
    "tiny-trained",
    "tiny-trained-packed",
];

/// Compares with what the `safetensors` crate reads from one file; returns the number of tensors.
fn compare_with_the_safetensors_crate(file: &Path, tensors: &Tensors) -> usize {
    let bytes = std::fs::read(file).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    for (name, view) in expected.iter() {
        let tensor = tensors.get(name).unwrap().unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(format!("{:?}", view.dtype()), tensor.dtype().to_string(), "{name}");
        assert_eq!(view.shape(), tensor.shape(), "{name}");
        assert_eq!(view.data(), &tensor.data()[..], "{name}");
        assert_eq!(tensors.path_of(name), Some(file));
    }
    expected.len()
}

#[test]
fn safetensors_files_read_as_the_safetensors_crate_reads_them() {
    for directory in DIRECTORIES {
        let Some(directory) = golden(directory) else { continue };
        for name in ["model.safetensors", "golden.safetensors"] {
            let file = directory.join(name);
            let tensors = read_checkpoint(&file).unwrap();
            assert_eq!(compare_with_the_safetensors_crate(&file, &tensors), tensors.len());
        }
        let names = |path: &Path| -> Vec<String> {
            read_checkpoint(path).unwrap().names().map(str::to_owned).collect()
        };
        assert_eq!(names(&directory), names(&directory.join("model.safetensors")));
    }
}

#[test]
fn a_sharded_checkpoint_has_the_tensors_of_all_shards() {
    let Some(directory) = golden("bitnet-sharded") else { return };
    let tensors = read_checkpoint(&directory).unwrap();
    let count: usize = [1, 2]
        .map(|n| directory.join(format!("model-0000{n}-of-00002.safetensors")))
        .iter()
        .map(|shard| compare_with_the_safetensors_crate(shard, &tensors))
        .sum();
    assert_eq!(count, tensors.len());
}

/// A copy of the sharded checkpoint that a test may damage.
fn sharded_copy() -> Option<tempfile::TempDir> {
    let directory = golden("bitnet-sharded")?;
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("model") {
            let bytes = std::fs::read(entry.path()).unwrap();
            std::fs::write(copy.path().join(entry.file_name()), bytes).unwrap();
        }
    }
    Some(copy)
}

#[test]
fn a_missing_shard_is_named() {
    let Some(copy) = sharded_copy() else { return };
    std::fs::remove_file(copy.path().join("model-00002-of-00002.safetensors")).unwrap();
    let error = read_checkpoint(copy.path()).unwrap_err().to_string();
    let expected =
        "1 of 2 shards are not in its folder, the first is `model-00002-of-00002.safetensors`";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_tensor_that_the_index_promises_and_its_shard_lacks_is_named() {
    let Some(copy) = sharded_copy() else { return };
    let index = copy.path().join("model.safetensors.index.json");
    let json = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, json.replace("model.norm.weight", "model.norm.bias")).unwrap();
    let error = read_checkpoint(copy.path()).unwrap_err().to_string();
    assert!(error.contains("tensor `model.norm.bias`: is not there although"), "{error}");
    // A tensor that is in the other shard.
    let at = |n| format!(r#""model.embed_tokens.weight": "model-0000{n}-of-00002.safetensors""#);
    std::fs::write(&index, json.replace(&at(1), &at(2))).unwrap();
    let error = read_checkpoint(copy.path()).unwrap_err().to_string();
    assert!(error.contains("tensor `model.embed_tokens.weight`: is not there"), "{error}");
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let Some(copy) = sharded_copy() else { return };
    let shard = |n: u32| copy.path().join(format!("model-0000{n}-of-00002.safetensors"));
    std::fs::copy(shard(1), shard(2)).unwrap();
    let error = read_checkpoint(copy.path()).unwrap_err().to_string();
    assert!(error.contains("00002-of-00002.safetensors: tensor") && error.contains("twice"));
}

#[test]
fn a_torch_file_has_the_same_tensors_as_the_safetensors_file_of_the_same_model() {
    let (Some(torch), Some(directory)) = (golden("bitnet-bf16-bin"), golden("bitnet-bf16")) else {
        return;
    };
    let tensors = read_checkpoint(&torch).unwrap();
    let bytes = std::fs::read(directory.join("model.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!((tensors.len(), expected.len()), (24, 24));
    for (name, view) in expected.iter() {
        let tensor = tensors.get(name).unwrap().unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (DType::BF16, view.shape()), "{name}");
        assert_eq!(view.data(), &tensor.data()[..], "{name}");
    }
}

#[test]
fn a_sharded_torch_checkpoint_is_read_through_its_index() {
    let Some(torch) = golden("bitnet-bf16-bin/pytorch_model.bin") else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(&torch, folder.path().join("pytorch_model-00001-of-00001.bin")).unwrap();
    let shard = "pytorch_model-00001-of-00001.bin";
    let json = format!(r#"{{"weight_map":{{"model.norm.weight":"{shard}"}}}}"#);
    std::fs::write(folder.path().join("pytorch_model.bin.index.json"), json).unwrap();
    assert_eq!(read_checkpoint(folder.path()).unwrap().len(), 24);
}

/// Name, type and shape of a tensor in a GGUF file.
type Expected = (&'static str, DType, &'static [usize]);

fn check_gguf(path: &Path, count: usize, expected: &[Expected], tokens: usize, merges: usize) {
    let file = gguf::read(path).unwrap();
    assert_eq!(file.tensors.len(), count);
    for &(name, dtype, shape) in expected {
        let tensor = file.tensors.get(name).unwrap().unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, shape), "{name}");
    }
    let metadata = &file.metadata;
    assert_eq!(metadata.keys().count(), 25);
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "bitnet-b1.58");
    assert_eq!(metadata.require::<u32>("bitnet-b1.58.embedding_length").unwrap(), 256);
    let epsilon = metadata.require::<f32>("bitnet-b1.58.attention.layer_norm_rms_epsilon");
    assert_eq!(epsilon.unwrap(), 1e-5);
    assert!(metadata.require::<bool>("tokenizer.ggml.add_bos_token").unwrap());
    let texts = metadata.require::<Vec<&str>>("tokenizer.ggml.tokens").unwrap();
    assert_eq!((texts.len(), texts[0], texts[3]), (tokens, "!", "$"));
    let bos = metadata.require::<usize>("tokenizer.ggml.bos_token_id").unwrap();
    assert_eq!(texts[bos], "<|begin_of_text|>");
    assert_eq!(metadata.require::<Vec<&str>>("tokenizer.ggml.merges").unwrap().len(), merges);
    let types = metadata.require::<Vec<i64>>("tokenizer.ggml.token_type").unwrap();
    assert_eq!((types.len(), types[0], types[bos]), (tokens, 1, 3));
}

#[test]
fn gguf_files_list_their_tensors_and_metadata() {
    use DType::{F16, F32, I2S, Tq2_0};
    if let Some(path) = golden("gguf/bitnet-packed-TQ2_0.gguf") {
        let expected: [Expected; 4] = [
            ("token_embd.weight", F16, &[1024, 256]),
            ("blk.0.attn_norm.weight", F32, &[256]),
            ("blk.1.attn_v.weight", Tq2_0, &[128, 256]),
            ("blk.0.ffn_down.weight", Tq2_0, &[256, 256]),
        ];
        check_gguf(&path, 24, &expected, 1024, 753);
    }
    for (name, dtype) in [("I2_S", I2S), ("TQ2_0", Tq2_0)] {
        let Some(path) = shared_data(&format!("gguf/tiny-trained-{name}.gguf")) else { continue };
        let expected: [Expected; 4] = [
            ("token_embd.weight", F16, &[2048, 256]),
            ("output_norm.weight", F32, &[256]),
            ("blk.3.ffn_up.weight", dtype, &[512, 256]),
            ("blk.0.ffn_down.weight", dtype, &[256, 512]),
        ];
        check_gguf(&path, 46, &expected, 2048, 1780);
    }
}

#[test]
fn both_gguf_files_of_one_model_hold_the_same_norms_and_embeddings() {
    let (Some(a), Some(b)) =
        (shared_data("gguf/tiny-trained-I2_S.gguf"), shared_data("gguf/tiny-trained-TQ2_0.gguf"))
    else {
        return;
    };
    let (a, b) = (gguf::read(&a).unwrap().tensors, gguf::read(&b).unwrap().tensors);
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
    let mut compared = 0;
    for name in a.names() {
        let (a, b) = (a.get(name).unwrap().unwrap(), b.get(name).unwrap().unwrap());
        assert_eq!(a.shape(), b.shape());
        if !a.dtype().is_ternary() {
            assert_eq!(a.data(), b.data(), "{name}");
            compared += 1;
        }
    }
    assert_eq!(compared, 18);
}

/// A start file of the fuzz targets: a golden model cut down to a few small tensors.
fn seed(path: &str) -> Vec<u8> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    std::fs::read(seeds.join(path)).unwrap()
}

#[test]
fn the_start_files_of_the_fuzz_targets_are_good_files() {
    for name in ["bitnet-bf16", "bitnet-packed", "llama-1.58-rmsnorm"] {
        let mut tensors = Tensors::default();
        let bytes = seed(&format!("safetensors/{name}")).into();
        safetensors::from_bytes(bytes, Path::new(name), &mut tensors).unwrap();
        assert_eq!(tensors.len(), 11);
    }
    for name in ["I2_S", "TQ2_0"] {
        let file = gguf::from_bytes(seed(&format!("gguf/{name}")).into(), Path::new(name)).unwrap();
        assert_eq!((file.tensors.len(), file.metadata.keys().count()), (6, 25));
        let down = file.tensors.get("blk.0.ffn_down.weight").unwrap().unwrap();
        assert_eq!(down.dtype().to_string(), name);
    }
    let index = ShardIndex::from_bytes(&seed("index/sharded"), Path::new("index")).unwrap();
    assert_eq!(index.shards().count(), 2);
}

#[test]
fn state_dictionaries_by_cpythons_own_pickler_are_read_in_every_protocol() {
    // The pickles are CPython's; names and arguments of the calls are torch's.
    let archive = |pickle: &[u8]| {
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        let values: Vec<u8> = (0..16).collect();
        for (name, data) in [("m/data.pkl", pickle), ("m/data/0", &values), ("m/data/1", &[])] {
            writer.start_file(name, options).unwrap();
            std::io::Write::write_all(&mut writer, data).unwrap();
        }
        writer.finish().unwrap().into_inner()
    };
    let pickles = ["state-2", "ordered-2", "ordered-4", "ordered-5"]
        .map(|name| archive(&seed(&format!("pickle/{name}"))));
    for bytes in pickles.into_iter().chain([seed("pickle/archive")]) {
        let mut tensors = Tensors::default();
        pickle::from_bytes(bytes.into(), Path::new("m.bin"), &mut tensors).unwrap();
        let check = |name, dtype, shape: &[usize], data: &[u8]| {
            let tensor = tensors.get(name).unwrap().unwrap();
            let found = (tensor.dtype(), tensor.shape(), &tensor.data()[..]);
            assert_eq!(found, (dtype, shape, data), "{name}");
        };
        let values: Vec<u8> = (0..16).collect();
        check("model.norm.weight", DType::F16, &[8], &values);
        check("model.w", DType::F16, &[2, 3], &values[4..]);
        check("p", DType::F16, &[1, 4], &values[8..]);
        check("empty", DType::F32, &[0, 4], &[]);
        assert!(tensors.get("t").unwrap_err().to_string().contains("not contiguous"));
        assert!(tensors.get("s").unwrap_err().to_string().contains("ShortStorage"));
        assert_eq!(tensors.len(), 6);
    }
}
