//! The models of `scripts/make_reference_models.py`: forms that the other golden models do not have,
//! against transformers. Their prompts keep so far from every rounding boundary that all of them,
//! the longest included, must agree to float rounding.

mod support;

use std::path::Path;

use bitnet_core::WeightScale;
use bitnet_core::backend::{ActivationPrecision, Backend, KvType, Span};
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::config::{Pooling, Precision};
use bitnet_model::decoder::{Decoder, Step};
use bitnet_model::source;
use bitnet_model::weights;
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::golden;
use bitnet_testing::golden::{EMBEDDERS, GENERATORS, GGUF, GoldenModel, argmax, deviation};

use support::{all_logits, assert_near, check_hidden, check_ternary, load};

/// Largest error of a logit or state, in standard deviations of its row. Measured: at most
/// 3.5e-6; see the golden data's README.
const TOLERANCE: f32 = 1e-5;

fn cpu() -> CpuBackend {
    CpuBackend::new(CpuOptions::default()).unwrap()
}

/// Final states of every position, the tokens fed in steps of up to `step` tokens.
fn final_states<B: Backend>(decoder: &Decoder<B>, ids: &[u32], step: usize) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut kv = decoder.kv_allocate(layout, blocks.len()).unwrap();
    let mut workspace = decoder.workspace(step, 1).unwrap();
    let (mut states, mut all) = (Vec::new(), Vec::new());
    for (index, tokens) in ids.chunks(step).enumerate() {
        let span = Span { rows: 0..tokens.len(), position: index * step, blocks: &blocks };
        decoder.forward(&Step { tokens, spans: &[span] }, &mut kv, &mut workspace).unwrap();
        decoder.final_states(&mut workspace, &mut states).unwrap();
        all.extend(states.chunks_exact(decoder.config().hidden_size).map(<[f32]>::to_vec));
    }
    all
}

fn check<B: Backend>(name: &str, golden: &GoldenModel, path: &Path, backend: B) {
    let decoder = load(backend, path);
    assert!(check_hidden(name, golden, &decoder, TOLERANCE) > 0, "{name} has no hidden states");
    for (k, prompt) in golden.prompts.iter().enumerate() {
        let what = format!("{name} prompt {k}");
        match decoder.config().pooling {
            None => check_logits(&what, golden, k, &decoder),
            Some(pooling) => {
                assert_eq!(pooling, Pooling::Last, "{name}");
                let states = final_states(&decoder, &prompt.ids, prompt.ids.len());
                let last = states.last().unwrap();
                let length = last.iter().map(|v| v * v).sum::<f32>().sqrt();
                let ours: Vec<f32> = last.iter().map(|v| v / length).collect();
                let reference = golden.f32(&format!("embedding.{k}")).unwrap();
                assert_near(&what, &ours, &reference, TOLERANCE * deviation(&reference));
            }
        }
    }
}

/// The last logits of a prompt, all of the short one, and the greedy continuation step by step.
fn check_logits<B: Backend>(what: &str, golden: &GoldenModel, k: usize, decoder: &Decoder<B>) {
    let prompt = &golden.prompts[k];
    let mut ids = prompt.ids.clone();
    ids.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
    let logits = all_logits(decoder, &ids);
    let (in_prompt, continued) = logits.split_at(prompt.ids.len());
    let last = in_prompt.last().unwrap();
    let reference = golden.f32(&format!("logits.last.{k}")).unwrap();
    assert_near(what, last, &reference, TOLERANCE * deviation(&reference));
    if k == 1 {
        let all = golden.f32("logits.all.1").unwrap();
        for (ours, reference) in in_prompt.iter().zip(all.chunks_exact(decoder.vocab_size())) {
            assert_near(what, ours, reference, TOLERANCE * deviation(reference));
        }
    }
    // Tokens after the prompt were not chosen for their roundings: an int8 model may jump there.
    let int8 = decoder.config().precision == Precision::Known(ActivationPrecision::Int8);
    let margin = if int8 { 0.3 } else { TOLERANCE };
    let rows = std::iter::once(last).chain(continued);
    for (step, (row, &expected)) in rows.zip(&prompt.greedy).enumerate() {
        if prompt.greedy_margin[step] > margin * deviation(row) {
            assert_eq!(argmax(row), expected, "{what} greedy {step}");
        }
    }
}

