//! Checkpoints of known shapes with random weights, for benchmarks: nothing to download.
//!
//! The same shape always gets the same weights. A third of the ternary weights is zero, which is
//! what ternarising normally distributed weights by their mean magnitude gives (31 %). Linear
//! layers share their random bytes at different offsets, so a shape takes little more memory than
//! its embedding, and the backend's own copy of each matrix.

use std::path::{Path, PathBuf};

use bitnet_core::backend::Activation;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;
use rayon::prelude::*;
use serde_json::Value;

use crate::arch;
use crate::config::{Hyperparameters, ModelConfig, WeightRule};
use crate::error::Error;
use crate::formats::Tensors;

/// A model whose shape is known.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its `config.json`, as far as the description needs it.
    config: &'static str,
    /// Whether each projection has a norm of its own.
    projection_norms: bool,
}

/// Every shape there is.
pub const ALL: [Shape; 5] = [
    Shape {
        name: "bitnet-2b-4t",
        config: r#"{"architectures": ["BitNetForCausalLM"], "hidden_size": 2560,
            "intermediate_size": 6912, "num_hidden_layers": 30, "num_attention_heads": 20,
            "num_key_value_heads": 5, "vocab_size": 128256, "max_position_embeddings": 4096,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "relu2",
            "tie_word_embeddings": true, "quantization_config":
            {"quant_method": "bitnet", "linear_class": "autobitlinear"}}"#,
        projection_norms: false,
    },
    Shape {
        name: "falcon3-7b",
        config: r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 3072,
            "intermediate_size": 23040, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 131072,
            "max_position_embeddings": 32768, "rope_theta": 1000042.0, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "tie_word_embeddings": false,
            "quantization_config": {"quant_method": "bitnet"}}"#,
        projection_norms: false,
    },
    Shape {
        name: "llama3-8b",
        config: r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": false, "quantization_config": {"quant_method": "bitnet"}}"#,
        projection_norms: false,
    },
    Shape {
        name: "1bitllm-3b",
        config: r#"{"architectures": ["BitnetForCausalLM"], "hidden_size": 3200,
            "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32002, "max_position_embeddings": 2048,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "input_bits": 8,
            "tie_word_embeddings": true}"#,
        projection_norms: false,
    },
    Shape {
        name: "bitnet-embedding-0.6b",
        config: r#"{"architectures": ["Qwen3Model"], "hidden_size": 1024,
            "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "tie_word_embeddings": true}"#,
        projection_norms: true,
    },
];

/// The tensors and the description of a shape.
pub struct ShapeCheckpoint {
    /// The shape's name, as the path that error messages name.
    pub path: PathBuf,
    /// Shape and rules of the decoder.
    pub config: ModelConfig,
    /// The random weights.
    pub tensors: Tensors,
}

