//! Every golden model, from its files to its logits, against the implementations that made the
//! golden data. The tolerances are those of the golden data's README.

use std::path::{Path, PathBuf};

use bitnet_core::DType;
use bitnet_core::backend::{ActivationPrecision, Backend, KvType, Span};
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::decoder::{Decoder, Stage, Step};
use bitnet_model::source;
use bitnet_model::weights::{self, LoadOptions};
use bitnet_quant::activation::quantize_row;
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::golden::{GoldenModel, argmax, deviation, divergence, largest_difference};
use bitnet_testing::{golden, shared_data, tiny_model};

/// Models with random weights, whose prompts 0 to 2 keep far from every rounding boundary.
const RANDOM: [&str; 8] = [
    "bitnet-bf16",
    "bitnet-packed",
    "bitnet-packed-bitlinear",
    "llama-1.58-packed",
    "llama-1.58-rmsnorm",
    "bitnet-odd",
    "bitnet-sharded",
    "bitnet-1bitllm",
];

/// Models with trained weights, calmer but closer to the boundaries.
const TRAINED: [&str; 2] = ["tiny-trained", "tiny"];

fn load<B: Backend>(backend: B, path: &Path) -> Decoder<B> {
    let checkpoint = source::open(path.to_str().unwrap()).unwrap();
    let mut notes = Vec::new();
    weights::load(
        backend,
        path,
        &checkpoint.description.config,
        &checkpoint.tensors,
        LoadOptions::default(),
        &mut notes,
    )
    .unwrap()
}

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

/// Logits of every position of `ids`.
fn all_logits<B: Backend>(decoder: &Decoder<B>, ids: &[u32]) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut kv = decoder.backend().kv_allocate(layout, blocks.len()).unwrap();
    let mut workspace = decoder.workspace(ids.len(), ids.len()).unwrap();
    let spans = [Span { rows: 0..ids.len(), position: 0, blocks: &blocks }];
    decoder.forward(&Step { tokens: ids, spans: &spans }, &mut kv, &mut workspace);
    let picks: Vec<usize> = (0..ids.len()).collect();
    let mut logits = Vec::new();
    decoder.logits(&mut workspace, &picks, &mut logits).unwrap();
    logits.chunks_exact(decoder.vocab_size()).map(<[f32]>::to_vec).collect()
}

fn assert_near(what: &str, ours: &[f32], reference: &[f32], tolerance: f32) {
    let error = largest_difference(ours, reference);
    println!("{what}: {error:.3e} of {tolerance:.3e}");
    assert!(error <= tolerance, "{what}: {error:e} is more than {tolerance:e}");
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
        check_hidden(name, &golden, &decoder);
        check_linears(name, &golden, &path);
    }
}

/// The intermediate results of the short prompt.
fn check_hidden<B: Backend>(name: &str, golden: &GoldenModel, decoder: &Decoder<B>) {
    let ids = &golden.prompts[1].ids;
    let blocks: Vec<u32> = (0..ids.len().div_ceil(16) as u32).collect();
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut kv = decoder.backend().kv_allocate(layout, blocks.len()).unwrap();
    let mut workspace = decoder.workspace(ids.len(), 1).unwrap();
    let spans = [Span { rows: 0..ids.len(), position: 0, blocks: &blocks }];
    let step = Step { tokens: ids, spans: &spans };
    let mut seen = 0;
    decoder.forward_observed(&step, &mut kv, &mut workspace, |stage, buffer| {
        let tensor = match stage {
            Stage::Embedding => "hidden.embed".to_owned(),
            Stage::Attention(layer) => format!("attn_out.layer.{layer}"),
            Stage::FeedForward(layer) => format!("mlp_out.layer.{layer}"),
            Stage::Layer(layer) => format!("hidden.layer.{layer}"),
        };
        let Some(reference) = golden.f32(&tensor) else { return };
        let mut ours = Vec::new();
        decoder.backend().read(buffer, ids.len(), &mut ours).unwrap();
        let what = format!("{name} {tensor}");
        assert_near(&what, &ours, &reference, 1e-4 * deviation(&reference));
        seen += 1;
    });
    if let Some(reference) = golden.f32("hidden.final_norm") {
        let mut ours = Vec::new();
        decoder.final_states(&mut workspace, &mut ours).unwrap();
        let what = format!("{name} hidden.final_norm");
        assert_near(&what, &ours, &reference, 1e-4 * deviation(&reference));
        seen += 1;
    }
    assert!(seen > 0 || name == "bitnet-1bitllm", "{name} has no hidden states");
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
        let linear = backend.load_linear(&matrix, ActivationPrecision::Int8).unwrap();
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
    for name in TRAINED {
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
    let found = [
        ("bitnet-packed-TQ2_0", golden("gguf/bitnet-packed-TQ2_0.gguf")),
        ("tiny-trained-TQ2_0", shared_data("gguf/tiny-trained-TQ2_0.gguf")),
        ("tiny-trained-I2_S", shared_data("gguf/tiny-trained-I2_S.gguf")),
    ];
    for (name, path) in found {
        let Some(path) = path else { continue };
        check_model(name, path, cpu());
    }
}

#[test]
fn ternary_matrices_are_exactly_those_of_the_reference() {
    use sha2::{Digest, Sha256};
    for name in RANDOM.iter().chain(&TRAINED) {
        let Some(path) = model_path(name) else { continue };
        let golden = read_golden(name, &path);
        let checkpoint = source::open(path.to_str().unwrap()).unwrap();
        let Some(ternary) = golden.json["ternary"].as_object() else {
            assert_eq!(*name, "bitnet-1bitllm", "{name} has no ternary digests");
            continue;
        };
        for (tensor, facts) in ternary {
            let extent = |i: usize| facts["shape"][i].as_u64().unwrap() as usize;
            let (rows, cols) = (extent(0), extent(1));
            let matrix = weights::matrix_by_name(
                &path,
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
