//! Every golden model through every pair of formats: the logits are the same bits where the formats
//! carry the same numbers, within a stated bound elsewhere, and what a format cannot hold is refused.

mod support;

use std::fs;
use std::path::Path;

use bitnet_core::DType;
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::Error;
use bitnet_model::convert::{self, Options, Target};
use bitnet_model::source::{self, Checkpoint, TINY};
use bitnet_model::tokenizer::Special;
use bitnet_testing::golden::{
    EMBEDDERS, GENERATORS, GGUF, RANDOM, RANDOM_GGUF, TRAINED, TRAINED_GGUF, deviation,
    largest_difference,
};
use bitnet_testing::{golden, shared_data};
use support::{all_logits, load_checkpoint};

const fn gguf(packing: DType) -> Target {
    Target::Gguf { packing, head: None }
}

/// Most that rounding moves a logit of these models, in standard deviations of its row: inputs are
/// rounded to int8, so the smallest difference can make a network jump.
const BOUND: f32 = 0.3;

/// Every format and packing.
const TARGETS: [(&str, Target); 8] = [
    ("bitnet", Target::Native { compact: true }),
    ("hf", Target::HuggingFace { packed: false, head: None }),
    ("hf-packed", Target::HuggingFace { packed: true, head: None }),
    ("tq2_0", gguf(DType::Tq2_0)),
    ("tq1_0", gguf(DType::Tq1_0)),
    ("i2_s", gguf(DType::I2S)),
    ("q2_0", gguf(DType::Q2_0)),
    ("onnx", Target::Onnx { head: None }),
];

fn open(path: &Path) -> Checkpoint {
    source::open(path.to_str().unwrap()).unwrap()
}

fn logits(checkpoint: &Checkpoint) -> Vec<Vec<f32>> {
    let decoder = load_checkpoint(
        CpuBackend::new(CpuOptions::default()).unwrap(),
        checkpoint,
        &mut Vec::new(),
    );
    let ids: Vec<u32> = (0..12).map(|i| i * 37 % decoder.vocab_size() as u32).collect();
    all_logits(&decoder, &ids)
}

fn convert(from: &Checkpoint, path: &Path, target: &Target) -> Result<Checkpoint, Error> {
    convert::to(from, path, target, Options::default(), |_, _| ())?;
    Ok(open(path))
}

/// The largest error in standard deviations; 0 if all bits are the same.
fn error(before: &[Vec<f32>], after: &[Vec<f32>]) -> f32 {
    let row = |(a, b): (&Vec<f32>, &Vec<f32>)| largest_difference(a, b) / deviation(a);
    before.iter().zip(after).map(row).fold(0.0, f32::max)
}

/// What became of a model in a format, as the table in the documentation has it.
fn outcome(expected: &[Vec<f32>], converted: &Result<Checkpoint, Error>) -> &'static str {
    match converted {
        Err(_) => "no",
        Ok(converted) => match error(expected, &logits(converted)) {
            0.0 => "same",
            rounded => {
                assert!(rounded < BOUND, "off by {rounded} standard deviations");
                "rounded"
            }
        },
    }
}

/// Texts in which tokenizers differ if they differ at all.
fn assert_same_ids(name: &str, a: &Checkpoint, b: &Checkpoint) {
    let Some(path) = golden("tokenizer/encode.json") else { return };
    let cases: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let (a, b) = (&a.description, &b.description);
    for case in cases["vectors"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        for special in [Special::Recognised, Special::AsText] {
            let ids = a.tokenizer.encode(text, true, special);
            assert_eq!(ids, b.tokenizer.encode(text, true, special), "{name}: {text:?}");
            let Ok(ids) = ids else { continue };
            assert_eq!(a.tokenizer.decode(&ids, true), b.tokenizer.decode(&ids, true), "{name}");
        }
    }
    assert_eq!((a.tokenizer.bos(), a.tokenizer.eos()), (b.tokenizer.bos(), b.tokenizer.eos()));
    assert_eq!(a.end_ids, b.end_ids, "{name}");
    let template = |d: &source::Description| d.template.as_ref().map(|t| t.source().to_owned());
    assert_eq!(template(a), template(b), "{name}");
}

/// The row of a model in the table of `docs/formats.md`.
fn row(name: &str, original: &Checkpoint) -> String {
    // In memory where that is possible: every conversion waits for the disk.
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    let folder = folder.unwrap();
    let expected = logits(original);
    let mut row = format!("| `{name}` |");
    let first: Vec<_> = TARGETS
        .iter()
        .map(|(format, target)| {
            let once = convert(original, &folder.path().join(format), target);
            row += &format!(" {} |", outcome(&expected, &once));
            (format, once)
        })
        .collect();
    for (format, once) in &first {
        let Ok(once) = once else { continue };
        let expected = logits(once);
        assert_same_ids(&format!("{name} as {format}"), original, once);
        for ((second, target), (_, direct)) in TARGETS.iter().zip(&first) {
            let path = folder.path().join(format!("{format}-{second}"));
            let twice = convert(once, &path, target);
            let outcome = outcome(&expected, &twice);
            let pair = format!("{name} as {format} as {second}");
            // The detour holds what the way holds, and the same format again changes nothing.
            assert_eq!(direct.is_ok(), twice.is_ok(), "{pair}: {:?}", twice.err());
            assert!(format != &second || outcome == "same", "{pair}");
            assert!(*second != "bitnet" || outcome == "same", "{pair}");
            // The vocabularies of the others are like this one's.
            if let Ok(twice) = twice
                && name == "bitnet-packed"
            {
                assert_same_ids(&pair, once, &twice);
            }
        }
    }
    row
}

