//! Native files: what is written comes back as it was, and what is damaged is refused or told.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::config::{ModelConfig, Precision, TensorNames, WeightRule};
use bitnet_model::convert::{self, Options, Target};
use bitnet_model::formats::native::{self, VERSION};
use bitnet_model::source::{self, Checkpoint, TINY};
use bitnet_model::tokenizer::{Special, Tokenizer};
use bitnet_model::weights::{self, LoadOptions};
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::golden::{
    EMBEDDERS, GENERATORS, GGUF, RANDOM, RANDOM_GGUF, TRAINED, TRAINED_GGUF,
};
use bitnet_testing::{golden, shared_data};
use safetensors::SafeTensors;
use support::{all_logits, load_checkpoint};

/// What tokenizers stumble over: spaces, scripts, digits, line ends, names of tokens.
const TEXTS: [&str; 7] = [
    "Once upon a time",
    "  two  spaces\n\n\tand tabs ",
    "naïve café, 12345.67 Ġ▁",
    "日本語 и русский 😀",
    "<|eot_id|>a</s> b<|begin_of_text|><0x0A>",
    "don't we'LL I'm",
    "",
];

/// A folder to write to.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn open(path: &Path) -> Result<Checkpoint, String> {
    source::open(path.to_str().unwrap()).map_err(|error| error.to_string())
}

fn write_tiny(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.bitnet");
    convert::to(
        &source::open(TINY).unwrap(),
        &path,
        &Target::Native { compact: true },
        Options::default(),
        |_, _| (),
    )
    .unwrap();
    path
}

/// The bits of the logits of each position, and the notes of loading.
fn results(checkpoint: &Checkpoint) -> (Vec<Vec<u32>>, Vec<String>) {
    let mut notes = checkpoint.description.notes.clone();
    let decoder =
        load_checkpoint(CpuBackend::new(CpuOptions::default()).unwrap(), checkpoint, &mut notes);
    let ids: Vec<u32> = (0..12).map(|i| i * 37 % decoder.vocab_size() as u32).collect();
    let bits = |row: Vec<f32>| row.into_iter().map(f32::to_bits).collect();
    (all_logits(&decoder, &ids).into_iter().map(bits).collect(), notes)
}

fn assert_same_tokenizer(name: &str, a: &Tokenizer, b: &Tokenizer) {
    assert_eq!((a.vocab_size(), a.bos(), a.eos()), (b.vocab_size(), b.bos(), b.eos()), "{name}");
    assert_eq!(a.adds_bos(), b.adds_bos(), "{name}");
    for id in 0..a.vocab_size() as u32 + 1 {
        assert_eq!(a.token_bytes(id), b.token_bytes(id), "{name}: {id}");
        assert_eq!(a.is_special(id), b.is_special(id), "{name}: {id}");
    }
    for text in TEXTS {
        for special in [Special::Recognised, Special::AsText] {
            let ids = a.encode(text, true, special);
            assert_eq!(ids, b.encode(text, true, special), "{name}: {text}");
            let Ok(ids) = ids else { continue };
            assert_eq!(a.decode(&ids, false), b.decode(&ids, false), "{name}: {text}");
        }
    }
    for token in ["<|eot_id|>", "</s>", "Ġthe", "▁the", "<0x0A>", "a"] {
        assert_eq!(a.id_of(token), b.id_of(token), "{name}: {token}");
    }
}

/// What of a description is the same whatever file it is from.
fn comparable(config: &ModelConfig, vocab_size: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: Some(vocab_size),
        tied: None,
        norm_offset: 0.0,
        precision: Precision::ByScale,
        weights: WeightRule::Tiled,
        interleaved_rope_rows: false,
        names: TensorNames::NATIVE,
        ..config.clone()
    }
}

fn assert_comes_back(name: &str, before: &Checkpoint) {
    for compact in [false, true] {
        assert_comes_back_from(&Target::Native { compact }, name, before);
    }
}

