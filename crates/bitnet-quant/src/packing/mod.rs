//! How weights are packed in files, and back. Written for reading and checking, not for kernels:
//! every packing becomes the neutral [`TernaryMatrix`], the numbers of embeddings become f32
//! ([`blocks`]).
//!
//! | packing | weights per block | scale | where |
//! |---|---|---|---|
//! | transformers' packed uint8 | rows by quarters of the matrix, in bit pairs | one tensor beside it | [`hf`] |
//! | `I2_S` | 128 in 32 bytes, over the whole tensor | one f32 after the codes | [`i2_s`] |
//! | `TQ1_0` | 256 in 52 bytes, base 3 | one f16 per block | [`tq`] |
//! | `TQ2_0` | 256 in 64 bytes | one f16 per block | [`tq`] |
//! | `Q2_0` | 64 (or 128) in 16 (32) bytes | one f16 per block | [`q2_0`] |
//! | `MatMulNBits` | 2, 4 or 8 bits each, in blocks of columns | apart, one f32 per block | [`nbits`] |
//! | kernel tiles | 16 x 16 in 64 bytes | beside them | [`tile`] |
//!
//! All store a weight `w` as the code `w + 1`. A fourth code fits into two bits and is no ternary
//! weight: it is refused with its place.

pub mod blocks;
pub mod hf;
pub mod i2_s;
pub mod nbits;
pub mod q2_0;
pub mod tile;
pub mod tq;

use std::ops::Range;

use bitnet_core::{DType, Error, Tensor, TernaryMatrix, WeightScale};
use half::f16;

use blocks::f16_to_f32;
use i2_s::I2sLayout;

/// Decodes a tensor of one of GGUF's ternary types ([`DType::is_ternary`]); all extents but the
/// innermost become rows. `i2s` is the layout of `I2_S` tensors, which does not stand in the file.
///
/// Block formats give [`WeightScale::Groups`], or [`WeightScale::Rows`] or
/// [`WeightScale::Multiply`] where the blocks of each row, or of the whole matrix, share one scale.
///
/// # Errors
/// If the type is not ternary, the tensor is empty or does not fill whole blocks, a code is 3, or a scale
/// is not finite.
pub fn decode_ternary(tensor: &Tensor, i2s: I2sLayout) -> Result<TernaryMatrix, Error> {
    match (tensor.dtype(), BlockPacking::of(tensor.dtype())) {
        (DType::I2S, _) => i2_s::decode(tensor, i2s),
        (_, Some(packing)) => packing.decode(tensor),
        (found, None) => Err(Error::TensorType { found, expected: "a ternary type" }),
    }
}

/// Encodes a matrix as one of GGUF's ternary types: the inverse of [`decode_ternary`], with `I2_S` in
/// its usual layout ([`I2sLayout::X86`]).
///
/// A scale that divides is stored as its reciprocal. The block formats round scales to f16 and
/// give blocks without a nonzero weight the scale 0, as ggml's quantisers do.
///
/// # Errors
/// If the type is not ternary, the matrix does not fill whole blocks, or its scales cannot be
/// stored: several within a block, or outside the range of f16.
pub fn encode_ternary(matrix: &TernaryMatrix, dtype: DType) -> Result<Vec<u8>, Error> {
    match (dtype, BlockPacking::of(dtype)) {
        (DType::I2S, _) => i2_s::encode(matrix),
        (_, Some(packing)) => packing.encode(matrix, dtype),
        (found, None) => Err(Error::TensorType { found, expected: "a ternary type" }),
    }
}

/// A format of blocks that each hold ternary codes and one f16 scale.
struct BlockPacking {
    /// Byte offset of the scale in a block.
    scale_at: usize,
    /// Byte offset of the codes, which fill the rest of the block.
    codes_at: usize,
    /// Code bytes of one block to its codes.
    decode: fn(&[u8], &mut [u8]),
    /// Codes of one block to its code bytes, which come zeroed.
    encode: fn(&[u8], &mut [u8]),
}

