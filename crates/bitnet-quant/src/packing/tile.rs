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
//! **Row order** ([`TileLayout::Rows`]) has the same tiles with their 32-bit words transposed: the
//! four bytes of row `r` of the matrix in tile `t` of its band start at byte
//! `(r * cols.div_ceil(16) + t) * 4`. A row is one contiguous run (640 bytes for 2560 columns), so
//! that rows nobody needs cost no memory traffic: `up` of a network whose gates are often zero. A
//! band of sixteen rows takes the same bytes in both orders.
//!
//! **Triples** ([`TileLayout::Triples`]) are bands in which three weights take 5 bits in place of 6, for
//! processors that look up what they read faster than memory brings it. Six tiles side by side, 96
//! columns, become a [`Block`] of five lines of 64 bytes; tiles that are left at the end of a band stay
//! as they are. The 24 codes that the six tiles have in their byte `b`, ascending by column, are eight
//! triples `c0 + 3 c1 + 9 c2` below 27. Byte `b` of line `i` has triple `i` in its low five bits, and above
//! them a part of one of the other three:
//!
//! ```text
//! line              0        1        2        3        4
//! bits 0..5      triple 0     1        2        3        4
//! bit  5         5, bit 0  7, bit 3  6, bit 0  7, bit 4  7, bit 0
//! bit  6         5, bit 1  5, bit 3  6, bit 1  6, bit 3  7, bit 1
//! bit  7         5, bit 2  5, bit 4  6, bit 2  6, bit 4  7, bit 2
//! ```
//!
//! So a look-up by the low bits of a line finds three codes of 16 rows and four columns, and two or three
//! shifts find the triples that lie across lines.
//!
//! **Column copy** ([`TiledMatrix::columns`]): the matrix once more, column after column, so that
//! columns that meet a zero input cost no memory traffic: `down` of such a network. The codes of
//! each column are padded to whole lines of [`LINE`] bytes, 256 rows each: the code of row `r` and
//! column `k` is in byte `k * column_bytes(rows) + r / 256 * 64 + r % 64`, at bits `2 p` and `2 p + 1`
//! with `p = r % 256 / 64`.

use std::ops::Range;

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{
    DType, Error, LinearUse, TernaryMatrix, TileLayout, TiledMatrix, WeightScale, mmap,
};

/// Rows of a tile: the height of a band.
pub const ROWS: usize = 16;
/// Columns of a tile.
pub const COLS: usize = 16;
/// Bytes of a tile.
pub const BYTES: usize = ROWS * COLS / 4;

/// The bytes of a tile.
pub type Tile = [u8; BYTES];

/// Tiles that a block of triples is made of.
pub const BLOCK_TILES: usize = 6;
/// Columns of a block of triples.
pub const BLOCK_COLS: usize = BLOCK_TILES * COLS;
/// Lines of a block of triples, and triples that the same byte of its tiles has codes of.
const BLOCK_LINES: usize = 5;
const BLOCK_TRIPLES: usize = 8;
/// Bytes of a block of triples.
pub const BLOCK_BYTES: usize = BLOCK_LINES * LINE;
/// A block of triples.
pub type Block = [u8; BLOCK_BYTES];

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

/// Bytes of one band, or `None` if they do not fit the address space.
pub fn band_len(layout: TileLayout, cols: usize) -> Option<usize> {
    let tiles = tiles_per_band(cols);
    match layout {
        TileLayout::Bands | TileLayout::Rows => tiles.checked_mul(BYTES),
        TileLayout::Triples => {
            (tiles / BLOCK_TILES * BLOCK_BYTES).checked_add(tiles % BLOCK_TILES * BYTES)
        }
    }
}

/// Bytes of a matrix in tiles, or `None` if they do not fit the address space.
pub fn byte_len(layout: TileLayout, rows: usize, cols: usize) -> Option<usize> {
    rows.div_ceil(ROWS).checked_mul(band_len(layout, cols)?)
}

/// The blocks of triples of a band of `cols` columns, and the tiles after them.
pub fn blocks_and_tiles(band: &[u8], cols: usize) -> (&[Block], &[Tile]) {
    let blocks = tiles_per_band(cols) / BLOCK_TILES;
    let (blocks, tiles) = band.split_at(blocks * BLOCK_BYTES);
    (blocks.as_chunks().0, tiles.as_chunks().0)
}

/// The codes of a triple, two bits each from the lowest on. Of numbers that are no triple (27 to 31) one
/// of the codes is 3.
#[inline(always)]
pub const fn codes_of_triple(triple: u8) -> u8 {
    let third = (triple > 8) as u8 + (triple > 17) as u8;
    let rest = triple - 9 * third;
    let second = (rest > 2) as u8 + (rest > 5) as u8;
    (rest - 3 * second) + 4 * second + 16 * third
}

/// The tiles of a band of triples.
///
/// # Panics
/// If there is no room for as many tiles as the band has.
#[inline(always)]
pub fn unpack_band((blocks, left): (&[Block], &[Tile]), tiles: &mut [Tile]) {
    let (unpacked, rest) = tiles.as_chunks_mut();
    for (block, tiles) in blocks.iter().zip(&mut *unpacked) {
        unpack_block(block, tiles);
    }
    assert_eq!(unpacked.len(), blocks.len());
    rest.copy_from_slice(left);
}

