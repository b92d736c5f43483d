//! Any bytes as a safetensors file.
#![no_main]

use std::path::Path;

use bitnet_model::formats::{Tensors, safetensors};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = Path::new("m.safetensors");
    let mut tensors = Tensors::default();
    if safetensors::from_bytes(Bytes::copy_from_slice(data), path, &mut tensors).is_ok() {
        safetensors::metadata(data, path).expect("the header was read a moment ago");
        for name in tensors.names() {
            let _ = tensors.get(name);
        }
    }
});