impl BlockPacking {
    fn of(dtype: DType) -> Option<&'static BlockPacking> {
        match dtype {
            DType::Tq1_0 => Some(&tq::TQ1_0),
            DType::Tq2_0 => Some(&tq::TQ2_0),
            DType::Q2_0 | DType::Q2_0Wide => Some(&q2_0::PACKING),
            _ => None,
        }
    }

    fn scale(&self, block: &[u8]) -> f32 {
        f16_to_f32([block[self.scale_at], block[self.scale_at + 1]])
    }

    /// The code bytes of a block.
    fn code_bytes(&self, size: usize) -> Range<usize> {
        if self.scale_at < self.codes_at { self.codes_at..size } else { 0..self.scale_at }
    }

    fn decode_codes(&self, block: &[u8], codes: &mut [u8]) {
        (self.decode)(&block[self.code_bytes(block.len())], codes);
    }

    /// The values `(code - 1) * scale` of a block.
    fn values(&self, block: &[u8], out: &mut [f32]) {
        let scale = self.scale(block);
        let mut codes = [0; 256];
        let codes = &mut codes[..out.len()];
        self.decode_codes(block, codes);
        for (value, &code) in out.iter_mut().zip(codes.iter()) {
            *value = f32::from(code as i8 - 1) * scale;
        }
    }

    fn decode(&self, tensor: &Tensor) -> Result<TernaryMatrix, Error> {
        let (rows, cols) = extents(tensor)?;
        let (len, size) = (tensor.dtype().block_len(), tensor.dtype().block_bytes());
        let block = |index: usize| &tensor.data()[index * size..(index + 1) * size];
        let scales: Vec<f32> =
            tensor.data().chunks_exact(size).map(|block| self.scale(block)).collect();
        let is_zero = |index: usize| {
            let mut codes = [0; 256];
            self.decode_codes(block(index), &mut codes[..len]);
            codes[..len].iter().all(|&code| code == 1)
        };
        let scale = merge_scales(rows, len, scales, is_zero);
        TernaryMatrix::from_rows(rows, cols, scale, |row, codes| {
            let blocks = tensor.row(row).chunks_exact(size);
            for (block, codes) in blocks.zip(codes.chunks_exact_mut(len)) {
                self.decode_codes(block, codes);
            }
        })
    }

    fn encode(&self, matrix: &TernaryMatrix, dtype: DType) -> Result<Vec<u8>, Error> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let (len, size) = (dtype.block_len(), dtype.block_bytes());
        let mut bytes = vec![0; byte_len(matrix, dtype)?];
        let mut codes = vec![0; cols];
        let row_size = cols / len * size;
        for row in 0..rows {
            unpack_row(matrix, row, &mut codes);
            let row_bytes = &mut bytes[row * row_size..][..row_size];
            for (index, block) in row_bytes.chunks_exact_mut(size).enumerate() {
                let span = index * len..(index + 1) * len;
                let codes = &codes[span.clone()];
                if codes.iter().any(|&code| code != 1) {
                    let scale = half_scale(matrix, row, span)?;
                    block[self.scale_at..self.scale_at + 2].copy_from_slice(&scale.to_le_bytes());
                }
                (self.encode)(codes, &mut block[self.code_bytes(size)]);
            }
        }
        Ok(bytes)
    }
}

