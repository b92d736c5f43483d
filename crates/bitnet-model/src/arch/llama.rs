//! Llama-form ternary models: Llama3-8B-1.58, Falcon3 and Falcon-E (BitNet quantisation in a plain
//! Llama), and TriLM (weights that are ternary already, inputs left in f32).

use bitnet_core::backend::{Activation, ActivationPrecision};

use super::{Architecture, apply_quantization, decoder};
use crate::config::{Hyperparameters, ModelConfig, Precision, WeightRule};
use crate::error::Error;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "Llama",
    classes: &["LlamaForCausalLM"],
    model_type: "llama",
    gguf: &["llama"],
    describe,
};

fn describe(h: &Hyperparameters<'_>, _notes: &mut Vec<String>) -> Result<ModelConfig, Error> {
    let mut config = decoder(h, ARCHITECTURE.name, Activation::Silu)?;
    if h.is_gguf() {
        config.interleaved_rope_rows = true;
        config.weights = WeightRule::Exact;
        config.precision = Precision::ByScale;
    } else if !apply_quantization(h, &mut config)? {
        config.weights = WeightRule::Exact;
        config.precision = Precision::Known(ActivationPrecision::F32);
    }
    Ok(config)
}