impl Shape {
    /// The shape of that name.
    pub fn named(name: &str) -> Option<&'static Shape> {
        static SHAPES: [Shape; 5] = ALL;
        SHAPES.iter().find(|shape| shape.name == name)
    }

    /// Shape and rules of its decoder.
    pub fn config(&self) -> ModelConfig {
        let path = Path::new(self.name);
        let json: Value = serde_json::from_str(self.config).expect("the shapes are valid JSON");
        let mut tensors = Tensors::default();
        if self.projection_norms {
            // The description recognises such a model by this one.
            let name = "layers.0.self_attn.q_proj.norm.weight";
            add(&mut tensors, path, name, ones(1)).expect("a good name");
        }
        let class = json["architectures"][0].as_str().expect("a name");
        let architecture = arch::for_class(class).expect("the shapes are of known architectures");
        let h = Hyperparameters::from_json(path, &json, &tensors);
        (architecture.describe)(&h, &mut Vec::new()).expect("the shapes are described in full")
    }

    /// Whether its gates can be exactly zero.
    pub fn has_relu2(&self) -> bool {
        self.config().activation == Activation::Relu2
    }

    /// Makes a checkpoint. `gate_sparsity` is the share, 0 to 1, of gates that are zero or less in
    /// a model with relu²: without it about half of them are.
    ///
    /// # Errors
    /// If a gate sparsity is asked for that is no share, or the model does not have relu².
    pub fn checkpoint(&self, gate_sparsity: Option<f64>) -> Result<ShapeCheckpoint, Error> {
        let path = Path::new(self.name);
        let config = self.config();
        let bias = match gate_sparsity {
            None => None,
            Some(_) if config.activation != Activation::Relu2 => {
                return Err(Error::file(
                    path,
                    "has no relu2 gates, of which none is exactly zero: leave the gate sparsity out",
                ));
            }
            Some(share) => {
                Some(GateBias::for_share(share, config.hidden_size).ok_or_else(|| {
                    Error::file(
                        path,
                        format!("a gate sparsity of {share} is no share: give 0 to 1"),
                    )
                })?)
            }
        };
        let maker = Maker { path, config: &config, bias, pool: Pool::new(&config) };
        let mut tensors = Tensors::default();
        maker.fill(&mut tensors)?;
        Ok(ShapeCheckpoint { path: path.to_owned(), config, tensors })
    }
}

/// Puts a share of the gates at or below zero, by weights alone.
///
/// The first elements of every embedding are positive, where all others have either sign, and the
/// norm before the feed-forward network enlarges them. A row of the gate that has more of the
/// weight +1 than -1 on them leans to the positive side, by an amount that is chosen such that noise
/// of the other elements takes just the wanted share below zero. Which gates these are depends on
/// the token, as in a real model. Results of the layers are too small to move the residual stream
/// much from the embedding.
#[derive(Debug, Clone, Copy)]
struct GateBias {
    /// Sum of a row's weights on the positive elements: `lower + 1` in this share of the rows,
    /// `lower` in the others.
    lower: i64,
    upper_share: f64,
}

/// Positive elements: one in so many.
const POSITIVE_PART: usize = 20;
/// Factor of the norm on them.
const ENLARGED: f32 = 4.0;
/// Mean magnitude of an element of the embedding, whose mean square is 1.
const MEAN_MAGNITUDE: f64 = 0.805;
/// Share of weights that are not zero.
const NONZERO: f64 = 2.0 / 3.0;

impl GateBias {
    fn for_share(share: f64, hidden: usize) -> Option<Self> {
        if !(0.0..=1.0).contains(&share) {
            return None;
        }
        let positive = hidden / POSITIVE_PART;
        let factor = f64::from(ENLARGED);
        // Share of gates at or below zero in rows with that sum.
        let closed = |sum: i64| {
            let mean = sum as f64 * factor * MEAN_MAGNITUDE;
            let of_positive = sum.abs() as f64 * factor * factor * (1.0 - MEAN_MAGNITUDE.powi(2));
            let variance = (hidden - positive) as f64 * NONZERO + of_positive;
            normal_below(-mean / variance.sqrt())
        };
        let most = positive as i64;
        // At the ends nothing is left to chance.
        if share == 0.0 || share == 1.0 {
            let lower = if share == 0.0 { most } else { -most };
            return Some(GateBias { lower, upper_share: 0.0 });
        }
        let lower = (-most..most).rev().find(|&sum| closed(sum) >= share).unwrap_or(-most);
        let (below, above) = (closed(lower), closed(lower + 1));
        Some(GateBias { lower, upper_share: ((below - share) / (below - above)).clamp(0.0, 1.0) })
    }

    /// The code of a weight on one of the positive elements: `row`'s weights there sum as they
    /// should, those that are not needed for it are zero.
    fn code(&self, row_noise: u64, col: usize) -> u8 {
        let upper = unit(row_noise) < self.upper_share;
        let sum = self.lower + i64::from(upper);
        match (col as u64) < sum.unsigned_abs() {
            true => (1 + sum.signum()) as u8,
            false => 1,
        }
    }
}

