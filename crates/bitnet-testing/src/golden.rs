//! The golden models, and the reference outputs of one: `golden.json` and `golden.safetensors`.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;

/// Models with random weights, whose prompts 0 to 2 keep far from every rounding boundary.
pub const RANDOM: [&str; 8] = [
    "bitnet-bf16",
    "bitnet-packed",
    "bitnet-packed-bitlinear",
    "llama-1.58-packed",
    "llama-1.58-rmsnorm",
    "bitnet-odd",
    "bitnet-sharded",
    "bitnet-1bitllm",
];

/// A model with trained weights, calmer but closer to the boundaries. The one that is
/// [built in](crate::tiny_model) is the same, packed.
pub const TRAINED: &str = "tiny-trained";

/// Models of `scripts/make_reference_models.py` that generate text: no prompt of theirs is near a
/// rounding boundary.
pub const GENERATORS: [&str; 4] = ["trilm", "llama3-rope", "bonsai", "bitnet-1bitllm-odd"];

/// Models of that script that make embeddings.
pub const EMBEDDERS: [&str; 2] = ["qwen3-embedding", "gemma3-embedding"];

/// The GGUF file that is one of [`RANDOM`].
pub const RANDOM_GGUF: &str = "gguf/bitnet-packed-TQ2_0.gguf";

/// The GGUF file that is one of [`GENERATORS`], in a shape of its own.
pub const GENERATOR_GGUF: &str = "gguf/trilm-TQ1_0.gguf";

/// GGUF files of that script, and the model whose weights, and so whose outputs, each has.
pub const GGUF: [(&str, &str); 4] = [
    (GENERATOR_GGUF, GENERATOR_GGUF),
    ("gguf/bonsai-Q2_0-64.gguf", "bonsai"),
    ("gguf/bonsai-Q2_0-128.gguf", "bonsai"),
    ("gguf/qwen3-embedding-I2_S.gguf", "qwen3-embedding"),
];

/// GGUF files of the trained model, which lie in the [shared data](crate::shared_data).
pub const TRAINED_GGUF: [&str; 2] = ["gguf/tiny-trained-TQ2_0.gguf", "gguf/tiny-trained-I2_S.gguf"];

/// One prompt and what the reference made of it.
#[derive(Debug, Clone, Deserialize)]
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// 32 greedy tokens after the prompt; none from an embedding model.
    #[serde(default)]
    pub greedy: Vec<u32>,
    /// Best minus second-best logit at each of them.
    #[serde(default)]
    pub greedy_margin: Vec<f32>,
    /// The second-best tokens.
    #[serde(default)]
    pub greedy_second: Vec<u32>,
}

/// The reference outputs of one model.
pub struct GoldenModel {
    /// The directory or file the model itself is read from.
    pub model: PathBuf,
    /// Everything in the JSON file.
    pub json: Value,
    /// The prompts.
    pub prompts: Vec<Prompt>,
    tensors: Vec<u8>,
}

impl GoldenModel {
    /// Reads the golden files of a model: inside its directory, or beside its GGUF file.
    ///
    /// # Panics
    /// If they are not there or not readable.
    pub fn read(model: &Path) -> Self {
        let stem = match model.is_dir() {
            true => model.join("golden"),
            false => model.with_extension("golden"),
        };
        Self::read_from(model, &stem)
    }

    /// Reads the golden files `stem.json` and `stem.safetensors` of a model that lies elsewhere.
    ///
    /// # Panics
    /// If they are not there or not readable.
    pub fn read_from(model: &Path, stem: &Path) -> Self {
        let file = |extension: &str| {
            let path = PathBuf::from(format!("{}.{extension}", stem.display()));
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let json: Value = serde_json::from_slice(&file("json")).expect("golden JSON");
        let prompts = Vec::<Prompt>::deserialize(&json["prompts"]).expect("golden prompts");
        GoldenModel { model: model.to_owned(), json, prompts, tensors: file("safetensors") }
    }

    /// Bytes and shape of a tensor, if the reference has it.
    pub fn tensor(&self, name: &str) -> Option<(Vec<usize>, Vec<u8>)> {
        let tensors = SafeTensors::deserialize(&self.tensors).expect("golden tensors");
        let view = tensors.tensor(name).ok()?;
        Some((view.shape().to_vec(), view.data().to_vec()))
    }

    /// Values of an f32 tensor, if the reference has it.
    pub fn f32(&self, name: &str) -> Option<Vec<f32>> {
        let (_, bytes) = self.tensor(name)?;
        Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    /// Values of an i32 tensor, if the reference has it.
    pub fn i32(&self, name: &str) -> Option<Vec<i32>> {
        let (_, bytes) = self.tensor(name)?;
        Some(bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    /// Values of an i8 tensor, if the reference has it.
    pub fn i8(&self, name: &str) -> Option<Vec<i8>> {
        let (_, bytes) = self.tensor(name)?;
        Some(bytes.iter().map(|&b| b as i8).collect())
    }

    /// Names of all tensors.
    pub fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.tensors).expect("golden tensors");
        tensors.names().into_iter().map(str::to_owned).collect()
    }
}

/// Standard deviation of a row of logits.
pub fn deviation(logits: &[f32]) -> f32 {
    let n = logits.len() as f64;
    let mean = logits.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    (logits.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt() as f32
}

/// Largest absolute difference between two rows.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Kullback-Leibler divergence of softmax(`other`) from softmax(`reference`).
pub fn divergence(reference: &[f32], other: &[f32]) -> f64 {
    let (p, q) = (log_softmax(reference), log_softmax(other));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Logarithms of the softmax, in f64.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
    let sum: f64 = logits.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    logits.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
}

/// Index of the largest logit, the lowest of equal ones.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = index;
        }
    }
    best as u32
}
