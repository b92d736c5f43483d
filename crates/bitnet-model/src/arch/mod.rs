//! Architectures: one file each, which turns hyper-parameters into a [`ModelConfig`].
//!
//! To add one, write a file with an [`Architecture`] and add it to [`ALL`].

mod bitnet;
mod bitnet_1bitllm;
mod gemma3;
mod llama;
mod qwen3;

use bitnet_core::backend::{Activation, ActivationPrecision};
use serde_json::Value;

use crate::config::{
    Hyperparameters, Key, LayerConfig, ModelConfig, Precision, Rope, RopeScaling, TensorNames,
    WeightRule,
};
use crate::error::Error;

/// A family of models that one description covers.
#[derive(Debug)]
pub struct Architecture {
    /// Name for people.
    pub name: &'static str,
    /// Its names in the `architectures` field of `config.json`.
    pub classes: &'static [&'static str],
    /// What `model_type` of `config.json` is for it.
    pub model_type: &'static str,
    /// Its names in `general.architecture` of GGUF files.
    pub gguf: &'static [&'static str],
    /// Makes the description. Facts that the file gets wrong or leaves out are corrected, with a
    /// note for people.
    pub describe: fn(&Hyperparameters<'_>, &mut Vec<String>) -> Result<ModelConfig, Error>,
}

/// Every architecture there is.
pub const ALL: &[&Architecture] = &[
    &bitnet::ARCHITECTURE,
    &bitnet_1bitllm::ARCHITECTURE,
    &llama::ARCHITECTURE,
    &qwen3::ARCHITECTURE,
    &gemma3::ARCHITECTURE,
];

/// The architecture of a `config.json`.
pub fn for_class(class: &str) -> Option<&'static Architecture> {
    ALL.iter().copied().find(|architecture| architecture.classes.contains(&class))
}

/// The architecture of a GGUF file.
pub fn for_gguf(name: &str) -> Option<&'static Architecture> {
    ALL.iter().copied().find(|architecture| architecture.gguf.contains(&name))
}

/// Every name under which an architecture is known, for error messages.
pub fn known_names() -> String {
    let names: Vec<&str> =
        ALL.iter().flat_map(|a| a.classes.iter().chain(a.gguf)).copied().collect();
    names.join(", ")
}

/// Widest rows and most layers of a description. Sizes and memory needs made of extents below these
/// fit 64 bits.
pub(crate) const WIDEST: usize = 1 << 24;
pub(crate) const MOST_LAYERS: usize = 1000;

