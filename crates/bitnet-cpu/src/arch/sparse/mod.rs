//! Integer products that leave zeros out: chosen rows of a matrix in row order, and chosen columns
//! of a column copy (see [`bitnet_quant::packing::tile::runs`]).

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod generic;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
#[cfg(target_arch = "x86_64")]
mod quintuples;

use bitnet_core::RunCodes;
use bitnet_quant::packing::tile::{self, runs};

#[cfg(target_arch = "x86_64")]
use super::prefetch_second;
use super::{Kernels, Tile};

/// Rows of a matrix, or columns of its second copy, one after another.
#[derive(Clone, Copy)]
pub(crate) struct Runs<'a> {
    pub(crate) codes: RunCodes,
    pub(crate) bytes: &'a [u8],
    /// Bytes of each.
    pub(crate) len: usize,
}

type Rows = unsafe fn(&[u8], usize, &[i8], &[u32], &mut [i32]);
type Columns = unsafe fn(&[u8], usize, &[(u32, i8)], &mut [i16], &mut [i32]);

/// The kernels of this file for one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Table {
    two_bits: RunKernels,
    quintuples: Option<Quintuples>,
    band: unsafe fn(&[u8], &mut [Tile]),
}

/// What whoever has runs in quintuples has seen to.
const TAKEN: &str = "kernels that take quintuples";

/// Those for one form of codes.
#[derive(Clone, Copy)]
struct RunKernels {
    rows: Rows,
    columns: Columns,
}

/// Those for quintuples.
#[derive(Clone, Copy)]
struct Quintuples {
    runs: RunKernels,
    tiles: unsafe fn(&[Tile], &mut [Tile]),
}

impl Table {
    /// Whether there are kernels for runs in quintuples.
    pub(super) fn takes_quintuples(&self) -> bool {
        self.quintuples.is_some()
    }

