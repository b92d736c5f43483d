//! Integer products that leave zeros out: chosen rows of a matrix in row order, and chosen columns
//! of a column copy (see [`bitnet_quant::packing::tile`]).

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod generic;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;

use bitnet_quant::packing::tile;

#[cfg(target_arch = "x86_64")]
use super::prefetch_second;
use super::{Kernels, Tile};

type Rows = unsafe fn(&[u8], usize, &[i8], &[u32], &mut [i32]);
type Columns = unsafe fn(&[u8], usize, &[(u32, i8)], &mut [i16], &mut [i32]);

/// The kernels of this file for one instruction set.
pub(super) struct Table {
    rows: Rows,
    columns: Columns,
    band: unsafe fn(&[u8], &mut [Tile]),
}

/// How many live rows or columns ahead a kernel asks memory for, into the second-level cache: runs
/// with gaps between them are not what the hardware foresees. Asking for the first-level cache
/// instead left half of the bandwidth unused.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 32;

/// Asks memory for the first [`AHEAD`] runs of a list.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask(matrix: &[u8], bytes: usize, list: impl Iterator<Item = u32>) {
    for run in list.take(AHEAD) {
        let start = matrix.as_ptr().wrapping_add(run as usize * bytes);
        (0..bytes).step_by(tile::LINE).for_each(|at| prefetch_second(start.wrapping_add(at)));
    }
}

/// Where the `N` rows or columns start that a kernel takes together, those it takes next, and those
/// that it asks memory for meanwhile.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Group<const N: usize> {
    starts: [*const u8; N],
    next: [*const u8; N],
    ahead: [*const u8; N],
}

#[cfg(target_arch = "x86_64")]
impl<const N: usize> Group<N> {
    /// The group from number `first` on of a list of `len` runs of `bytes` bytes. Past the end of the
    /// list its last run is repeated.
    #[inline(always)]
    fn new(
        matrix: &[u8],
        bytes: usize,
        len: usize,
        first: usize,
        list: impl Fn(usize) -> u32,
    ) -> Self {
        let start = |i: usize| matrix.as_ptr().wrapping_add(list(i.min(len - 1)) as usize * bytes);
        Group {
            starts: std::array::from_fn(|i| start(first + i)),
            next: std::array::from_fn(|i| start(first + N + i)),
            ahead: std::array::from_fn(|i| start(first + AHEAD + i)),
        }
    }
}

/// Columns of which a 16-bit lane can sum the products of a code (at most 2) and an activation
/// (-128..=127): 128 times -256 is -32 768, the very end of its range. Half as many pairs from
/// vpmaddubsw are the same.
const COLUMNS_PER_WIDENING: usize = 128;

/// Bytes of each of the four planes of [`spread`], for rows of `row_bytes`: whole registers of every
/// instruction set.
fn plane_len(row_bytes: usize) -> usize {
    row_bytes.next_multiple_of(64)
}

/// Length of the planes of inputs padded to `stride` columns.
pub(crate) fn planes_len(stride: usize) -> usize {
    4 * plane_len(stride / 4)
}

/// Spreads quantised inputs, padded to whole tiles, over four planes, so that element `i` of plane
/// `p` is what the code at bits `2 p` of byte `i` of a row is multiplied with.
///
/// # Panics
/// If `planes` is not [`planes_len`] elements.
pub(crate) fn spread(q: &[i8], planes: &mut [i8]) {
    assert!(planes.len() == planes_len(q.len()) && q.len().is_multiple_of(tile::COLS));
    let len = planes.len() / 4;
    planes.fill(0);
    let (tiles, _) = q.as_chunks::<{ tile::COLS }>();
    for (plane, out) in planes.chunks_exact_mut(len.max(1)).enumerate() {
        for (four, tile) in out.as_chunks_mut::<4>().0.iter_mut().zip(tiles) {
            four.copy_from_slice(&tile[4 * plane..][..4]);
        }
    }
}

