//! The ways to load a model: the same tokens from each, and what each promises about the file.

use std::cell::Cell;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bitnet_inference::{
    Device, Error, GenerateOptions, GenerationParams, InferenceEngine, Model, ModelOptions,
    SamplingParams, SessionOptions, WeightBytes, generate,
};
use bitnet_model::convert::{self, Options, Target};
use bitnet_model::tokenizer::Special;
use bitnet_model::weights::least_bytes;
use bitnet_model::{Error as ModelError, source};
use bitnet_testing::{golden, tiny_model};

const PROMPT: &str = "Once upon a time";

fn params() -> GenerationParams {
    GenerationParams { max_tokens: 30, ..GenerationParams::default() }
}

/// What the built-in model gives.
fn expected() -> Vec<u32> {
    let mut engine = InferenceEngine::new();
    engine.load_model("tiny").unwrap();
    engine.generate(PROMPT, params()).wait().unwrap().tokens
}

fn tokens(engine: &InferenceEngine) -> Vec<u32> {
    engine.generate(PROMPT, params()).wait().unwrap().tokens
}

fn session_tokens(model: &Model) -> Vec<u32> {
    let prompt = model.tokenizer().encode(PROMPT, true, Special::Recognised).unwrap();
    let options = GenerateOptions {
        sampling: SamplingParams::default(),
        max_tokens: 30,
        stop: Vec::new(),
        end_ids: model.description().end_ids.clone(),
        constraint: None,
    };
    let mut session = model.session(SessionOptions::default()).unwrap();
    let show = |_: &str| ControlFlow::Continue(());
    generate(&mut session, model.tokenizer(), &prompt, &options, show).unwrap().tokens
}

/// The built-in model as a native file.
fn native(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.bitnet");
    let checkpoint = source::open("tiny").unwrap();
    let target = Target::Native { compact: true };
    convert::to(&checkpoint, &path, &target, Options::default(), |_, _| {}).unwrap();
    path
}

/// A copy of the built-in model's folder.
fn copy_of_tiny(folder: &Path) -> PathBuf {
    for file in fs::read_dir(tiny_model()).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    folder.to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn go_on<T>(_: T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn a_native_file_is_used_as_it_lies() {
    let folder = tempfile::tempdir().unwrap();
    let path = native(folder.path());
    let mut engine = InferenceEngine::new();
    engine.load_mmap(text(&path)).unwrap();
    let WeightBytes { mapped, own } = engine.model().unwrap().weight_bytes();
    let checkpoint = source::open(text(&path)).unwrap();
    let description = &checkpoint.description;
    let least = least_bytes(&path, &description.config, &checkpoint.tensors).unwrap();
    assert!((least..=fs::metadata(&path).unwrap().len()).contains(&mapped), "{mapped} {least}");
    assert!(own < mapped / 50, "norms and scales: {own}");
    drop(checkpoint);
    // A file that is gone is there as long as it is mapped.
    #[cfg(unix)]
    fs::remove_file(&path).unwrap();
    assert_eq!(tokens(&engine), expected());
}

#[test]
fn formats_that_are_laid_out_at_load_are_not_called_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = InferenceEngine::new();
    for model in ["tiny", text(&copy_of_tiny(folder.path())), text(&golden("trilm").unwrap())] {
        let error = engine.load_mmap(model).unwrap_err();
        assert!(matches!(error, Error::NotMapped { .. }), "{error}");
        assert!(error.to_string().contains("bitnet convert"), "{error}");
    }
    let options = &ModelOptions::default();
    // The embedding stays in the file, the matrices are laid out anew.
    let bytes = Model::open(text(folder.path()), options).unwrap().weight_bytes();
    assert!(bytes.mapped > 0 && bytes.own > bytes.mapped / 2, "{bytes:?}");
}

#[test]
fn a_streamed_model_needs_its_file_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = native(folder.path());
    let mapped = Model::open_mmap(text(&path), &ModelOptions::default()).unwrap().weight_bytes();
    let mut engine = InferenceEngine::new();
    // A cell, which no other thread could use.
    let calls = Cell::new(0);
    let count = |now: bitnet_inference::LoadProgress| {
        calls.set(calls.get() + 1);
        assert!(now.bytes <= now.total_bytes && now.tensors <= now.total_tensors);
        ControlFlow::Continue(())
    };
    engine.load_streaming(text(&path), count).unwrap();
    assert_eq!(calls.get(), 4 + 1, "four layers and the end");
    let bytes = engine.model().unwrap().weight_bytes();
    assert_eq!(bytes, WeightBytes { mapped: 0, own: mapped.total() });
    // Under a mapped model this would end the program.
    fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(tokens(&engine), expected());
}

