//! What a decoder looks like: the description that an architecture makes of a model's
//! hyper-parameters, and everything the decoder needs to know of it.

use std::path::Path;

use bitnet_core::backend::{Activation, ActivationPrecision, KvLayout, KvType};
use bitnet_core::numerics::rope_inverse_frequencies;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::Error;
use crate::formats::Tensors;
use crate::formats::gguf::{self, Metadata};

/// A decoder-only transformer with ternary linear layers.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name for people.
    pub architecture: &'static str,
    /// Elements of the residual stream.
    pub hidden_size: usize,
    /// Elements between the gate and the down projection.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; need not be `hidden_size / heads`.
    pub head_size: usize,
    /// Longest sequence the model is meant for, in tokens.
    pub context_length: usize,
    /// Rows of the embedding; `None` where the file leaves it to the tensor.
    pub vocab_size: Option<usize>,
    /// Whether the output head is the embedding, where the file says so; else the tensors tell.
    pub tied: Option<bool>,
    /// Epsilon of every RMSNorm but those of the projections.
    pub norm_eps: f32,
    /// Added to every norm weight but those of the projections (1 in Gemma, whose files store
    /// `w - 1`).
    pub norm_offset: f32,
    /// Non-linearity of the feed-forward network.
    pub activation: Activation,
    /// How linear layers take their input.
    pub precision: Precision,
    /// Factor on the embedding (Gemma: the square root of the hidden size).
    pub embedding_scale: f32,
    /// Factor on `q · k`.
    pub attention_scale: f32,
    /// The kinds of rotary embedding that layers choose from.
    pub ropes: Vec<Rope>,
    /// The layers, in order.
    pub layers: Vec<LayerConfig>,
    /// Whether norms stand before the output and down projections (BitNet's sub-norms).
    pub sub_norms: bool,
    /// Whether each query and key head is normed by itself (Qwen3, Gemma3).
    pub head_norms: bool,
    /// Whether the results of attention and feed-forward are normed before they are added
    /// (Gemma3).
    pub post_norms: bool,
    /// Epsilon of the norm that every projection has on its own input, if it has one.
    pub projection_norm_eps: Option<f32>,
    /// How float weights and packed scales of this checkpoint are meant.
    pub weights: WeightRule,
    /// Whether q and k rows are stored for interleaved rotation (GGUF's `llama`) and have to be
    /// put back.
    pub interleaved_rope_rows: bool,
    /// What the files call the tensors.
    pub names: TensorNames,
    /// How an embedding model makes one vector of a text; `None` for text generators.
    pub pooling: Option<Pooling>,
}

impl ModelConfig {
    /// Layout of a KV store for this model.
    pub fn kv_layout(&self, kv_type: KvType, block_tokens: usize) -> KvLayout {
        KvLayout {
            layers: self.layers.len(),
            kv_heads: self.kv_heads,
            head_size: self.head_size,
            block_tokens,
            kv_type,
        }
    }
}

/// How linear layers take their input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// As stated.
    Known(ActivationPrecision),
    /// The file does not say: int8 where each matrix has a single scale, f32 where one has many
    /// (a quantisation-aware model has one scale per matrix).
    ByScale,
}

/// How the weights of a checkpoint are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightRule {
    /// Packed bytes with a `weight_scale` that multiplies; float weights are master weights.
    Multiply,
    /// Packed bytes with a `weight_scale` that divides; float weights are master weights.
    Divide,
    /// Float weights that are ternary already; anything else is refused.
    Exact,
    /// Tiles of the CPU kernels with their scales, checked when they were written: a native file.
    Tiled,
}

/// One layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Index into [`ModelConfig::ropes`].
    pub rope: usize,
    /// Tokens that a token sees, itself included; `None` for all.
    pub window: Option<usize>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// Change of the rotary frequencies for contexts longer than those trained on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1's rule: long wavelengths divided, short ones kept, a ramp between
    /// (`_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`).
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Wavelengths above `original_context / low` are long.
        low: f32,
        /// Wavelengths below `original_context / high` are short.
        high: f32,
        /// Context length of the training.
        original_context: f32,
    },
}

