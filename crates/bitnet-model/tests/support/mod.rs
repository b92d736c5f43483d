//! What the tests of whole models share: loading, running, and comparing with a reference.
#![allow(dead_code)] // each test program uses its part

use std::path::Path;

use bitnet_core::backend::{Backend, KvType, Span};
use bitnet_model::decoder::{Decoder, Point, Step};
use bitnet_model::source::{self, Checkpoint};
use bitnet_model::weights::{self, LoadOptions};
use bitnet_testing::golden::{GoldenModel, deviation, largest_difference};
use sha2::{Digest, Sha256};

/// Loads a model as a user's command would.
pub fn load<B: Backend>(backend: B, path: &Path) -> Decoder<B> {
    load_checkpoint(backend, &source::open(path.to_str().unwrap()).unwrap(), &mut Vec::new())
}

/// The same of a checkpoint that is open. Adds what is decided to `notes`.
pub fn load_checkpoint<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    notes: &mut Vec<String>,
) -> Decoder<B> {
    let Checkpoint { description, tensors } = checkpoint;
    let (path, config) = (&description.path, &description.config);
    weights::load(backend, path, config, tensors, LoadOptions::default(), notes).unwrap()
}

/// Logits of every position of `ids`.
pub fn all_logits<B: Backend>(decoder: &Decoder<B>, ids: &[u32]) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut kv = decoder.kv_allocate(layout, blocks.len()).unwrap();
    let mut workspace = decoder.workspace(ids.len(), ids.len()).unwrap();
    let spans = [Span { rows: 0..ids.len(), position: 0, blocks: &blocks }];
    decoder.forward(&Step { tokens: ids, spans: &spans }, &mut kv, &mut workspace).unwrap();
    let picks: Vec<usize> = (0..ids.len()).collect();
    let mut logits = Vec::new();
    decoder.logits(&mut workspace, &picks, &mut logits).unwrap();
    logits.chunks_exact(decoder.vocab_size()).map(<[f32]>::to_vec).collect()
}

/// Fails if any element differs by more than `tolerance`.
pub fn assert_near(what: &str, ours: &[f32], reference: &[f32], tolerance: f32) {
    let error = largest_difference(ours, reference);
    println!("{what}: {error:.3e} of {tolerance:.3e}");
    assert!(error <= tolerance, "{what}: {error:e} is more than {tolerance:e}");
}

/// The intermediate results of the short prompt, within `tolerance` standard deviations of each.
/// Returns how many were compared.
pub fn check_hidden<B: Backend>(
    name: &str,
    golden: &GoldenModel,
    decoder: &Decoder<B>,
    tolerance: f32,
) -> usize {
    let ids = &golden.prompts[1].ids;
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut kv = decoder.kv_allocate(layout, blocks.len()).unwrap();
    let mut workspace = decoder.workspace(ids.len(), 1).unwrap();
    let spans = [Span { rows: 0..ids.len(), position: 0, blocks: &blocks }];
    let step = Step { tokens: ids, spans: &spans };
    let mut seen = 0;
    decoder
        .forward_observed(&step, &mut kv, &mut workspace, |point, buffer| {
            let tensor = match point {
                Point::Embedding => "hidden.embed".to_owned(),
                Point::Attention(layer) => format!("attn_out.layer.{layer}"),
                Point::FeedForwardInput(_) => return,
                Point::FeedForward(layer) => format!("mlp_out.layer.{layer}"),
                Point::Layer(layer) => format!("hidden.layer.{layer}"),
            };
            let Some(reference) = golden.f32(&tensor) else { return };
            let mut ours = Vec::new();
            decoder.backend().read(buffer, ids.len(), &mut ours).unwrap();
            let what = format!("{name} {tensor}");
            assert_near(&what, &ours, &reference, tolerance * deviation(&reference));
            seen += 1;
        })
        .unwrap();
    if let Some(reference) = golden.f32("hidden.final_norm") {
        let mut ours = Vec::new();
        decoder.final_states(&mut workspace, &mut ours).unwrap();
        let what = format!("{name} hidden.final_norm");
        assert_near(&what, &ours, &reference, tolerance * deviation(&reference));
        seen += 1;
    }
    seen
}

/// Every ternary matrix whose digest the reference has, to the bit. Returns how many there are.
pub fn check_ternary(name: &str, golden: &GoldenModel, path: &Path) -> usize {
    let checkpoint = source::open(path.to_str().unwrap()).unwrap();
    let Some(ternary) = golden.json["ternary"].as_object() else { return 0 };
    for (tensor, facts) in ternary {
        let extent = |i: usize| facts["shape"][i].as_u64().unwrap() as usize;
        let (rows, cols) = (extent(0), extent(1));
        let matrix = weights::matrix_by_name(
            path,
            &checkpoint.description.config,
            &checkpoint.tensors,
            tensor.strip_suffix(".weight").unwrap(),
            rows,
            cols,
        )
        .unwrap();
        let weights: Vec<u8> =
            (0..rows * cols).map(|i| matrix.weight(i / cols, i % cols) as u8).collect();
        let digest = Sha256::digest(&weights);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, facts["sha256_int8"].as_str().unwrap(), "{name} {tensor}");
    }
    ternary.len()
}
