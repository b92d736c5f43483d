//! The layouts of ternary weights that the CPU kernels read. Bands and rows of two bits are the same
//! bytes on every instruction set, so that a file can hold them and every CPU can map it.
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
//! [`triples`] are bands of fewer bytes. [`runs`] are rows, or columns of a second copy, one after another.

pub mod runs;
pub mod triples;

use std::ops::Range;

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{
    ColumnCopy, DType, Error, LinearUse, RunCodes, TernaryMatrix, TileLayout, TiledMatrix,
    WeightScale, mmap,
};

use runs::{column_bytes, pack_columns, row_bytes};
use triples::{BLOCK_BYTES, BLOCK_TILES};

/// Rows of a tile: the height of a band.
pub const ROWS: usize = 16;
/// Columns of a tile.
pub const COLS: usize = 16;
/// Bytes of a tile.
pub const BYTES: usize = ROWS * COLS / 4;

/// The bytes of a tile.
pub type Tile = [u8; BYTES];

/// Bytes of a line: what one access to memory brings.
pub const LINE: usize = 64;

/// Four weights of zero.
const ZEROS: u8 = 0b01_01_01_01;

/// Tiles in one band of a matrix with `cols` columns.
pub fn tiles_per_band(cols: usize) -> usize {
    cols.div_ceil(COLS)
}

/// Bytes of one band, or `None` if they do not fit the address space.
pub fn band_len(layout: TileLayout, cols: usize) -> Option<usize> {
    let tiles = tiles_per_band(cols);
    match layout {
        TileLayout::Bands => tiles.checked_mul(BYTES),
        TileLayout::Triples => {
            (tiles / BLOCK_TILES * BLOCK_BYTES).checked_add(tiles % BLOCK_TILES * BYTES)
        }
        TileLayout::Rows(codes) => row_bytes(codes, cols).checked_mul(ROWS),
    }
}

/// Bytes of a matrix in tiles, or `None` if they do not fit the address space.
pub fn byte_len(layout: TileLayout, rows: usize, cols: usize) -> Option<usize> {
    rows.div_ceil(ROWS).checked_mul(band_len(layout, cols)?)
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
pub fn pack(matrix: &TernaryMatrix, layout: TileLayout, out: &mut [u8]) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    assert_eq!(Some(out.len()), byte_len(layout, rows, cols), "room for {rows} x {cols} in tiles");
    let len = band_len(layout, cols).expect("a band is no longer than all");
    let bands = (0..rows).step_by(ROWS).zip(out.chunks_exact_mut(len.max(1)));
    match layout {
        TileLayout::Rows(codes) => runs::pack_rows(matrix, codes, out),
        TileLayout::Bands => {
            for (first, band) in bands {
                pack_band(matrix, first..rows.min(first + ROWS), band.as_chunks_mut().0);
            }
        }
        TileLayout::Triples => {
            let mut room = vec![[0; BYTES]; tiles_per_band(cols)];
            for (first, band) in bands {
                pack_band(matrix, first..rows.min(first + ROWS), &mut room);
                triples::pack_band(&room, band);
            }
        }
    }
}

/// Lays the rows of a band out in its tiles.
fn pack_band(matrix: &TernaryMatrix, rows: Range<usize>, tiles: &mut [Tile]) {
    tiles.as_flattened_mut().fill(ZEROS);
    for (row, of_matrix) in rows.enumerate() {
        // A packed byte has four consecutive columns, which a tile has in four bytes of one plane.
        for (i, &four) in matrix.packed_row(of_matrix).iter().enumerate() {
            let (first, bit) = place(row, 4 * i % COLS);
            for (column, byte) in tiles[4 * i / COLS][first..][..4].iter_mut().enumerate() {
                *byte = *byte & !(3 << bit) | (four >> (2 * column) & 3) << bit;
            }
        }
    }
}

/// What whoever reads a matrix can make use of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reader {
    /// Second copies of matrices that gain from one.
    pub copies: bool,
    /// [`triples`] and quintuples ([`runs`]), which are fewer bytes.
    pub compact: bool,
}

/// Whether an output is made of one sum of integers. Only such sums, which may be taken in any order, can
/// leave zeros out, and only they are taken from [compact](Reader::compact) layouts.
pub fn sums_exactly(scale: &WeightScale, precision: ActivationPrecision) -> bool {
    precision == ActivationPrecision::Int8 && !matches!(scale, WeightScale::Groups { .. })
}

