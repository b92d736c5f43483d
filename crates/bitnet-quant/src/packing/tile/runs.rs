//! Runs: rows, or columns of a second copy, that lie one after another, so that those nobody needs cost
//! no memory traffic. `up` of a network whose gates are often zero is read by rows, `down` of it by
//! columns. The weights of a run are codes in one of two forms ([`RunCodes`]), four to a byte in two
//! bits each or five to a byte; number `p` of a byte is its *plane* `p`.
//!
//! **Quintuples** are for processors whose vpdpbusd multiplies any unsigned byte. The codes `c0` to `c4`
//! of a byte are the number `v = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4` in base 3, stored as
//! `q0 = ceil(256 v / 243)`: the fraction `v / 243` in units of 1/256, as in TQ1_0 of ggml. Each code is
//! what three times the byte carries out of its eight bits:
//!
//! ```text
//! 3 q_p = 256 c_p + q_{p + 1},        0 <= q_{p + 1} < 256
//! ```
//!
//! So a kernel need not find the codes: a sum of products of the codes with some `x_p` is
//! `sum c_p x_p = (3 sum q_p x_p - sum q_{p + 1} x_p) / 256`, exactly.
//!
//! **Row order** ([`TileLayout::Rows`](bitnet_core::TileLayout::Rows)): a row is 32-bit words, each with
//! four columns per plane: column `k` is in byte `k % 4` of word `k / n`, in the plane `k % n / 4`,
//! with the `n = 16` or 20 columns of a word. In two bits these are the words that the row has in its
//! tiles. A row of 2560 columns takes 640 bytes or 512. Rows are padded to whole bands.
//!
//! **Column copy** ([`ColumnCopy`](bitnet_core::ColumnCopy)): a column is whole lines of [`LINE`] bytes,
//! each with 64 rows per plane: row `r` is in byte `r % 64` of line `r / n`, in the plane `r % n / 64`,
//! with the `n = 256` or 320 rows of a line.

use bitnet_core::{RunCodes, TernaryMatrix};

use super::{BYTES, COLS, LINE, ROWS, Tile};

/// Columns that a byte of each plane of a row's word belongs to.
const WORD: usize = 4;

/// Bytes of a row in row order.
pub const fn row_bytes(codes: RunCodes, cols: usize) -> usize {
    cols.div_ceil(WORD * codes.per_byte()) * WORD
}

/// Rows that a line of the column copy holds.
pub const fn line_rows(codes: RunCodes) -> usize {
    LINE * codes.per_byte()
}

/// Bytes of one column of the column copy.
pub const fn column_bytes(codes: RunCodes, rows: usize) -> usize {
    rows.div_ceil(line_rows(codes)) * LINE
}

/// A byte with one more code, after those of the planes before `plane`.
#[inline(always)]
fn with_code(codes: RunCodes, byte: u8, plane: usize, code: u8) -> u8 {
    match codes {
        RunCodes::TwoBits => byte | code << (2 * plane),
        RunCodes::Quintuples => 3 * byte + code,
    }
}

/// The byte as it is stored, once it has all its codes.
#[inline(always)]
fn stored(codes: RunCodes, byte: u8) -> u8 {
    match codes {
        RunCodes::TwoBits => byte,
        RunCodes::Quintuples => (256 * u32::from(byte)).div_ceil(243) as u8,
    }
}

/// Takes the next code off a byte of a run. Every byte has five codes of a quintuple.
#[inline(always)]
fn take_code(form: RunCodes, byte: &mut u8) -> u8 {
    match form {
        RunCodes::TwoBits => {
            let code = *byte & 3;
            *byte >>= 2;
            code
        }
        RunCodes::Quintuples => {
            // What three times the byte carries: 3 * 86 is 258, 3 * 171 is 513.
            let code = u8::from(*byte >= 86) + u8::from(*byte >= 171);
            *byte = byte.wrapping_mul(3);
            code
        }
    }
}

/// The codes of a row from its words, which those of its tiles are too.
pub(super) fn unpack_row(
    form: RunCodes,
    words: impl Iterator<Item = [u8; WORD]>,
    codes: &mut [u8],
) {
    for (mut word, codes) in words.zip(codes.chunks_mut(WORD * form.per_byte())) {
        for codes in codes.chunks_mut(WORD) {
            for (code, byte) in codes.iter_mut().zip(&mut word) {
                *code = take_code(form, byte);
            }
        }
    }
}

