//! **Triples** ([`TileLayout::Triples`](bitnet_core::TileLayout::Triples)): bands in which three weights
//! take 5 bits in place of 6, for processors that look up what they read faster than memory brings it.
//! Six tiles side by side, 96
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

use super::{COLS, LINE, Tile, tiles_per_band};

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

/// The bytes of a band from its tiles.
pub(super) fn pack_band(tiles: &[Tile], band: &mut [u8]) {
    let (blocks, left) = tiles.as_chunks::<BLOCK_TILES>();
    let (out, out_left) = band.split_at_mut(blocks.len() * BLOCK_BYTES);
    for (out, tiles) in out.as_chunks_mut().0.iter_mut().zip(blocks) {
        *out = pack_block(tiles);
    }
    out_left.copy_from_slice(left.as_flattened());
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

#[cfg(test)]
mod tests {
    use bitnet_core::{Error, TernaryMatrix, TileLayout, TiledMatrix, WeightScale};

    use super::super::{byte_len, pack, untiled};
    use super::*;

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
        let mut triples = vec![0; byte_len(TileLayout::Triples, rows, cols).unwrap()];
        pack(&m, TileLayout::Triples, &mut triples);
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
}