impl Kernels {
    /// `acc[i] = sum over k of code(live[i], k) * q[k]`, exactly, for rows of `row_bytes` bytes in
    /// row order and inputs [`spread`] over `planes`.
    ///
    /// # Panics
    /// If a row is not there, or lengths do not fit.
    pub(crate) fn ternary_rows(
        &self,
        rows: &[u8],
        row_bytes: usize,
        planes: &[i8],
        live: &[u32],
        acc: &mut [i32],
    ) {
        let Some(last) = live.iter().copied().reduce(u32::max) else { return };
        assert!((last as usize + 1).checked_mul(row_bytes).is_some_and(|end| end <= rows.len()));
        assert!(row_bytes.is_multiple_of(4) && planes.len() == 4 * plane_len(row_bytes));
        assert_eq!(live.len(), acc.len());
        // SAFETY: the CPU has the instructions (see `Kernels`); the rows are there, whole words of
        // them, and the planes cover a row in whole registers, as just checked.
        unsafe { (self.sparse.rows)(rows, row_bytes, planes, live, acc) }
    }

    /// `sums[r] += sum of code(r, column) * value` over `live`, a list of `(column, value)`. `narrow`
    /// is room for as many numbers.
    ///
    /// # Panics
    /// If a column is not there, or lengths do not fit.
    pub(crate) fn ternary_columns(
        &self,
        columns: &[u8],
        column_bytes: usize,
        live: &[(u32, i8)],
        narrow: &mut [i16],
        sums: &mut [i32],
    ) {
        let Some(last) = live.iter().map(|&(column, _)| column).reduce(u32::max) else { return };
        let end = (last as usize + 1).checked_mul(column_bytes);
        assert!(end.is_some_and(|end| end <= columns.len()));
        assert!(column_bytes.is_multiple_of(tile::LINE));
        assert!(sums.len() == 4 * column_bytes && narrow.len() == sums.len());
        // SAFETY: the CPU has the instructions (see `Kernels`); the columns are there, whole lines
        // of them, and there is room for the sums, as just checked.
        unsafe { (self.sparse.columns)(columns, column_bytes, live, narrow, sums) }
    }

    /// The tiles of a band from its sixteen rows in row order.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(crate) fn band_of_rows(&self, rows: &[u8], tiles: &mut [Tile]) {
        assert_eq!(rows.len(), tiles.len() * tile::BYTES);
        // SAFETY: the CPU has the instructions (see `Kernels`); the lengths agree.
        unsafe { (self.sparse.band)(rows, tiles) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::arch::tests::all_kernels;

    fn each_kernel(test: impl Fn(&Kernels)) {
        all_kernels().into_iter().for_each(test);
    }

    fn numbers() -> impl FnMut() -> u32 {
        let mut state = 1u32;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        }
    }

    fn codes(len: usize, next: &mut impl FnMut() -> u32) -> Vec<u8> {
        (0..len).map(|_| (0..4).fold(0, |byte, _| byte << 2 | (next() % 3) as u8)).collect()
    }

    /// Every count of live rows around the kernels' groups, and rows of every length around their
    /// registers, the last row of the matrix among them.
    #[test]
    fn chosen_rows_have_exact_sums() {
        let mut next = numbers();
        for tiles in [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 65, 129, 160] {
            let (count, row_bytes) = (23, 4 * tiles);
            let rows = codes(count * row_bytes, &mut next);
            let q: Vec<i8> = (0..16 * tiles).map(|_| next() as i8).collect();
            let mut planes = vec![1; planes_len(q.len())];
            spread(&q, &mut planes);
            let exact = |row: u32| -> i32 {
                let row = &rows[row as usize * row_bytes..][..row_bytes];
                let code = |k: usize| row[k / 16 * 4 + k % 4] >> (2 * (k % 16 / 4)) & 3;
                q.iter().enumerate().map(|(k, &q)| i32::from(code(k)) * i32::from(q)).sum()
            };
            for chosen in 0..=count {
                let live: Vec<u32> = (0..chosen).map(|i| (i * count / chosen) as u32).collect();
                let live: Vec<u32> = live.iter().map(|row| count as u32 - 1 - row).collect();
                let expected: Vec<i32> = live.iter().map(|&row| exact(row)).collect();
                each_kernel(|kernels| {
                    let mut acc = vec![-1; chosen];
                    kernels.ternary_rows(&rows, row_bytes, &planes, &live, &mut acc);
                    assert_eq!(acc, expected, "{}, {tiles} tiles", kernels.name);
                });
            }
        }
    }