/// Lays a matrix out for its use and its reader, starting on a cache line.
///
/// # Errors
/// If the matrix is too large to lay out.
pub fn tiled(
    matrix: &TernaryMatrix,
    precision: ActivationPrecision,
    usage: LinearUse,
    reader: Reader,
) -> Result<TiledMatrix, Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let exact = sums_exactly(matrix.scale(), precision);
    let codes = if reader.compact { RunCodes::Quintuples } else { RunCodes::TwoBits };
    let layout = match usage {
        LinearUse::SparseOutputs if exact => TileLayout::Rows(codes),
        _ if exact && reader.compact => TileLayout::Triples,
        _ => TileLayout::Bands,
    };
    let overflow = || Error::TensorShape {
        dtype: DType::I8,
        shape: vec![rows, cols],
        reason: "its size overflows".to_owned(),
    };
    let len = byte_len(layout, rows, cols).ok_or_else(overflow)?;
    let tiles = mmap::filled(len, |out| pack(matrix, layout, out))?;
    let columns = if reader.copies && exact && usage == LinearUse::SparseInputs {
        let len = column_bytes(codes, rows).checked_mul(cols).ok_or_else(overflow)?;
        Some(ColumnCopy {
            codes,
            bytes: mmap::filled(len, |out| pack_columns(matrix, codes, out))?,
        })
    } else {
        None
    };
    TiledMatrix::new(rows, cols, matrix.scale().clone(), layout, tiles, columns)
}

/// The neutral form of a matrix in tiles.
///
/// # Errors
/// If the bytes do not fill the shape, or a weight is none of -1, 0 and +1.
pub fn untiled(matrix: &TiledMatrix) -> Result<TernaryMatrix, Error> {
    check_len(matrix)?;
    let (rows, cols, layout) = (matrix.rows(), matrix.cols(), matrix.layout());
    let len = band_len(layout, cols).expect("a band is no longer than all");
    let mut room = match layout {
        TileLayout::Triples => vec![[0; BYTES]; tiles_per_band(cols)],
        TileLayout::Bands | TileLayout::Rows(_) => Vec::new(),
    };
    TernaryMatrix::from_rows(rows, cols, matrix.scale().clone(), |row, codes| {
        let band = &matrix.tiles()[row / ROWS * len..][..len];
        let tiles = match layout {
            TileLayout::Rows(form) => {
                let bytes = row_bytes(form, cols);
                let (words, _) = band[row % ROWS * bytes..][..bytes].as_chunks();
                return runs::unpack_row(form, words.iter().copied(), codes);
            }
            TileLayout::Bands => band.as_chunks().0,
            TileLayout::Triples => {
                if row % ROWS == 0 {
                    triples::unpack_band(triples::blocks_and_tiles(band, cols), &mut room);
                }
                &room
            }
        };
        let words = tiles.iter().map(|tile: &Tile| tile.as_chunks().0[row % ROWS]);
        runs::unpack_row(RunCodes::TwoBits, words, codes);
    })
}

/// Whether a part of a matrix is in a layout for readers that take [compact](Reader::compact) ones.
pub fn is_compact(matrix: &TiledMatrix) -> bool {
    let quintuples = |codes| codes == RunCodes::Quintuples;
    let tiles = match matrix.layout() {
        TileLayout::Bands => false,
        TileLayout::Triples => true,
        TileLayout::Rows(codes) => quintuples(codes),
    };
    tiles || matrix.columns().is_some_and(|copy| quintuples(copy.codes))
}

/// The same matrix in layouts that every reader takes, second copies included.
///
/// # Errors
/// As [`untiled`] and [`tiled`].
pub fn portable(
    matrix: &TiledMatrix,
    precision: ActivationPrecision,
) -> Result<TiledMatrix, Error> {
    let copies = matrix.columns().is_some();
    let usage = match matrix.layout() {
        TileLayout::Rows(_) => LinearUse::SparseOutputs,
        _ if copies => LinearUse::SparseInputs,
        _ => LinearUse::Dense,
    };
    tiled(&untiled(matrix)?, precision, usage, Reader { copies, compact: false })
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
    check(matrix.tiles(), byte_len(matrix.layout(), rows, cols))?;
    match matrix.columns() {
        Some(ColumnCopy { codes, bytes }) => {
            check(bytes, column_bytes(*codes, rows).checked_mul(cols))
        }
        None => Ok(()),
    }
}

