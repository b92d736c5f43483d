//! The seam between the decoder and whatever computes: the trait [`Backend`].
//!
//! A backend owns device memory. The decoder (`bitnet-model`) is written once, generic over it,
//! and calls operations that are coarse enough to fuse. Required operations are the small ones;
//! the coarse ones have default bodies built from them, which a backend overrides where that
//! pays. An operation either computes its result or does not exist: no stand-ins.
//!
//! Operations are infallible as far as the host can see: shapes are fixed when weights and buffers
//! are made, and breaking them is a bug that panics. A device that can be lost in flight reports it
//! from [`Backend::read`].

use std::ops::Range;

use crate::error::Error;
use crate::mmap::WeightBytes;
use crate::profile::OperationProfile;
use crate::screen::{Candidate, Pick, Screen};
use crate::shortcuts::ShortcutCounts;
use crate::tensor::Tensor;
use crate::ternary::{LinearUse, TernaryMatrix, TiledMatrix};

/// The non-linearity of a gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)²`: BitNet b1.58 2B-4T.
    Relu2,
    /// `x * sigmoid(x)`: Llama, Qwen, 1bitLLM.
    Silu,
    /// GELU by tanh: Gemma.
    GeluTanh,
}

/// Whether a linear layer rounds its input to int8 per token before multiplying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationPrecision {
    /// Absmax int8 per token, `127 / max(absmax, 1e-5)`: BitNet.
    Int8,
    /// The f32 input itself: models whose weights alone are ternary (TriLM, Ternary-Bonsai).
    F32,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Exact: what the reference computes with.
    F32,
    /// Rounded once on writing; what would become infinite becomes the largest finite number.
    F16,
    /// Rounded once on writing, with one f32 scale per token and head.
    Int8,
}

impl KvType {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Int8 => "int8",
        }
    }
}

/// Extents of a KV store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads per layer.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_size: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Storage type.
    pub kv_type: KvType,
}

impl KvLayout {
    /// Bytes of one block: keys and values of `block_tokens` tokens in every layer.
    pub fn block_bytes(&self) -> usize {
        let head_bytes = match self.kv_type {
            KvType::F32 => 4 * self.head_size,
            KvType::F16 => 2 * self.head_size,
            KvType::Int8 => self.head_size + 4,
        };
        2 * self.layers * self.kv_heads * self.block_tokens * head_bytes
    }
}

/// One sequence's rows in a step: consecutive tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Span<'a> {
    /// Rows of the step's buffers that belong to this sequence.
    pub rows: Range<usize>,
    /// Position in the sequence of the first of those rows.
    pub position: usize,
    /// The sequence's block table: token `t` is token `t % block_tokens` of block
    /// `blocks[t / block_tokens]`.
    pub blocks: &'a [u32],
}

/// What attention needs to know besides its tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of the store's `kv_heads`. Query head `h` reads key/value head
    /// `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Factor on `q · k` before the softmax.
    pub scale: f32,
    /// A token sees itself and the `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
}

/// A loaded weight, which takes memory.
pub trait Weigh {
    /// How much it takes.
    fn weight_bytes(&self) -> WeightBytes;
}

impl Weigh for Vec<f32> {
    fn weight_bytes(&self) -> WeightBytes {
        WeightBytes { mapped: 0, own: size_of_val(&self[..]) as u64 }
    }
}

impl Weigh for Tensor {
    fn weight_bytes(&self) -> WeightBytes {
        WeightBytes::of(self.data())
    }
}

/// What a backend does without.
impl Weigh for () {
    fn weight_bytes(&self) -> WeightBytes {
        WeightBytes::default()
    }
}

impl Weigh for Screen {
    fn weight_bytes(&self) -> WeightBytes {
        WeightBytes::of(self.data())
    }
}

/// An RMSNorm: weight and epsilon.
pub struct Norm<B: Backend> {
    /// Weight, one per element.
    pub weight: B::Vector,
    /// Added to the mean square.
    pub eps: f32,
}