/// Share of a standard normal distribution below `x` (Abramowitz and Stegun 26.2.17, good to 1e-7).
fn normal_below(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let polynomial = [1.330_274_429, -1.821_255_978, 1.781_477_937, -0.356_563_782, 0.319_381_530]
        .iter()
        .fold(0.0, |sum, coefficient| (sum + coefficient) * t);
    let above = polynomial * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x < 0.0 { above } else { 1.0 - above }
}

/// Random packed codes that every matrix takes a part of.
struct Pool(Bytes);

impl Pool {
    /// Matrices begin at different places in the first so many bytes.
    const OFFSETS: usize = 1 << 20;

    fn new(config: &ModelConfig) -> Self {
        let attention = config.heads * config.head_size;
        let largest = config.hidden_size * attention.max(config.intermediate_size) / 4;
        // Four codes of three values each.
        let codes: [u8; 81] = std::array::from_fn(|i| {
            let code = |divisor: usize| (i / divisor % 3) as u8;
            code(1) | code(3) << 2 | code(9) << 4 | code(27) << 6
        });
        let mut bytes = vec![0; largest + Pool::OFFSETS];
        bytes.par_chunks_mut(CHUNK).enumerate().for_each(|(index, chunk)| {
            let mut noise = Noise::new(index as u64);
            for four in chunk.chunks_mut(4) {
                let bits = noise.next();
                for (i, byte) in four.iter_mut().enumerate() {
                    let draw = (bits >> (16 * i)) as u16;
                    *byte = codes[(usize::from(draw) * codes.len()) >> 16];
                }
            }
        });
        Pool(bytes.into())
    }

    /// The packed matrix that is the `index`th.
    fn matrix(&self, index: usize, bytes: usize) -> Bytes {
        let start = index * 65_521 % Pool::OFFSETS;
        self.0.slice(start..start + bytes)
    }
}

/// Bytes that one generator fills, so that threads share the work and the result is the same.
const CHUNK: usize = 1 << 16;

/// SplitMix64.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        Noise(mixed(seed ^ 0x5851_f42d_4c95_7f2d))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }
}

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number from 0 to 1.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

struct Maker<'a> {
    path: &'a Path,
    config: &'a ModelConfig,
    bias: Option<GateBias>,
    pool: Pool,
}

