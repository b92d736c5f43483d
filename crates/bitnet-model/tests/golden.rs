//! Every golden model, from its files to its logits, against the implementations that made the
//! golden data. The tolerances are those of the golden data's README.

mod support;

use std::path::{Path, PathBuf};

use bitnet_core::backend::{ActivationPrecision, Backend};
use bitnet_core::{DType, LinearUse};
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::decoder::Decoder;
use bitnet_model::source;
use bitnet_model::weights;
use bitnet_quant::activation::quantize_row;
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::golden::{
    GoldenModel, RANDOM, RANDOM_GGUF, TRAINED, TRAINED_GGUF, argmax, deviation, divergence,
};
use bitnet_testing::{golden, shared_data, tiny_model};

use support::{all_logits, assert_near, check_hidden, check_ternary, load};

/// Where a golden model lies: the packed trained one is the one that is built in.
fn model_path(name: &str) -> Option<PathBuf> {
    if name == "tiny" { Some(tiny_model()) } else { golden(name) }
}

fn read_golden(name: &str, path: &Path) -> GoldenModel {
    match golden(name) {
        // Outputs of the built-in model lie apart from it.
        Some(directory) if path.is_dir() => GoldenModel::read_from(path, &directory.join("golden")),
        _ => GoldenModel::read(path),
    }
}

/// Logits of one prompt's last position, tight or loose as the golden README says.
fn check_last(name: &str, golden: &GoldenModel, k: usize, ours: &[f32], tight: bool, loose: f32) {
    let reference = golden.f32(&format!("logits.last.{k}")).unwrap();
    let tolerance = if tight { 1e-4 } else { loose };
    assert_near(&format!("{name} last {k}"), ours, &reference, tolerance * deviation(&reference));
    if !tight {
        let bound = if loose < 0.1 { 1e-3 } else { 0.1 };
        let divergence = divergence(&reference, ours);
        assert!(divergence < bound, "{name} last {k}: KL {divergence}");
    }
}

/// Greedy continuations with the golden prefix put in.
fn check_greedy<B: Backend>(name: &str, golden: &GoldenModel, decoder: &Decoder<B>, margin: f32) {
    for (k, prompt) in golden.prompts.iter().enumerate() {
        let mut ids = prompt.ids.clone();
        ids.extend(&prompt.greedy[..prompt.greedy.len() - 1]);
        let logits = all_logits(decoder, &ids);
        let mut compared = 0;
        for (i, &expected) in prompt.greedy.iter().enumerate() {
            let row = &logits[prompt.ids.len() - 1 + i];
            let best = argmax(row);
            let threshold = margin * if margin == 0.3 { 1.0 } else { deviation(row) };
            if prompt.greedy_margin[i] > threshold.max(0.3) {
                compared += 1;
                assert_eq!(best, expected, "{name} prompt {k} greedy {i}");
            } else if let Some(&second) = prompt.greedy_second.get(i) {
                assert!(
                    best == expected || best == second,
                    "{name} prompt {k} greedy {i}: {best} is neither {expected} nor {second}"
                );
            }
        }
        println!(
            "{name} prompt {k}: {compared} of 32 greedy tokens have a clear margin, all equal"
        );
        // Logits that chose tokens 0, 15 and 31.
        if let Some(chosen) = golden.f32(&format!("logits.greedy.{k}")) {
            let rows = chosen.chunks_exact(chosen.len() / 3);
            for (reference, step) in rows.zip([0, 15, 31]) {
                let row = &logits[prompt.ids.len() - 1 + step];
                let what = format!("{name} prompt {k} logits of greedy {step}");
                assert_near(&what, row, reference, 0.3 * deviation(reference));
            }
        }
    }
}

fn check_model<B: Backend>(name: &str, path: PathBuf, backend: B) {
    let golden = read_golden(name, &path);
    let decoder = load(backend, &path);
    let trained = name.contains("tiny");
    for (k, prompt) in golden.prompts.iter().enumerate() {
        let logits = all_logits(&decoder, &prompt.ids);
        let tight = if trained { k < 2 } else { k < 3 };
        let loose = if trained { 0.08 } else { 0.3 };
        check_last(name, &golden, k, logits.last().unwrap(), tight, loose);
        if k == 1 {
            let all = golden.f32("logits.all.1").unwrap();
            for (position, reference) in all.chunks_exact(decoder.vocab_size()).enumerate() {
                let what = format!("{name} short prompt position {position}");
                assert_near(&what, &logits[position], reference, 1e-4 * deviation(reference));
            }
        }
    }
    // 0.3 std (about 1.2) for random models; 0.3 itself for the trained one.
    check_greedy(name, &golden, &decoder, 0.3);
    if path.is_dir() {
        assert!(check_hidden(name, &golden, &decoder, 1e-4) > 0, "{name} has no hidden states");
        check_linears(name, &golden, &path);
    }
}

