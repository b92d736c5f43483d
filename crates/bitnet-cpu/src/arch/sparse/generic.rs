//! Plain code, which the compiler vectorises.

use bitnet_quant::packing::tile::{self, Tile};

use super::{COLUMNS_PER_WIDENING, LINE_ROWS, RunKernels, Table, plane_len};

pub(crate) static TABLE: Table =
    Table { two_bits: RunKernels { rows, columns }, quintuples: None, band };

/// See [`Kernels::ternary_rows`](crate::arch::Kernels::ternary_rows).
fn rows(rows: &[u8], row_bytes: usize, planes: &[i8], live: &[u32], acc: &mut [i32]) {
    for (acc, &row) in acc.iter_mut().zip(live) {
        let row = &rows[row as usize * row_bytes..][..row_bytes];
        *acc = 0;
        for (plane, q) in planes.chunks_exact(plane_len(row_bytes)).enumerate() {
            let products = row.iter().zip(q);
            *acc += products
                .map(|(byte, &q)| i32::from(byte >> (2 * plane) & 3) * i32::from(q))
                .sum::<i32>();
        }
    }
}

/// See [`Kernels::ternary_columns`](crate::arch::Kernels::ternary_columns).
fn columns(
    columns: &[u8],
    column_bytes: usize,
    live: &[(u32, i8)],
    narrow: &mut [i16],
    sums: &mut [i32],
) {
    for live in live.chunks(COLUMNS_PER_WIDENING) {
        narrow.fill(0);
        for &(column, value) in live {
            let column = &columns[column as usize * column_bytes..][..column_bytes];
            let (lines, _) = column.as_chunks::<{ tile::LINE }>();
            let (rows, _) = narrow.as_chunks_mut::<{ LINE_ROWS }>();
            for (line, rows) in lines.iter().zip(rows) {
                for (plane, rows) in rows.chunks_exact_mut(tile::LINE).enumerate() {
                    for (sum, byte) in rows.iter_mut().zip(line) {
                        // Wraps only for codes of 3, which no matrix has.
                        let product = i16::from(byte >> (2 * plane) & 3) * i16::from(value);
                        *sum = sum.wrapping_add(product);
                    }
                }
            }
        }
        for (sum, &narrow) in sums.iter_mut().zip(&*narrow) {
            *sum += i32::from(narrow);
        }
    }
}

/// See [`Kernels::band_of_rows`](crate::arch::Kernels::band_of_rows).
pub(super) fn band(rows: &[u8], tiles: &mut [Tile]) {
    band_from(rows, tiles, 0);
}

/// The tiles of a band from tile `first` on.
pub(super) fn band_from(rows: &[u8], tiles: &mut [Tile], first: usize) {
    let (words, _) = rows.as_chunks::<4>();
    let per_row = tiles.len();
    for (t, tile) in tiles.iter_mut().enumerate().skip(first) {
        for (row, word) in tile.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *word = words[row * per_row + t];
        }
    }
}
