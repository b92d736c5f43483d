//! The layout of ternary weights that the CPU kernels read: the same bytes on every instruction
//! set, so that a file can hold them and every CPU can map it.
//!
//! A matrix `[rows, cols]` is padded to whole tiles of [`ROWS`] x [`COLS`] weights. The 16 rows of
//! a tile make a *band*; the tiles of a band lie one after another along the columns, the bands one
//! after another along the rows: tile `(band, t)` starts at byte
//! `(band * cols.div_ceil(16) + t) * 64`.
//!
//! A weight `w` is the code `w + 1` in two bits. In the 64 bytes of a tile, the weight of row `r`
//! (0..16) and column `k` (0..16) is in byte `4 r + k % 4`, at bits `2 p` and `2 p + 1` of it with
//! the plane `p = k / 4`:
//!
//! ```text
//! byte          0     1     2     3  |  4     5     6     7  | ...  60    61    62    63
//! row           0     0     0     0  |  1     1     1     1  |      15    15    15    15
//! bits 0..2   k=0   k=1   k=2   k=3  | k=0   k=1   k=2   k=3 |     k=0   k=1   k=2   k=3
//! bits 2..4   k=4   k=5   k=6   k=7  | ...
//! bits 4..6   k=8   k=9   k=10  k=11 | ...
//! bits 6..8   k=12  k=13  k=14  k=15 | ...
//! ```
//!
//! So a load of 16, 32 or 64 bytes, a shift by `2 p` and an AND with 3 give four columns of 4, 8 or
//! 16 rows as unsigned bytes, four to a 32-bit lane: what vpmaddubsw, vpdpbusd and sdot multiply
//! with four int8 activations broadcast to all lanes. Each 32-bit lane sums one row, and no
//! horizontal sum is ever needed. Padding has the code 1 (weight 0).

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{DType, Error, LinearUse, TernaryMatrix, TileOrder, TiledMatrix, WeightScale};
use bytes::Bytes;

/// Rows of a tile: the height of a band.
pub const ROWS: usize = 16;
/// Columns of a tile.
pub const COLS: usize = 16;
/// Bytes of a tile.
pub const BYTES: usize = ROWS * COLS / 4;

/// A tile of which every weight is zero.
const ZERO: [u8; BYTES] = [0b01_01_01_01; BYTES];

/// Tiles in one band of a matrix with `cols` columns.
pub fn tiles_per_band(cols: usize) -> usize {
    cols.div_ceil(COLS)
}

/// Bytes of a matrix in tiles, or `None` if they do not fit the address space.
pub fn byte_len(rows: usize, cols: usize) -> Option<usize> {
    rows.div_ceil(ROWS).checked_mul(tiles_per_band(cols))?.checked_mul(BYTES)
}

/// The byte of a tile that holds row `row` and column `col` of it, and the lower of its two bits.
#[inline(always)]
pub fn place(row: usize, col: usize) -> (usize, usize) {
    (4 * row + col % 4, 2 * (col / 4))
}

/// Lays a matrix out in tiles.
///
/// # Panics
/// If `out` is not [`byte_len`] bytes.
pub fn pack(matrix: &TernaryMatrix, out: &mut [u8]) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    assert_eq!(Some(out.len()), byte_len(rows, cols), "room for {rows} x {cols} in tiles");
    let (tiles, _) = out.as_chunks_mut::<BYTES>();
    tiles.fill(ZERO);
    for row in 0..rows {
        let band = &mut tiles[row / ROWS * tiles_per_band(cols)..][..tiles_per_band(cols)];
        // A packed byte has four consecutive columns, which a tile has in four bytes of one plane.
        for (i, &four) in matrix.packed_row(row).iter().enumerate() {
            let (byte, bit) = place(row % ROWS, 4 * i % COLS);
            let tile = &mut band[4 * i / COLS];
            for column in 0..4 {
                let code = four >> (2 * column) & 3;
                tile[byte + column] = tile[byte + column] & !(3 << bit) | code << bit;
            }
        }
    }
}

/// Lays a matrix out for its use, starting on a cache line. With `copies`, a matrix that gains from
/// it gets its second copy.
///
/// # Errors
/// If the matrix is too large to lay out.
pub fn tiled(
    matrix: &TernaryMatrix,
    _precision: ActivationPrecision,
    _usage: LinearUse,
    _copies: bool,
) -> Result<TiledMatrix, Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let len = byte_len(rows, cols).ok_or_else(|| Error::TensorShape {
        dtype: DType::I8,
        shape: vec![rows, cols],
        reason: "its size overflows".to_owned(),
    })?;
    let mut bytes = vec![0; len + BYTES];
    let start = bytes.as_ptr().align_offset(BYTES);
    pack(matrix, &mut bytes[start..start + len]);
    let tiles = Bytes::from(bytes).slice(start..start + len);
    TiledMatrix::new(rows, cols, matrix.scale().clone(), TileOrder::Bands, tiles, None)
}

