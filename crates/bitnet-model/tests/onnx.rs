//! Exports of torch's two exporters (`scripts/check_onnx.py --fixtures`), against the weights that
//! they were made of and against transformers; and exports of our own read back.

mod support;

use std::fs;
use std::path::Path;

use ::safetensors::SafeTensors;
use bitnet_core::DType;
use bitnet_core::mmap::is_mapped;
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::convert::{self, Options, Target};
use bitnet_model::formats::{Tensors, onnx, safetensors};
use bitnet_model::source::{self, Sidecars, TINY, Vocabulary};
use bitnet_testing::golden;
use bitnet_testing::golden::deviation;
use half::f16;
use support::{all_logits, assert_near, load_checkpoint};

fn read(
    path: &Path,
    reader: fn(&Path, &mut Tensors) -> Result<(), bitnet_model::Error>,
) -> Tensors {
    let mut tensors = Tensors::default();
    reader(path, &mut tensors).unwrap();
    tensors
}

#[test]
fn an_export_by_torchscript_has_the_weights_of_its_checkpoint() {
    let model = golden("llama3-rope").expect("it is in the project");
    let path = golden("onnx/llama3-rope-torchscript.onnx").expect("it is in the project");
    let expected = read(&model.join("model.safetensors"), safetensors::read);
    let exported = read(&path, onnx::read);
    for name in expected.names() {
        let expected = expected.get(name).unwrap().unwrap();
        let tensor = exported.get(name).unwrap().unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(tensor.dtype(), DType::F16, "{name}");
        assert_eq!(tensor.shape(), expected.shape(), "{name}");
        assert_eq!(tensor.data(), expected.data(), "{name}");
        // The constants of linear layers lie the other way round.
        assert_eq!(is_mapped(tensor.data()), !name.ends_with("_proj.weight"), "{name}");
    }
}

#[test]
fn an_export_by_torch_s_newer_exporter_computes_what_transformers_does() {
    let file = |name: &str| golden(&format!("onnx/{name}")).expect("it is in the project");
    let tensors = read(&file("bitnet-dynamo.onnx"), onnx::read);
    assert_eq!(tensors.files().count(), 1);
    let llama = golden("llama3-rope").unwrap();
    let sidecars = Sidecars {
        path: Path::new("bitnet-dynamo"),
        config: &fs::read(file("bitnet-config.json")).unwrap(),
        generation_config: None,
        vocabulary: Vocabulary::Json(&fs::read(llama.join("tokenizer.json")).unwrap()),
        tokenizer_config: None,
        special_tokens_map: None,
        chat_template: None,
        pooling: None,
    };
    let checkpoint = source::describe(sidecars, tensors, "ONNX").unwrap();
    let decoder = load(&checkpoint);
    let bytes = fs::read(file("bitnet-golden.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |name: &str| reference.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
    let ids: Vec<u32> = numbers("ids").into_iter().map(u32::from_le_bytes).collect();
    let expected: Vec<f32> = numbers("logits").into_iter().map(f32::from_le_bytes).collect();
    let rows = expected.chunks_exact(decoder.vocab_size());
    for (position, (ours, row)) in all_logits(&decoder, &ids).iter().zip(rows).enumerate() {
        // Measured: 1.6e-6.
        assert_near(&format!("position {position}"), ours, row, 1e-5 * deviation(row));
    }
}

fn load(checkpoint: &source::Checkpoint) -> bitnet_model::decoder::Decoder<CpuBackend> {
    load_checkpoint(CpuBackend::new(CpuOptions::default()).unwrap(), checkpoint, &mut Vec::new())
}

#[test]
fn a_folder_that_keeps_its_model_in_onnx_is_opened_by_any_of_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let tiny = source::open(TINY).unwrap();
    let target = Target::Onnx { head: None };
    convert::to(&tiny, &out, &target, Options::default(), |_, _| ()).unwrap();
    let ids = [1, 5, 300, 7];
    let expected = all_logits(&load(&tiny), &ids);
    let inner = out.join("onnx");
    for step in ["as it was written", "where transformers.js has it"] {
        if step != "as it was written" {
            fs::create_dir(&inner).unwrap();
            for name in ["model.onnx", "model.onnx.data"] {
                fs::rename(out.join(name), inner.join(name)).unwrap();
            }
        }
        let file = if inner.exists() { inner.join("model.onnx") } else { out.join("model.onnx") };
        for path in [&out, &file] {
            let checkpoint = source::open(path.to_str().unwrap()).unwrap();
            assert_eq!(checkpoint.description.format, "ONNX");
            assert_eq!(all_logits(&load(&checkpoint), &ids), expected, "{step}");
        }
    }
}

#[test]
fn the_tables_of_an_export_are_mapped_and_begin_on_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let tiny = source::open(TINY).unwrap();
    let target = Target::Onnx { head: Some(DType::F16) };
    convert::to(&tiny, &out, &target, Options::default(), |_, _| ()).unwrap();
    let tensors = read(&out.join("model.onnx"), onnx::read);
    let table = tensors.get("model.embed_tokens.weight").unwrap().unwrap();
    assert!(is_mapped(table.data()));
    assert_eq!(table.data().as_ptr().addr() % 4096, 0);
    let original = tiny.tensors.get("model.embed_tokens.weight").unwrap().unwrap();
    assert_eq!((table.dtype(), table.shape()), (DType::F16, original.shape()));
    let wide = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    for (ours, theirs) in table.data().as_chunks().0.iter().zip(original.data().as_chunks().0) {
        assert_eq!(f16::from_le_bytes(*ours), f16::from_f32(wide(theirs)));
    }
}
