//! Qwen3-form ternary models: Ternary-Bonsai (scales per group of weights, inputs left in f32) and
//! the backbone of Microsoft's BitNet-embedding 0.6B (a norm before each projection, int8 inputs).
//! Query and key heads are normed one by one.

use bitnet_core::backend::{Activation, ActivationPrecision};
use serde_json::Value;

use super::{Architecture, apply_quantization, decoder};
use crate::config::{
    Hyperparameters, Key, ModelConfig, Pooling, Precision, TensorNames, WeightRule,
};
use crate::error::Error;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "Qwen3",
    classes: &["Qwen3ForCausalLM", "Qwen3Model"],
    model_type: "qwen3",
    gguf: &["qwen3"],
    describe,
};

fn describe(h: &Hyperparameters<'_>, _notes: &mut Vec<String>) -> Result<ModelConfig, Error> {
    let mut config = decoder(h, ARCHITECTURE.name, Activation::Silu)?;
    config.head_norms = true;
    const WINDOW: Key = Key("use_sliding_window", "");
    if h.json().and_then(|json| json.get(WINDOW.0)) == Some(&Value::Bool(true)) {
        return Err(h.error(WINDOW, "is true: Qwen3 is supported without a window only"));
    }
    embedding_backbone(h, &mut config)?;
    if config.projection_norm_eps.is_none() {
        if h.is_gguf() {
            config.weights = WeightRule::Exact;
            config.precision = Precision::ByScale;
        } else if !apply_quantization(h, &mut config)? {
            config.weights = WeightRule::Exact;
            config.precision = Precision::Known(ActivationPrecision::F32);
        }
    }
    Ok(config)
}

/// Recognises Microsoft's BitNet-embedding models by the norms before their projections, and sets
/// what only these have: master weights, and pooling into one vector.
pub(super) fn embedding_backbone(
    h: &Hyperparameters<'_>,
    config: &mut ModelConfig,
) -> Result<(), Error> {
    let backbone = if h.is_gguf() {
        h.has_tensor("blk.0.attn_q_norm_in.weight")
    } else {
        h.has_tensor("layers.0.self_attn.q_proj.norm.weight")
            || h.has_tensor("model.layers.0.self_attn.q_proj.norm.weight")
    };
    if !backbone {
        return Ok(());
    }
    // The converter of bitnet.cpp and its graph use the model's own epsilon for these norms.
    config.projection_norm_eps = Some(config.norm_eps);
    if !h.is_gguf() {
        config.names = TensorNames { projection_norm: ".norm", ..config.names };
    }
    const POOLING: Key = Key("", "pooling_type");
    config.pooling = match h.optional_size(POOLING)? {
        // The model card of the family: the last token's state.
        None | Some(3) => Some(Pooling::Last),
        Some(1) => Some(Pooling::Mean),
        Some(other) => {
            return Err(h.error(
                POOLING,
                format!("is {other}: only 1 (mean) and 3 (last token) are supported"),
            ));
        }
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::formats::Tensors;

    #[test]
    fn a_window_is_refused() {
        for (windowed, refused) in [(false, false), (true, true)] {
            let config = serde_json::json!({
                "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0, "hidden_act": "silu", "use_sliding_window": windowed,
            });
            let tensors = Tensors::default();
            let h = Hyperparameters::from_json(Path::new("config.json"), &config, &tensors);
            let error = describe(&h, &mut Vec::new()).err().map(|error| error.to_string());
            assert_eq!(error.is_some_and(|e| e.contains("use_sliding_window")), refused);
        }
    }
}
