//! A ternary weight matrix with its scales: what every reader produces and every backend loads.
//!
//! [`TernaryMatrix`] is the neutral form that readers of other formats produce. [`TiledMatrix`] is a
//! matrix that already lies as the CPU kernels read it, mapped from a file.

use bytes::Bytes;

use crate::error::Error;

/// How the integer (or float) products of a ternary matrix become output values.
///
/// `acc` is the sum of activation times weight in {-1, 0, +1}; `s_x` is the activation scale
/// `127 / absmax`, or 1 where activations are not quantised. The order of operations is part of
/// the definition: it decides the last bit.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightScale {
    /// `y = (acc / s_x) * scale`: `AutoBitLinear` in transformers' `integrations/bitnet.py`, and
    /// GGUF files.
    Multiply(f32),
    /// `y = acc / (s_x * scale)`: `BitLinear` there, and weights ternarised at load, whose scale
    /// is `1 / mean|W|`.
    Divide(f32),
    /// One scale per output row, applied as [`Multiply`](WeightScale::Multiply).
    Rows(Vec<f32>),
    /// One scale per `len` consecutive columns of a row, `[rows, cols / len]`:
    /// `y = (sum over groups of acc_group * scale_group) / s_x`, groups in ascending order.
    Groups {
        /// Columns per group; divides the matrix's columns and is a multiple of 4.
        len: usize,
        /// Scales, row by row.
        values: Vec<f32>,
    },
}

impl WeightScale {
    /// All scale values in row-major order.
    pub fn values(&self) -> &[f32] {
        match self {
            WeightScale::Multiply(scale) | WeightScale::Divide(scale) => {
                std::slice::from_ref(scale)
            }
            WeightScale::Rows(values) | WeightScale::Groups { values, .. } => values,
        }
    }

    fn check(&self, rows: usize, cols: usize) -> Result<(), Error> {
        let unusable = |reason: String| Error::WeightScale { rows, cols, reason };
        match self {
            WeightScale::Multiply(_) | WeightScale::Divide(_) => {}
            WeightScale::Rows(values) if values.len() != rows => {
                return Err(unusable(format!("{} row scales for {rows} rows", values.len())));
            }
            WeightScale::Rows(_) => {}
            WeightScale::Groups { len, values } => {
                if *len == 0 || len % 4 != 0 || !cols.is_multiple_of(*len) {
                    return Err(unusable(format!("groups of {len} do not tile {cols} columns")));
                }
                if Some(values.len()) != rows.checked_mul(cols / len) {
                    return Err(unusable(format!("{} scales for groups of {len}", values.len())));
                }
            }
        }
        if let Some(bad) = self.values().iter().find(|v| !v.is_finite()) {
            return Err(unusable(format!("{bad} is not a finite number")));
        }
        if let WeightScale::Divide(0.0) = self {
            return Err(unusable("it divides and is zero".to_owned()));
        }
        Ok(())
    }
}

/// Ternary weights `[rows, cols]` = `[output features, input features]`, 2 bits each.
///
/// A weight `w` is stored as the code `w + 1`; four codes per byte, the first in the low bits;
/// each row starts on a byte, and codes past the last column are 1 (weight 0). This neutral
/// row-major form passes between readers and backends, which lay it out as their kernels like.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scale: WeightScale,
}

impl TernaryMatrix {
    /// Builds a matrix row by row: `fill(row, codes)` writes the codes (0, 1 or 2) of one row into
    /// a buffer of `cols` bytes. A code above 2 is an error that names its place.
    pub fn from_rows(
        rows: usize,
        cols: usize,
        scale: WeightScale,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<Self, Error> {
        scale.check(rows, cols)?;
        let stride = cols.div_ceil(4);
        let mut codes = vec![0; rows * stride];
        let mut row_codes = vec![1; stride * 4];
        for row in 0..rows {
            fill(row, &mut row_codes[..cols]);
            // Billions of weights pass here while a model loads. A search that may stop early and
            // four separate bytes stay scalar code; a maximum and 32-bit shifts become vector code.
            if row_codes.iter().fold(0, |largest, &code| code.max(largest)) > 2 {
                let column = row_codes.iter().position(|&code| code > 2).expect("it was seen");
                return Err(Error::IllegalCode { code: row_codes[column], row, column });
            }
            let packed = &mut codes[row * stride..(row + 1) * stride];
            for (byte, four) in packed.iter_mut().zip(row_codes.as_chunks::<4>().0) {
                let four = u32::from_le_bytes(*four);
                *byte = (four | four >> 6 | four >> 12 | four >> 18) as u8;
            }
        }
        Ok(TernaryMatrix { rows, cols, codes, scale })
    }

    /// The same matrix with its rows in another order: row `i` of the result is row `order[i]`.
    ///
    /// # Panics
    /// If `order` has another length than the matrix has rows, or names a row that is not there.
    pub fn reorder_rows(&self, order: &[usize]) -> Self {
        assert_eq!(order.len(), self.rows);
        let stride = self.cols.div_ceil(4);
        let mut codes = Vec::with_capacity(self.codes.len());
        for &row in order {
            codes.extend_from_slice(&self.codes[row * stride..(row + 1) * stride]);
        }
        let scale = match &self.scale {
            WeightScale::Rows(values) => {
                WeightScale::Rows(order.iter().map(|&row| values[row]).collect())
            }
            WeightScale::Groups { len, values } => {
                let groups = self.cols / len;
                let values = order.iter().flat_map(|&row| &values[row * groups..][..groups]);
                WeightScale::Groups { len: *len, values: values.copied().collect() }
            }
            single => single.clone(),
        };
        TernaryMatrix { rows: self.rows, cols: self.cols, codes, scale }
    }

    /// The same weights with other scales.
    ///
    /// # Errors
    /// If the scales do not fit the shape or are not usable numbers.
    pub fn with_scale(self, scale: WeightScale) -> Result<Self, Error> {
        scale.check(self.rows, self.cols)?;
        Ok(TernaryMatrix { scale, ..self })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How sums become outputs.
    pub fn scale(&self) -> &WeightScale {
        &self.scale
    }

    /// The packed codes of one row, `cols.div_ceil(4)` bytes.
    pub fn packed_row(&self, row: usize) -> &[u8] {
        let stride = self.cols.div_ceil(4);
        &self.codes[row * stride..(row + 1) * stride]
    }

    /// The code (weight + 1) at one place.
    #[inline]
    pub fn code(&self, row: usize, col: usize) -> u8 {
        (self.packed_row(row)[col / 4] >> (2 * (col % 4))) & 3
    }

    /// The weight, -1, 0 or +1, at one place.
    #[inline]
    pub fn weight(&self, row: usize, col: usize) -> i8 {
        self.code(row, col) as i8 - 1
    }
}

/// How a linear layer is used, which decides how a backend lays its matrix out. It never changes a
/// result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearUse {
    /// Every output is needed and most inputs are not zero.
    Dense,
    /// `up` of a gated network whose gate is often zero: outputs that meet a zero gate are not
    /// needed.
    SparseOutputs,
    /// `down` of such a network: many inputs are zero.
    SparseInputs,
}

/// How tiles lie; `bitnet-quant`'s `packing::tile` describes each layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileLayout {
    /// Tile after tile: sixteen rows side by side.
    Bands,
    /// Bands of fewer bytes: three weights in 5 bits.
    Triples,
    /// Row after row: each row's share of its tiles together.
    Rows(RunCodes),
}

