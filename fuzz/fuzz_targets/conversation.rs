//! Any bytes as a saved conversation of the built-in model, with a checksum that is right.
#![no_main]

use std::sync::LazyLock;
use std::{env, fs, process};

use bitnet_inference::{Engine, EngineOptions, Model, ModelOptions, Request, SamplingParams};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

static ENGINE: LazyLock<Engine> = LazyLock::new(|| {
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    let model = Model::open("tiny", &options).expect("it is built in");
    let options = EngineOptions { kv_bytes: 4_000_000, ..EngineOptions::default() };
    model.engine(options).expect("there is memory for it")
});

fuzz_target!(|data: &[u8]| {
    let body = &data[..data.len().saturating_sub(32)];
    let path = env::temp_dir().join(format!("bitnet-fuzz-{}.kv", process::id()));
    let bytes = [body, Sha256::digest(body).as_slice()].concat();
    fs::write(&path, bytes).expect("a temporary file");
    if let Ok(tokens) = ENGINE.restore(&path)
        && let Ok(mut stream) =
            ENGINE.submit(Request::new(tokens, SamplingParams::default(), 2))
    {
        while stream.next().is_some() {}
    }
});