/// A ternary linear layer, with the norm that some models put before each of them.
pub struct BitLinear<B: Backend> {
    /// The matrix.
    pub weight: B::Linear,
    /// Norm of this layer's own input (`use_rms_norm` in Falcon-E, `*_norm_in` in embedding
    /// models), applied after any shared norm.
    pub norm: Option<Norm<B>>,
}

impl<B: Backend> Weigh for Norm<B> {
    fn weight_bytes(&self) -> WeightBytes {
        self.weight.weight_bytes()
    }
}

impl<B: Backend> Weigh for BitLinear<B> {
    fn weight_bytes(&self) -> WeightBytes {
        let norm = self.norm.iter().map(Norm::weight_bytes);
        norm.chain([self.weight.weight_bytes()]).sum()
    }
}

/// A gated feed-forward network: `down(sub_norm(activation(gate(x)) * up(x)))`.
pub struct GatedFfn<B: Backend> {
    /// `[intermediate, hidden]`, goes through the activation.
    pub gate: BitLinear<B>,
    /// `[intermediate, hidden]`.
    pub up: BitLinear<B>,
    /// `[hidden, intermediate]`.
    pub down: BitLinear<B>,
    /// Applied to the gate.
    pub activation: Activation,
    /// Norm over the intermediate values before `down` (BitNet's sub-norm).
    pub sub_norm: Option<Norm<B>>,
}

/// Buffers that composed operations need between their parts. Made once per decoder.
pub struct Scratch<B: Backend> {
    /// Room for the widest input of a linear layer.
    pub normed: B::Buffer,
    /// Room for `[rows, intermediate]`.
    pub gate: B::Buffer,
    /// Room for `[rows, intermediate]`.
    pub up: B::Buffer,
}

