//! BitNet b1.58 2B-4T and its fine-tunes: relu², norms before the output and down projections
//! (`modeling_bitnet.py` in transformers).

use bitnet_core::backend::Activation;

use super::{Architecture, apply_quantization, decoder};
use crate::config::{Hyperparameters, ModelConfig};
use crate::error::Error;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "BitNet b1.58",
    classes: &["BitNetForCausalLM"],
    model_type: "bitnet",
    // Uploads before 2025-04-23 are called `bitnet-25`.
    gguf: &["bitnet-b1.58", "bitnet-25"],
    describe,
};

fn describe(h: &Hyperparameters<'_>, notes: &mut Vec<String>) -> Result<ModelConfig, Error> {
    // GGUF files do not state the activation: the architecture's name means relu².
    let mut config = decoder(h, ARCHITECTURE.name, Activation::Relu2)?;
    config.sub_norms = true;
    if !apply_quantization(h, &mut config)? && !h.is_gguf() {
        notes.push(
            "config.json has no quantization_config: weights are taken as master weights and \
             ternarised, inputs as int8"
                .to_owned(),
        );
    }
    Ok(config)
}
