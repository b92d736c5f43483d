//! Any bytes as a GGUF file; every metadata value is read as every kind.
#![no_main]

use std::path::Path;

use bitnet_model::formats::gguf;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = gguf::from_bytes(Bytes::copy_from_slice(data), Path::new("m.gguf")) else {
        return;
    };
    for name in file.tensors.names() {
        let _ = file.tensors.get(name);
    }
    for key in file.metadata.keys() {
        let _ = file.metadata.get::<u64>(key);
        let _ = file.metadata.get::<u32>(key);
        let _ = file.metadata.get::<i64>(key);
        let _ = file.metadata.get::<f32>(key);
        let _ = file.metadata.get::<bool>(key);
        let _ = file.metadata.get::<&str>(key);
        let _ = file.metadata.get::<Vec<&str>>(key);
        let _ = file.metadata.get::<Vec<i64>>(key);
        let _ = file.metadata.get::<Vec<f32>>(key);
    }
});
