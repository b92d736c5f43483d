//! bitnet.cpp's `I2_S`: two bits per weight over the whole tensor as one flat run, then 32 bytes
//! that start with the f32 scale of the tensor.
//!
//! The usual layout, which every converter writes and bitnet.cpp on x86 reads, has blocks of 128
//! weights in 32 bytes: weight `32 l + m` of a block is bits `6 - 2 l` of byte `m`, so that the first
//! quarter is in the top bits. Blocks run on across the ends of rows. Two builds of bitnet.cpp's
//! quantiser write others under the same name, and nothing in the file tells them apart:
//! see [`I2sLayout`].
//!
//! No tool writes a last block that is not full (the converter fails, the quantiser leaves its weights
//! out), so there is no such block to read: it is refused.

use std::ops::Range;
use std::str::FromStr;

use bitnet_core::{DType, Error, Tensor, TernaryMatrix, WeightScale};

use super::{byte_len, extents, scale_error, shape_error, unpack_row};

/// Which build of bitnet.cpp wrote an `I2_S` tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum I2sLayout {
    /// Blocks of 128 weights in 32 bytes: all published files, converters everywhere, and the
    /// quantiser on x86.
    #[default]
    X86,
    /// Blocks of 64 weights in 16 bytes, weight `16 l + m` in bits `6 - 2 l` of byte `m`: the
    /// quantiser on ARM.
    Arm,
    /// Four rows to a byte, row `4 g + l` of column `c` in bits `6 - 2 l` of byte `g cols + c`:
    /// the quantiser on x86 built without `ACT_PARALLEL`.
    X86Rows,
}

/// A layout name that is none of `x86`, `arm`, `x86-rows`.
#[derive(Debug, thiserror::Error)]
#[error("unknown I2_S layout `{0}`: choose x86 (the usual one), arm or x86-rows")]
pub struct UnknownLayout(String);

impl FromStr for I2sLayout {
    type Err = UnknownLayout;

    fn from_str(name: &str) -> Result<Self, UnknownLayout> {
        match name {
            "x86" => Ok(I2sLayout::X86),
            "arm" => Ok(I2sLayout::Arm),
            "x86-rows" => Ok(I2sLayout::X86Rows),
            other => Err(UnknownLayout(other.to_owned())),
        }
    }
}

/// Decodes an `I2_S` tensor; all extents but the innermost become rows.
///
/// # Errors
/// If the tensor is of another type, is empty or does not fill whole blocks (for
/// [`I2sLayout::X86Rows`] whole groups of four rows), a code is 3, or the scale is not finite.
pub fn decode(tensor: &Tensor, layout: I2sLayout) -> Result<TernaryMatrix, Error> {
    if tensor.dtype() != DType::I2S {
        return Err(Error::TensorType { found: tensor.dtype(), expected: "I2_S" });
    }
    let (rows, cols) = extents(tensor)?;
    let block = match layout {
        I2sLayout::X86 => 128,
        I2sLayout::Arm => 64,
        I2sLayout::X86Rows if rows.is_multiple_of(4) => 1,
        I2sLayout::X86Rows => {
            return Err(shape_error(tensor, format!("{rows} rows do not make groups of four")));
        }
    };
    if !tensor.len().is_multiple_of(block) {
        return Err(shape_error(tensor, format!("its last block of {block} weights is not full")));
    }
    let (bytes, tail) = tensor.data().split_at(tensor.len() / 4);
    let scale = WeightScale::Multiply(f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    TernaryMatrix::from_rows(rows, cols, scale, |row, codes| match layout {
        I2sLayout::X86 => decode_run::<32>(bytes, row * cols, codes),
        I2sLayout::Arm => decode_run::<16>(bytes, row * cols, codes),
        I2sLayout::X86Rows => decode_quarter(&bytes[row / 4 * cols..][..cols], row % 4, codes),
    })
}

/// Codes `start ..` of the flat run of blocks with `BYTES` bytes.
fn decode_run<const BYTES: usize>(bytes: &[u8], start: usize, mut codes: &mut [u8]) {
    for (places, l) in pieces::<BYTES>(start, codes.len()) {
        let (piece, rest) = codes.split_at_mut(places.len());
        decode_quarter(&bytes[places], l, piece);
        codes = rest;
    }
}

/// Cuts `len` weights from flat index `start` on where a block's quarters begin. Gives the bytes
/// that each piece lies in, and its quarter `l`.
fn pieces<const BYTES: usize>(
    mut start: usize,
    len: usize,
) -> impl Iterator<Item = (Range<usize>, usize)> {
    let end = start + len;
    std::iter::from_fn(move || {
        let (quarter, m) = (start / BYTES, start % BYTES);
        let len = (BYTES - m).min(end - start);
        let first = quarter / 4 * BYTES + m;
        start += len;
        (len > 0).then_some((first..first + len, quarter % 4))
    })
}

/// The codes in bits `6 - 2 l` of every byte.
#[inline]
fn decode_quarter(bytes: &[u8], l: usize, codes: &mut [u8]) {
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = (byte >> (6 - 2 * l)) & 3;
    }
}

/// Encodes a matrix in the usual layout, [`I2sLayout::X86`]. A scale that divides is stored as its
/// reciprocal.
///
/// # Errors
/// If the weights do not fill whole blocks of 128, or have more than one scale.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, Error> {
    let scale = match matrix.scale() {
        WeightScale::Multiply(scale) => *scale,
        WeightScale::Divide(scale) => 1.0 / scale,
        WeightScale::Rows(_) | WeightScale::Groups { .. } => {
            return Err(scale_error(matrix, "I2_S holds one scale per matrix".to_owned()));
        }
    };
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut bytes = vec![0; byte_len(matrix, DType::I2S)?];
    let (packed, tail) = bytes.split_at_mut(rows * cols / 4);
    if !packed.len().is_multiple_of(32) {
        return Err(Error::TensorShape {
            dtype: DType::I2S,
            shape: vec![rows, cols],
            reason: "its last block of 128 weights is not full".to_owned(),
        });
    }
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    let mut codes = vec![0; cols];
    for row in 0..rows {
        unpack_row(matrix, row, &mut codes);
        let mut codes = &codes[..];
        for (places, l) in pieces::<32>(row * cols, cols) {
            let (piece, rest) = codes.split_at(places.len());
            for (byte, code) in packed[places].iter_mut().zip(piece) {
                *byte |= code << (6 - 2 * l);
            }
            codes = rest;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_chosen_by_name() {
        assert_eq!("x86".parse::<I2sLayout>().unwrap(), I2sLayout::default());
        assert_eq!("arm".parse::<I2sLayout>().unwrap(), I2sLayout::Arm);
        assert_eq!("x86-rows".parse::<I2sLayout>().unwrap(), I2sLayout::X86Rows);
        let error = "neon".parse::<I2sLayout>().unwrap_err().to_string();
        assert!(error.contains("`neon`") && error.contains("x86-rows"), "{error}");
    }
}
