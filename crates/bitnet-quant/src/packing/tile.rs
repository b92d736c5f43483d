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
//!
//! **Row order** ([`TileOrder::Rows`]) has the same tiles with their 32-bit words transposed: the
//! four bytes of row `r` of the matrix in tile `t` of its band start at byte
//! `(r * cols.div_ceil(16) + t) * 4`. A row is one contiguous run (640 bytes for 2560 columns), so
//! that rows nobody needs cost no memory traffic: `up` of a network whose gates are often zero. A
//! band of sixteen rows takes the same bytes in both orders.
//!
//! **Column copy** ([`TiledMatrix::columns`]): the matrix once more, column after column, so that
//! columns that meet a zero input cost no memory traffic: `down` of such a network. The codes of
//! each column are padded to whole lines of [`LINE`] bytes, 256 rows each: the code of row `r` and
//! column `k` is in byte `k * column_bytes(rows) + r / 256 * 64 + r % 64`, at bits `2 p` and `2 p + 1`
//! with `p = r % 256 / 64`.

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{
    DType, Error, LinearUse, TernaryMatrix, TileOrder, TiledMatrix, WeightScale, mmap,
};

/// Rows of a tile: the height of a band.
pub const ROWS: usize = 16;
/// Columns of a tile.
pub const COLS: usize = 16;
/// Bytes of a tile.
pub const BYTES: usize = ROWS * COLS / 4;

/// Bytes of a line of the column copy: what one access to memory brings.
pub const LINE: usize = 64;
/// Rows that a line of the column copy holds.
pub const LINE_ROWS: usize = 4 * LINE;

/// Four weights of zero.
const ZEROS: u8 = 0b01_01_01_01;

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

/// Bytes of one column of the column copy.
pub fn column_bytes(rows: usize) -> usize {
    rows.div_ceil(LINE_ROWS) * LINE
}

/// Where row `row` has its word of tile `t` of its band, in words from the start of the matrix.
#[inline(always)]
fn word(order: TileOrder, per_band: usize, row: usize, t: usize) -> usize {
    match order {
        TileOrder::Bands => (row / ROWS * per_band + t) * ROWS + row % ROWS,
        TileOrder::Rows => row * per_band + t,
    }
}

/// Lays a matrix out in tiles.
///
/// # Panics
/// If `out` is not [`byte_len`] bytes.
pub fn pack(matrix: &TernaryMatrix, order: TileOrder, out: &mut [u8]) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    assert_eq!(Some(out.len()), byte_len(rows, cols), "room for {rows} x {cols} in tiles");
    out.fill(ZEROS);
    let (words, _) = out.as_chunks_mut::<4>();
    for row in 0..rows {
        // A packed byte has four consecutive columns, which a tile has in four bytes of one plane.
        for (i, &four) in matrix.packed_row(row).iter().enumerate() {
            let (_, bit) = place(0, 4 * i % COLS);
            let word = &mut words[word(order, tiles_per_band(cols), row, 4 * i / COLS)];
            for (column, byte) in word.iter_mut().enumerate() {
                *byte = *byte & !(3 << bit) | (four >> (2 * column) & 3) << bit;
            }
        }
    }
}