impl Rope {
    /// Inverse frequencies `[head_size / 2]`.
    pub fn inverse_frequencies(&self, head_size: usize) -> Vec<f32> {
        let mut frequencies = rope_inverse_frequencies(self.theta, head_size);
        for frequency in &mut frequencies {
            *frequency = match self.scaling {
                RopeScaling::None => *frequency,
                RopeScaling::Linear { factor } => *frequency / factor,
                RopeScaling::Llama3 { factor, low, high, original_context } => {
                    let wavelength = 2.0 * std::f32::consts::PI / *frequency;
                    if wavelength < original_context / high {
                        *frequency
                    } else if wavelength > original_context / low {
                        *frequency / factor
                    } else {
                        let smooth = (original_context / wavelength - low) / (high - low);
                        (1.0 - smooth) * (*frequency / factor) + smooth * *frequency
                    }
                }
            };
        }
        frequencies
    }
}

/// How the hidden states of a text become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The last token's.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// What a checkpoint calls its tensors. Layer tensors are `prefix + layer{i} + name + suffix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each field is the name of the tensor it is called after
pub struct TensorNames {
    pub layer: &'static str,
    pub embedding: &'static str,
    pub head: &'static str,
    pub final_norm: &'static str,
    pub attention_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub o: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub attention_sub_norm: &'static str,
    pub post_attention_norm: &'static str,
    pub ffn_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub ffn_sub_norm: &'static str,
    pub post_ffn_norm: &'static str,
    /// Suffix of a projection's own norm.
    pub projection_norm: &'static str,
}

impl TensorNames {
    /// Names of Hugging Face checkpoints. Base models without a head leave out `model.`.
    pub const HUGGING_FACE: TensorNames = TensorNames {
        layer: "layers",
        embedding: "embed_tokens",
        head: "lm_head",
        final_norm: "norm",
        attention_norm: "input_layernorm",
        q: "self_attn.q_proj",
        k: "self_attn.k_proj",
        v: "self_attn.v_proj",
        o: "self_attn.o_proj",
        q_norm: "self_attn.q_norm",
        k_norm: "self_attn.k_norm",
        attention_sub_norm: "self_attn.attn_sub_norm",
        post_attention_norm: "",
        ffn_norm: "post_attention_layernorm",
        gate: "mlp.gate_proj",
        up: "mlp.up_proj",
        down: "mlp.down_proj",
        ffn_sub_norm: "mlp.ffn_sub_norm",
        post_ffn_norm: "",
        projection_norm: ".rms_norm",
    };

    /// Names of GGUF files.
    pub const GGUF: TensorNames = TensorNames {
        layer: "blk",
        embedding: "token_embd",
        head: "output",
        final_norm: "output_norm",
        attention_norm: "attn_norm",
        q: "attn_q",
        k: "attn_k",
        v: "attn_v",
        o: "attn_output",
        q_norm: "attn_q_norm",
        k_norm: "attn_k_norm",
        attention_sub_norm: "attn_sub_norm",
        post_attention_norm: "post_attention_norm",
        ffn_norm: "ffn_norm",
        gate: "ffn_gate",
        up: "ffn_up",
        down: "ffn_down",
        ffn_sub_norm: "ffn_sub_norm",
        post_ffn_norm: "post_ffw_norm",
        projection_norm: "_norm_in",
    };

    /// Names of native files.
    pub const NATIVE: TensorNames = TensorNames {
        layer: "layers",
        embedding: "embedding",
        head: "head",
        final_norm: "final_norm",
        attention_norm: "attention_norm",
        q: "q",
        k: "k",
        v: "v",
        o: "o",
        q_norm: "q_norm",
        k_norm: "k_norm",
        attention_sub_norm: "attention_sub_norm",
        post_attention_norm: "post_attention_norm",
        ffn_norm: "ffn_norm",
        gate: "gate",
        up: "up",
        down: "down",
        ffn_sub_norm: "ffn_sub_norm",
        post_ffn_norm: "post_ffn_norm",
        projection_norm: ".norm",
    };
}

/// A hyper-parameter's name in `config.json` and, without its architecture prefix, in GGUF
/// metadata. An empty name does not exist in that format.
#[derive(Debug, Clone, Copy)]
pub struct Key(pub &'static str, pub &'static str);

/// The hyper-parameters of one model, from whichever file has them.
#[derive(Debug, Clone, Copy)]
pub struct Hyperparameters<'a> {
    /// The file, for error messages.
    pub path: &'a Path,
    source: Source<'a>,
    tensors: &'a Tensors,
}

#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    Json(&'a Value),
    Gguf { metadata: &'a Metadata, prefix: &'a str },
}

impl<'a> Hyperparameters<'a> {
    /// From a Hugging Face `config.json`.
    pub fn from_json(path: &'a Path, config: &'a Value, tensors: &'a Tensors) -> Self {
        Hyperparameters { path, source: Source::Json(config), tensors }
    }

