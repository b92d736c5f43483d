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
    model_type: "gemma3_text",
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
    if h.json().and_then(|json| json.get("use_bidirectional_attention")) == Some(&Value::Bool(true))
    {
        return Err(h.error(
            Key("use_bidirectional_attention", ""),
            "is true: only causal attention is supported",
        ));
    }
    if let Some(scalar) = h.optional_size(Key("query_pre_attn_scalar", ""))? {
        config.attention_scale = inverse_root(scalar);
    }
    windows(h, &mut config)?;
    Ok(config)
}

/// Sets the window and the rotary base of the sliding layers: those that `layer_types` calls so or,
/// in older files, all but every `sliding_window_pattern`-th. Defaults are those of
/// `Gemma3TextConfig`, which a file need not repeat.
fn windows(h: &Hyperparameters<'_>, config: &mut ModelConfig) -> Result<(), Error> {
    const TYPES: Key = Key("layer_types", "");
    let window = h.optional_size(Key("sliding_window", ""))?.unwrap_or(4096);
    let sliding = LayerConfig { rope: 1, window: Some(window) };
    match h.json().and_then(|json| json.get("layer_types")).and_then(Value::as_array) {
        None => {
            let pattern = h.optional_size(Key("sliding_window_pattern", ""))?.unwrap_or(6);
            for (index, layer) in config.layers.iter_mut().enumerate() {
                if !(index + 1).is_multiple_of(pattern) {
                    *layer = sliding;
                }
            }
        }
        Some(types) if types.len() != config.layers.len() => {
            return Err(h.error(
                TYPES,
                format!("has {} entries for {} layers", types.len(), config.layers.len()),
            ));
        }
        Some(types) => {
            for (layer, kind) in config.layers.iter_mut().zip(types) {
                match kind.as_str() {
                    Some("full_attention") => {}
                    Some("sliding_attention") => *layer = sliding,
                    _ => {
                        return Err(h.error(
                            TYPES,
                            format!(
                                "holds {kind}: only full_attention and sliding_attention exist"
                            ),
                        ));
                    }
                }
            }
        }
    }
    let nested = h.json().and_then(|json| json.get("rope_parameters")?.get("sliding_attention"));
    config.ropes.push(match (nested, h.optional_float(Key("rope_local_base_freq", ""))?) {
        (Some(parameters), _) => rope_of(h, parameters)?,
        (None, Some(theta)) => Rope { theta, scaling: RopeScaling::None },
        (None, None) => LOCAL_ROPE,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bitnet_core::Tensor;

    use super::*;
    use crate::formats::Tensors;

    fn gemma(extra: &str) -> Result<ModelConfig, Error> {
        let text = format!(
            r#"{{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
                "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0, "hidden_activation": "gelu_pytorch_tanh" {extra}}}"#
        );
        let config: Value = serde_json::from_str(&text).unwrap();
        let path = Path::new("config.json");
        let mut tensors = Tensors::default();
        let name = "layers.0.self_attn.q_proj.norm.weight".to_owned();
        tensors.insert(path, name, Ok(Tensor::from_f32(vec![1], &[1.0]))).unwrap();
        describe(&Hyperparameters::from_json(path, &config, &tensors), &mut Vec::new())
    }

    #[test]
    fn files_without_layer_types_have_a_full_layer_at_every_turn_of_the_pattern() {
        let extra = r#", "sliding_window": 8, "sliding_window_pattern": 2"#;
        let layers = gemma(extra).unwrap().layers;
        let sliding = LayerConfig { rope: 1, window: Some(8) };
        let full = LayerConfig { rope: 0, window: None };
        assert_eq!(layers, [sliding, full, sliding, full]);
        let by_default = LayerConfig { rope: 1, window: Some(4096) };
        assert_eq!(gemma("").unwrap().layers, [by_default; 4]);
    }

    #[test]
    fn newer_files_give_both_rotations_in_rope_parameters() {
        let older = gemma(r#", "rope_local_base_freq": 20000.0"#).unwrap();
        let newer = gemma(
            r#", "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}"#,
        )
        .unwrap();
        assert_eq!(newer, older);
        assert_eq!(older.ropes.iter().map(|r| r.theta).collect::<Vec<_>>(), [1e6, 2e4]);
    }

    #[test]
    fn attention_that_is_not_plain_is_refused() {
        for (extra, word) in [
            (r#", "use_bidirectional_attention": true"#, "causal"),
            (r#", "attn_logit_softcapping": 50.0"#, "soft-capped"),
            (r#", "final_logit_softcapping": 30.0"#, "a soft cap on logits"),
            (r#", "layer_types": ["full_attention"]"#, "1 entries for 4 layers"),
        ] {
            let error = gemma(extra).unwrap_err().to_string();
            assert!(error.contains(word), "{extra}: {error}");
        }
    }
}