/// Lays a matrix out column after column.
///
/// # Panics
/// If `out` is not `cols * column_bytes(rows)` bytes.
pub fn pack_columns(matrix: &TernaryMatrix, out: &mut [u8]) {
    let bytes = column_bytes(matrix.rows());
    assert_eq!(Some(out.len()), bytes.checked_mul(matrix.cols()), "room for the columns");
    out.fill(ZEROS);
    // A block of columns at a time, which stays in the cache while all rows pass by.
    const BLOCK: usize = 64;
    for (block, out) in out.chunks_mut((BLOCK * bytes).max(1)).enumerate() {
        for row in 0..matrix.rows() {
            let (byte, bit) = (row / LINE_ROWS * LINE + row % LINE, row % LINE_ROWS / LINE * 2);
            let mut columns = out[byte..].iter_mut().step_by(bytes);
            for &four in matrix.packed_row(row).iter().skip(block * BLOCK / 4).take(BLOCK / 4) {
                for (column, byte) in columns.by_ref().take(4).enumerate() {
                    *byte = *byte & !(3 << bit) | (four >> (2 * column) & 3) << bit;
                }
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
    precision: ActivationPrecision,
    usage: LinearUse,
    copies: bool,
) -> Result<TiledMatrix, Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    // Only sums of integers, which may be taken in any order, can leave zeros out.
    let exact = precision == ActivationPrecision::Int8
        && !matches!(matrix.scale(), WeightScale::Groups { .. });
    let order = match usage {
        LinearUse::SparseOutputs if exact => TileOrder::Rows,
        _ => TileOrder::Bands,
    };
    let overflow = || Error::TensorShape {
        dtype: DType::I8,
        shape: vec![rows, cols],
        reason: "its size overflows".to_owned(),
    };
    let len = byte_len(rows, cols).ok_or_else(overflow)?;
    let tiles = mmap::filled(len, |out| pack(matrix, order, out))?;
    let columns = if copies && exact && usage == LinearUse::SparseInputs {
        let len = column_bytes(rows).checked_mul(cols).ok_or_else(overflow)?;
        Some(mmap::filled(len, |out| pack_columns(matrix, out))?)
    } else {
        None
    };
    TiledMatrix::new(rows, cols, matrix.scale().clone(), order, tiles, columns)
}

/// The neutral form of a matrix in tiles.
///
/// # Errors
/// If the bytes do not fill the shape, or a weight is none of -1, 0 and +1.
pub fn untiled(matrix: &TiledMatrix) -> Result<TernaryMatrix, Error> {
    check_len(matrix)?;
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let (words, _) = matrix.tiles().as_chunks::<4>();
    TernaryMatrix::from_rows(rows, cols, matrix.scale().clone(), |row, codes| {
        for (col, code) in codes.iter_mut().enumerate() {
            let (byte, bit) = place(0, col % COLS);
            let word = words[word(matrix.order(), tiles_per_band(cols), row, col / COLS)];
            *code = word[byte] >> bit & 3;
        }
    })
}

/// Checks that a matrix in tiles has the bytes that its shape says, and so has its column copy. That
/// the copy has the same weights is not looked at.
///
/// # Errors
/// If one of them has not.
pub fn check_len(matrix: &TiledMatrix) -> Result<(), Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let check = |bytes: &[u8], expected: Option<usize>| {
        let expected = expected.unwrap_or(usize::MAX);
        if bytes.len() == expected {
            return Ok(());
        }
        let (dtype, shape) = (DType::U8, vec![rows, cols]);
        Err(Error::TensorSize { dtype, shape, expected, found: bytes.len() })
    };
    check(matrix.tiles(), byte_len(rows, cols))?;
    match matrix.columns() {
        Some(columns) => check(columns, column_bytes(rows).checked_mul(cols)),
        None => Ok(()),
    }
}

/// The code at one place of a tile.
#[inline(always)]
pub fn tile_code(tile: &[u8; BYTES], row: usize, col: usize) -> u8 {
    let (byte, bit) = place(row, col);
    tile[byte] >> bit & 3
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn matrix(rows: usize, cols: usize) -> TernaryMatrix {
        TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(0.5), |row, codes| {
            for (col, code) in codes.iter_mut().enumerate() {
                *code = ((row * 7 + col * 5 + row * col / 3) % 3) as u8;
            }
        })
        .unwrap()
    }

    fn bytes(matrix: &TernaryMatrix, order: TileOrder) -> Bytes {
        let mut bytes = vec![0; byte_len(matrix.rows(), matrix.cols()).unwrap()];
        pack(matrix, order, &mut bytes);
        bytes.into()
    }

    #[test]
    fn a_matrix_of_any_shape_comes_back_from_its_tiles() {
        for rows in [1, 15, 16, 17, 33] {
            for cols in [1, 3, 4, 15, 16, 17, 100, 127] {
                let m = matrix(rows, cols);
                for usage in [LinearUse::Dense, LinearUse::SparseOutputs, LinearUse::SparseInputs] {
                    for copies in [false, true] {
                        let t = tiled(&m, ActivationPrecision::Int8, usage, copies).unwrap();
                        assert_eq!(untiled(&t).unwrap(), m);
                    }
                }
            }
        }
    }

    #[test]
    fn only_integer_sums_that_may_leave_zeros_out_get_layouts_for_it() {
        use ActivationPrecision::{F32, Int8};
        let m = matrix(20, 40);
        let lay = |m, precision, usage| {
            let t = tiled(m, precision, usage, true).unwrap();
            (t.order(), t.columns().is_some())
        };
        let plain = (TileOrder::Bands, false);
        assert_eq!(lay(&m, Int8, LinearUse::SparseOutputs), (TileOrder::Rows, false));
        assert_eq!(lay(&m, Int8, LinearUse::SparseInputs), (TileOrder::Bands, true));
        assert_eq!(lay(&m, Int8, LinearUse::Dense), plain);
        let scale = WeightScale::Groups { len: 8, values: vec![1.0; 100] };
        let grouped = TernaryMatrix::from_rows(20, 40, scale, |_, codes| codes.fill(0)).unwrap();
        for usage in [LinearUse::SparseOutputs, LinearUse::SparseInputs] {
            assert_eq!(lay(&m, F32, usage), plain);
            assert_eq!(lay(&grouped, Int8, usage), plain);
            assert!(tiled(&m, Int8, usage, false).unwrap().columns().is_none());
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
        let bands = bytes(&m, TileOrder::Bands);
        assert_eq!(bands.len(), 2 * 3 * 64);
        // Planes 2 and 3 of the third tile are padding, 0b0101; plane 0 is code 0.
        assert_eq!(bands[(3 + 2) * 64 + 11], 0b0101_1000);
        assert_eq!(bands[(3 + 2) * 64 + 10], 0b0101_0000);
        assert_eq!(bands[3 * 64 + 4 * 4], 0b0101_0101, "rows past the last are weight 0");
        // A row has 3 tiles of 4 bytes.
        let by_row = bytes(&m, TileOrder::Rows);
        assert_eq!(by_row.len(), bands.len());
        assert_eq!(by_row[(18 * 3 + 2) * 4 + 3], 0b0101_1000);
        assert_eq!(by_row[20 * 3 * 4], 0b0101_0101, "rows past the last are weight 0");
    }

    #[test]
    fn a_weight_is_where_the_column_copy_says() {
        // Row 470 is row 214 of the second line: byte 214 % 64 = 22, plane 214 / 64 = 3.
        let m = TernaryMatrix::from_rows(500, 6, WeightScale::Multiply(1.0), |row, codes| {
            codes.fill(0);
            codes[5] = if row == 470 { 2 } else { 0 };
        })
        .unwrap();
        assert_eq!(column_bytes(500), 128);
        let mut columns = vec![0; 6 * 128];
        pack_columns(&m, &mut columns);
        assert_eq!(columns[5 * 128 + 64 + 22], 0b1000_0000);
        assert_eq!(columns[4 * 128 + 64 + 22], 0);
        assert_eq!(columns[5 * 128 + 127], 0b0100_0000, "rows past the last are weight 0");
        assert_eq!(columns.iter().filter(|&&byte| byte & 0b1010_1010 != 0).count(), 1);
    }

    #[test]
    fn code_three_is_refused_on_the_way_back() {
        let mut bytes = vec![0; 64];
        bytes[4 * 5 + 2] = 0b1100;
        for order in [TileOrder::Bands, TileOrder::Rows] {
            let tiles = Bytes::from(bytes.clone());
            let m = TiledMatrix::new(16, 16, WeightScale::Multiply(1.0), order, tiles, None);
            let error = untiled(&m.unwrap()).unwrap_err();
            assert!(matches!(error, Error::IllegalCode { code: 3, row: 5, column: 6 }));
        }
    }

    #[test]
    fn bytes_that_do_not_fill_the_shape_are_refused() {
        let m = matrix(20, 40);
        let make = |tiles: usize, columns: usize| {
            let (tiles, columns) = (vec![0; tiles].into(), vec![0; columns].into());
            let scale = WeightScale::Multiply(1.0);
            check_len(
                &TiledMatrix::new(20, 40, scale, TileOrder::Bands, tiles, Some(columns)).unwrap(),
            )
        };
        let (tiles, columns) = (byte_len(m.rows(), m.cols()).unwrap(), 40 * 64);
        assert!(make(tiles, columns).is_ok());
        assert!(make(tiles - 1, columns).is_err());
        assert!(make(tiles, columns - 64).is_err());
    }
}
