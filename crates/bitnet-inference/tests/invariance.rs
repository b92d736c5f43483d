//! The same bits whatever the instruction set, the number of threads, the chunking of the prompt
//! and the other sequences of the batch.

use std::path::PathBuf;
use std::sync::Arc;

use bitnet_core::Shortcuts;
use bitnet_core::backend::{Backend, KvType, Span};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::decoder::{Decoder, Step};
use bitnet_model::source;
use bitnet_model::tokenizer::Special;
use bitnet_model::weights::{self, LoadOptions};
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::golden::{
    GENERATOR_GGUF, GENERATORS, GoldenModel, RANDOM, RANDOM_GGUF, TRAINED, TRAINED_GGUF,
};
use bitnet_testing::{golden, shared_data, tiny_model};

/// Every golden model that generates text, with its longest prompt.
fn models() -> Vec<(PathBuf, Vec<u32>)> {
    let directories = RANDOM.into_iter().chain([TRAINED]).chain(GENERATORS);
    let named = directories.chain([RANDOM_GGUF, GENERATOR_GGUF]);
    let paths = named.filter_map(golden).chain(TRAINED_GGUF.into_iter().filter_map(shared_data));
    let mut found: Vec<_> = paths
        .map(|path| {
            let ids = GoldenModel::read(&path).prompts[3].ids.clone();
            (path, ids)
        })
        .collect();
    if let Some(directory) = golden("tiny") {
        let golden = GoldenModel::read_from(&tiny_model(), &directory.join("golden"));
        found.push((tiny_model(), golden.prompts[3].ids.clone()));
    }
    assert!(!found.is_empty());
    found
}

fn open(path: &std::path::Path, isa: Isa, threads: usize) -> Model {
    let options =
        ModelOptions { isa: Some(isa), threads: Some(threads), ..ModelOptions::default() };
    Model::open(path.to_str().unwrap(), &options).unwrap()
}

/// Bits of the logits of every position, the prompt cut into chunks.
fn logits(model: &Model, ids: &[u32], chunk: usize, kv_type: KvType) -> Vec<u32> {
    let mut bits = Vec::new();
    let mut session = model.session(SessionOptions { kv_type, chunk }).unwrap();
    session.feed_showing_all(ids, |row| bits.extend(row.iter().map(|v| v.to_bits()))).unwrap();
    bits
}

#[test]
fn logits_do_not_depend_on_instruction_set_threads_or_chunks() {
    let best = *Isa::detected().last().unwrap();
    for isa in Isa::ALL {
        if !Isa::detected().contains(&isa) {
            println!("skipped: this CPU has no {isa}");
        }
    }
    for (path, ids) in models() {
        let model = open(&path, best, 1);
        let expected = logits(&model, &ids, ids.len(), KvType::F32);
        for chunk in [1, 7, 64] {
            let same = logits(&model, &ids, chunk, KvType::F32) == expected;
            assert!(same, "{} in chunks of {chunk}", path.display());
        }
        for isa in Isa::detected() {
            for threads in [1, 2] {
                let model = open(&path, isa, threads);
                let same = logits(&model, &ids, 64, KvType::F32) == expected;
                assert!(same, "{} with {isa} and {threads} threads", path.display());
            }
        }
    }
}

/// The model with these shortcuts and copies, read token by token: the way of decoding.
fn decoded(path: &std::path::Path, isa: Isa, shortcuts: Shortcuts, copies: bool) -> Model {
    let options = ModelOptions {
        isa: Some(isa),
        threads: Some(2),
        shortcuts: Some(shortcuts),
        copies,
        ..ModelOptions::default()
    };
    Model::open(path.to_str().unwrap(), &options).unwrap()
}

#[test]
fn logits_do_not_depend_on_shortcuts_or_copies() {
    let best = *Isa::detected().last().unwrap();
    for (path, ids) in models() {
        let expected = logits(&open(&path, best, 1), &ids, ids.len(), KvType::F32);
        for isa in Isa::detected() {
            for shortcuts in [Shortcuts::ALL, Shortcuts::NONE] {
                for copies in [false, true] {
                    let model = decoded(&path, isa, shortcuts, copies);
                    let same = logits(&model, &ids, 1, KvType::F32) == expected;
                    assert!(same, "{} with {isa}, {shortcuts:?}, {copies}", path.display());
                }
            }
        }
    }
}