/// What all these models share: a pre-norm Llama decoder with plain causal attention.
fn decoder(
    h: &Hyperparameters<'_>,
    architecture: &'static str,
    activation: Activation,
) -> Result<ModelConfig, Error> {
    const HEADS: Key = Key("num_attention_heads", "attention.head_count");
    const KV_HEADS: Key = Key("num_key_value_heads", "attention.head_count_kv");
    const HEAD_SIZE: Key = Key("head_dim", "attention.key_length");
    const HIDDEN: Key = Key("hidden_size", "embedding_length");
    const LAYERS: Key = Key("num_hidden_layers", "block_count");
    const INTERMEDIATE: Key = Key("intermediate_size", "feed_forward_length");

    let hidden_size = h.size(HIDDEN)?;
    let heads = h.size(HEADS)?;
    let kv_heads = h.optional_size(KV_HEADS)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(
            h.error(KV_HEADS, format!("is {kv_heads}, which does not divide {heads} heads"))
        );
    }
    let head_size = match h.optional_size(HEAD_SIZE)? {
        Some(size) => size,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(h.error(HEADS, format!("is {heads}, which does not divide {hidden_size}")));
        }
    };
    if !head_size.is_multiple_of(2) {
        return Err(h.error(HEAD_SIZE, format!("is {head_size}: rotation needs an even head size")));
    }
    let rotated = h.optional_size(Key("", "rope.dimension_count"))?;
    if rotated.is_some_and(|rotated| rotated != head_size) {
        return Err(h.error(
            Key("", "rope.dimension_count"),
            format!("differs from the head size {head_size}: partial rotation is not supported"),
        ));
    }
    let layers = h.size(LAYERS)?;
    if layers > MOST_LAYERS {
        return Err(h.error(LAYERS, format!("is {layers}: no model has that many layers")));
    }
    let intermediate_size = h.size(INTERMEDIATE)?;
    for (key, width) in
        [(HIDDEN, hidden_size), (INTERMEDIATE, intermediate_size), (HEADS, heads * head_size)]
    {
        if width > WIDEST {
            return Err(h.error(key, format!("makes rows of {width}: no model is that wide")));
        }
    }
    let attention_scale = inverse_root(head_size);
    refuse_unsupported(h, attention_scale)?;
    Ok(ModelConfig {
        architecture,
        hidden_size,
        intermediate_size,
        heads,
        kv_heads,
        head_size,
        context_length: h.size(Key("max_position_embeddings", "context_length"))?,
        vocab_size: h.optional_size(Key("vocab_size", "vocab_size"))?,
        tied: match h.is_gguf() {
            true => None,
            false => h.optional_bool(Key("tie_word_embeddings", ""))?,
        },
        norm_eps: h.float(Key("rms_norm_eps", "attention.layer_norm_rms_epsilon"))?,
        norm_offset: 0.0,
        activation: stated_activation(h)?.unwrap_or(activation),
        precision: Precision::Known(ActivationPrecision::Int8),
        embedding_scale: 1.0,
        attention_scale,
        ropes: vec![rope(h)?],
        layers: vec![LayerConfig { rope: 0, window: None }; layers],
        sub_norms: false,
        head_norms: false,
        post_norms: false,
        projection_norm_eps: None,
        weights: WeightRule::Multiply,
        interleaved_rope_rows: false,
        names: if h.is_gguf() { TensorNames::GGUF } else { TensorNames::HUGGING_FACE },
        pooling: None,
    })
}

/// Settings that change the result and that nothing here computes: each must be absent or have the
/// value that changes nothing.
fn refuse_unsupported(h: &Hyperparameters<'_>, attention_scale: f32) -> Result<(), Error> {
    let numbers = [
        (Key("partial_rotary_factor", ""), 1.0, "partial rotation"),
        (Key("attn_logit_softcapping", "attn_logit_softcapping"), 0.0, "soft-capped attention"),
        (Key("final_logit_softcapping", "final_logit_softcapping"), 0.0, "a soft cap on logits"),
        (Key("", "attention.scale"), attention_scale, "another scale of attention"),
        (Key("", "logit_scale"), 1.0, "a factor on logits"),
    ];
    for (key, neutral, what) in numbers {
        if let Some(value) = h.number(key)?
            && value as f32 != neutral
        {
            return Err(h.error(key, format!("is {value}: {what} is not supported")));
        }
    }
    for bias in [Key("attention_bias", ""), Key("mlp_bias", "")] {
        if h.optional_bool(bias)? == Some(true) {
            return Err(h.error(bias, "is true: biases are not supported"));
        }
    }
    const CAUSAL: Key = Key("is_causal", "attention.causal");
    if h.optional_bool(CAUSAL)? == Some(false) {
        return Err(h.error(CAUSAL, "is false: only causal attention is supported"));
    }
    Ok(())
}

/// `1 / sqrt(size)`, rounded once.
fn inverse_root(size: usize) -> f32 {
    (1.0 / (size as f64).sqrt()) as f32
}

/// The activation that `config.json` names; GGUF files name none.
fn stated_activation(h: &Hyperparameters<'_>) -> Result<Option<Activation>, Error> {
    for key in [Key("hidden_act", ""), Key("hidden_activation", "")] {
        if h.is_gguf() {
            break;
        }
        return match h.optional_text(key)? {
            None => continue,
            Some("relu2") => Ok(Some(Activation::Relu2)),
            Some("silu" | "swish") => Ok(Some(Activation::Silu)),
            Some("gelu_pytorch_tanh") => Ok(Some(Activation::GeluTanh)),
            Some(other) => Err(h.error(
                key,
                format!("is `{other}`: only relu2, silu and gelu_pytorch_tanh are supported"),
            )),
        };
    }
    Ok(None)
}

