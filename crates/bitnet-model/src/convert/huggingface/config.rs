//! `config.json` of a model.

use bitnet_core::backend::{Activation, ActivationPrecision};
use serde_json::{Map, Value, json};

use super::super::{Source, holds};
use crate::config::{Rope, RopeScaling};

/// A number as its shortest text, not with the digits that widening adds.
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().expect("a number as text").into()
}

fn rope_scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => {
            json!({"rope_type": "linear", "factor": number(factor)})
        }
        RopeScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3",
            "factor": number(factor),
            "low_freq_factor": number(low),
            "high_freq_factor": number(high),
            "original_max_position_embeddings": original_context as u64,
        }),
    }
}

/// The file without the type of its weights, which is known when they are written. `divides` says
/// how the scales of packed weights are applied; master weights have none.
pub(in crate::convert) fn config(
    source: &Source<'_>,
    packed: bool,
    divides: bool,
) -> Map<String, Value> {
    let c = &source.config;
    let architecture = holds::architecture(c);
    // Embedding models are called after the decoder alone.
    let ending = if c.pooling.is_some() { "Model" } else { "ForCausalLM" };
    let class = architecture.classes.iter().find(|class| class.ends_with(ending));
    let (activation_key, activation) = match c.activation {
        Activation::Relu2 => ("hidden_act", "relu2"),
        Activation::Silu => ("hidden_act", "silu"),
        Activation::GeluTanh => ("hidden_activation", "gelu_pytorch_tanh"),
    };
    let end_ids = &source.description.end_ids;
    let mut json = json!({
        "architectures": [class.unwrap_or(&architecture.classes[0])],
        "model_type": architecture.model_type,
        "vocab_size": source.tables.embedding.rows(),
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers.len(),
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": number(c.norm_eps),
        "rope_theta": number(c.ropes[0].theta),
        "rope_scaling": rope_scaling(c.ropes[0].scaling),
        "tie_word_embeddings": source.tables.head.is_none(),
        "attention_bias": false,
        "attention_dropout": 0.0,
        "use_cache": true,
        "bos_token_id": source.description.tokenizer.bos(),
        "eos_token_id": end_ids,
    });
    let Value::Object(json) = &mut json else { unreachable!("it is written as one above") };
    let mut put = |key: &str, value: Value| json.insert(key.to_owned(), value);
    put(activation_key, activation.into());
    if let [_, Rope { theta, .. }, ..] = c.ropes[..] {
        put("rope_local_base_freq", number(theta));
    }
    if let Some(window) = c.layers.iter().find_map(|layer| layer.window) {
        let types = c.layers.iter().map(|layer| match layer.window {
            Some(_) => "sliding_attention",
            None => "full_attention",
        });
        put("layer_types", types.collect());
        put("sliding_window", window.into());
        // The scale of attention is the inverse root of it.
        let scalar = (1.0 / f64::from(c.attention_scale).powi(2)).round();
        put("query_pre_attn_scalar", (scalar as u64).into());
    }
    if source.precision == ActivationPrecision::Int8 && c.pooling.is_none() {
        let mut quantization = json!({
            "quant_method": "bitnet",
            "linear_class": if divides { "bitlinear" } else { "autobitlinear" },
            "quantization_mode": if packed { "offline" } else { "online" },
        });
        if let Some(eps) = c.projection_norm_eps {
            quantization["use_rms_norm"] = true.into();
            quantization["rms_norm_eps"] = number(eps);
        }
        put("quantization_config", quantization);
    }
    std::mem::take(json)
}