/// How the weights of a run lie in its bytes: of a row of a matrix, or of a column, that may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunCodes {
    /// Four to a byte.
    TwoBits,
    /// Five to a byte, as a number in base 3.
    Quintuples,
}

impl RunCodes {
    /// Weights in a byte.
    pub const fn per_byte(self) -> usize {
        match self {
            RunCodes::TwoBits => 4,
            RunCodes::Quintuples => 5,
        }
    }
}

/// A second copy of a matrix, column after column.
#[derive(Debug, Clone)]
pub struct ColumnCopy {
    /// How the weights of a column lie.
    pub codes: RunCodes,
    /// All columns.
    pub bytes: Bytes,
}

/// A ternary matrix in the layout of the CPU kernels, usually mapped from a file.
#[derive(Debug, Clone)]
pub struct TiledMatrix {
    rows: usize,
    cols: usize,
    scale: WeightScale,
    layout: TileLayout,
    tiles: Bytes,
    columns: Option<ColumnCopy>,
}

impl TiledMatrix {
    /// Puts a matrix together. `columns` is for matrices that meet many zero inputs. A backend checks
    /// the lengths of the bytes when it loads the matrix.
    ///
    /// # Errors
    /// If the scales do not fit the shape or are not usable numbers.
    pub fn new(
        rows: usize,
        cols: usize,
        scale: WeightScale,
        layout: TileLayout,
        tiles: Bytes,
        columns: Option<ColumnCopy>,
    ) -> Result<Self, Error> {
        scale.check(rows, cols)?;
        Ok(TiledMatrix { rows, cols, scale, layout, tiles, columns })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How sums become outputs.
    pub fn scale(&self) -> &WeightScale {
        &self.scale
    }

    /// How `tiles` lie.
    pub fn layout(&self) -> TileLayout {
        self.layout
    }

    /// The weights in tiles.
    pub fn tiles(&self) -> &Bytes {
        &self.tiles
    }

    /// The weights column after column, if there is such a copy.
    pub fn columns(&self) -> Option<&ColumnCopy> {
        self.columns.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(scale: WeightScale, code: u8) -> Result<TernaryMatrix, Error> {
        TernaryMatrix::from_rows(2, 6, scale, |row, codes| {
            codes.copy_from_slice(&[0, 1, 2, 0, 1, 2]);
            codes[5] = if row == 1 { code } else { 2 };
        })
    }

    #[test]
    fn weights_come_back_as_they_were_put_in() {
        let m = matrix(WeightScale::Multiply(0.5), 0).unwrap();
        let row1: Vec<i8> = (0..6).map(|col| m.weight(1, col)).collect();
        assert_eq!(row1, [-1, 0, 1, -1, 0, -1]);
        assert_eq!(m.packed_row(1).len(), 2);
        assert_eq!(m.packed_row(1)[1] >> 4, 0b0101, "padding codes are zero weights");
    }

    #[test]
    fn rows_move_with_their_scales() {
        let m = matrix(WeightScale::Rows(vec![0.5, 2.0]), 0).unwrap();
        let swapped = m.reorder_rows(&[1, 0]);
        assert_eq!(swapped.packed_row(0), m.packed_row(1));
        assert_eq!(*swapped.scale(), WeightScale::Rows(vec![2.0, 0.5]));
        assert_eq!(swapped.reorder_rows(&[1, 0]), m);
    }

    #[test]
    fn code_three_is_refused_with_its_place() {
        let error = matrix(WeightScale::Multiply(1.0), 3).unwrap_err();
        assert!(matches!(error, Error::IllegalCode { code: 3, row: 1, column: 5 }));
    }

    #[test]
    fn unusable_scales_are_refused() {
        assert!(matrix(WeightScale::Multiply(f32::NAN), 0).is_err());
        assert!(matrix(WeightScale::Divide(0.0), 0).is_err());
        assert!(matrix(WeightScale::Rows(vec![1.0]), 0).is_err());
        assert!(matrix(WeightScale::Groups { len: 3, values: vec![1.0; 4] }, 0).is_err());
    }
}
