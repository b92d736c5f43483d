//! Any bytes as an ONNX file, whose weights are then asked for: many are made only then.
#![no_main]

use std::path::Path;

use bitnet_model::formats::{Tensors, onnx};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut tensors = Tensors::default();
    // No folder has external data for it.
    let path = Path::new("absent/m.onnx");
    if onnx::from_bytes(data.to_vec().into(), path, &mut tensors).is_ok() {
        for name in tensors.names() {
            let _ = tensors.get(name);
        }
    }
});