    #[test]
    fn chosen_columns_have_exact_sums() {
        let mut next = numbers();
        for column_bytes in [64, 128, 640] {
            let columns = codes(300 * column_bytes, &mut next);
            for count in [0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 257] {
                let live: Vec<(u32, i8)> =
                    (0..count).map(|i| ((299 - i) as u32, next() as i8)).collect();
                let mut expected = vec![7; 4 * column_bytes];
                for &(column, value) in &live {
                    let column = &columns[column as usize * column_bytes..][..column_bytes];
                    for (row, sum) in expected.iter_mut().enumerate() {
                        let byte = column[row / 256 * 64 + row % 64];
                        let code = byte >> (2 * (row % 256 / 64)) & 3;
                        *sum += i32::from(code) * i32::from(value);
                    }
                }
                each_kernel(|kernels| {
                    let (mut narrow, mut sums) = (vec![9; expected.len()], vec![7; expected.len()]);
                    kernels.ternary_columns(&columns, column_bytes, &live, &mut narrow, &mut sums);
                    assert_eq!(sums, expected, "{}, {count} columns", kernels.name);
                });
            }
        }
    }

    /// All codes 2 and all activations at one end, around every widening limit.
    #[test]
    fn narrow_sums_of_rows_and_columns_hold_at_their_fullest() {
        each_kernel(|kernels| {
            for fill in [-128i8, 127] {
                let full = 2 * i32::from(fill);
                for tiles in [1, 63, 64, 65, 128, 129, 540] {
                    let rows = vec![0b10_10_10_10; 5 * 4 * tiles];
                    let mut planes = vec![0; planes_len(16 * tiles)];
                    spread(&vec![fill; 16 * tiles], &mut planes);
                    let mut acc = [0; 5];
                    kernels.ternary_rows(&rows, 4 * tiles, &planes, &[0, 1, 2, 3, 4], &mut acc);
                    assert_eq!(acc, [full * 16 * tiles as i32; 5], "{} {tiles}", kernels.name);
                }
                for count in [1, 127, 128, 129, 256, 300] {
                    let columns = vec![0b10_10_10_10; 64];
                    let (mut narrow, mut sums) = (vec![0; 256], vec![0; 256]);
                    let live = vec![(0, fill); count];
                    kernels.ternary_columns(&columns, 64, &live, &mut narrow, &mut sums);
                    assert_eq!(sums, vec![full * count as i32; 256], "{} {count}", kernels.name);
                }
            }
        });
    }

    #[test]
    fn a_band_comes_back_from_its_rows() {
        let mut next = numbers();
        for tiles in [1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 160] {
            let rows: Vec<u8> = (0..tiles * tile::BYTES).map(|_| next() as u8).collect();
            let (words, _) = rows.as_chunks::<4>();
            each_kernel(|kernels| {
                let mut band = vec![[0; tile::BYTES]; tiles];
                kernels.band_of_rows(&rows, &mut band);
                for (t, tile) in band.iter().enumerate() {
                    for (row, word) in tile.as_chunks::<4>().0.iter().enumerate() {
                        assert_eq!(*word, words[row * tiles + t], "{} {tiles}", kernels.name);
                    }
                }
            });
        }
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_row_past_the_last_is_refused() {
        let kernels = Kernels::for_isa(Isa::Scalar).unwrap();
        kernels.ternary_rows(&[0; 16], 8, &[0; 256], &[2], &mut [0]);
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_column_past_the_last_is_refused() {
        let kernels = Kernels::for_isa(Isa::Scalar).unwrap();
        kernels.ternary_columns(&[0; 128], 64, &[(2, 1)], &mut [0; 256], &mut [0; 256]);
    }
}