/// The tiles that a block of triples is made of.
#[inline(always)]
fn unpack_block(block: &Block, tiles: &mut [Tile; BLOCK_TILES]) {
    let (lines, _) = block.as_chunks::<LINE>();
    for b in 0..LINE {
        let line: [u8; BLOCK_LINES] = std::array::from_fn(|i| lines[i][b]);
        let high = |i: usize| line[i] >> 5;
        let triples = [
            line[0] & 31,
            line[1] & 31,
            line[2] & 31,
            line[3] & 31,
            line[4] & 31,
            high(0) | high(1) >> 1 << 3,
            high(2) | high(3) >> 1 << 3,
            high(4) | (high(1) & 1) << 3 | (high(3) & 1) << 4,
        ];
        let codes = triples.map(codes_of_triple);
        for half in 0..2 {
            let (tiles, codes) = (&mut tiles[3 * half..], &codes[4 * half..]);
            tiles[0][b] = codes[0] | codes[1] << 6;
            tiles[1][b] = codes[1] >> 2 | codes[2] << 4;
            tiles[2][b] = codes[2] >> 4 | codes[3] << 2;
        }
    }
}

/// A block of triples from its tiles.
fn pack_block(tiles: &[Tile; BLOCK_TILES]) -> Block {
    let mut block = [0; BLOCK_BYTES];
    let (lines, _) = block.as_chunks_mut::<LINE>();
    for b in 0..LINE {
        let mut triples = [0u8; BLOCK_TRIPLES];
        for (triples, tiles) in triples.chunks_exact_mut(4).zip(tiles.chunks_exact(3)) {
            let codes = u32::from_le_bytes([tiles[0][b], tiles[1][b], tiles[2][b], 0]);
            for (i, triple) in triples.iter_mut().enumerate() {
                let codes = codes >> (6 * i);
                *triple =
                    (codes & 3) as u8 + 3 * (codes >> 2 & 3) as u8 + 9 * (codes >> 4 & 3) as u8;
            }
        }
        let [fifth, sixth, seventh] = [triples[5], triples[6], triples[7]];
        let high = [
            fifth & 7,
            fifth >> 3 << 1 | seventh >> 3 & 1,
            sixth & 7,
            sixth >> 3 << 1 | seventh >> 4,
            seventh & 7,
        ];
        for ((line, low), high) in lines.iter_mut().zip(triples).zip(high) {
            line[b] = low | high << 5;
        }
    }
    block
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

/// Where row `row` has its word of tile `t` of its band, in words from the start of the matrix; of
/// triples, when they are unpacked.
#[inline(always)]
fn word(layout: TileLayout, per_band: usize, row: usize, t: usize) -> usize {
    match layout {
        TileLayout::Bands | TileLayout::Triples => (row / ROWS * per_band + t) * ROWS + row % ROWS,
        TileLayout::Rows => row * per_band + t,
    }
}

/// Lays a matrix out in tiles.
///
/// # Panics
/// If `out` is not [`byte_len`] bytes.
pub fn pack(matrix: &TernaryMatrix, layout: TileLayout, out: &mut [u8]) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    assert_eq!(Some(out.len()), byte_len(layout, rows, cols), "room for {rows} x {cols} in tiles");
    if layout != TileLayout::Triples {
        return pack_rows(matrix, 0..rows, layout, out);
    }
    let mut room = vec![[0; BYTES]; tiles_per_band(cols)];
    let band_bytes = (out.len() / rows.div_ceil(ROWS).max(1)).max(1);
    for (first, out) in (0..rows).step_by(ROWS).zip(out.chunks_exact_mut(band_bytes)) {
        pack_rows(matrix, first..rows.min(first + ROWS), layout, room.as_flattened_mut());
        let (blocks, left) = room.as_chunks::<BLOCK_TILES>();
        let (out, out_left) = out.split_at_mut(blocks.len() * BLOCK_BYTES);
        for (out, tiles) in out.as_chunks_mut().0.iter_mut().zip(blocks) {
            *out = pack_block(tiles);
        }
        out_left.copy_from_slice(left.as_flattened());
    }
}

