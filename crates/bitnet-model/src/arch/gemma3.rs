//! Gemma3-form ternary models: the backbone of Microsoft's BitNet-embedding 270M. Norm weights are
//! stored as `w - 1`, results are normed before they are added, the embedding is scaled by the
//! square root of the hidden size, and most layers see a window with a rotary base of their own
//! (`modeling_gemma3.py` in transformers).

use bitnet_core::backend::Activation;
use serde_json::Value;

use super::{Architecture, decoder, inverse_root, qwen3::embedding_backbone, rope_of};
use crate::config::{
    Hyperparameters, Key, LayerConfig, ModelConfig, Rope, RopeScaling, TensorNames,
};
use crate::error::Error;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "Gemma3",
    classes: &["Gemma3TextModel", "Gemma3ForCausalLM"],
    gguf: &["gemma3"],
    describe,
};

/// Rotation of the layers with a window: the default of `Gemma3TextConfig`.
const LOCAL_ROPE: Rope = Rope { theta: 10_000.0, scaling: RopeScaling::None };

fn describe(h: &Hyperparameters<'_>, notes: &mut Vec<String>) -> Result<ModelConfig, Error> {
    let mut config = decoder(h, ARCHITECTURE.name, Activation::GeluTanh)?;
    config.head_norms = true;
    config.post_norms = true;
    config.norm_offset = 1.0;
    config.embedding_scale = (config.hidden_size as f64).sqrt() as f32;
    if !h.is_gguf() {
        config.names = TensorNames {
            post_attention_norm: "post_attention_layernorm",
            ffn_norm: "pre_feedforward_layernorm",
            post_ffn_norm: "post_feedforward_layernorm",
            ..TensorNames::HUGGING_FACE
        };
    }
    embedding_backbone(h, &mut config)?;
    if config.projection_norm_eps.is_none() {
        return Err(Error::file(
            h.path,
            "this Gemma3 has no norms before its projections: only the BitNet-embedding form of \
             Gemma3 is ternary",
        ));
    }
    if h.is_gguf() {
        notes.push(
            "the file stores Gemma norms as `w - 1` (its converter leaves them as they are): 1 is \
             added"
                .to_owned(),
        );
        if let Some(window) = h.optional_size(Key("", "attention.sliding_window"))? {
            // llama.cpp's rule for this architecture: every sixth layer sees everything.
            for (index, layer) in config.layers.iter_mut().enumerate() {
                if index % 6 != 5 {
                    *layer = LayerConfig { rope: 1, window: Some(window) };
                }
            }
            config.ropes.push(LOCAL_ROPE);
        }
        return Ok(config);
    }
    if let Some(scalar) = h.optional_size(Key("query_pre_attn_scalar", ""))? {
        config.attention_scale = inverse_root(scalar);
    }
    windows(h, &mut config)?;
    Ok(config)
}

/// Sets the window and the rotary base of the layers that `layer_types` calls sliding.
fn windows(h: &Hyperparameters<'_>, config: &mut ModelConfig) -> Result<(), Error> {
    const TYPES: Key = Key("layer_types", "");
    let Some(types) = h.json().and_then(|json| json.get("layer_types")).and_then(Value::as_array)
    else {
        return Ok(());
    };
    if types.len() != config.layers.len() {
        return Err(h.error(
            TYPES,
            format!("has {} entries for {} layers", types.len(), config.layers.len()),
        ));
    }
    for (layer, kind) in config.layers.iter_mut().zip(types) {
        *layer = match kind.as_str() {
            Some("full_attention") => LayerConfig { rope: 0, window: None },
            Some("sliding_attention") => {
                LayerConfig { rope: 1, window: Some(h.size(Key("sliding_window", ""))?) }
            }
            _ => {
                return Err(h.error(
                    TYPES,
                    format!("holds {kind}: only full_attention and sliding_attention exist"),
                ));
            }
        };
    }
    let nested = h.json().and_then(|json| json.get("rope_parameters")?.get("sliding_attention"));
    config.ropes.push(match (nested, h.optional_float(Key("rope_local_base_freq", ""))?) {
        (Some(parameters), _) => rope_of(h, parameters)?,
        (None, Some(theta)) => Rope { theta, scaling: RopeScaling::None },
        (None, None) => LOCAL_ROPE,
    });
    Ok(())
}