impl Maker<'_> {
    fn fill(&self, tensors: &mut Tensors) -> Result<(), Error> {
        let c = self.config;
        let n = &c.names;
        add(tensors, self.path, "embed_tokens.weight", self.table(0)?)?;
        if c.tied == Some(false) {
            add(tensors, self.path, "lm_head.weight", self.table(1)?)?;
        }
        // Random signs: else the residual stream, which stays near the embedding, would make each
        // token its own most probable successor by far, which no real head does.
        let mut noise = Noise::new(2);
        let signs = (0..c.hidden_size).map(|_| if noise.next() & 1 == 0 { 1.0 } else { -1.0 });
        let signs: Vec<f32> = signs.collect();
        let final_norm = Tensor::from_f32(vec![c.hidden_size], &signs);
        add(tensors, self.path, "norm.weight", final_norm)?;

        let (attention, kv) = (c.heads * c.head_size, c.kv_heads * c.head_size);
        let mut matrices = 0;
        for layer in 0..c.layers.len() {
            let name = |module: &str, suffix: &str| format!("layers.{layer}.{module}{suffix}");
            let mut norms = vec![
                (n.attention_norm, ones(c.hidden_size)),
                (n.ffn_norm, self.ffn_norm(c.hidden_size)),
            ];
            if c.sub_norms {
                norms.push((n.attention_sub_norm, ones(attention)));
                norms.push((n.ffn_sub_norm, ones(c.intermediate_size)));
            }
            if c.head_norms {
                norms.push((n.q_norm, ones(c.head_size)));
                norms.push((n.k_norm, ones(c.head_size)));
            }
            for (module, tensor) in norms {
                add(tensors, self.path, &name(module, ".weight"), tensor)?;
            }
            for (module, rows, cols) in [
                (n.q, attention, c.hidden_size),
                (n.k, kv, c.hidden_size),
                (n.v, kv, c.hidden_size),
                (n.o, c.hidden_size, attention),
                (n.gate, c.intermediate_size, c.hidden_size),
                (n.up, c.intermediate_size, c.hidden_size),
                (n.down, c.hidden_size, c.intermediate_size),
            ] {
                let mut codes = self.pool.matrix(matrices, rows.div_ceil(4) * cols);
                if module == n.gate
                    && let Some(bias) = self.bias
                {
                    codes = lean(&codes, bias, rows, cols, layer);
                }
                let shape = vec![rows.div_ceil(4), cols];
                let codes = Tensor::new(DType::U8, shape, codes)?;
                add(tensors, self.path, &name(module, ".weight"), codes)?;
                // Outputs of unit variance, but for what is added to the residual stream.
                let unit = 1.0 / (cols as f64 * NONZERO).sqrt();
                let scale = if module == n.o || module == n.down { unit * 1e-3 } else { unit };
                let scale = match c.weights {
                    WeightRule::Divide => 1.0 / scale,
                    WeightRule::Multiply | WeightRule::Exact | WeightRule::Tiled => scale,
                };
                let scale = Tensor::from_f32(vec![1], &[scale as f32]);
                add(tensors, self.path, &name(module, ".weight_scale"), scale)?;
                let norm = name(module, &format!("{}.weight", n.projection_norm));
                if c.projection_norm_eps.is_some() {
                    add(tensors, self.path, &norm, ones(cols))?;
                }
                matrices += 1;
            }
        }
        Ok(())
    }

    /// An embedding or head, bf16 `[vocabulary, hidden]`: nearly normal numbers of variance 1.
    fn table(&self, which: u64) -> Result<Tensor, Error> {
        let (rows, cols) =
            (self.config.vocab_size.expect("the shapes state it"), self.config.hidden_size);
        bitnet_core::budget::require(
            &format!("an embedding of {rows} tokens"),
            (2 * rows * cols) as u64,
        )?;
        let positive = if self.bias.is_some() { cols / POSITIVE_PART } else { 0 };
        let mut bytes = vec![0u8; 2 * rows * cols];
        bytes.par_chunks_mut(2 * cols).enumerate().for_each(|(row, chunk)| {
            let mut noise = Noise::new(which << 32 | row as u64 | 1 << 48);
            for pair in chunk.as_chunks_mut::<4>().0 {
                let bits = noise.next();
                for (half, value) in pair.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *value = bf16(near_normal((bits >> (32 * half)) as u32));
                }
            }
            for value in chunk.as_chunks_mut::<2>().0.iter_mut().take(positive) {
                value[1] &= 0x7f;
            }
        });
        Ok(Tensor::new(DType::BF16, vec![rows, cols], bytes.into())?)
    }

    /// The norm before the feed-forward network.
    fn ffn_norm(&self, hidden: usize) -> Tensor {
        let enlarged = if self.bias.is_some() { hidden / POSITIVE_PART } else { 0 };
        let weight: Vec<f32> =
            (0..hidden).map(|i| if i < enlarged { ENLARGED } else { 1.0 }).collect();
        Tensor::from_f32(vec![hidden], &weight)
    }
}

/// The sum of four uniform bytes, with mean 0 and variance 1.
fn near_normal(bits: u32) -> f32 {
    let sum: u32 = bits.to_le_bytes().iter().map(|&byte| u32::from(byte)).sum();
    // The variance of a uniform byte is (256² - 1) / 12.
    (sum as f32 - 510.0) / 147.8
}

/// The upper half of an f32.
fn bf16(value: f32) -> [u8; 2] {
    ((value.to_bits() >> 16) as u16).to_le_bytes()
}

