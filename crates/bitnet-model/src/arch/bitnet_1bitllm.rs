//! 1bitLLM/bitnet_b1_58-large and -3B: a Llama with SiLU and the two BitNet sub-norms under older
//! names; float master weights, ternarised at load.

use bitnet_core::backend::Activation;

use super::{Architecture, apply_quantization, decoder};
use crate::config::{Hyperparameters, Key, ModelConfig, TensorNames};
use crate::error::Error;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "BitNet b1.58 (1bitLLM)",
    classes: &["BitnetForCausalLM"],
    model_type: "bitnet",
    gguf: &["bitnet"],
    describe,
};

fn describe(h: &Hyperparameters<'_>, notes: &mut Vec<String>) -> Result<ModelConfig, Error> {
    let mut config = decoder(h, ARCHITECTURE.name, Activation::Silu)?;
    config.sub_norms = true;
    if h.is_gguf() {
        // llama.cpp's name for this architecture has also been given to conversions of 2B-4T,
        // whose shape no 1bitLLM model has and whose activation is another.
        if (config.hidden_size, config.intermediate_size) == (2560, 6912) {
            config.activation = Activation::Relu2;
            notes.push(
                "the file says architecture `bitnet` (SiLU) but has the shape of BitNet b1.58 \
                 2B-4T: relu2 is used"
                    .to_owned(),
            );
        }
        return Ok(config);
    }
    apply_quantization(h, &mut config)?;
    config.names = TensorNames {
        attention_sub_norm: "self_attn.inner_attn_ln",
        ffn_sub_norm: "mlp.ffn_layernorm",
        ..TensorNames::HUGGING_FACE
    };
    if let Some(bits) = h.optional_size(Key("input_bits", ""))?
        && bits != 8
    {
        return Err(h.error(Key("input_bits", ""), format!("is {bits}: only 8 is supported")));
    }
    Ok(config)
}