/// Computes the operations of a decoder in some memory.
///
/// Buffers hold f32 activations `[rows, cols]`, row after row. An operation works on the first
/// `rows` rows of its buffers, so that one allocation serves steps of every size; the width of a
/// buffer's rows is what the operation that last wrote it produces. Every row's result depends on
/// that row alone (and, in attention, on the keys and values of its own
/// sequence): batching and chunking never change a bit.
#[allow(clippy::too_many_arguments)] // an operation names its operands
pub trait Backend: Send + Sync + Sized + 'static {
    /// f32 activations.
    type Buffer: Send;
    /// A loaded f32 vector: the weight of a norm.
    type Vector: Weigh + Send + Sync;
    /// A loaded ternary matrix in the layout of this backend's kernels.
    type Linear: Weigh + Send + Sync;
    /// A loaded embedding or output-head matrix `[vocabulary, hidden]`, stored as in the file.
    type Table: Weigh + Send + Sync;
    /// A loaded reduced-precision copy of an output head.
    type Screen: Weigh + Send + Sync;
    /// Key/value blocks.
    type Kv: Send;

    /// Name for people, for instance `cpu (avx2, 2 threads)`.
    fn name(&self) -> String;
    /// Another backend on the same device, which computes at the same time as this one, with the
    /// weights that this one loaded. Shortcuts are counted together.
    ///
    /// # Errors
    /// If the device cannot serve two at once.
    fn replica(&self) -> Result<Self, Error>;
    /// What shortcuts have saved so far; all zero for a backend that takes none.
    fn shortcut_counts(&self) -> ShortcutCounts {
        ShortcutCounts::default()
    }
    /// What each kind of operation has cost so far, in the order in which they first ran; empty for a
    /// backend that keeps no such books, or was not asked to.
    fn profile(&self) -> Vec<OperationProfile> {
        Vec::new()
    }

    // Memory.

    /// Loads the weight of a norm.
    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, Error>;
    /// Loads a ternary matrix whose inputs are taken in the given precision.
    fn load_linear(
        &self,
        matrix: &TernaryMatrix,
        precision: ActivationPrecision,
        usage: LinearUse,
    ) -> Result<Self::Linear, Error>;
    /// Loads a matrix that already lies in tiles. A mapped one stays mapped where the layout suits
    /// the backend.
    ///
    /// # Errors
    /// If the bytes do not fill the shape.
    fn load_tiled(
        &self,
        matrix: &TiledMatrix,
        precision: ActivationPrecision,
    ) -> Result<Self::Linear, Error>;
    /// Loads an embedding or head: F32, F16, BF16, Q8_0, Q4_K or Q6_K `[vocabulary, hidden]`.
    /// A mapped tensor stays mapped.
    fn load_table(&self, table: &Tensor) -> Result<Self::Table, Error>;
    /// Loads the screen of an output head; `None` where this backend takes no such shortcut. A
    /// mapped one stays mapped.
    fn load_screen(&self, screen: &Screen) -> Result<Option<Self::Screen>, Error>;
    /// Whether a screen is to be made for a head that comes without one.
    fn wants_screen(&self) -> bool {
        false
    }
    /// A zeroed buffer with room for `rows` rows of `cols` elements.
    fn buffer(&self, rows: usize, cols: usize) -> Result<Self::Buffer, Error>;
    /// Copies `values` to the start of a buffer, as rows of `cols`.
    fn write(&self, buffer: &mut Self::Buffer, cols: usize, values: &[f32]);
    /// Copies the first `rows` rows of a buffer into `out`, waiting for the device first. An error
    /// here means that the device was lost.
    fn read(&self, buffer: &Self::Buffer, rows: usize, out: &mut Vec<f32>) -> Result<(), Error>;

    // Small operations.

    /// `out[i] = table[tokens[i]] * scale`.
    fn embed(&self, table: &Self::Table, tokens: &[u32], scale: f32, out: &mut Self::Buffer);
    /// `out[i] = norm(x[i])`.
    fn rms_norm(&self, x: &Self::Buffer, rows: usize, norm: &Norm<Self>, out: &mut Self::Buffer);
    /// RMSNorm of each head of `head_size` elements by itself, in place (Qwen3's q/k norms).
    fn head_norm(&self, x: &mut Self::Buffer, rows: usize, norm: &Norm<Self>, head_size: usize);
    /// `outs[j][i] = linears[j] · quantise(norm(x[i]))`: one shared norm and quantisation, any
    /// number of matrices. The linears' own norms are not looked at here (see
    /// [`project`](Backend::project)).
    fn linears(
        &self,
        x: &Self::Buffer,
        rows: usize,
        norm: Option<&Norm<Self>>,
        linears: &[&Self::Linear],
        outs: &mut [&mut Self::Buffer],
    );
    /// Rotates each head of `head_size` elements in place, element `i` with `i + head_size/2`.
    /// `cos` and `sin` are `[rows, head_size/2]`.
    fn rope(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        head_size: usize,
        cos: &Self::Buffer,
        sin: &Self::Buffer,
    );
    /// `gate = activation(gate) * up`, element by element. With [`Activation::Relu2`] that is +0
    /// wherever `gate <= 0`, whatever `up` is.
    fn gate(&self, gate: &mut Self::Buffer, up: &Self::Buffer, rows: usize, activation: Activation);
    /// `x += y`.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, rows: usize);
    /// `out[j] = table · norm(x[picks[j]])`: logits `[picks, vocabulary]` of chosen rows.
    fn head(
        &self,
        x: &Self::Buffer,
        picks: &[usize],
        norm: &Norm<Self>,
        table: &Self::Table,
        out: &mut Self::Buffer,
    );
    /// The logits of chosen rows of `x` that can matter, exactly as [`head`](Backend::head) gives
    /// them: those of `picks[j]` in `outs[j]`, in ascending order of ids. `screen` was made from
    /// `table`. An error means that the device was lost.
    fn screened_head(
        &self,
        x: &Self::Buffer,
        picks: &[Pick<'_>],
        norm: &Norm<Self>,
        table: &Self::Table,
        screen: &Self::Screen,
        outs: &mut [Vec<Candidate>],
    ) -> Result<(), Error>;

    // Keys and values.

    /// Storage for `blocks` blocks.
    fn kv_allocate(&self, layout: KvLayout, blocks: usize) -> Result<Self::Kv, Error>;
    /// Copies whole blocks, `(from, to)`, in all layers.
    fn kv_copy(&self, kv: &mut Self::Kv, pairs: &[(u32, u32)]);
    /// The contents of blocks, in a layout that [`kv_import`](Backend::kv_import) of the same
    /// backend and [`KvLayout`] reads.
    fn kv_export(&self, kv: &Self::Kv, blocks: &[u32]) -> Result<Vec<u8>, Error>;
    /// Restores exported blocks into the blocks given.
    fn kv_import(&self, kv: &mut Self::Kv, blocks: &[u32], data: &[u8]) -> Result<(), Error>;
    /// Stores the keys and values `[rows, kv_heads * head_size]` of a step in one layer.
    fn kv_write(
        &self,
        kv: &mut Self::Kv,
        layer: usize,
        k: &Self::Buffer,
        v: &Self::Buffer,
        spans: &[Span<'_>],
    );
    /// Causal attention of one layer: queries and `out` are `[rows, heads * head_size]`, keys and
    /// values come from the store, the step's own included.
    fn attention(
        &self,
        shape: AttentionShape,
        layer: usize,
        q: &Self::Buffer,
        kv: &Self::Kv,
        spans: &[Span<'_>],
        out: &mut Self::Buffer,
    );

    // Coarse operations.

    /// `outs[j] = linears[j](norm(x))`, through each linear's own norm where it has one.
    fn project(
        &self,
        x: &Self::Buffer,
        rows: usize,
        norm: Option<&Norm<Self>>,
        linears: &[&BitLinear<Self>],
        outs: &mut [&mut Self::Buffer],
        normed: &mut Self::Buffer,
    ) {
        if linears.iter().all(|linear| linear.norm.is_none()) {
            // At most q, k and v share an input.
            let weights: [&Self::Linear; 3] =
                std::array::from_fn(|j| &linears[j.min(linears.len() - 1)].weight);
            return self.linears(x, rows, norm, &weights[..linears.len()], outs);
        }
        let x = match norm {
            Some(norm) => {
                self.rms_norm(x, rows, norm, normed);
                &*normed
            }
            None => x,
        };
        for (linear, out) in linears.iter().zip(outs) {
            self.linears(x, rows, linear.norm.as_ref(), &[&linear.weight], &mut [out]);
        }
    }

    /// `out = ffn(norm(x))`.
    fn gated_ffn(
        &self,
        x: &Self::Buffer,
        rows: usize,
        norm: Option<&Norm<Self>>,
        ffn: &GatedFfn<Self>,
        scratch: &mut Scratch<Self>,
        out: &mut Self::Buffer,
    ) {
        gated_ffn_by_parts(self, x, rows, norm, ffn, scratch, out);
    }
}

/// [`Backend::gated_ffn`] by the operations that it is made of: its default body, and what a
/// backend's own falls back to.
pub fn gated_ffn_by_parts<B: Backend>(
    backend: &B,
    x: &B::Buffer,
    rows: usize,
    norm: Option<&Norm<B>>,
    ffn: &GatedFfn<B>,
    scratch: &mut Scratch<B>,
    out: &mut B::Buffer,
) {
    let Scratch { normed, gate, up } = scratch;
    backend.project(x, rows, norm, &[&ffn.gate, &ffn.up], &mut [gate, up], normed);
    backend.gate(gate, up, rows, ffn.activation);
    backend.project(gate, rows, ffn.sub_norm.as_ref(), &[&ffn.down], &mut [out], normed);
}