/// A packed gate matrix whose rows lean as the bias says.
fn lean(codes: &[u8], bias: GateBias, rows: usize, cols: usize, layer: usize) -> Bytes {
    let mut codes = codes.to_vec();
    let packed_rows = rows.div_ceil(4);
    codes.par_chunks_mut(cols).enumerate().for_each(|(packed_row, bytes)| {
        for quarter in 0..4 {
            let row = quarter * packed_rows + packed_row;
            let noise = mixed(1 << 40 | (layer * rows + row) as u64);
            for (col, byte) in bytes.iter_mut().take(cols / POSITIVE_PART).enumerate() {
                let shift = 2 * quarter;
                *byte = *byte & !(3 << shift) | bias.code(noise, col) << shift;
            }
        }
    });
    codes.into()
}

/// The weight of a norm that leaves its input's scale alone.
fn ones(len: usize) -> Tensor {
    Tensor::from_f32(vec![len], &vec![1.0; len])
}

fn add(tensors: &mut Tensors, path: &Path, name: &str, tensor: Tensor) -> Result<(), Error> {
    tensors.insert(path, name.to_owned(), Ok(tensor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_is_that_of_the_tables() {
        for (x, share) in [(0.0, 0.5), (1.0, 0.841_345), (-1.959_964, 0.025), (3.0, 0.998_650)] {
            assert!((normal_below(x) - share).abs() < 1e-6, "{x}");
        }
    }

    #[test]
    fn a_third_of_the_codes_is_zero_and_none_is_illegal() {
        let small = Shape { config: SMALL, ..ALL[0] };
        let checkpoint = small.checkpoint(None).unwrap();
        let name = "layers.1.mlp.up_proj.weight";
        let tensor = checkpoint.tensors.get(name).unwrap().unwrap();
        let mut counts = [0u64; 4];
        for byte in tensor.data() {
            (0..4).for_each(|i| counts[usize::from(byte >> (2 * i) & 3)] += 1);
        }
        let all = counts.iter().sum::<u64>() as f64;
        assert_eq!(counts[3], 0);
        counts[..3]
            .iter()
            .for_each(|&count| assert!((count as f64 / all - 1.0 / 3.0).abs() < 0.01));
    }

    #[test]
    fn the_embedding_has_unit_variance_and_the_stated_magnitude() {
        let checkpoint = Shape { config: SMALL, ..ALL[0] }.checkpoint(None).unwrap();
        let table = checkpoint.tensors.get("embed_tokens.weight").unwrap().unwrap();
        let values = table.data().as_chunks::<2>().0.iter();
        let values: Vec<f64> = values
            .map(|&half| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(half)) << 16)))
            .collect();
        let mean = |f: &dyn Fn(f64) -> f64| {
            values.iter().map(|&v| f(v)).sum::<f64>() / values.len() as f64
        };
        assert!(mean(&|v| v).abs() < 0.02);
        assert!((mean(&|v| v * v) - 1.0).abs() < 0.02);
        assert!((mean(&f64::abs) - MEAN_MAGNITUDE).abs() < 0.01, "{}", mean(&f64::abs));
    }

    #[test]
    fn sparsity_is_refused_without_relu2_and_outside_of_its_range() {
        let error = ALL[2].checkpoint(Some(0.5)).err().unwrap().to_string();
        assert!(error.contains("llama3-8b") && error.contains("relu2"), "{error}");
        for share in [-0.1, 1.1, f64::NAN] {
            let error = ALL[0].checkpoint(Some(share)).err().unwrap().to_string();
            assert!(error.contains("give 0 to 1"), "{error}");
        }
    }

    /// A 2B-4T in the small.
    const SMALL: &str = r#"{"architectures": ["BitNetForCausalLM"], "hidden_size": 640,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 128,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "relu2",
        "tie_word_embeddings": true, "quantization_config":
        {"quant_method": "bitnet", "linear_class": "autobitlinear"}}"#;
}