#[test]
fn a_greedy_text_does_not_depend_on_shortcuts() {
    let text = |shortcuts| {
        let model = decoded(&tiny_model(), *Isa::detected().last().unwrap(), shortcuts, true);
        let mut session = model.session(SessionOptions::default()).unwrap();
        let mut values = Vec::new();
        let mut ids = model.tokenizer().encode("Once upon a time", true, Special::AsText).unwrap();
        let mut rest = ids.clone();
        for _ in 0..200 {
            session.feed(&rest, &mut values).unwrap();
            let best = (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap();
            rest = vec![best as u32];
            ids.push(best as u32);
        }
        ids
    };
    assert_eq!(text(Shortcuts::ALL), text(Shortcuts::NONE));
}

/// SHA-256 of the logits' bits of every position of the longest prompt, little-endian, as x86-64
/// computes them. Any CPU must get the same ones.
const DIGESTS: [(&str, &str); 4] = [
    ("tiny", "ec0b62e7b9bde7229a0cfb8d14c0fa93a212ed570a03acb4fa993782cc116d64"),
    ("llama-1.58-packed", "6bfcac14e00ffa7c486bfd5d7388fea98893f6325f1005f41a967ace9de4be87"),
    ("bitnet-1bitllm", "371eb199e6095620bef7f0bb1dcbfb837ea469d968d70cf0f826c3e90beb3856"),
    (
        "bitnet-packed-TQ2_0.gguf",
        "9fcab349b40e44dd591eb13af61945b3ee3936a6da51410b8d6ee3dceb7c5cbd",
    ),
];

#[test]
fn logits_have_the_same_bits_on_every_kind_of_cpu() {
    use sha2::{Digest, Sha256};
    let models = models();
    let found = DIGESTS.map(|(name, _)| {
        let found = models.iter().find(|(path, _)| path.ends_with(name));
        let (path, ids) = found.expect("these models are in this repository");
        let model = open(path, *Isa::detected().last().unwrap(), 2);
        let mut digest = Sha256::new();
        for bits in logits(&model, ids, 64, KvType::F32) {
            digest.update(bits.to_le_bytes());
        }
        let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        (name, hex)
    });
    assert_eq!(found, DIGESTS.map(|(name, digest)| (name, digest.to_owned())));
}

/// Bits of the logits of the last two of many tokens, which are read in chunks.
fn last_logits<B: Backend>(
    decoder: &Decoder<B>,
    kv_type: KvType,
    count: usize,
    chunk: usize,
) -> Vec<u32> {
    let ids: Vec<u32> =
        (0..count).map(|i| (i * i * 7 + i) as u32 % decoder.vocab_size() as u32).collect();
    let blocks: Vec<u32> = (0..count.div_ceil(16) as u32).rev().collect();
    let layout = decoder.kv_layout(kv_type, 16);
    let mut kv = decoder.kv_allocate(layout, blocks.len()).unwrap();
    let mut workspace = decoder.workspace(chunk, 1).unwrap();
    let (mut bits, mut values) = (Vec::new(), Vec::new());
    // The last token is a step of its own.
    let (prompt, last) = ids.split_at(count - 1);
    let mut position = 0;
    for tokens in prompt.chunks(chunk).chain([last]) {
        let spans = [Span { rows: 0..tokens.len(), position, blocks: &blocks }];
        decoder.forward(&Step { tokens, spans: &spans }, &mut kv, &mut workspace).unwrap();
        position += tokens.len();
        if position + 1 >= count {
            decoder.logits(&mut workspace, &[tokens.len() - 1], &mut values).unwrap();
            bits.extend(values.iter().map(|v| v.to_bits()));
        }
    }
    bits
}

#[test]
fn a_context_of_several_splits_gives_the_bits_of_the_reference() {
    let path = golden("llama-1.58-packed").expect("this model is in this repository");
    // The reference takes its time: the context is longest for one type.
    for (kv_type, count) in [(KvType::F32, 1110), (KvType::F16, 530), (KvType::Int8, 530)] {
        let expected = last_logits(&*load(&path, ReferenceBackend), kv_type, count, count);
        let steps = [(1, 128), (2, 1110), (3, 333)];
        for (isa, (threads, chunk)) in Isa::detected().into_iter().zip(steps.iter().cycle()) {
            let options =
                CpuOptions { threads: Some(*threads), isa: Some(isa), ..CpuOptions::default() };
            let decoder = load(&path, CpuBackend::new(options).unwrap());
            let same = last_logits(&*decoder, kv_type, count, *chunk) == expected;
            assert!(same, "{isa}, {kv_type:?}, {threads} threads, chunks of {chunk}");
        }
    }
}

#[test]
fn coarser_keys_and_values_are_the_same_everywhere_too() {
    for (path, ids) in models().into_iter().take(3) {
        for kv_type in [KvType::F16, KvType::Int8] {
            let expected = logits(&open(&path, Isa::Scalar, 1), &ids, 64, kv_type);
            for isa in Isa::detected() {
                let same = logits(&open(&path, isa, 2), &ids, 7, kv_type) == expected;
                assert!(same, "{} with {isa} and {kv_type:?}", path.display());
            }
        }
    }
}

/// A sequence on its way through the batch.
struct Sequence {
    ids: Vec<u32>,
    blocks: Vec<u32>,
    read: usize,
    bits: Vec<u32>,
}

#[test]
fn a_sequence_gives_the_same_bits_alone_and_in_a_batch_of_eight_others() {
    const BLOCK_TOKENS: usize = 16;
    for (path, ids) in models() {
        let model = open(&path, *Isa::detected().last().unwrap(), 2);
        let options = CpuOptions { threads: Some(2), ..CpuOptions::default() };
        let decoder = load(&path, CpuBackend::new(options).unwrap());
        // Nine sequences: the prompt from different tokens on, in different lengths, their blocks
        // scattered over the store, read in different chunks at different positions.
        let mut sequences: Vec<Sequence> = (0..9)
            .map(|i| {
                let mut ids = ids.clone();
                ids.rotate_left(i * 5);
                ids.truncate(130 - i * 11);
                let count = ids.len().div_ceil(BLOCK_TOKENS) as u32;
                let blocks = (0..count).rev().map(|b| b * 9 + i as u32).collect();
                Sequence { ids, blocks, read: 0, bits: Vec::new() }
            })
            .collect();
        let blocks = 1 + *sequences.iter().flat_map(|s| &s.blocks).max().unwrap() as usize;
        let layout = decoder.kv_layout(KvType::F32, BLOCK_TOKENS);
        let mut kv = decoder.kv_allocate(layout, blocks).unwrap();
        let mut workspace = decoder.workspace(256, 256).unwrap();
        let mut step_number = 0;
        while sequences.iter().any(|s| s.read < s.ids.len()) {
            let mut tokens = Vec::new();
            let mut spans = Vec::new();
            let mut chunks = Vec::new();
            for (i, s) in sequences.iter().enumerate() {
                let chunk = (1 + (i * 7 + step_number * 3) % 24).min(s.ids.len() - s.read);
                let rows = tokens.len()..tokens.len() + chunk;
                tokens.extend(&s.ids[s.read..s.read + chunk]);
                if chunk > 0 {
                    spans.push(Span { rows, position: s.read, blocks: &s.blocks });
                }
                chunks.push(chunk);
            }
            decoder
                .forward(&Step { tokens: &tokens, spans: &spans }, &mut kv, &mut workspace)
                .unwrap();
            let picks: Vec<usize> = (0..tokens.len()).collect();
            let mut values = Vec::new();
            decoder.logits(&mut workspace, &picks, &mut values).unwrap();
            let mut rows = values.chunks_exact(decoder.vocab_size());
            drop(spans);
            for (s, chunk) in sequences.iter_mut().zip(chunks) {
                s.read += chunk;
                for row in rows.by_ref().take(chunk) {
                    s.bits.extend(row.iter().map(|v| v.to_bits()));
                }
            }
            step_number += 1;
        }
        for (i, s) in sequences.iter().enumerate() {
            let alone = logits(&model, &s.ids, s.ids.len(), KvType::F32);
            assert!(s.bits == alone, "{} sequence {i}", path.display());
        }
    }
}

fn load<B: Backend>(path: &std::path::Path, backend: B) -> Arc<Decoder<B>> {
    let checkpoint = source::open(path.to_str().unwrap()).unwrap();
    let config = &checkpoint.description.config;
    let options = LoadOptions::default();
    let mut notes = Vec::new();
    Arc::new(
        weights::load(backend, path, config, &checkpoint.tensors, options, &mut notes).unwrap(),
    )
}
