//! Any bytes as a `config.json`, described by its architecture.
#![no_main]

use std::path::Path;

use bitnet_model::arch;
use bitnet_model::config::Hyperparameters;
use bitnet_model::formats::Tensors;
use bitnet_model::weights;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(data) else { return };
    let tensors = Tensors::default();
    let h = Hyperparameters::from_json(Path::new("config.json"), &json, &tensors);
    for architecture in arch::ALL {
        if let Ok(config) = (architecture.describe)(&h, &mut Vec::new()) {
            let _ = weights::packed_bytes(&config);
        }
    }
});