/// The code at one place of a tile.
#[inline(always)]
pub fn tile_code(tile: &Tile, row: usize, col: usize) -> u8 {
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

    fn bytes(matrix: &TernaryMatrix, layout: TileLayout) -> Bytes {
        let mut bytes = vec![0; byte_len(layout, matrix.rows(), matrix.cols()).unwrap()];
        pack(matrix, layout, &mut bytes);
        bytes.into()
    }

    #[test]
    fn a_matrix_of_any_shape_comes_back_from_its_tiles() {
        for rows in [1, 15, 16, 17, 33] {
            for cols in [1, 3, 4, 15, 16, 17, 80, 95, 96, 100, 127, 175, 209] {
                let m = matrix(rows, cols);
                for usage in [LinearUse::Dense, LinearUse::SparseOutputs, LinearUse::SparseInputs] {
                    for (copies, compact) in [(false, false), (true, false), (true, true)] {
                        let reader = Reader { copies, compact };
                        let t = tiled(&m, ActivationPrecision::Int8, usage, reader).unwrap();
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
        let lay_for = |reader, m, precision, usage| {
            let t = tiled(m, precision, usage, reader).unwrap();
            (t.layout(), t.columns().is_some())
        };
        let plain = (TileLayout::Bands, false);
        let neither = Reader::default();
        assert_eq!(lay_for(neither, &m, Int8, LinearUse::SparseInputs), plain);
        assert_eq!(lay_for(neither, &m, Int8, LinearUse::Dense), plain);
        let lay = |m, precision, usage| {
            lay_for(Reader { copies: true, compact: true }, m, precision, usage)
        };
        assert_eq!(
            lay(&m, Int8, LinearUse::SparseOutputs),
            (TileLayout::Rows(RunCodes::Quintuples), false)
        );
        assert_eq!(lay(&m, Int8, LinearUse::SparseInputs), (TileLayout::Triples, true));
        assert_eq!(lay(&m, Int8, LinearUse::Dense), (TileLayout::Triples, false));
        let scale = WeightScale::Groups { len: 8, values: vec![1.0; 100] };
        let grouped = TernaryMatrix::from_rows(20, 40, scale, |_, codes| codes.fill(0)).unwrap();
        for usage in [LinearUse::SparseOutputs, LinearUse::SparseInputs] {
            assert_eq!(lay(&m, F32, usage), plain);
            assert_eq!(lay(&grouped, Int8, usage), plain);
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
        let bands = bytes(&m, TileLayout::Bands);
        assert_eq!(bands.len(), 2 * 3 * 64);
        // Planes 2 and 3 of the third tile are padding, 0b0101; plane 0 is code 0.
        assert_eq!(bands[(3 + 2) * 64 + 11], 0b0101_1000);
        assert_eq!(bands[(3 + 2) * 64 + 10], 0b0101_0000);
        assert_eq!(bands[3 * 64 + 4 * 4], 0b0101_0101, "rows past the last are weight 0");
    }

    #[test]
    fn code_three_is_refused_on_the_way_back() {
        let mut bytes = vec![0; 64];
        bytes[4 * 5 + 2] = 0b1100;
        for layout in [TileLayout::Bands, TileLayout::Triples, TileLayout::Rows(RunCodes::TwoBits)]
        {
            let tiles = Bytes::from(bytes.clone());
            let m = TiledMatrix::new(16, 16, WeightScale::Multiply(1.0), layout, tiles, None);
            let error = untiled(&m.unwrap()).unwrap_err();
            assert!(matches!(error, Error::IllegalCode { code: 3, row: 5, column: 6 }));
        }
    }

    #[test]
    fn bytes_that_do_not_fill_the_shape_are_refused() {
        let m = matrix(20, 40);
        let make = |tiles: usize, columns: usize| {
            let (tiles, bytes) = (vec![0; tiles].into(), vec![0; columns].into());
            let columns = ColumnCopy { codes: RunCodes::TwoBits, bytes };
            let scale = WeightScale::Multiply(1.0);
            check_len(
                &TiledMatrix::new(20, 40, scale, TileLayout::Bands, tiles, Some(columns)).unwrap(),
            )
        };
        let tiles = byte_len(TileLayout::Bands, m.rows(), m.cols()).unwrap();
        let columns = 40 * 64;
        assert!(make(tiles, columns).is_ok());
        assert!(make(tiles - 1, columns).is_err());
        assert!(make(tiles, columns - 64).is_err());
    }
}