fn assert_comes_back_from(target: &Target, name: &str, before: &Checkpoint) {
    let folder = folder();
    let path = folder.path().join("model.bitnet");
    let mut told = Vec::new();
    convert::to(before, &path, target, Options::default(), |done, all| told.push((done, all)))
        .unwrap();
    let all = told[0].1;
    assert_eq!(told, (1..=all).map(|done| (done, all)).collect::<Vec<_>>(), "{name}");
    let after = open(&path).unwrap();

    let (old, new) = (&before.description, &after.description);
    let (logits, notes) = results(before);
    let (logits_after, notes_after) = results(&after);
    assert!(logits == logits_after, "{name}: other logits");
    assert_eq!(notes, notes_after, "{name}");
    assert_eq!(new.notes, notes_after, "{name}: nothing is left to be decided");
    let vocab_size = logits[0].len();
    assert_eq!(comparable(&old.config, vocab_size), comparable(&new.config, vocab_size), "{name}");
    assert_eq!(old.end_ids, new.end_ids, "{name}");
    let source = |c: &Checkpoint| c.description.template.as_ref().map(|t| t.source().to_owned());
    assert_eq!(source(before), source(&after), "{name}");
    assert_same_tokenizer(name, &old.tokenizer, &new.tokenizer);
    source::verify_checksums(path.to_str().unwrap()).unwrap();
    assert_eq!(after.tensors.contains("screen"), new.config.pooling.is_none(), "{name}");

    // Converting what is native already gives the same bytes, and so does converting again.
    let again = folder.path().join("again");
    convert::to(&after, &again, target, Options::default(), |_, _| ()).unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap(), "{name}: other bytes");
}

#[test]
fn every_model_comes_back_to_the_last_bit() {
    assert_comes_back(TINY, &source::open(TINY).unwrap());
    let directories = RANDOM.into_iter().chain(["bitnet-bf16-bin", TRAINED]).chain(GENERATORS);
    let files = [RANDOM_GGUF].into_iter().chain(GGUF.map(|(file, _)| file));
    let named = directories.chain(EMBEDDERS).chain(files).map(|name| (name, golden(name)));
    for (name, path) in named.chain(TRAINED_GGUF.map(|name| (name, shared_data(name)))) {
        let Some(path) = path else { continue };
        assert_comes_back(name, &open(&path).unwrap());
    }
}

#[test]
fn a_sentencepiece_vocabulary_comes_back() {
    let folder = folder();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    let Some(source) = golden("llama-1.58-packed") else { return };
    for name in ["config.json", "model.safetensors"] {
        fs::copy(source.join(name), model.join(name)).unwrap();
    }
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/sentencepiece");
    for seed in ["unigram", "bpe"] {
        fs::copy(seeds.join(seed), model.join("tokenizer.model")).unwrap();
        assert_comes_back(seed, &open(&model).unwrap());
    }
}

#[test]
fn the_reference_backend_reads_tiles_too() {
    let folder = folder();
    let path = write_tiny(folder.path());
    let ids = [1, 2, 3];
    let native = all_logits(&support::load(ReferenceBackend, &path), &ids);
    let tiny = all_logits(&support::load(ReferenceBackend, Path::new(TINY)), &ids);
    assert!(native == tiny);
}

#[test]
fn the_safetensors_crate_reads_it_and_what_fills_a_page_begins_on_one() {
    let folder = folder();
    let bytes = fs::read(write_tiny(folder.path())).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut large = 0;
    for (name, view) in tensors.iter() {
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        if view.data().len() >= 4096 {
            assert_eq!(at % 4096, 0, "{name}");
            large += 1;
        }
    }
    assert!(large > 28, "{large}");
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let texts = header.metadata().as_ref().unwrap();
    assert_eq!((texts["format"].as_str(), texts["version"].as_str()), ("bitnet", VERSION));
}

/// A native file of the built-in model with a part of its bytes replaced by as many others.
fn edited(folder: &Path, from: &str, to: &str) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let path = write_tiny(folder);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    fs::write(&path, bytes).unwrap();
    path
}

#[track_caller]
fn refused(path: &Path, words: &str) {
    let error = open(path)
        .and_then(|checkpoint| {
            let Checkpoint { mut description, tensors } = checkpoint;
            weights::load(
                ReferenceBackend,
                &description.path,
                &description.config,
                &tensors,
                LoadOptions::default(),
                &mut description.notes,
            )
            .map(drop)
            .map_err(|error| error.to_string())
        })
        .unwrap_err();
    assert!(error.contains(words), "{error}");
}