    fn of(&self, codes: RunCodes) -> &RunKernels {
        match codes {
            RunCodes::TwoBits => &self.two_bits,
            RunCodes::Quintuples => &self.quintuples.as_ref().expect(TAKEN).runs,
        }
    }
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

/// Rows that a line of two-bit codes of a column has.
const LINE_ROWS: usize = runs::line_rows(RunCodes::TwoBits);

/// Columns of which a 16-bit lane can sum the products of a code (at most 2) and an activation
/// (-128..=127): 128 times -256 is -32 768, the very end of its range. Half as many pairs from
/// vpmaddubsw are the same.
const COLUMNS_PER_WIDENING: usize = 128;

/// Bytes of each plane of [`spread`], for rows of `row_bytes`: whole registers of every instruction
/// set.
fn plane_len(row_bytes: usize) -> usize {
    row_bytes.next_multiple_of(64)
}

/// Length of the planes of inputs for such rows.
pub(crate) fn planes_len(rows: Runs<'_>) -> usize {
    rows.codes.per_byte() * plane_len(rows.len)
}

/// Spreads quantised inputs over planes, so that element `i` of plane `p` is what the code in plane `p`
/// of byte `i` of a row is multiplied with. Where there is no input it is zero.
///
/// # Panics
/// If `planes` is not [`planes_len`] elements.
pub(crate) fn spread(q: &[i8], rows: Runs<'_>, planes: &mut [i8]) {
    assert_eq!(planes.len(), planes_len(rows));
    planes.fill(0);
    let per_word = 4 * rows.codes.per_byte();
    for (plane, out) in planes.chunks_exact_mut(plane_len(rows.len).max(1)).enumerate() {
        for (four, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(q.chunks(per_word)) {
            for (out, q) in four.iter_mut().zip(word.iter().skip(4 * plane)) {
                *out = *q;
            }
        }
    }
}

impl Kernels {
    /// `acc[i] = sum over k of code(live[i], k) * q[k]`, exactly, for inputs [`spread`] over `planes`.
    ///
    /// # Panics
    /// If a row is not there, lengths do not fit, or these kernels do not take the form of the codes.
    pub(crate) fn ternary_rows(
        &self,
        rows: Runs<'_>,
        planes: &[i8],
        live: &[u32],
        acc: &mut [i32],
    ) {
        let Runs { codes, bytes, len } = rows;
        let Some(last) = live.iter().copied().reduce(u32::max) else { return };
        assert!((last as usize + 1).checked_mul(len).is_some_and(|end| end <= bytes.len()));
        assert!(len.is_multiple_of(4) && planes.len() == planes_len(rows));
        assert_eq!(live.len(), acc.len());
        // SAFETY: the CPU has the instructions (see `Kernels`); the rows are there, whole words of
        // them, and the planes cover a row in whole registers, as just checked.
        unsafe { (self.sparse.of(codes).rows)(bytes, len, planes, live, acc) }
    }

    /// `sums[r] += sum of code(r, column) * value` over `live`, a list of `(column, value)`. `narrow`
    /// is room for as many numbers.
    ///
    /// # Panics
    /// If a column is not there, lengths do not fit, or these kernels do not take the form of the codes.
    pub(crate) fn ternary_columns(
        &self,
        columns: Runs<'_>,
        live: &[(u32, i8)],
        narrow: &mut [i16],
        sums: &mut [i32],
    ) {
        let Runs { codes, bytes, len } = columns;
        let Some(last) = live.iter().map(|&(column, _)| column).reduce(u32::max) else { return };
        assert!((last as usize + 1).checked_mul(len).is_some_and(|end| end <= bytes.len()));
        assert!(len.is_multiple_of(tile::LINE));
        assert!(sums.len() == codes.per_byte() * len && narrow.len() == sums.len());
        // SAFETY: the CPU has the instructions (see `Kernels`); the columns are there, whole lines
        // of them, and there is room for the sums, as just checked.
        unsafe { (self.sparse.of(codes).columns)(bytes, len, live, narrow, sums) }
    }

    /// The words of sixteen rows in row order side by side: of two bits, the tiles of the band.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(crate) fn band_of_rows(&self, rows: &[u8], tiles: &mut [Tile]) {
        assert_eq!(rows.len(), tiles.len() * tile::BYTES);
        // SAFETY: the CPU has the instructions (see `Kernels`); the lengths agree.
        unsafe { (self.sparse.band)(rows, tiles) }
    }

    /// [`runs::tiles_of_quintuples`].
    ///
    /// # Panics
    /// If these kernels do not take quintuples.
    pub(crate) fn tiles_of_quintuples(&self, words: &[Tile], tiles: &mut [Tile]) {
        // SAFETY: the CPU has the instructions (see `Kernels`).
        unsafe { (self.sparse.quintuples.as_ref().expect(TAKEN).tiles)(words, tiles) }
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

    /// Every kernel that takes runs of these codes.
    fn each_kernel_of(codes: RunCodes, test: impl Fn(&Kernels)) {
        each_kernel(|kernels| {
            if codes == RunCodes::TwoBits || kernels.sparse.takes_quintuples() {
                test(kernels);
            }
        });
    }

    const FORMS: [RunCodes; 2] = [RunCodes::TwoBits, RunCodes::Quintuples];

    fn code(codes: RunCodes, byte: u8, plane: usize) -> i32 {
        match codes {
            RunCodes::TwoBits => i32::from(byte >> (2 * plane) & 3),
            RunCodes::Quintuples => i32::from(byte) * 3i32.pow(plane as u32) % 256 * 3 / 256,
        }
    }

    /// Random bytes of runs. Every byte has five codes of a quintuple.
    fn bytes(codes: RunCodes, len: usize, next: &mut impl FnMut() -> u32) -> Vec<u8> {
        let mut byte = || match codes {
            RunCodes::TwoBits => (0..4).fold(0, |byte, _| byte << 2 | (next() % 3) as u8),
            RunCodes::Quintuples => next() as u8,
        };
        (0..len).map(|_| byte()).collect()
    }

    /// The byte whose codes are all 2.
    fn fullest(codes: RunCodes) -> u8 {
        match codes {
            RunCodes::TwoBits => 0b10_10_10_10,
            RunCodes::Quintuples => 255,
        }
    }

    /// Every count of live rows around the kernels' groups, and rows of every length around their
    /// registers, the last row of the matrix among them.
    #[test]
    fn chosen_rows_have_exact_sums() {
        let mut next = numbers();
        for codes in FORMS {
            let per_word = 4 * codes.per_byte();
            for words in [1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 65, 129, 160] {
                let (count, len) = (23, 4 * words);
                let rows = bytes(codes, count * len, &mut next);
                let rows = Runs { codes, bytes: &rows, len };
                // The last word meets no whole word of inputs.
                let q: Vec<i8> = (0..per_word * words - 4).map(|_| next() as i8).collect();
                let mut planes = vec![1; planes_len(rows)];
                spread(&q, rows, &mut planes);
                let exact = |row: u32| -> i32 {
                    let row = &rows.bytes[row as usize * len..][..len];
                    let of =
                        |k: usize| code(codes, row[k / per_word * 4 + k % 4], k % per_word / 4);
                    q.iter().enumerate().map(|(k, &q)| of(k) * i32::from(q)).sum()
                };
                for chosen in 0..=count {
                    let live: Vec<u32> = (0..chosen).map(|i| (i * count / chosen) as u32).collect();
                    let live: Vec<u32> = live.iter().map(|row| count as u32 - 1 - row).collect();
                    let expected: Vec<i32> = live.iter().map(|&row| exact(row)).collect();
                    each_kernel_of(codes, |kernels| {
                        let mut acc = vec![-1; chosen];
                        kernels.ternary_rows(rows, &planes, &live, &mut acc);
                        assert_eq!(acc, expected, "{}, {codes:?}, {words} words", kernels.name);
                    });
                }
            }
        }
    }

    #[test]
    fn chosen_columns_have_exact_sums() {
        let mut next = numbers();
        for (codes, len) in FORMS.into_iter().flat_map(|f| [64, 128, 640].map(|len| (f, len))) {
            let columns = bytes(codes, 300 * len, &mut next);
            let columns = Runs { codes, bytes: &columns, len };
            let planes = codes.per_byte();
            for count in [0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 257] {
                let live: Vec<(u32, i8)> =
                    (0..count).map(|i| ((299 - i) as u32, next() as i8)).collect();
                let mut expected = vec![7; planes * len];
                for &(column, value) in &live {
                    let column = &columns.bytes[column as usize * len..][..len];
                    for (row, sum) in expected.iter_mut().enumerate() {
                        let (line, row) = (row / (64 * planes), row % (64 * planes));
                        let byte = column[line * 64 + row % 64];
                        *sum += code(codes, byte, row / 64) * i32::from(value);
                    }
                }
                each_kernel_of(codes, |kernels| {
                    let (mut narrow, mut sums) = (vec![9; expected.len()], vec![7; expected.len()]);
                    kernels.ternary_columns(columns, &live, &mut narrow, &mut sums);
                    assert_eq!(sums, expected, "{}, {codes:?}, {count} columns", kernels.name);
                });
            }
        }
    }

    /// All codes 2 and all activations at one end, around every widening limit.
    #[test]
    fn narrow_sums_of_rows_and_columns_hold_at_their_fullest() {
        for (codes, fill) in FORMS.into_iter().flat_map(|form| [(form, -128i8), (form, 127)]) {
            let (full, per_word) = (2 * i32::from(fill), 4 * codes.per_byte());
            let mut lengths = vec![1, 63, 64, 65, 128, 129, 540];
            // Twice as far as sums of quintuples go at once: in one go they would not fit.
            lengths.extend([1 << 14, 1 << 15]);
            for words in lengths {
                let rows = vec![fullest(codes); 5 * 4 * words];
                let rows = Runs { codes, bytes: &rows, len: 4 * words };
                let mut planes = vec![0; planes_len(rows)];
                spread(&vec![fill; per_word * words], rows, &mut planes);
                each_kernel_of(codes, |kernels| {
                    let mut acc = [0; 5];
                    kernels.ternary_rows(rows, &planes, &[0, 1, 2, 3, 4], &mut acc);
                    let expected = [full * (per_word * words) as i32; 5];
                    assert_eq!(acc, expected, "{} {codes:?} {words}", kernels.name);
                });
            }
            let columns = vec![fullest(codes); 64];
            let columns = Runs { codes, bytes: &columns, len: 64 };
            for count in [1, 31, 32, 33, 127, 128, 129, 256, 300] {
                each_kernel_of(codes, |kernels| {
                    let all = 64 * codes.per_byte();
                    let (mut narrow, mut sums) = (vec![0; all], vec![0; all]);
                    let live = vec![(0, fill); count];
                    kernels.ternary_columns(columns, &live, &mut narrow, &mut sums);
                    let expected = vec![full * count as i32; all];
                    assert_eq!(sums, expected, "{} {codes:?} {count}", kernels.name);
                });
            }
        }
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
    fn tiles_of_quintuples_are_those_of_plain_code() {
        let mut next = numbers();
        for (count, tiles) in [(1, 1), (1, 2), (3, 4), (4, 5), (5, 6), (8, 9), (128, 160)] {
            let words = bytes(RunCodes::Quintuples, 64 * count, &mut next);
            let (words, _) = words.as_chunks();
            let mut expected = vec![[8; tile::BYTES]; tiles];
            runs::tiles_of_quintuples(words, &mut expected);
            each_kernel_of(RunCodes::Quintuples, |kernels| {
                let mut out = vec![[9; tile::BYTES]; tiles];
                kernels.tiles_of_quintuples(words, &mut out);
                assert_eq!(out, expected, "{}, {count} words", kernels.name);
            });
        }
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_row_past_the_last_is_refused() {
        let kernels = Kernels::for_isa(Isa::Scalar).unwrap();
        let rows = Runs { codes: RunCodes::TwoBits, bytes: &[0; 16], len: 8 };
        kernels.ternary_rows(rows, &[0; 256], &[2], &mut [0]);
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_column_past_the_last_is_refused() {
        let kernels = Kernels::for_isa(Isa::Scalar).unwrap();
        let columns = Runs { codes: RunCodes::TwoBits, bytes: &[0; 128], len: 64 };
        kernels.ternary_columns(columns, &[(2, 1)], &mut [0; 256], &mut [0; 256]);
    }
}