/// Lays a matrix out row after row.
pub(super) fn pack_rows(matrix: &TernaryMatrix, form: RunCodes, out: &mut [u8]) {
    let (planes, cols) = (form.per_byte(), matrix.cols());
    let bytes = row_bytes(form, cols);
    let mut codes = vec![1; bytes * planes];
    for (row, out) in out.chunks_exact_mut(bytes.max(1)).enumerate() {
        if row < matrix.rows() {
            for (four, codes) in matrix.packed_row(row).iter().zip(codes.chunks_exact_mut(4)) {
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = four >> (2 * i) & 3;
                }
            }
        } else {
            codes.fill(1);
        }
        let (words, _) = out.as_chunks_mut::<WORD>();
        for (word, codes) in words.iter_mut().zip(codes.chunks_exact(WORD * planes)) {
            *word = [0; WORD];
            for (plane, codes) in codes.as_chunks::<WORD>().0.iter().enumerate() {
                for (byte, &code) in word.iter_mut().zip(codes) {
                    *byte = with_code(form, *byte, plane, code);
                }
            }
            *word = word.map(|byte| stored(form, byte));
        }
    }
}

/// Lays a matrix out column after column.
///
/// # Panics
/// If `out` is not `cols * column_bytes(rows)` bytes.
pub fn pack_columns(matrix: &TernaryMatrix, form: RunCodes, out: &mut [u8]) {
    let bytes = column_bytes(form, matrix.rows());
    assert_eq!(Some(out.len()), bytes.checked_mul(matrix.cols()), "room for the columns");
    out.fill(0);
    // A block of columns at a time, which stays in the cache while all rows pass by.
    const BLOCK: usize = 64;
    // Weights of zero, below the last row.
    let zeros = [0b01_01_01_01; BLOCK / 4];
    for (block, out) in out.chunks_mut((BLOCK * bytes).max(1)).enumerate() {
        for row in 0..matrix.rows().next_multiple_of(line_rows(form)) {
            let line = row / line_rows(form) * LINE;
            let (byte, plane) = (line + row % LINE, row % line_rows(form) / LINE);
            let fours = match row < matrix.rows() {
                true => &matrix.packed_row(row)[block * BLOCK / 4..],
                false => &zeros[..],
            };
            let mut columns = out[byte..].iter_mut().step_by(bytes);
            for four in fours.iter().take(BLOCK / 4) {
                for (i, byte) in columns.by_ref().take(4).enumerate() {
                    *byte = with_code(form, *byte, plane, four >> (2 * i) & 3);
                }
            }
        }
        out.iter_mut().for_each(|byte| *byte = stored(form, *byte));
    }
}

/// The tiles of a band from its rows in quintuples, whose words lie side by side as in a tile: sixteen
/// rows to an element of `words`.
#[inline(always)]
pub fn tiles_of_quintuples(words: &[Tile], tiles: &mut [Tile]) {
    const PLANES: usize = RunCodes::Quintuples.per_byte();
    // The columns of four words are those of five tiles.
    const WORDS: usize = COLS / WORD;
    for (words, tiles) in words.chunks(WORDS).zip(tiles.chunks_mut(PLANES)) {
        let mut group = [[0; BYTES]; PLANES];
        for (w, word) in words.iter().enumerate() {
            let mut left = *word;
            for p in 0..PLANES {
                let (tile, plane) = ((PLANES * w + p) / WORDS, (PLANES * w + p) % WORDS);
                for (out, left) in group[tile].iter_mut().zip(&mut left) {
                    *out |= take_code(RunCodes::Quintuples, left) << (2 * plane);
                }
            }
        }
        tiles.copy_from_slice(&group[..tiles.len()]);
    }
}

/// Words of sixteen rows of quintuples side by side, which [`tiles_of_quintuples`] takes.
pub const fn words_per_band(cols: usize) -> usize {
    row_bytes(RunCodes::Quintuples, cols) * ROWS / BYTES
}

#[cfg(test)]
mod tests {
    use bitnet_core::WeightScale;

    use super::RunCodes::{Quintuples, TwoBits};
    use super::*;