#[test]
fn versions_that_knew_fewer_layouts_are_read() {
    let folder = folder();
    let before = source::open(TINY).unwrap();
    let path = folder.path().join("tiny.bitnet");
    let target = Target::Native { compact: false };
    convert::to(&before, &path, &target, Options::default(), |_, _| ()).unwrap();
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(13).position(|window| window == br#""version":"4""#).unwrap();
    for version in [br#""version":"2""#, br#""version":"4""#] {
        let older = [&bytes[..at], version, &bytes[at + 13..]].concat();
        fs::write(&path, older).unwrap();
        assert!(results(&open(&path).unwrap()).0 == results(&before).0);
    }
}

#[test]
fn other_versions_and_broken_descriptions_are_refused() {
    let folder = folder();
    let folder = folder.path();
    for (from, to, words) in [
        (
            r#""version":"4""#,
            r#""version":"1""#,
            "version `1` and this program reads versions 2, 3, 4",
        ),
        (r#"\"kv_heads\":2"#, r#"\"kv_heads\":3"#, "4 heads of 64 for 3 key/value heads"),
        (r#"\"kv_heads\":2"#, r#"\"kv_heads\":0"#, "`kv_heads` 0: 1 to 4 are possible"),
        (r#"\"rope\":0"#, r#"\"rope\":1"#, "layer 0 is impossible"),
        (r#"\"head_norms\""#, r#"\"head_forms\""#, "unknown field `head_forms`"),
        ("BitNet b1.58", "BitNet b9.99", "architecture is `BitNet b9.99`"),
        (r#"\"hidden_size\":256"#, r#"\"hidden_size\":128"#, "tensor `embedding.weight`"),
        (r#"\"bos\":2036"#, r#"\"bos\":9036"#, "token id 9036"),
        (r#""layers.2.up.scale.multiply":{"#, r#""layers.2.up.scale.subtract":{"#, "any scale"),
        (
            r#""layers.2.up.tiles.rows.quintuples":{"#,
            r#""layers.2.up.tiles.rows.quintuplex":{"#,
            "is missing",
        ),
        (r#""screen":{"#, r#""scream":{"#, "tensor `scream`: is not part of"),
        (r#""padding.3":{"#, r#""pudding.3":{"#, "tensor `pudding.3`: is not part of"),
    ] {
        refused(&edited(folder, from, to), words);
    }
    let path = write_tiny(folder);
    let bytes = fs::read(&path).unwrap();
    for length in [0, 7, 8, 60, 5000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        assert!(open(&path).is_err(), "{length} bytes");
    }
}

#[test]
fn a_changed_weight_is_told_by_the_checksums() {
    let folder = folder();
    let path = write_tiny(folder.path());
    let name = path.to_str().unwrap();
    assert!(source::verify_checksums(name).unwrap() > 28);
    let mut bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("layers.3.down.tiles.triples").unwrap();
    let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
    // Weights become others, or none at all: the bytes are unread.
    bytes[at + 100] ^= 0xff;
    fs::write(&path, bytes).unwrap();
    results(&open(&path).unwrap());
    let error = source::verify_checksums(name).unwrap_err().to_string();
    assert!(error.contains("tensor `layers.3.down.tiles"), "{error}");
    assert!(error.contains("its checksum differs"), "{error}");
    let text = edited(folder.path(), r#"\"hidden_size\":256"#, r#"\"hidden_size\":255"#);
    let error = source::verify_checksums(text.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("tensor `model`: is damaged"), "{error}");
}

#[test]
fn a_conversion_that_ends_early_leaves_what_was_there() {
    let folder = folder();
    let path = folder.path().join("model.bitnet");
    let part = folder.path().join("model.bitnet.part");
    let mut seen = 0;
    convert::to(
        &source::open(TINY).unwrap(),
        &path,
        &Target::Native { compact: true },
        Options::default(),
        |_, _| {
            // Ending here leaves this file.
            let bytes = fs::read(&part).unwrap();
            assert!(native::from_bytes(bytes.into(), &part).is_err());
            assert!(!path.exists());
            seen += 1;
        },
    )
    .unwrap();
    assert!(seen > 28 && !part.exists());

    // A checkpoint whose last layer is broken: found when most of the file is written.
    let before = fs::read(&path).unwrap();
    let mut broken = source::open(TINY).unwrap();
    broken.description.config.layers.push(broken.description.config.layers[0]);
    fs::write(&part, b"left by an interrupted conversion").unwrap();
    let error = convert::to(
        &broken,
        &path,
        &Target::Native { compact: true },
        Options::default(),
        |_, _| (),
    )
    .unwrap_err();
    assert!(error.to_string().contains("`layers.4."), "{error}");
    assert!(fs::read(&path).unwrap() == before && !part.exists());
}

#[test]
fn a_folder_with_one_native_file_is_that_model() {
    let folder = folder();
    let path = write_tiny(folder.path());
    assert_eq!(open(folder.path()).unwrap().description.path, path);
    fs::copy(&path, folder.path().join("b.bitnet")).unwrap();
    let error = open(folder.path()).err().unwrap();
    assert!(error.contains("several .bitnet files"), "{error}");
    // Whatever it is called, it is told by its first bytes.
    let other = folder.path().join("model");
    fs::copy(&path, &other).unwrap();
    assert_eq!(open(&other).unwrap().description.format, "native");
    fs::write(&path, b"something else entirely").unwrap();
    let error = open(&path).err().unwrap();
    assert!(error.contains("is not a .bitnet file"), "{error}");
}