#[test]
fn text_generators_match_transformers() {
    for name in GENERATORS {
        let Some(path) = golden(name) else { continue };
        check(name, &GoldenModel::read(&path), &path, cpu());
    }
}

#[test]
fn embedding_models_match_transformers() {
    for name in EMBEDDERS {
        let Some(path) = golden(name) else { continue };
        check(name, &GoldenModel::read(&path), &path, cpu());
    }
}

#[test]
fn gguf_files_match_transformers_on_the_same_weights() {
    for (file, reference) in GGUF {
        let (Some(path), Some(reference)) = (golden(file), golden(reference)) else { continue };
        check(file, &GoldenModel::read(&reference), &path, cpu());
    }
}

#[test]
fn ternary_matrices_are_exactly_those_of_the_reference() {
    for name in GENERATORS.into_iter().chain(EMBEDDERS) {
        let Some(path) = golden(name) else { continue };
        let compared = check_ternary(name, &GoldenModel::read(&path), &path);
        assert!(compared >= 7, "{name} has {compared} digests");
    }
}

#[test]
fn scales_are_recovered_as_finely_as_the_form_has_them() {
    let scale = |model: &str, module: &str, rows, cols| {
        let path = golden(model)?;
        let checkpoint = source::open(path.to_str().unwrap()).unwrap();
        let config = &checkpoint.description.config;
        let matrix =
            weights::matrix_by_name(&path, config, &checkpoint.tensors, module, rows, cols);
        Some(matrix.unwrap().scale().clone())
    };
    // Halves of the rows where a layer was split by outputs, of the columns where by inputs.
    if let Some(scale) = scale("trilm", "model.layers.1.mlp.up_proj", 64, 48) {
        let WeightScale::Rows(values) = scale else { panic!("{scale:?}") };
        assert!(values[..32].iter().all(|&value| value == values[0]));
        assert!(values[32..].iter().all(|&value| value == values[32] && value != values[0]));
    }
    if let Some(scale) = scale("trilm", "model.layers.1.mlp.down_proj", 48, 64) {
        let WeightScale::Groups { len, values } = scale else { panic!("{scale:?}") };
        assert_eq!((len, values.len()), (32, 2 * 48));
    }
    for (model, module) in [
        ("bonsai", "model.layers.0.self_attn.o_proj"),
        ("gguf/bonsai-Q2_0-128.gguf", "blk.0.attn_output"),
    ] {
        if let Some(scale) = scale(model, module, 128, 256) {
            let WeightScale::Groups { len, values } = scale else { panic!("{scale:?}") };
            assert_eq!((len, values.len()), (128, 2 * 128), "{model}");
        }
    }
}

#[test]
fn feeding_a_prompt_in_pieces_changes_no_bit_even_with_a_window() {
    for name in EMBEDDERS {
        let Some(path) = golden(name) else { continue };
        let ids = &GoldenModel::read(&path).prompts[2].ids;
        let decoder = load(cpu(), &path);
        let whole = final_states(&decoder, ids, ids.len());
        for step in [1, 7, 20] {
            assert_eq!(final_states(&decoder, ids, step), whole, "{name} in steps of {step}");
        }
    }
}

#[test]
fn the_scalar_reference_and_the_kernels_give_the_same_bits() {
    let models = GENERATORS.into_iter().chain(EMBEDDERS).map(|name| (name, name));
    for (model, prompts) in models.chain(GGUF) {
        let (Some(path), Some(prompts)) = (golden(model), golden(prompts)) else { continue };
        let ids = &GoldenModel::read(&prompts).prompts[2].ids;
        let scalar = final_states(&load(ReferenceBackend, &path), ids, ids.len());
        assert!(scalar == final_states(&load(cpu(), &path), ids, ids.len()), "{model}");
    }
}