/// The neutral form of a matrix in tiles.
///
/// # Errors
/// If the bytes do not fill the shape, or a weight is none of -1, 0 and +1.
pub fn untiled(matrix: &TiledMatrix) -> Result<TernaryMatrix, Error> {
    check_len(matrix)?;
    unpack(matrix.rows(), matrix.cols(), matrix.tiles(), matrix.scale().clone())
}

/// Checks that a matrix in tiles has the bytes that its shape says.
///
/// # Errors
/// If it has not.
pub fn check_len(matrix: &TiledMatrix) -> Result<(), Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let expected = byte_len(rows, cols).unwrap_or(usize::MAX);
    if matrix.tiles().len() != expected {
        return Err(Error::TensorSize {
            dtype: DType::U8,
            shape: vec![rows, cols],
            expected,
            found: matrix.tiles().len(),
        });
    }
    Ok(())
}

/// The matrix that [`pack`] laid out.
///
/// # Errors
/// [`Error::IllegalCode`] where a weight is none of -1, 0 and +1, and what
/// [`TernaryMatrix::from_rows`] refuses.
///
/// # Panics
/// If `bytes` is not [`byte_len`] bytes.
pub fn unpack(
    rows: usize,
    cols: usize,
    bytes: &[u8],
    scale: WeightScale,
) -> Result<TernaryMatrix, Error> {
    assert_eq!(Some(bytes.len()), byte_len(rows, cols), "{rows} x {cols} in tiles");
    let (tiles, _) = bytes.as_chunks::<BYTES>();
    TernaryMatrix::from_rows(rows, cols, scale, |row, codes| {
        let band = &tiles[row / ROWS * tiles_per_band(cols)..];
        for (col, code) in codes.iter_mut().enumerate() {
            *code = tile_code(&band[col / COLS], row % ROWS, col % COLS);
        }
    })
}

/// The code at one place of a tile.
#[inline(always)]
pub fn tile_code(tile: &[u8; BYTES], row: usize, col: usize) -> u8 {
    let (byte, bit) = place(row, col);
    tile[byte] >> bit & 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize) -> TernaryMatrix {
        TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(0.5), |row, codes| {
            for (col, code) in codes.iter_mut().enumerate() {
                *code = ((row * 7 + col * 5 + row * col / 3) % 3) as u8;
            }
        })
        .unwrap()
    }

    #[test]
    fn a_matrix_of_any_shape_comes_back_from_its_tiles() {
        for rows in [1, 15, 16, 17, 33] {
            for cols in [1, 3, 4, 15, 16, 17, 100, 127] {
                let m = matrix(rows, cols);
                let mut bytes = vec![0xff; byte_len(rows, cols).unwrap()];
                pack(&m, &mut bytes);
                assert_eq!(unpack(rows, cols, &bytes, m.scale().clone()).unwrap(), m);
            }
        }
    }

    #[test]
    fn a_weight_is_where_the_layout_says() {
        // Row 18 is row 2 of the second band; column 39 is column 7 of the third tile: byte
        // 4 * 2 + 7 % 4 = 11 of the tile, plane 7 / 4 = 1.
        let (rows, cols) = (20, 40);
        let m = TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(1.0), |row, codes| {
            codes.fill(0);
            codes[39] = if row == 18 { 2 } else { 0 };
        })
        .unwrap();
        let mut bytes = vec![0; byte_len(rows, cols).unwrap()];
        pack(&m, &mut bytes);
        assert_eq!(bytes.len(), 2 * 3 * 64);
        // Planes 2 and 3 of the third tile are padding, 0b0101; plane 0 is code 0.
        assert_eq!(bytes[(3 + 2) * 64 + 11], 0b0101_1000);
        assert_eq!(bytes[(3 + 2) * 64 + 10], 0b0101_0000);
        assert_eq!(bytes[3 * 64 + 4 * 4], 0b0101_0101, "rows past the last are weight 0");
    }

    #[test]
    fn code_three_is_refused_on_the_way_back() {
        let mut bytes = vec![0; 64];
        bytes[4 * 5 + 2] = 0b1100;
        let error = unpack(16, 16, &bytes, WeightScale::Multiply(1.0)).unwrap_err();
        assert!(matches!(error, Error::IllegalCode { code: 3, row: 5, column: 6 }));
    }
}
