//! The forward pass of a decoder as ONNX operations: what `decoder.rs` computes, for a batch of
//! sequences with their cached keys and values, by the names that optimum and transformers.js feed.
//!
//! Shapes: b sequences, s tokens in each, T of them with those in the cache, h heads, d elements
//! per head.

use std::collections::BTreeMap;

use bitnet_core::backend::{Activation, ActivationPrecision};
use bitnet_core::{DType, WeightScale};
use bitnet_quant::packing::nbits::Blocks;

use super::graph::Attribute::{Int, Ints};
use super::graph::Extent::{Free, Is};
use super::graph::{Graph, Value};
use crate::config::{LayerConfig, ModelConfig};
use crate::formats::onnx::{BLOCK_COLUMNS, COLUMNS, SCALE_COLUMNS};

/// What stands for minus infinity in masks. A row that sees nothing stays a number.
const MASKED: f32 = f32::MIN;

/// A ternary matrix that is an initializer.
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) blocks: Blocks,
    /// The codes.
    pub(super) codes: Value,
    /// The factor of each block.
    pub(super) block_scales: Value,
    /// What is done to the sums.
    pub(super) scale: Scale,
}

/// Blocks of a matrix with int8 inputs. They are the longest that ONNX Runtime has fast kernels for,
/// but those kernels round their input to int8 once more, each block by its own largest value. So
/// every block has a column to spare, which holds 127 and meets the weight zero: with 127 as the
/// largest value, rounding whole numbers changes none of them.
pub(super) const INT8_BLOCKS: Blocks = Blocks { bits: 2, len: 128, cols: 127 };

impl Matrix {
    fn is_for_int8(&self) -> bool {
        self.blocks == INT8_BLOCKS
    }
}

/// What the scale of a matrix does to sums.
pub(super) enum Scale {
    Multiply(Value),
    Divide(Value),
    /// The blocks have scales, the same for so many columns.
    Blocks(usize),
}

impl Scale {
    /// How a scale is applied, once `value` has made a constant of its numbers.
    pub(super) fn new(scale: &WeightScale, value: impl FnOnce(&[f32]) -> Value) -> Self {
        match scale {
            WeightScale::Multiply(_) | WeightScale::Rows(_) => {
                Scale::Multiply(value(scale.values()))
            }
            WeightScale::Divide(_) => Scale::Divide(value(scale.values())),
            WeightScale::Groups { len, .. } => Scale::Blocks(*len),
        }
    }
}

/// The initializers of a model by the full names of their places.
#[derive(Default)]
pub(super) struct Weights {
    pub(super) matrices: BTreeMap<String, Matrix>,
    /// Norms: the weight less the model's offset.
    pub(super) norms: BTreeMap<String, Value>,
    /// The embedding and the head `[vocabulary, hidden]`.
    pub(super) tables: BTreeMap<String, (Value, DType)>,
}

/// Adds the nodes of a decoder to a graph that has its weights.
pub(super) fn build(
    graph: &mut Graph,
    config: &ModelConfig,
    precision: ActivationPrecision,
    weights: &Weights,
    vocabulary: usize,
) {
    Builder { g: graph, c: config, precision, w: weights }.model(vocabulary);
}

struct Builder<'a> {
    g: &'a mut Graph,
    c: &'a ModelConfig,
    precision: ActivationPrecision,
    w: &'a Weights,
}

/// Values that all layers use.
struct Common {
    /// `[2]`: s and T, one element each.
    tokens: Value,
    total: Value,
    /// Of each rotation, cosines and sines `[b, 1, s, d/2]`.
    angles: Vec<(Value, Value)>,
    /// Of each width of attention, what is added to scores `[b, 1, s, T]`.
    masks: Vec<(Option<usize>, Value)>,
}

/// Input of linear layers.
struct Input {
    /// Its values; whole numbers where it was rounded to int8.
    values: Value,
    /// What it was multiplied with before it was rounded.
    scale: Option<Value>,
    /// The values in blocks that have room for more than their columns.
    filled: Vec<(Blocks, Value)>,
}