/// Merges the scales of groups, `[rows, groups per row]`, into one per row or one for the matrix
/// where that changes no weight. A group without a nonzero weight has no say: quantisers give it
/// the scale 0, or anything.
fn merge_scales(
    rows: usize,
    len: usize,
    scales: Vec<f32>,
    is_zero: impl Fn(usize) -> bool,
) -> WeightScale {
    // Kept as they are, so that the matrix's own check finds and names the value.
    if scales.iter().any(|scale| !scale.is_finite()) {
        return WeightScale::Groups { len, values: scales };
    }
    let shared = |groups: Range<usize>| {
        let mut shared = None;
        for group in groups {
            let scale = scales[group];
            let same = shared.is_some_and(|shared: f32| shared.to_bits() == scale.to_bits());
            if !same && !is_zero(group) && shared.replace(scale).is_some() {
                return None;
            }
        }
        Some(shared.unwrap_or(0.0))
    };
    if let Some(scale) = shared(0..scales.len()) {
        return WeightScale::Multiply(scale);
    }
    let per_row = scales.len() / rows;
    let by_row = (0..rows).map(|row| shared(row * per_row..(row + 1) * per_row)).collect();
    match by_row {
        Some(values) => WeightScale::Rows(values),
        None => WeightScale::Groups { len, values: scales },
    }
}

/// The factor on the weights of some columns of a row, rounded to f16.
fn half_scale(matrix: &TernaryMatrix, row: usize, cols: Range<usize>) -> Result<f16, Error> {
    let unusable = |reason| scale_error(matrix, reason);
    let scale = match matrix.scale() {
        WeightScale::Multiply(scale) => *scale,
        WeightScale::Divide(scale) => 1.0 / scale,
        WeightScale::Rows(values) => values[row],
        WeightScale::Groups { len, values } => {
            let groups = &values[row * (matrix.cols() / len)..][cols.start / len..];
            let groups = &groups[..cols.end.div_ceil(*len) - cols.start / len];
            if groups.iter().any(|scale| scale.to_bits() != groups[0].to_bits()) {
                return Err(unusable(format!(
                    "groups of {len} columns have different scales within a block of {}",
                    cols.len()
                )));
            }
            groups[0]
        }
    };
    let half = f16::from_f32(scale);
    if !half.is_finite() || (half == f16::ZERO && scale != 0.0) {
        return Err(unusable(format!("{scale:e} is outside the range of f16")));
    }
    Ok(half)
}

fn scale_error(matrix: &TernaryMatrix, reason: String) -> Error {
    Error::WeightScale { rows: matrix.rows(), cols: matrix.cols(), reason }
}

fn shape_error(tensor: &Tensor, reason: impl Into<String>) -> Error {
    let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
    Error::TensorShape { dtype, shape, reason: reason.into() }
}

/// Rows and columns of a tensor that is to be a matrix. Emptiness is refused: an extent of zero
/// lets the others be as large as a hostile file likes.
fn extents(tensor: &Tensor) -> Result<(usize, usize), Error> {
    match (tensor.rows(), tensor.cols()) {
        (0, _) | (_, 0) => Err(shape_error(tensor, "it has no elements")),
        extents => Ok(extents),
    }
}

/// Bytes of a matrix in a format, or why it does not fit its blocks.
fn byte_len(matrix: &TernaryMatrix, dtype: DType) -> Result<usize, Error> {
    let shape = vec![matrix.rows(), matrix.cols()];
    dtype.byte_len(&shape).map_err(|reason| Error::TensorShape { dtype, shape, reason })
}

/// The codes of one row, one byte each.
fn unpack_row(matrix: &TernaryMatrix, row: usize, codes: &mut [u8]) {
    let (whole, rest) = codes.as_chunks_mut::<4>();
    let packed = matrix.packed_row(row);
    spread(packed, whole.as_flattened_mut());
    for (l, code) in rest.iter_mut().enumerate() {
        *code = (packed[whole.len()] >> (2 * l)) & 3;
    }
}

/// Codes from bytes that hold four each, the first in the low bits: the rows of
/// [`TernaryMatrix`], and the blocks of `Q2_0`.
fn spread(bytes: &[u8], codes: &mut [u8]) {
    for (four, &byte) in codes.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
        // One 32-bit word, so that the loop becomes vector code.
        let byte = u32::from(byte);
        *four = ((byte | byte << 6 | byte << 12 | byte << 18) & 0x0303_0303).to_le_bytes();
    }
}