/// Single linear layers: int8 inputs and integer sums exactly, outputs to float rounding.
fn check_linears(name: &str, golden: &GoldenModel, path: &Path) {
    let checkpoint = source::open(path.to_str().unwrap()).unwrap();
    for tensor in golden.names() {
        let Some(module) =
            tensor.strip_prefix("bitlinear.").and_then(|rest| rest.strip_suffix(".x_q"))
        else {
            continue;
        };
        let part = |part: &str| format!("bitlinear.{module}.{part}");
        let input = golden.f32(&part("x_normed")).or_else(|| golden.f32(&part("x"))).unwrap();
        let expected_q = golden.i8(&part("x_q")).unwrap();
        let scales = golden.f32(&part("x_scale")).unwrap();
        let cols = input.len() / scales.len();
        let mut q = vec![0i8; cols];
        for (row, x) in input.chunks_exact(cols).enumerate() {
            let quantized = quantize_row(x, &mut q);
            assert_eq!(quantized.scale, scales[row], "{name} {module} scale of row {row}");
            assert_eq!(q, expected_q[row * cols..][..cols], "{name} {module} row {row}");
        }
        let y = golden.f32(&part("y")).unwrap();
        let rows = y.len() / scales.len();
        let matrix = weights::matrix_by_name(
            path,
            &checkpoint.description.config,
            &checkpoint.tensors,
            module,
            rows,
            cols,
        )
        .unwrap();
        let acc = golden.i32(&part("acc")).unwrap();
        for (token, q) in expected_q.chunks_exact(cols).enumerate() {
            for row in 0..rows {
                let sum: i32 =
                    (0..cols).map(|k| i32::from(q[k]) * i32::from(matrix.weight(row, k))).sum();
                assert_eq!(sum, acc[token * rows + row], "{name} {module} token {token} row {row}");
            }
        }
        let backend = ReferenceBackend;
        let linear =
            backend.load_linear(&matrix, ActivationPrecision::Int8, LinearUse::Dense).unwrap();
        let mut x = backend.buffer(scales.len(), cols).unwrap();
        backend.write(&mut x, cols, &input);
        let mut out = backend.buffer(scales.len(), rows).unwrap();
        backend.linears(&x, scales.len(), None, &[&linear], &mut [&mut out]);
        let mut ours = Vec::new();
        backend.read(&out, scales.len(), &mut ours).unwrap();
        let largest = y.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert_near(&format!("{name} {module} y"), &ours, &y, 1e-5 * largest);
    }
}

fn cpu() -> CpuBackend {
    CpuBackend::new(CpuOptions::default()).unwrap()
}

#[test]
fn random_models_match_the_reference_within_the_tight_bound() {
    for name in RANDOM {
        let Some(path) = model_path(name) else { continue };
        check_model(name, path, cpu());
    }
}

#[test]
fn trained_models_match_the_reference() {
    for name in [TRAINED, "tiny"] {
        let Some(path) = model_path(name) else { continue };
        check_model(name, path, cpu());
    }
}

#[test]
fn the_scalar_reference_and_the_kernels_give_the_same_bits() {
    for name in ["llama-1.58-packed", "bitnet-1bitllm", "tiny"] {
        let Some(path) = model_path(name) else { continue };
        let ids = &read_golden(name, &path).prompts[2].ids;
        let scalar = all_logits(&load(ReferenceBackend, &path), ids);
        assert!(scalar == all_logits(&load(cpu(), &path), ids), "{name}");
    }
}

#[test]
fn gguf_models_match_the_reference() {
    let trained = TRAINED_GGUF.map(|name| (name, shared_data(name)));
    for (name, path) in [(RANDOM_GGUF, golden(RANDOM_GGUF))].into_iter().chain(trained) {
        let Some(path) = path else { continue };
        check_model(name, path, cpu());
    }
}

#[test]
fn ternary_matrices_are_exactly_those_of_the_reference() {
    for name in RANDOM.into_iter().chain([TRAINED, "tiny"]) {
        let Some(path) = model_path(name) else { continue };
        let compared = check_ternary(name, &read_golden(name, &path), &path);
        // Only the plain module's reference has no digests.
        assert!(compared > 0 || name == "bitnet-1bitllm", "{name} has no ternary digests");
    }
}

#[test]
fn a_torch_file_gives_the_same_tensors_as_safetensors() {
    let (Some(bin), Some(safetensors)) = (golden("bitnet-bf16-bin"), golden("bitnet-bf16")) else {
        return;
    };
    let ids = &GoldenModel::read(&safetensors).prompts[1].ids;
    let from_bin = all_logits(&load(cpu(), &bin), ids);
    let from_safetensors = all_logits(&load(cpu(), &safetensors), ids);
    assert_eq!(from_bin, from_safetensors);
    assert_eq!(
        source::open(bin.to_str().unwrap())
            .unwrap()
            .tensors
            .get("model.embed_tokens.weight")
            .unwrap()
            .unwrap()
            .dtype(),
        DType::BF16
    );
}

#[test]
fn the_configuration_says_whether_the_head_is_the_embedding() {
    let Some(path) = golden("llama-1.58-packed") else { return };
    let mut checkpoint = source::open(path.to_str().unwrap()).unwrap();
    let config = &mut checkpoint.description.config;
    assert_eq!(config.tied, Some(false));
    assert!(weights::tables(&path, config, &checkpoint.tensors).unwrap().head.is_some());
    config.tied = Some(true);
    assert!(weights::tables(&path, config, &checkpoint.tensors).unwrap().head.is_none());
}