    /// From GGUF metadata; keys are looked up as `prefix.key`.
    pub fn from_gguf(
        path: &'a Path,
        metadata: &'a Metadata,
        prefix: &'a str,
        tensors: &'a Tensors,
    ) -> Self {
        Hyperparameters { path, source: Source::Gguf { metadata, prefix }, tensors }
    }

    /// The members of an object inside `config.json`.
    pub fn nested<'b>(&'b self, object: &'b Value) -> Hyperparameters<'b> {
        Hyperparameters { path: self.path, source: Source::Json(object), tensors: self.tensors }
    }

    /// Whether the checkpoint has a tensor of that name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    /// Whether the source is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.source, Source::Gguf { .. })
    }

    /// The JSON value, for settings that only `config.json` has.
    pub fn json(&self) -> Option<&'a Value> {
        match self.source {
            Source::Json(config) => Some(config),
            Source::Gguf { .. } => None,
        }
    }

    fn name(&self, key: Key) -> String {
        match self.source {
            Source::Json(_) => key.0.to_owned(),
            Source::Gguf { prefix, .. } => format!("{prefix}.{}", key.1),
        }
    }

    /// An error about one hyper-parameter.
    pub fn error(&self, key: Key, reason: impl std::fmt::Display) -> Error {
        Error::file(self.path, format!("`{}` {reason}", self.name(key)))
    }

    fn missing(&self, key: Key) -> Error {
        self.error(key, "is missing: the model cannot be described without it")
    }

    /// A number, if it is there.
    pub(crate) fn number(&self, key: Key) -> Result<Option<f64>, Error> {
        match self.source {
            Source::Json(config) => match config.get(key.0) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => match value.as_f64() {
                    Some(number) => Ok(Some(number)),
                    None => Err(self.error(key, format!("is {value}, not a number"))),
                },
            },
            Source::Gguf { metadata, .. } => match metadata.value(&self.name(key)) {
                None => Ok(None),
                Some(gguf::Value::Unsigned(number)) => Ok(Some(*number as f64)),
                Some(gguf::Value::Signed(number)) => Ok(Some(*number as f64)),
                Some(gguf::Value::F32(number)) => Ok(Some(f64::from(*number))),
                Some(gguf::Value::F64(number)) => Ok(Some(*number)),
                Some(_) => Err(self.error(key, "is not a number")),
            },
        }
    }

    /// A positive count, if it is there.
    pub fn optional_size(&self, key: Key) -> Result<Option<usize>, Error> {
        // Larger than any model's extent, small enough that products of two fit 64 bits.
        const LARGEST: f64 = (1u64 << 31) as f64;
        match self.number(key)? {
            None => Ok(None),
            Some(n) if (1.0..=LARGEST).contains(&n) && n.fract() == 0.0 => Ok(Some(n as usize)),
            Some(n) => Err(self.error(key, format!("is {n}: it must be a positive whole number"))),
        }
    }

    /// A positive count.
    pub fn size(&self, key: Key) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite positive number, if it is there.
    pub fn optional_float(&self, key: Key) -> Result<Option<f32>, Error> {
        match self.number(key)? {
            None => Ok(None),
            Some(n) if n > 0.0 && (n as f32).is_finite() && n as f32 > 0.0 => Ok(Some(n as f32)),
            Some(n) => Err(self.error(key, format!("is {n}: it must be a positive number"))),
        }
    }

    /// A finite positive number.
    pub fn float(&self, key: Key) -> Result<f32, Error> {
        self.optional_float(key)?.ok_or_else(|| self.missing(key))
    }

    /// A truth value, if it is there.
    pub fn optional_bool(&self, key: Key) -> Result<Option<bool>, Error> {
        match self.source {
            Source::Json(config) => match config.get(key.0) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => match value.as_bool() {
                    Some(value) => Ok(Some(value)),
                    None => Err(self.error(key, format!("is {value}, neither true nor false"))),
                },
            },
            Source::Gguf { metadata, .. } => metadata.get(&self.name(key)),
        }
    }

    /// A text, if it is there.
    pub fn optional_text(&self, key: Key) -> Result<Option<&'a str>, Error> {
        match self.source {
            Source::Json(config) => match config.get(key.0) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => match value.as_str() {
                    Some(text) => Ok(Some(text)),
                    None => Err(self.error(key, format!("is {value}, not a text"))),
                },
            },
            Source::Gguf { metadata, .. } => metadata.get(&self.name(key)),
        }
    }
}
