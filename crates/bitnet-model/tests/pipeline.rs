//! Decoders in several stages: the same bits as in one, wherever they are cut.

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use bitnet_core::backend::{Backend, KvType, Span};
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::Error;
use bitnet_model::decoder::{Decoder, Step};
use bitnet_model::source;
use bitnet_model::weights::{self, LoadOptions};
use bitnet_quant::reference::ReferenceBackend;
use bitnet_testing::{golden, tiny_model};
use support::{all_logits, load};

fn cpu() -> CpuBackend {
    // With a screen of the head, which is on the last stage.
    CpuBackend::new(CpuOptions { threads: Some(1), copies: true, ..CpuOptions::default() }).unwrap()
}

fn in_stages<B: Backend>(backends: Vec<B>, path: &Path) -> Result<Decoder<B>, Error> {
    let checkpoint = source::open(path.to_str().unwrap()).unwrap();
    weights::load_stages(
        backends,
        path,
        &checkpoint.description.config,
        &checkpoint.tensors,
        LoadOptions::default(),
        &mut Vec::new(),
        &mut |_| ControlFlow::Continue(()),
    )
}

fn check<B: Backend>(backend: impl Fn() -> B, path: &Path) {
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
    let whole = load(backend(), path);
    let expected = all_logits(&whole, &ids);
    let layers = whole.config().layers.len();
    for stages in 1..=layers.min(3) {
        let decoder = in_stages((0..stages).map(|_| backend()).collect(), path).unwrap();
        assert_eq!(decoder.stages().len(), stages);
        assert!(all_logits(&decoder, &ids) == expected, "{stages} stages of {}", path.display());
        let replica = decoder.replica().unwrap();
        drop(decoder);
        assert!(all_logits(&replica, &ids) == expected, "a replica of {}", path.display());
    }
}

#[test]
fn the_number_of_stages_changes_no_bit() {
    // Tied and untied heads; several kinds of rotation, and windows.
    let models = ["bitnet-1bitllm", "trilm", "gemma3-embedding"].map(|name| golden(name).unwrap());
    for path in models.iter().chain([&tiny_model()]) {
        check(cpu, path);
        check(|| ReferenceBackend, path);
    }
}

#[test]
fn blocks_are_copied_in_every_stage() {
    let decoder = in_stages(vec![cpu(), cpu()], &tiny_model()).unwrap();
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut workspace = decoder.workspace(16, 1).unwrap();
    let mut kv = decoder.kv_allocate(layout, 4).unwrap();
    let mut run = |kv: &mut _, tokens: &[u32], position, blocks: &[u32]| {
        let spans = [Span { rows: 0..tokens.len(), position, blocks }];
        decoder.forward(&Step { tokens, spans: &spans }, kv, &mut workspace).unwrap();
        let mut logits = Vec::new();
        decoder.logits(&mut workspace, &[tokens.len() - 1], &mut logits).unwrap();
        logits
    };
    run(&mut kv, &[5; 16], 0, &[0]);
    let expected = run(&mut kv, &[9], 16, &[0, 1]);
    // What one stage gives in one step.
    let ids = [&[5; 16][..], &[9]].concat();
    assert!(all_logits(&load(cpu(), &tiny_model()), &ids).pop().unwrap() == expected);
    decoder.kv_copy(&mut kv, &[(0, 2)]);
    assert!(run(&mut kv, &[9], 16, &[2, 3]) == expected);
    let mut other = decoder.kv_allocate(layout, 3).unwrap();
    decoder.kv_transfer(&kv, &mut other, &[2]).unwrap();
    assert!(run(&mut other, &[9], 16, &[2, 0]) == expected);
    assert!(run(&mut other, &[9], 16, &[1, 0]) != expected, "an empty block is another context");
}

#[test]
fn more_devices_than_layers_are_refused_and_so_are_none() {
    let path = tiny_model();
    let layers = load(ReferenceBackend, &path).config().layers.len();
    for devices in [0, layers + 1] {
        let error = in_stages(vec![ReferenceBackend; devices], &path).err().unwrap();
        assert!(matches!(error, Error::Devices { devices: d, .. } if d == devices), "{error}");
        assert!(error.to_string().contains(&format!("give 1 to {layers}")), "{error}");
    }
}

#[test]
fn progress_counts_all_tensors_and_can_end_the_loading() {
    let path = tiny_model();
    let checkpoint = source::open(path.to_str().unwrap()).unwrap();
    let config = &checkpoint.description.config;
    let run = |most_calls: usize| {
        let mut seen = Vec::new();
        let mut progress = |now| {
            seen.push(now);
            if seen.len() < most_calls { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let (options, notes) = (LoadOptions::default(), &mut Vec::new());
        let backends = vec![ReferenceBackend];
        let tensors = &checkpoint.tensors;
        let loaded =
            weights::load_stages(backends, &path, config, tensors, options, notes, &mut progress);
        (seen, loaded.map(|_| ()))
    };
    let (seen, loaded) = run(usize::MAX);
    loaded.unwrap();
    assert_eq!(seen.len(), config.layers.len() + 1, "one for each layer, and one for the end");
    assert!(seen.is_sorted_by_key(|now| (now.tensors, now.bytes)));
    let last = seen[seen.len() - 1];
    assert_eq!((last.tensors, last.bytes), (last.total_tensors, last.total_bytes));
    let in_layers = seen[config.layers.len() - 1];
    let outside = checkpoint.tensors.names().filter(|name| !name.contains("layers.")).count();
    assert_eq!(in_layers.tensors, last.tensors - outside);
    for calls in [1, config.layers.len() + 1] {
        let (seen, loaded) = run(calls);
        assert_eq!(seen.len(), calls);
        assert!(matches!(loaded, Err(Error::Cancelled { .. })));
    }
}