/// Rotary embedding from `rope_theta` and `rope_scaling`, the newer `rope_parameters`, or GGUF's
/// `rope.*` keys.
fn rope(h: &Hyperparameters<'_>) -> Result<Rope, Error> {
    let Some(config) = h.json() else {
        let theta = h.float(Key("", "rope.freq_base"))?;
        const FACTOR: Key = Key("", "rope.scaling.factor");
        let scaling = match h.optional_text(Key("", "rope.scaling.type"))? {
            Some("none") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: h.float(FACTOR)? },
            Some(other) => return Err(unsupported_scaling(h, other)),
            // A factor alone means linear scaling (llama.cpp's default), also under its older name.
            None => {
                let older = h.optional_float(Key("", "rope.scale_linear"))?;
                h.optional_float(FACTOR)?
                    .or(older)
                    .map_or(RopeScaling::None, |factor| RopeScaling::Linear { factor })
            }
        };
        return Ok(Rope { theta, scaling });
    };
    match config.get("rope_parameters") {
        // Gemma3 has one set for each kind of layer.
        Some(parameters @ Value::Object(_)) => {
            rope_of(h, parameters.get("full_attention").unwrap_or(parameters))
        }
        _ => {
            let theta = h.float(Key("rope_theta", ""))?;
            let scaling = match config.get("rope_scaling") {
                None | Some(Value::Null) => RopeScaling::None,
                Some(scaling) => rope_scaling(h, scaling)?,
            };
            Ok(Rope { theta, scaling })
        }
    }
}

/// Rotary embedding from one object in the newer style, base and scaling together.
fn rope_of(h: &Hyperparameters<'_>, parameters: &Value) -> Result<Rope, Error> {
    let theta = h.nested(parameters).float(Key("rope_theta", ""))?;
    Ok(Rope { theta, scaling: rope_scaling(h, parameters)? })
}

fn rope_scaling(h: &Hyperparameters<'_>, scaling: &Value) -> Result<RopeScaling, Error> {
    let inner = h.nested(scaling);
    let kind = match inner.optional_text(Key("rope_type", ""))? {
        Some(kind) => Some(kind),
        None => inner.optional_text(Key("type", ""))?,
    };
    match kind {
        None if !scaling.is_object() || scaling.get("factor").is_some() => Err(h.error(
            Key("rope_scaling", ""),
            format!("is {scaling}: it must be an object with a `rope_type`"),
        )),
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: inner.float(Key("factor", ""))? }),
        Some("llama3") => {
            const HIGH: Key = Key("high_freq_factor", "");
            let (low, high) = (inner.float(Key("low_freq_factor", ""))?, inner.float(HIGH)?);
            if high <= low {
                return Err(h.error(HIGH, format!("is {high}: it must exceed low_freq_factor")));
            }
            Ok(RopeScaling::Llama3 {
                factor: inner.float(Key("factor", ""))?,
                low,
                high,
                original_context: inner.float(Key("original_max_position_embeddings", ""))?,
            })
        }
        Some(other) => Err(unsupported_scaling(h, other)),
    }
}

fn unsupported_scaling(h: &Hyperparameters<'_>, kind: &str) -> Error {
    h.error(
        Key("rope_scaling", "rope.scaling.type"),
        format!("is `{kind}`: only default, linear and llama3 scaling are supported"),
    )
}