impl Builder<'_> {
    fn model(&mut self, vocabulary: usize) {
        let c = self.c;
        let (batch, tokens) = (Free("batch_size"), Free("sequence_length"));
        let total = Free("total_sequence_length");
        let ids = self.g.input("input_ids", DType::I64, &[batch, tokens]);
        let mask = self.g.input("attention_mask", DType::I64, &[batch, total]);
        let heads = Is(c.kv_heads);
        let cached = [batch, heads, Free("past_sequence_length"), Is(c.head_size)];
        let past: Vec<[Value; 2]> = (0..c.layers.len())
            .map(|layer| {
                ["key", "value"].map(|side| {
                    let name = format!("past_key_values.{layer}.{side}");
                    self.g.input(&name, DType::F32, &cached)
                })
            })
            .collect();

        let common = self.common(&ids, &mask);
        self.g.enter("/model/embed_tokens");
        let mut hidden = self.table(c.names.embedding, |b, table| b.g.op("Gather", &[table, &ids]));
        if c.embedding_scale != 1.0 {
            hidden = self.scaled(&hidden, c.embedding_scale);
        }
        let mut present = Vec::new();
        for (layer, past) in past.iter().enumerate() {
            let (after, kept) = self.layer(layer, &hidden, past, &common);
            hidden = after;
            present.push(kept);
        }
        self.g.enter("/model/norm");
        let norm = self.w.norms[c.names.final_norm].clone();
        let states = self.rms_norm(&hidden, &norm, c.norm_eps, c.norm_offset);
        if c.pooling.is_some() {
            let shape = [batch, tokens, Is(c.hidden_size)];
            self.g.output("last_hidden_state", &states, DType::F32, &shape);
        } else {
            let logits = self.head(&states, &ids, vocabulary);
            self.g.output("logits", &logits, DType::F32, &[batch, tokens, Is(vocabulary)]);
        }
        let shape = [batch, heads, total, Is(c.head_size)];
        for (layer, sides) in present.iter().enumerate() {
            for (side, value) in ["key", "value"].iter().zip(sides) {
                self.g.output(&format!("present.{layer}.{side}"), value, DType::F32, &shape);
            }
        }
    }

    /// Positions, rotations and masks.
    fn common(&mut self, ids: &Value, attention_mask: &Value) -> Common {
        let g = &mut *self.g;
        g.enter("/model");
        let second = [("start", Int(1)), ("end", Int(2))];
        let tokens = g.op_with("Shape", &[ids], &second);
        let total = g.op_with("Shape", &[attention_mask], &second);
        let past = g.op("Sub", &[&total, &tokens]);

        // A token's position is the number of tokens before it that the mask shows.
        let (zero, one) = (g.int(0), g.int(1));
        let counted = g.op("CumSum", &[attention_mask, &one]);
        let positions = g.op("Sub", &[&counted, &one]);
        let positions = g.op("Max", &[&positions, &zero]);
        let axis = g.ints(&[1]);
        let positions = g.op("Slice", &[&positions, &past, &total, &axis]);
        let positions = g.op_with("Cast", &[&positions], &[("to", Int(1))]);
        // [b, 1, s, 1]
        let axes = g.ints(&[1, 3]);
        let positions = g.op("Unsqueeze", &[&positions, &axes]);
        let angles = self
            .c
            .ropes
            .iter()
            .enumerate()
            .map(|(rope, settings)| {
                let frequencies = settings.inverse_frequencies(self.c.head_size);
                let bytes: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
                let name = format!("model.rotary_emb.{rope}.inv_freq");
                let shape = [frequencies.len()];
                let frequencies = g.initializer(name, DType::F32, &shape, &bytes);
                let angles = g.op("Mul", &[&positions, &frequencies]);
                (g.op("Cos", &[&angles]), g.op("Sin", &[&angles]))
            })
            .collect();

        let squeezed = |g: &mut Graph, value: &Value| {
            let first = g.ints(&[0]);
            g.op("Squeeze", &[value, &first])
        };
        let (from, to) = (squeezed(g, &past), squeezed(g, &total));
        let queries = g.op("Range", &[&from, &to, &one]);
        let queries = g.op("Unsqueeze", &[&queries, &axis]);
        let keys = g.op("Range", &[&zero, &to, &one]);
        let shown = g.op_with("Cast", &[attention_mask], &[("to", Int(9))]);
        let axes = g.ints(&[1, 2]);
        let shown = g.op("Unsqueeze", &[&shown, &axes]);
        let before = g.op("LessOrEqual", &[&keys, &queries]);
        let seen = g.op("And", &[&before, &shown]);
        let mut windows: Vec<Option<usize>> = self.c.layers.iter().map(|l| l.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let (nothing, masked) = (g.float(0.0), g.float(MASKED));
        let masks = windows
            .into_iter()
            .map(|window| {
                let seen = match window {
                    None => seen.clone(),
                    Some(window) => {
                        let window = g.int(window as i64);
                        let oldest = g.op("Sub", &[&queries, &window]);
                        let near = g.op("Greater", &[&keys, &oldest]);
                        g.op("And", &[&seen, &near])
                    }
                };
                (window, g.op("Where", &[&seen, &nothing, &masked]))
            })
            .collect();
        Common { tokens, total, angles, masks }
    }

    fn layer(
        &mut self,
        layer: usize,
        hidden: &Value,
        past: &[Value; 2],
        common: &Common,
    ) -> (Value, [Value; 2]) {
        let names = self.c.names;
        let normed = self.layer_norm(layer, names.attention_norm, hidden);
        let (branch, present) = self.attention(layer, &normed, past, common);
        let hidden = self.add_branch(layer, hidden, &branch, names.post_attention_norm);
        let normed = self.layer_norm(layer, names.ffn_norm, &hidden);
        let branch = self.feed_forward(layer, &normed);
        (self.add_branch(layer, &hidden, &branch, names.post_ffn_norm), present)
    }

    fn add_branch(&mut self, layer: usize, hidden: &Value, branch: &Value, norm: &str) -> Value {
        let normed = self.c.post_norms.then(|| self.layer_norm(layer, norm, branch));
        self.g.enter(scope(self.c, layer, ""));
        self.g.op("Add", &[hidden, normed.as_ref().unwrap_or(branch)])
    }

    fn attention(
        &mut self,
        layer: usize,
        x: &Value,
        past: &[Value; 2],
        common: &Common,
    ) -> (Value, [Value; 2]) {
        let c = self.c;
        let names = c.names;
        let LayerConfig { rope, window } = c.layers[layer];
        let (heads, kv_heads, size) = (c.heads as i64, c.kv_heads as i64, c.head_size as i64);
        let [q, k, v] = self.linears(layer, x, [names.q, names.k, names.v]);
        let q = self.heads(layer, &q, heads, c.head_norms.then_some(names.q_norm));
        let k = self.heads(layer, &k, kv_heads, c.head_norms.then_some(names.k_norm));
        let v = self.heads(layer, &v, kv_heads, None);

        self.g.enter(scope(c, layer, "self_attn"));
        let (q, k) =
            (self.rotated(&q, &common.angles[rope]), self.rotated(&k, &common.angles[rope]));
        let g = &mut *self.g;
        let keys = g.op_with("Concat", &[&past[0], &k], &[("axis", Int(2))]);
        let values = g.op_with("Concat", &[&past[1], &v], &[("axis", Int(2))]);
        // The queries of all heads that share keys, one after another: [b, kv heads, g s, d].
        let shape = g.ints(&[0, kv_heads, -1, size]);
        let grouped = g.op("Reshape", &[&q, &shape]);
        let turned = g.op_with("Transpose", &[&keys], &[("perm", Ints(&[0, 1, 3, 2]))]);
        let scores = g.op("MatMul", &[&grouped, &turned]);
        let scale = g.float(c.attention_scale);
        let scores = g.op("Mul", &[&scores, &scale]);
        let (by_head, rest) = (g.ints(&[0, heads]), g.ints(&[-1]));
        let axis = [("axis", Int(0))];
        let shape = g.op_with("Concat", &[&by_head, &common.tokens, &rest], &axis);
        let scores = g.op("Reshape", &[&scores, &shape]);
        let masks = &common.masks;
        let (_, mask) = masks.iter().find(|(w, _)| *w == window).expect("every width has a mask");
        let scores = g.op("Add", &[&scores, mask]);
        let shares = g.op_with("Softmax", &[&scores], &[("axis", Int(3))]);
        let by_group = g.ints(&[0, kv_heads, -1]);
        let shape = g.op_with("Concat", &[&by_group, &common.total], &axis);
        let shares = g.op("Reshape", &[&shares, &shape]);
        let attended = g.op("MatMul", &[&shares, &values]);
        let shape = g.ints(&[0, heads, -1, size]);
        let attended = g.op("Reshape", &[&attended, &shape]);
        let attended = g.op_with("Transpose", &[&attended], &[("perm", Ints(&[0, 2, 1, 3]))]);
        let shape = g.ints(&[0, 0, heads * size]);
        let mut attended = g.op("Reshape", &[&attended, &shape]);
        if c.sub_norms {
            attended = self.layer_norm(layer, names.attention_sub_norm, &attended);
        }
        let [branch] = self.linears(layer, &attended, [names.o]);
        (branch, [keys, values])
    }

    /// `[b, s, h d]` to `[b, h, s, d]`, each head normed by itself if there is a norm.
    fn heads(&mut self, layer: usize, x: &Value, heads: i64, norm: Option<&str>) -> Value {
        self.g.enter(scope(self.c, layer, "self_attn"));
        let shape = self.g.ints(&[0, 0, heads, self.c.head_size as i64]);
        let mut x = self.g.op("Reshape", &[x, &shape]);
        if let Some(norm) = norm {
            x = self.layer_norm(layer, norm, &x);
            self.g.enter(scope(self.c, layer, "self_attn"));
        }
        self.g.op_with("Transpose", &[&x], &[("perm", Ints(&[0, 2, 1, 3]))])
    }

    /// Rotates element `i` of each head with element `i + d/2`.
    fn rotated(&mut self, x: &Value, (cos, sin): &(Value, Value)) -> Value {
        let g = &mut *self.g;
        let halves = [("axis", Int(3)), ("num_outputs", Int(2))];
        let [first, second] = g.outputs_of("Split", &[x], &halves);
        let mut product = |a: &Value, b: &Value| g.op("Mul", &[a, b]);
        let (a, b) = (product(&first, cos), product(&second, sin));
        let (c, d) = (product(&second, cos), product(&first, sin));
        let (first, second) = (g.op("Sub", &[&a, &b]), g.op("Add", &[&c, &d]));
        g.op_with("Concat", &[&first, &second], &[("axis", Int(3))])
    }

    fn feed_forward(&mut self, layer: usize, x: &Value) -> Value {
        let names = self.c.names;
        let [gate, up] = self.linears(layer, x, [names.gate, names.up]);
        self.g.enter(scope(self.c, layer, "mlp"));
        let gate = self.activation(&gate);
        let mut gated = self.g.op("Mul", &[&gate, &up]);
        if self.c.sub_norms {
            gated = self.layer_norm(layer, names.ffn_sub_norm, &gated);
        }
        let [branch] = self.linears(layer, &gated, [names.down]);
        branch
    }

    fn activation(&mut self, x: &Value) -> Value {
        match self.c.activation {
            Activation::Relu2 => {
                let positive = self.g.op("Relu", &[x]);
                self.g.op("Mul", &[&positive, &positive])
            }
            Activation::Silu => {
                let gate = self.g.op("Sigmoid", &[x]);
                self.g.op("Mul", &[x, &gate])
            }
            Activation::GeluTanh => {
                // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
                let square = self.g.op("Mul", &[x, x]);
                let cube = self.g.op("Mul", &[&square, x]);
                let cube = self.scaled(&cube, 0.044_715);
                let sum = self.g.op("Add", &[x, &cube]);
                let inner = self.scaled(&sum, (2.0 / std::f64::consts::PI).sqrt() as f32);
                let tanh = self.g.op("Tanh", &[&inner]);
                let one = self.g.float(1.0);
                let twice = self.g.op("Add", &[&tanh, &one]);
                let half = self.scaled(x, 0.5);
                self.g.op("Mul", &[&half, &twice])
            }
        }
    }

    fn scaled(&mut self, x: &Value, factor: f32) -> Value {
        let factor = self.g.float(factor);
        self.g.op("Mul", &[x, &factor])
    }

    /// One of the model's own norms in a layer.
    fn layer_norm(&mut self, layer: usize, name: &str, x: &Value) -> Value {
        self.g.enter(scope(self.c, layer, &name.replace('.', "/")));
        let weight = self.w.norms[&full_name(self.c, layer, name)].clone();
        self.rms_norm(x, &weight, self.c.norm_eps, self.c.norm_offset)
    }

    /// `(weight + offset) (x / sqrt(mean x^2 + eps))`
    fn rms_norm(&mut self, x: &Value, weight: &Value, eps: f32, offset: f32) -> Value {
        let g = &mut *self.g;
        let square = g.op("Mul", &[x, x]);
        let last = g.ints(&[-1]);
        let mean = g.op("ReduceMean", &[&square, &last]);
        let eps = g.float(eps);
        let sum = g.op("Add", &[&mean, &eps]);
        let root = g.op("Sqrt", &[&sum]);
        let inverse = g.op("Reciprocal", &[&root]);
        let normed = g.op("Mul", &[x, &inverse]);
        let mut weight = weight.clone();
        if offset != 0.0 {
            let offset = g.float(offset);
            weight = g.op("Add", &[&weight, &offset]);
        }
        g.op("Mul", &[&weight, &normed])
    }

    /// Linear layers with one input, which is rounded once unless each has a norm of its own.
    fn linears<const N: usize>(&mut self, layer: usize, x: &Value, names: [&str; N]) -> [Value; N] {
        let eps = self.c.projection_norm_eps;
        let mut shared = None;
        names.map(|name| {
            let module = full_name(self.c, layer, name);
            self.g.enter(scope(self.c, layer, &name.replace('.', "/")));
            let matrix = &self.w.matrices[&module];
            if let Some(eps) = eps {
                let norm = &self.w.norms[&format!("{module}{}", self.c.names.projection_norm)];
                let normed = self.rms_norm(x, norm, eps, 0.0);
                let mut input = self.input(&normed);
                return self.linear(&mut input, matrix);
            }
            let input = shared.get_or_insert_with(|| self.input(x));
            self.linear(input, matrix)
        })
    }

    /// An input as linear layers take it: rounded to int8 per token, or as it is.
    fn input(&mut self, x: &Value) -> Input {
        if self.precision == ActivationPrecision::F32 {
            return Input { values: x.clone(), scale: None, filled: Vec::new() };
        }
        let g = &mut *self.g;
        let absolute = g.op("Abs", &[x]);
        let last = g.ints(&[-1]);
        let largest = g.op("ReduceMax", &[&absolute, &last]);
        let least = g.float(1e-5);
        let largest = g.op("Max", &[&largest, &least]);
        let steps = g.float(127.0);
        let scale = g.op("Div", &[&steps, &largest]);
        let product = g.op("Mul", &[x, &scale]);
        // Nothing is to be clamped: no product is 127.5 or more.
        let values = g.op("Round", &[&product]);
        Input { values, scale: Some(scale), filled: Vec::new() }
    }

    /// Values `[b, s, cols]` in blocks that have room for more: `fill` in what is left of each, which
    /// meets the weight zero.
    fn filled_up(&mut self, values: &Value, blocks: Blocks, cols: usize, fill: f32) -> Value {
        let g = &mut *self.g;
        let count = blocks.per_row(cols);
        let missing = (count * blocks.cols - cols) as i64;
        let (count, block_cols, len) = (count as i64, blocks.cols as i64, blocks.len as i64);
        let mut values = values.clone();
        if missing > 0 {
            let pads = g.ints(&[0, 0, 0, 0, 0, missing]);
            values = g.op("Pad", &[&values, &pads]);
        }
        let shape = g.ints(&[0, 0, count, block_cols]);
        let in_blocks = g.op("Reshape", &[&values, &shape]);
        let pads = g.ints(&[0, 0, 0, 0, 0, 0, 0, len - block_cols]);
        let fill = g.float(fill);
        let filled = g.op("Pad", &[&in_blocks, &pads, &fill]);
        let shape = g.ints(&[0, 0, count * len]);
        g.op("Reshape", &[&filled, &shape])
    }

    fn linear(&mut self, input: &mut Input, matrix: &Matrix) -> Value {
        let Matrix { rows, cols, blocks, .. } = *matrix;
        let mut values = input.values.clone();
        let mut texts = Vec::new();
        let mut k = cols;
        if blocks.cols < blocks.len {
            k = blocks.per_row(cols) * blocks.len;
            texts = vec![(COLUMNS, cols.to_string()), (BLOCK_COLUMNS, blocks.cols.to_string())];
            let known = input.filled.iter().find(|(other, _)| *other == blocks);
            values = match known {
                Some((_, filled)) => filled.clone(),
                None => {
                    let fill = if matrix.is_for_int8() { 127.0 } else { 0.0 };
                    let filled = self.filled_up(&values, blocks, cols, fill);
                    input.filled.push((blocks, filled.clone()));
                    filled
                }
            };
        }
        if let Scale::Blocks(cols) = matrix.scale {
            texts.push((SCALE_COLUMNS, cols.to_string()));
        }
        let g = &mut *self.g;
        let attributes = [
            ("K", Int(k as u64)),
            ("N", Int(rows as u64)),
            ("bits", Int(blocks.bits as u64)),
            ("block_size", Int(blocks.len as u64)),
            // 4 rounds inputs to int8 block by block, 1 leaves them in f32.
            ("accuracy_level", Int(if matrix.is_for_int8() { 4 } else { 1 })),
        ];
        let operands = [&values, &matrix.codes, &matrix.block_scales];
        let sums = g.microsoft_op("MatMulNBits", &operands, &attributes, &texts);
        match (&input.scale, &matrix.scale) {
            (None, Scale::Multiply(scale)) => g.op("Mul", &[&sums, scale]),
            (None, Scale::Divide(scale)) => g.op("Div", &[&sums, scale]),
            (None, Scale::Blocks(_)) => sums,
            (Some(input_scale), Scale::Multiply(scale)) => {
                let product = g.op("Div", &[&sums, input_scale]);
                g.op("Mul", &[&product, scale])
            }
            (Some(input_scale), Scale::Divide(scale)) => {
                let both = g.op("Mul", &[input_scale, scale]);
                g.op("Div", &[&sums, &both])
            }
            (Some(input_scale), Scale::Blocks(_)) => g.op("Div", &[&sums, input_scale]),
        }
    }

    /// What `with` makes of a table, as f32.
    fn table(&mut self, name: &str, with: impl FnOnce(&mut Self, &Value) -> Value) -> Value {
        let (table, dtype) = &self.w.tables[name];
        let value = with(self, table);
        match dtype {
            DType::F32 => value,
            _ => self.g.op_with("Cast", &[&value], &[("to", Int(1))]),
        }
    }

    /// `states · headᵀ`
    fn head(&mut self, states: &Value, ids: &Value, vocabulary: usize) -> Value {
        let c = self.c;
        let name =
            if self.w.tables.contains_key(c.names.head) { c.names.head } else { c.names.embedding };
        self.g.enter("/lm_head");
        let table = self.table(name, |_, table| table.clone());
        let g = &mut *self.g;
        let shape = g.ints(&[-1, c.hidden_size as i64]);
        let rows = g.op("Reshape", &[states, &shape]);
        let logits = g.op_with("Gemm", &[&rows, &table], &[("transB", Int(1))]);
        let (tokens, vocabulary) = (g.op("Shape", &[ids]), g.ints(&[vocabulary as i64]));
        let shape = g.op_with("Concat", &[&tokens, &vocabulary], &[("axis", Int(0))]);
        g.op("Reshape", &[&logits, &shape])
    }
}

/// The full name of a layer's module.
fn full_name(config: &ModelConfig, layer: usize, name: &str) -> String {
    format!("{}.{layer}.{name}", config.names.layer)
}

/// Where the nodes of a layer's module are.
fn scope(config: &ModelConfig, layer: usize, module: &str) -> String {
    let layer = format!("/model/{}.{layer}", config.names.layer);
    if module.is_empty() { layer } else { format!("{layer}/{module}") }
}