    /// A matrix of weights of `other` but for one place, which has the code 2.
    fn matrix(rows: usize, cols: usize, other: u8, place: (usize, usize)) -> TernaryMatrix {
        TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(1.0), |row, codes| {
            codes.fill(other);
            if row == place.0 {
                codes[place.1] = 2;
            }
        })
        .unwrap()
    }

    #[test]
    fn a_quintuple_is_the_number_that_the_layout_says_and_gives_its_codes_back() {
        for v in 0..243u32 {
            let codes: [u8; 5] = std::array::from_fn(|p| (v / 3u32.pow(4 - p as u32) % 3) as u8);
            let byte = (0..5).fold(0, |byte, p| with_code(Quintuples, byte, p, codes[p]));
            assert_eq!(u32::from(byte), v);
            let byte = stored(Quintuples, byte);
            assert_eq!(u32::from(byte), (256 * v).div_ceil(243));
            let mut left = byte;
            assert_eq!(std::array::from_fn(|_| take_code(Quintuples, &mut left)), codes);
        }
        for byte in 0..=255u8 {
            let mut left = byte;
            let code = take_code(Quintuples, &mut left);
            assert_eq!(3 * u32::from(byte), 256 * u32::from(code) + u32::from(left));
        }
    }

    #[test]
    fn a_weight_is_where_the_row_order_says() {
        // Column 39 is column 7 of the third word of two bits: byte 3, plane 1.
        let mut rows = vec![9; 32 * row_bytes(TwoBits, 40)];
        pack_rows(&matrix(20, 40, 0, (18, 39)), TwoBits, &mut rows);
        assert_eq!(rows[(18 * 3 + 2) * 4 + 3], 0b0101_1000);
        assert_eq!(rows[(18 * 3 + 2) * 4 + 2], 0b0101_0000);
        assert_eq!(rows[20 * 3 * 4], 0b0101_0101, "rows past the last are weight 0");
        // Column 33 is column 13 of the second word of quintuples: byte 1, plane 3, whose code counts
        // 3; plane 4 has columns 36 to 39, of which 37 is past the last.
        assert_eq!(row_bytes(Quintuples, 37), 8);
        let mut rows = vec![9; 32 * 8];
        pack_rows(&matrix(20, 37, 0, (18, 33)), Quintuples, &mut rows);
        assert_eq!(rows[18 * 8 + 4 + 1], (256 * (2 * 3 + 1u32)).div_ceil(243) as u8);
        assert_eq!(rows[18 * 8 + 4], 0);
        assert_eq!(rows[20 * 8], (256 * 121u32).div_ceil(243) as u8, "five weights of 0");
    }

    #[test]
    fn a_weight_is_where_the_column_copy_says() {
        // Row 470 is row 214 of the second line of two bits: byte 22, plane 3.
        let m = matrix(500, 6, 0, (470, 5));
        let mut columns = vec![9; 6 * column_bytes(TwoBits, 500)];
        pack_columns(&m, TwoBits, &mut columns);
        assert_eq!(columns.len(), 6 * 128);
        assert_eq!(columns[5 * 128 + 64 + 22], 0b1000_0000);
        assert_eq!(columns[4 * 128 + 64 + 22], 0);
        assert_eq!(columns[5 * 128 + 127], 0b0100_0000, "rows past the last are weight 0");
        assert_eq!(columns.iter().filter(|&&byte| byte & 0b1010_1010 != 0).count(), 1);
        // It is row 150 of the second line of quintuples: byte 22, plane 2, whose code counts 9. The
        // byte's last code is that of row 598.
        let mut columns = vec![9; 6 * column_bytes(Quintuples, 500)];
        pack_columns(&m, Quintuples, &mut columns);
        assert_eq!(columns.len(), 6 * 128);
        assert_eq!(columns[5 * 128 + 64 + 22], (256 * (2 * 9 + 3 + 1u32)).div_ceil(243) as u8);
        assert_eq!(columns[4 * 128 + 64 + 22], (256 * 4u32).div_ceil(243) as u8);
        assert_eq!(columns[5 * 128 + 22], 0);
    }

    #[test]
    fn tiles_come_back_from_words_of_quintuples() {
        for cols in [1, 20, 37, 79, 80, 81, 96, 161, 240] {
            let m = TernaryMatrix::from_rows(16, cols, WeightScale::Multiply(1.0), |row, codes| {
                codes
                    .iter_mut()
                    .enumerate()
                    .for_each(|(k, code)| *code = ((row + 1) * (k + 2) % 3) as u8);
            })
            .unwrap();
            let bytes = row_bytes(Quintuples, cols);
            let mut rows = vec![0; ROWS * bytes];
            pack_rows(&m, Quintuples, &mut rows);
            let mut words = vec![[0; BYTES]; words_per_band(cols)];
            for (w, word) in words.iter_mut().enumerate() {
                for (row, out) in word.chunks_exact_mut(WORD).enumerate() {
                    out.copy_from_slice(&rows[row * bytes + WORD * w..][..WORD]);
                }
            }
            let mut tiles = vec![[9; BYTES]; super::super::tiles_per_band(cols)];
            tiles_of_quintuples(&words, &mut tiles);
            for row in 0..ROWS {
                for col in 0..cols {
                    let code = super::super::tile_code(&tiles[col / COLS], row, col % COLS);
                    assert_eq!(code, m.code(row, col), "{row} {col} of {cols}");
                }
            }
        }
    }
}