/// Lays some rows out in tiles, from the first of a band on.
fn pack_rows(matrix: &TernaryMatrix, rows: Range<usize>, layout: TileLayout, out: &mut [u8]) {
    out.fill(ZEROS);
    let (words, _) = out.as_chunks_mut::<4>();
    let per_band = tiles_per_band(matrix.cols());
    for row in rows.clone() {
        // A packed byte has four consecutive columns, which a tile has in four bytes of one plane.
        for (i, &four) in matrix.packed_row(row).iter().enumerate() {
            let (_, bit) = place(0, 4 * i % COLS);
            let word = &mut words[word(layout, per_band, row - rows.start, 4 * i / COLS)];
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

/// What whoever reads a matrix can make use of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reader {
    /// Second copies of matrices that gain from one.
    pub copies: bool,
    /// [`TileLayout::Triples`].
    pub triples: bool,
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
    // Only sums of integers, which may be taken in any order, can leave zeros out.
    let exact = precision == ActivationPrecision::Int8
        && !matches!(matrix.scale(), WeightScale::Groups { .. });
    let layout = match usage {
        LinearUse::SparseOutputs if exact => TileLayout::Rows,
        _ if exact && reader.triples => TileLayout::Triples,
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
        let len = column_bytes(rows).checked_mul(cols).ok_or_else(overflow)?;
        Some(mmap::filled(len, |out| pack_columns(matrix, out))?)
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
    let per_band = tiles_per_band(cols);
    let mut room = vec![[0; BYTES]; if layout == TileLayout::Triples { per_band } else { 0 }];
    TernaryMatrix::from_rows(rows, cols, matrix.scale().clone(), |row, codes| {
        let (words, row) = match layout {
            TileLayout::Bands | TileLayout::Rows => (matrix.tiles().as_chunks().0, row),
            TileLayout::Triples => {
                if row % ROWS == 0 {
                    let len = matrix.tiles().len() / rows.div_ceil(ROWS);
                    let band = &matrix.tiles()[row / ROWS * len..][..len];
                    unpack_band(blocks_and_tiles(band, cols), &mut room);
                }
                (room.as_flattened().as_chunks().0, row % ROWS)
            }
        };
        for (col, code) in codes.iter_mut().enumerate() {
            let (byte, bit) = place(0, col % COLS);
            let word: [u8; 4] = words[word(layout, per_band, row, col / COLS)];
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
    check(matrix.tiles(), byte_len(matrix.layout(), rows, cols))?;
    match matrix.columns() {
        Some(columns) => check(columns, column_bytes(rows).checked_mul(cols)),
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
                    for (copies, triples) in [(false, false), (true, false), (true, true)] {
                        let reader = Reader { copies, triples };
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
            lay_for(Reader { copies: true, triples: true }, m, precision, usage)
        };
        assert_eq!(lay(&m, Int8, LinearUse::SparseOutputs), (TileLayout::Rows, false));
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
        // A row has 3 tiles of 4 bytes.
        let by_row = bytes(&m, TileLayout::Rows);
        assert_eq!(by_row.len(), bands.len());
        assert_eq!(by_row[(18 * 3 + 2) * 4 + 3], 0b0101_1000);
        assert_eq!(by_row[20 * 3 * 4], 0b0101_0101, "rows past the last are weight 0");
    }

    #[test]
    fn a_weight_is_where_triples_say() {
        // Row 18 is row 2 of the second band. Column 85 is column 5 of tile 5 of the first block: byte
        // 4 * 2 + 5 % 4 = 9, and code 4 * 5 + 5 / 4 = 21 of it, the lowest of triple 7.
        let (rows, cols) = (20, 100);
        let m = TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(1.0), |row, codes| {
            codes.fill(0);
            codes[85] = if row == 18 { 2 } else { 0 };
            codes[99] = 1;
        })
        .unwrap();
        let triples = bytes(&m, TileLayout::Triples);
        assert_eq!(triples.len(), 2 * (320 + 64));
        let block = &triples[384..][..320];
        assert_eq!(block[4 * 64 + 9], 2 << 5);
        assert_eq!(block[9], 0);
        // Rows past the last have weights of zero: triples of 1 + 3 + 9 = 13.
        assert_eq!(block[4 * 4], 13 | 5 << 5);
        assert_eq!(block[64 + 4 * 4], 13 | 0b011 << 5);
        // Column 99 is column 3 of the tile that is left.
        assert_eq!(triples[384 + 320 + 4 * 2 + 3], 0b0101_0101);
        assert_eq!(triples[384 + 320 + 4 * 2 + 2], 0b0101_0100);
    }

    #[test]
    fn every_triple_has_three_codes_of_its_own() {
        for triple in 0..32u8 {
            let codes = codes_of_triple(triple);
            let three = [codes & 3, codes >> 2 & 3, codes >> 4];
            let value = three[0] + 3 * three[1] + 9 * three[2];
            assert_eq!(three.iter().all(|&code| code < 3), triple < 27);
            assert!(triple >= 27 || value == triple);
        }
    }

    #[test]
    fn numbers_that_are_no_triple_are_refused_on_the_way_back() {
        let mut bytes = vec![0; 320];
        bytes[64 + 4 * 5 + 2] = 27;
        let m = TiledMatrix::new(
            16,
            96,
            WeightScale::Multiply(1.0),
            TileLayout::Triples,
            bytes.into(),
            None,
        );
        // Triple 1 begins with code 3, the last plane of the first tile.
        let error = untiled(&m.unwrap()).unwrap_err();
        assert!(matches!(error, Error::IllegalCode { code: 3, row: 5, column: 14 }), "{error}");
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
        for layout in [TileLayout::Bands, TileLayout::Rows, TileLayout::Triples] {
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
            let (tiles, columns) = (vec![0; tiles].into(), vec![0; columns].into());
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
