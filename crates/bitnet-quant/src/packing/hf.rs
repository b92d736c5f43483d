//! transformers' packed uint8 (`pack_weights` in `integrations/bitnet.py`): a matrix of N rows and
//! K columns in `[R, K]` bytes, `R = ceil(N / 4)`. Row `r` is in packed row `r mod R` at bits
//! `2 (r / R)`: the first quarter of the rows in the low bits, the last in the top ones. Columns stay
//! where they are. The bits of rows past the last are 0.

use bitnet_core::{DType, Error, Tensor, TernaryMatrix, WeightScale};

use super::{extents, shape_error, unpack_row};

/// Decodes `packed`, uint8 `[ceil(rows / 4), cols]`, to a matrix `[rows, cols]`. The scale is a
/// tensor of its own in these checkpoints, and multiplies or divides by their configuration.
///
/// # Errors
/// If `packed` is not uint8, is empty or does not hold `rows` rows, a code is 3, or the scale is
/// unusable.
pub fn decode(packed: &Tensor, rows: usize, scale: WeightScale) -> Result<TernaryMatrix, Error> {
    if packed.dtype() != DType::U8 {
        return Err(Error::TensorType { found: packed.dtype(), expected: "packed U8" });
    }
    let (packed_rows, cols) = extents(packed)?;
    if rows.div_ceil(4) != packed_rows {
        let reason = format!("{rows} rows of ternary weights pack into {}", rows.div_ceil(4));
        return Err(shape_error(packed, reason));
    }
    TernaryMatrix::from_rows(rows, cols, scale, |row, codes| {
        let shift = 2 * (row / packed_rows);
        for (code, byte) in codes.iter_mut().zip(packed.row(row % packed_rows)) {
            *code = (byte >> shift) & 3;
        }
    })
}

/// Encodes the codes of a matrix as uint8 `[ceil(rows / 4), cols]`. Its scale is the caller's to
/// store.
pub fn encode(matrix: &TernaryMatrix) -> Vec<u8> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let packed_rows = rows.div_ceil(4);
    let mut packed = vec![0; packed_rows * cols];
    let mut codes = vec![0; cols];
    for row in 0..rows {
        unpack_row(matrix, row, &mut codes);
        let shift = 2 * (row / packed_rows);
        for (byte, code) in packed[row % packed_rows * cols..].iter_mut().zip(&codes) {
            *byte |= code << shift;
        }
    }
    packed
}