/// Applies `quantization_config` of transformers' BitNet integration
/// (`BitNetQuantConfig` in `utils/quantization_config.py`). Returns whether there is one.
fn apply_quantization(h: &Hyperparameters<'_>, config: &mut ModelConfig) -> Result<bool, Error> {
    const FIELD: Key = Key("quantization_config", "");
    let Some(quantization) = h.json().and_then(|json| json.get("quantization_config")) else {
        return Ok(false);
    };
    if quantization.is_null() {
        return Ok(false);
    }
    let inner = h.nested(quantization);
    match inner.optional_text(Key("quant_method", ""))? {
        Some("bitnet") => {}
        other => {
            return Err(h.error(
                FIELD,
                format!("has quant_method `{}`: only `bitnet` is ternary", other.unwrap_or("")),
            ));
        }
    }
    config.weights = match inner.optional_text(Key("linear_class", ""))? {
        Some("autobitlinear") => WeightRule::Multiply,
        None | Some("bitlinear") => WeightRule::Divide,
        Some(other) => {
            return Err(h.error(
                FIELD,
                format!("has linear_class `{other}`: only bitlinear and autobitlinear exist"),
            ));
        }
    };
    if let Some(modules) = quantization.get("modules_to_not_convert").filter(|m| !m.is_null()) {
        // Anything but a list is shown as it is.
        for module in modules.as_array().map_or(std::slice::from_ref(modules), Vec::as_slice) {
            if !matches!(module.as_str(), Some("lm_head" | "embed_tokens" | "model.embed_tokens")) {
                return Err(h.error(
                    FIELD,
                    format!("leaves {module} unquantised: only lm_head may be left out"),
                ));
            }
        }
    }
    if quantization.get("use_rms_norm") == Some(&Value::Bool(true)) {
        let eps = inner.optional_float(Key("rms_norm_eps", ""))?;
        // The default of `BitNetQuantConfig`, which transformers leaves out of the file.
        config.projection_norm_eps = Some(eps.unwrap_or(1e-6));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Tensors;
    use std::path::Path;

    fn llama(extra: &str) -> Result<ModelConfig, Error> {
        let text = format!(
            r#"{{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0, "hidden_act": "silu" {extra}}}"#
        );
        let config: Value = serde_json::from_str(&text).unwrap();
        let tensors = Tensors::default();
        let h = Hyperparameters::from_json(Path::new("config.json"), &config, &tensors);
        (llama::ARCHITECTURE.describe)(&h, &mut Vec::new())
    }

    #[test]
    fn head_size_falls_back_to_the_quotient_and_kv_heads_to_heads() {
        let config = llama("").unwrap();
        assert_eq!((config.head_size, config.kv_heads), (16, 4));
        assert_eq!(config.attention_scale, 0.25);
    }

    #[test]
    fn a_missing_hyper_parameter_is_named() {
        let text = r#"{"hidden_size": 64, "num_attention_heads": 4}"#;
        let config: Value = serde_json::from_str(text).unwrap();
        let tensors = Tensors::default();
        let h = Hyperparameters::from_json(Path::new("config.json"), &config, &tensors);
        let error = (llama::ARCHITECTURE.describe)(&h, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("`num_hidden_layers` is missing"), "{error}");
    }

    #[test]
    fn settings_that_are_not_supported_are_refused() {
        for (extra, word) in [
            (r#", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#, "yarn"),
            (r#", "quantization_config": {"quant_method": "gptq"}"#, "gptq"),
            (r#", "attention_bias": true"#, "attention_bias"),
            (r#", "num_key_value_heads": 3"#, "3"),
            (r#", "head_dim": 15"#, "even"),
            (r#", "rope_scaling": {"factor": 4.0}"#, "rope_type"),
            (r#", "rope_scaling": "linear""#, "rope_type"),
            (r#", "partial_rotary_factor": 0.5"#, "partial rotation"),
            (r#", "is_causal": false"#, "causal"),
            (
                r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
                "must exceed",
            ),
            (
                r#", "quantization_config": {"quant_method": "bitnet",
                "modules_to_not_convert": "model.layers.0"}"#,
                "layers.0",
            ),
            (r#", "head_dim": 2147483646"#, "no model is that wide"),
            (
                r#", "quantization_config": {"quant_method": "bitnet",
                "modules_to_not_convert": ["model.layers.0"]}"#,
                "layers.0",
            ),
        ] {
            let error = llama(extra).unwrap_err().to_string();
            assert!(error.contains(word), "{extra}: {error}");
        }
    }

    /// A GGUF file of nothing but metadata that describes a small Llama, and what is added to it.
    fn llama_gguf(added: &[(&str, Added<'_>)]) -> Result<ModelConfig, Error> {
        let sizes = [
            ("embedding_length", 64),
            ("feed_forward_length", 96),
            ("block_count", 2),
            ("attention.head_count", 4),
            ("context_length", 128),
        ];
        let floats = [("attention.layer_norm_rms_epsilon", 1e-5), ("rope.freq_base", 10_000.0)];
        let entries: Vec<(&str, Added<'_>)> = sizes
            .iter()
            .map(|&(key, size)| (key, Added::Size(size)))
            .chain(floats.iter().map(|&(key, float)| (key, Added::Float(float))))
            .chain(added.iter().copied())
            .collect();
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend((entries.len() as u64).to_le_bytes());
        for (key, value) in entries {
            bytes.extend(text(&format!("llama.{key}")));
            let (kind, value) = match value {
                Added::Size(value) => (4u32, value.to_le_bytes().to_vec()),
                Added::Float(value) => (6, value.to_le_bytes().to_vec()),
                Added::Truth(value) => (7, vec![u8::from(value)]),
                Added::Text(value) => (8, text(value)),
            };
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        let path = Path::new("m.gguf");
        let file = crate::formats::gguf::from_bytes(bytes.into(), path).unwrap();
        let h = Hyperparameters::from_gguf(path, &file.metadata, "llama", &file.tensors);
        (llama::ARCHITECTURE.describe)(&h, &mut Vec::new())
    }

    #[derive(Clone, Copy)]
    enum Added<'a> {
        Size(u32),
        Float(f32),
        Truth(bool),
        Text(&'a str),
    }

    #[test]
    fn float_weights_of_a_llama_in_a_gguf_file_must_be_ternary_already() {
        assert_eq!(llama_gguf(&[]).unwrap().weights, WeightRule::Exact);
    }

    #[test]
    fn metadata_of_a_gguf_file_that_changes_the_result_is_refused_unless_it_is_neutral() {
        for (key, neutral, other) in [
            ("attention.scale", Added::Float(0.25), Added::Float(0.5)),
            ("attention.causal", Added::Truth(true), Added::Truth(false)),
            ("final_logit_softcapping", Added::Float(0.0), Added::Float(30.0)),
            ("logit_scale", Added::Float(1.0), Added::Float(0.5)),
            ("rope.dimension_count", Added::Size(16), Added::Size(8)),
            ("rope.scaling.type", Added::Text("none"), Added::Text("yarn")),
        ] {
            assert_eq!(llama_gguf(&[(key, neutral)]).unwrap(), llama_gguf(&[]).unwrap());
            let error = llama_gguf(&[(key, other)]).unwrap_err().to_string();
            assert!(error.contains(&format!("`llama.{key}`")), "{error}");
        }
    }

    #[test]
    fn a_rope_factor_without_a_type_scales_linearly_as_in_llama_cpp() {
        let linear = RopeScaling::Linear { factor: 4.0 };
        let factor = ("rope.scaling.factor", Added::Float(4.0));
        let older = ("rope.scale_linear", Added::Float(4.0));
        let typed = |kind| ("rope.scaling.type", Added::Text(kind));
        for (added, scaling) in [
            (vec![factor], linear),
            (vec![older], linear),
            (vec![typed("linear"), factor], linear),
            (vec![typed("none"), factor], RopeScaling::None),
        ] {
            assert_eq!(llama_gguf(&added).unwrap().ropes[0].scaling, scaling);
        }
    }

    #[test]
    fn llama3_rope_scaling_keeps_short_wavelengths_and_divides_long_ones() {
        let config = llama(
            r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
        )
        .unwrap();
        let rope = Rope { theta: 500_000.0, ..config.ropes[0] };
        let plain = Rope { scaling: RopeScaling::None, ..rope }.inverse_frequencies(128);
        let scaled = rope.inverse_frequencies(128);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled[32] <= plain[32] && scaled[32] >= plain[32] / 8.0);
    }
}