#[test]
fn loading_can_be_cancelled_and_leaves_the_model_before() {
    let mut engine = InferenceEngine::new();
    engine.load_model("tiny").unwrap();
    let before: *const Model = engine.model().unwrap();
    let error = engine.load_streaming("tiny", |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, Error::Model(ModelError::Cancelled { .. })), "{error}");
    assert!(std::ptr::eq(engine.model().unwrap(), before));
    engine.load_streaming("tiny", go_on).unwrap();
    assert_eq!(tokens(&engine), expected());
}

#[test]
fn a_lazy_model_is_checked_now_and_loaded_once_by_whoever_needs_it() {
    let mut engine = InferenceEngine::new();
    assert!(engine.load_lazy("no such file").unwrap_err().to_string().contains("no such file"));
    let embedder = golden("qwen3-embedding").unwrap();
    assert!(matches!(engine.load_lazy(text(&embedder)), Err(Error::WrongKind(_))));
    assert!(matches!(engine.model(), Err(Error::NoModel)));

    engine.load_lazy("tiny").unwrap();
    let models: Vec<usize> = std::thread::scope(|scope| {
        let address = || std::ptr::from_ref(engine.model().unwrap()).addr();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(address)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(models.iter().all(|&model| model == models[0]), "{models:?}");
    assert_eq!(tokens(&engine), expected());
}

#[test]
fn errors_of_the_weights_come_with_the_request_and_the_next_one_tries_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = copy_of_tiny(folder.path());
    let weights = path.join("model.safetensors");
    let good = fs::read(&weights).unwrap();

    // A weight that is not a number, which only loading finds.
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&good[8..8 + header]).unwrap();
    let offset = json["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let mut bad = good.clone();
    bad[8 + header + offset..][..4].copy_from_slice(&[0xff; 4]);
    fs::write(&weights, &bad).unwrap();

    let mut engine = InferenceEngine::new();
    engine.load_lazy(text(&path)).unwrap();
    for _ in 0..2 {
        let error = engine.generate(PROMPT, params()).wait().unwrap_err().to_string();
        assert!(error.contains("model.norm.weight"), "{error}");
    }
    fs::write(&weights, &good).unwrap();
    assert_eq!(tokens(&engine), expected());
}

#[test]
fn a_pipeline_gives_the_tokens_of_one_device() {
    let expected = expected();
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    for devices in 1..=4 {
        let devices = vec![Device::Cpu; devices];
        let model = Model::open_distributed("tiny", &devices, &options).unwrap();
        assert_eq!(model.stages().len(), devices.len());
        assert_eq!(model.backend_name().matches("1 thread").count(), devices.len());
        assert_eq!(session_tokens(&model), expected);
        let mut engine = InferenceEngine::builder().threads(1).build().unwrap();
        engine.load_distributed("tiny", &devices).unwrap();
        assert_eq!(tokens(&engine), expected);
    }
}

#[test]
fn devices_that_cannot_be_had_are_refused() {
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    let open = |devices: &[Device], options: &ModelOptions| {
        Model::open_distributed("tiny", devices, options).err().expect("it is refused")
    };
    let error = open(&[Device::Cpu; 5], &options);
    let expected = "its 4 layers cannot be spread over 5 devices: give 1 to 4";
    assert!(error.to_string().contains(expected), "{error}");
    assert!(matches!(
        open(&[], &options),
        Error::Model(ModelError::Devices { devices: 0, layers: 4, .. })
    ));
    let error = open(&[Device::Cpu, Device::Gpu], &options).to_string();
    assert!(error.contains("device `gpu` is not available"), "{error}");
    assert!("tpu".parse::<Device>().unwrap_err().to_string().contains("unknown device `tpu`"));
    let pinned = ModelOptions { pinned: true, ..options };
    assert!(open(&[Device::Cpu; 2], &pinned).to_string().contains("pinned"));
}