#[test]
fn every_model_goes_through_every_pair_of_formats_as_the_table_says() {
    let table = include_str!("../../../docs/formats.md");
    let directories = RANDOM.into_iter().chain([TRAINED]).chain(GENERATORS).chain(EMBEDDERS);
    let files = [RANDOM_GGUF].into_iter().chain(GGUF.map(|(file, _)| file));
    let named = directories.chain(files).map(|name| (name, golden(name)));
    let models = named.chain(TRAINED_GGUF.map(|name| (name, shared_data(name))));
    let mut missing = String::new();
    for (name, path) in models {
        let Some(path) = path else { continue };
        let row = row(name, &open(&path));
        if !table.lines().any(|line| line == row) {
            missing += &format!("{row}\n");
        }
    }
    assert!(missing.is_empty(), "docs/formats.md has other rows than\n{missing}");
}

#[test]
fn the_head_can_be_rounded_on_the_way() {
    for (name, path) in [(TINY, None), ("bitnet-packed", golden("bitnet-packed"))] {
        let original = match (name, &path) {
            (TINY, _) => source::open(TINY).unwrap(),
            (_, Some(path)) => open(path),
            (_, None) => continue,
        };
        let folder = tempfile::tempdir().unwrap();
        let expected = logits(&original);
        for (dtype, bound) in [
            (DType::F32, 0.0),
            (DType::BF16, 0.0),
            (DType::F16, BOUND),
            (DType::Q8_0, BOUND),
            (DType::Q6K, BOUND),
        ] {
            let head = Some(dtype);
            let target = Target::Gguf { packing: DType::Tq2_0, head };
            let path = folder.path().join(format!("{dtype}.gguf"));
            let converted = convert(&original, &path, &target).unwrap();
            let embedding = converted.tensors.get("token_embd.weight").unwrap().unwrap();
            assert_eq!(embedding.dtype(), dtype);
            let off = error(&expected, &logits(&converted));
            println!("{name}: {dtype} moves logits by {off} standard deviations");
            assert!(off <= bound, "{name}: {dtype} is off by {off}");
            let target = Target::HuggingFace { packed: true, head };
            let path = folder.path().join(format!("{dtype}"));
            match dtype.is_float() {
                true => {
                    let off_too =
                        error(&expected, &logits(&convert(&original, &path, &target).unwrap()));
                    assert_eq!(off, off_too, "{name}: {dtype}");
                }
                false => continue,
            }
        }
    }
}

#[test]
fn sentencepiece_vocabularies_go_where_there_is_room_for_them() {
    let Some(source) = golden("llama-1.58-packed") else { return };
    let folder = tempfile::tempdir().unwrap();
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/sentencepiece");
    for seed in ["unigram", "bpe"] {
        let model = folder.path().join(seed);
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(source.join(name), model.join(name)).unwrap();
        }
        fs::copy(seeds.join(seed), model.join("tokenizer.model")).unwrap();
        let model = open(&model);
        // From a native file nothing can be copied.
        let native =
            convert(&model, &folder.path().join("native"), &Target::Native { compact: true })
                .unwrap();
        let target = Target::HuggingFace { packed: true, head: None };
        let path = folder.path().join(format!("{seed}-hf"));
        let hugging_face = convert(&native, &path, &target).unwrap();
        assert!(path.join("tokenizer.model").is_file());
        assert_same_ids(seed, &model, &hugging_face);
        let gguf = convert(&model, &folder.path().join("gguf"), &gguf(DType::I2S));
        match seed {
            "bpe" => assert_same_ids(seed, &model, &gguf.unwrap()),
            _ => {
                let refused = gguf.err().unwrap().to_string();
                assert!(refused.contains("it is a SentencePiece unigram model"), "{refused}");
            }
        }
    }
}

#[test]
fn a_pattern_of_words_that_has_no_name_in_gguf_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(bitnet_testing::tiny_model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let path = model.join("tokenizer.json");
    let whole = fs::read_to_string(&path).unwrap();
    let refused = |from: &str, to: &str| {
        assert!(whole.contains(from), "{from}");
        fs::write(&path, whole.replace(from, to)).unwrap();
        let converted = convert(&open(&model), &folder.path().join("gguf"), &gguf(DType::I2S));
        converted.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let error = refused("{1,3}", "{1,4}");
    assert!(error.contains("there is no name for how it cuts words"), "{error}");
    // Without `ignore_merges` it is Smaug's.
    let merges = match whole.contains("\"ignore_merges\":true") {
        true => ["\"ignore_merges\":true", "\"ignore_merges\":false"],
        false => ["\"ignore_merges\": true", "\"ignore_merges\": false"],
    };
    assert_eq!(refused(merges[0], merges[1]), "");
}

#[test]
fn a_conversion_that_fails_leaves_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut broken = source::open(TINY).unwrap();
    broken.description.config.layers.push(broken.description.config.layers[0]);
    for (name, target) in TARGETS {
        let path = folder.path().join(name);
        let error = convert(&broken, &path, &target).err().unwrap().to_string();
        assert!(error.contains("layers.4."), "{name}: {error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
