//! AVX2.

use std::arch::x86_64::*;

use bitnet_quant::packing::tile::{self, Tile};

use super::{COLUMNS_PER_WIDENING, Group, LINE_ROWS, RunKernels, Table, ask, generic, plane_len};

pub(crate) static TABLE: Table =
    Table { two_bits: RunKernels { rows, columns }, quintuples: None, band };

/// Bytes of a row whose products a 16-bit lane can sum. The codes of every other plane are taken
/// times 4, as they lie: vpmaddubsw then adds two products of at most 8 and an activation, at least
/// -2048. A lane gets two of them per register of 32 bytes, and 16 reach -32 768, the very end
/// of its range.
const BYTES_PER_WIDENING: usize = 8 * 32;

/// Rows that share the loads of their inputs: no more accumulators fit the registers.
const GROUP: usize = 2;

/// See [`Kernels::ternary_rows`](crate::arch::Kernels::ternary_rows).
///
/// # Safety
/// The CPU has AVX2. Every live row lies in `rows`, `row_bytes` is a multiple of 4, and each of the
/// four planes has `plane_len(row_bytes)` elements.
#[target_feature(enable = "avx2")]
unsafe fn rows(rows: &[u8], row_bytes: usize, planes: &[i8], live: &[u32], acc: &mut [i32]) {
    ask(rows, row_bytes, live.iter().copied());
    for (i, acc) in acc.chunks_mut(GROUP).enumerate() {
        let group = Group::new(rows, row_bytes, live.len(), i * GROUP, |i| live[i]);
        // SAFETY: the contract of this function.
        let sums = unsafe { group_sums(group, row_bytes, planes) };
        let pairs = _mm256_hadd_epi32(sums[0], sums[1]);
        let pairs =
            _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
        let sums = _mm_hadd_epi32(pairs, pairs);
        acc[0] = _mm_cvtsi128_si32(sums);
        if let Some(acc) = acc.get_mut(1) {
            *acc = _mm_extract_epi32::<1>(sums);
        }
    }
}

/// Per row eight sums whose sum is that of the row.
///
/// # Safety
/// As for [`rows`], for the rows of the group.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn group_sums(group: Group<GROUP>, row_bytes: usize, planes: &[i8]) -> [__m256i; GROUP] {
    let ones = _mm256_set1_epi16(1);
    let stride = plane_len(row_bytes);
    let mut wide = [_mm256_setzero_si256(); GROUP];
    for run in (0..row_bytes).step_by(BYTES_PER_WIDENING) {
        let end = row_bytes.min(run + BYTES_PER_WIDENING);
        let mut narrow = [[_mm256_setzero_si256(); 2]; GROUP];
        let mut at = run;
        while at + 64 <= end {
            for next in group.next {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
            }
            for ahead in group.ahead {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(at).cast());
            }
            for at in [at, at + 32] {
                // SAFETY: 32 bytes of each row; and the planes have elements for all of them.
                unsafe {
                    let codes =
                        group.starts.map(|row| _mm256_loadu_si256(row.wrapping_add(at).cast()));
                    multiply(codes, planes, stride, at, &mut narrow);
                }
            }
            at += 64;
        }
        while at < end {
            let words = _mm256_set1_epi32(((end - at) / 4) as i32);
            let mask = _mm256_cmpgt_epi32(words, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            // SAFETY: only whole words before the end of each row are read; the planes are padded
            // to whole registers.
            unsafe {
                let codes = group
                    .starts
                    .map(|row| _mm256_maskload_epi32(row.wrapping_add(at).cast(), mask));
                multiply(codes, planes, stride, at, &mut narrow);
            }
            at += 32;
        }
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            let [once, fourfold] = narrow.map(|narrow| _mm256_madd_epi16(narrow, ones));
            let fourfold = _mm256_srai_epi32::<2>(fourfold);
            *wide = _mm256_add_epi32(*wide, _mm256_add_epi32(once, fourfold));
        }
    }
    wide
}

/// Adds the products of 32 bytes of each row: `narrow[_][0]` gets those of planes 0 and 2,
/// `narrow[_][1]` four times those of planes 1 and 3.
///
/// # Safety
/// Each plane of `stride` elements has 32 from `at`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply(
    mut codes: [__m256i; GROUP],
    planes: &[i8],
    stride: usize,
    at: usize,
    narrow: &mut [[__m256i; 2]; GROUP],
) {
    let masks = [_mm256_set1_epi8(0b11), _mm256_set1_epi8(0b11_00)];
    for half in 0..2 {
        for plane in 0..2 {
            let q = planes.as_ptr().wrapping_add((2 * half + plane) * stride + at);
            // SAFETY: the contract of this function.
            let q = unsafe { _mm256_loadu_si256(q.cast()) };
            for (codes, narrow) in codes.iter().zip(&mut *narrow) {
                let pairs = _mm256_maddubs_epi16(_mm256_and_si256(*codes, masks[plane]), q);
                narrow[plane] = _mm256_add_epi16(narrow[plane], pairs);
            }
        }
        // Bits that cross a byte are masked off.
        codes = codes.map(|codes| _mm256_srli_epi16::<4>(codes));
    }
}

/// Columns that share the loads and stores of the sums.
const COLUMNS: usize = 8;

/// See [`Kernels::ternary_columns`](crate::arch::Kernels::ternary_columns). The bytes of two columns
/// are interleaved, so that vpmaddubsw adds their products.
///
/// # Safety
/// The CPU has AVX2. Every live column lies in `columns`, `column_bytes` is a multiple of 64, and
/// `narrow` and `sums` have four elements per byte of a column.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn columns(
    columns: &[u8],
    column_bytes: usize,
    live: &[(u32, i8)],
    narrow: &mut [i16],
    sums: &mut [i32],
) {
    ask(columns, column_bytes, live.iter().map(|&(column, _)| column));
    for (block, values) in live.chunks(COLUMNS_PER_WIDENING).enumerate() {
        narrow.fill(0);
        for (i, values) in values.chunks(COLUMNS).enumerate() {
            let first = block * COLUMNS_PER_WIDENING + i * COLUMNS;
            let group = Group::new(columns, column_bytes, live.len(), first, |i| live[i].0);
            // Those that a short last group repeats are taken times 0.
            let values = std::array::from_fn(|i| values.get(i).map_or(0, |&(_, value)| value));
            // SAFETY: the contract of this function.
            unsafe { add_columns(group, values, column_bytes, narrow) };
        }
        // SAFETY: likewise.
        unsafe { widen(column_bytes, narrow, sums) };
    }
}

/// Adds products of some columns to `narrow`: for each 32 bytes and plane 16 sums of the low and 16
/// of the high halves of the two 128-bit lanes.
///
/// # Safety
/// As for [`columns`], for the columns of the group.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_columns(
    group: Group<COLUMNS>,
    values: [i8; COLUMNS],
    column_bytes: usize,
    narrow: &mut [i16],
) {
    const PAIRS: usize = COLUMNS / 2;
    let mask = _mm256_set1_epi8(3);
    let values: [__m256i; PAIRS] = std::array::from_fn(|i| {
        let pair = [values[2 * i] as u8, values[2 * i + 1] as u8];
        _mm256_set1_epi16(i16::from_le_bytes(pair))
    });
    let mut sums = narrow.as_mut_ptr().cast::<__m256i>();
    for at in (0..column_bytes).step_by(32) {
        if at % tile::LINE == 0 {
            for next in group.next {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
            }
            for ahead in group.ahead {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(at).cast());
            }
        }
        let load = |i: usize| {
            // SAFETY: 32 bytes from `at` lie in a column.
            unsafe { _mm256_loadu_si256(group.starts[i].wrapping_add(at).cast()) }
        };
        let mut codes: [[__m256i; 2]; PAIRS] = std::array::from_fn(|i| {
            let (a, b) = (load(2 * i), load(2 * i + 1));
            [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)]
        });
        for _plane in 0..4 {
            for half in 0..2 {
                // SAFETY: there are four numbers per byte of a column: 32 bytes pass eight times 16.
                let mut sum = unsafe { _mm256_loadu_si256(sums) };
                for (codes, value) in codes.iter_mut().zip(values) {
                    let own = _mm256_and_si256(codes[half], mask);
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(own, value));
                    // Bits that cross a byte are masked off.
                    codes[half] = _mm256_srli_epi16::<2>(codes[half]);
                }
                // SAFETY: as above.
                unsafe { _mm256_storeu_si256(sums, sum) };
                sums = sums.wrapping_add(1);
            }
        }
    }
}

/// Adds `narrow`, in the order of [`add_columns`], to `sums`, row after row.
///
/// # Safety
/// As for [`columns`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen(column_bytes: usize, narrow: &[i16], sums: &mut [i32]) {
    let mut narrow = narrow.as_ptr().cast::<__m128i>();
    for at in (0..column_bytes).step_by(32) {
        for plane in 0..4 {
            let row = at / tile::LINE * LINE_ROWS + at % tile::LINE + plane * tile::LINE;
            // The low and high halves of bytes 0..16, and of bytes 16..32.
            for eight in [0, 16, 8, 24] {
                let to = sums.as_mut_ptr().wrapping_add(row + eight).cast::<__m256i>();
                // SAFETY: both have four elements per byte of a column, and every eight of them are
                // reached once.
                unsafe {
                    let wide = _mm256_cvtepi16_epi32(_mm_loadu_si128(narrow));
                    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), wide));
                }
                narrow = narrow.wrapping_add(1);
            }
        }
    }
}

/// See [`Kernels::band_of_rows`](crate::arch::Kernels::band_of_rows): eight words of eight rows at a
/// time.
///
/// # Safety
/// The CPU has AVX2, and `rows` has as many bytes as `tiles`.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn band(rows: &[u8], tiles: &mut [Tile]) {
    let row_bytes = 4 * tiles.len();
    let whole = tiles.len() / 8 * 8;
    let next_band = rows.as_ptr().wrapping_add(rows.len());
    for first in (0..whole).step_by(8) {
        for line in first..first + 8 {
            // Sixteen rows at once are more than the hardware foresees.
            _mm_prefetch::<_MM_HINT_T1>(next_band.wrapping_add(64 * line).cast());
        }
        for half in 0..2 {
            let r: [__m256i; 8] = std::array::from_fn(|row| {
                let at = (8 * half + row) * row_bytes + 4 * first;
                // SAFETY: eight words of one of sixteen rows.
                unsafe { _mm256_loadu_si256(rows.as_ptr().wrapping_add(at).cast()) }
            });
            // Pairs of rows, then fours of them, then the two 128-bit lanes.
            let two: [__m256i; 8] = std::array::from_fn(|i| {
                let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
                if i % 2 == 0 { _mm256_unpacklo_epi32(a, b) } else { _mm256_unpackhi_epi32(a, b) }
            });
            let four: [__m256i; 8] = std::array::from_fn(|i| {
                let (a, b) = (two[i / 4 * 4 + i % 4 / 2], two[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 { _mm256_unpacklo_epi64(a, b) } else { _mm256_unpackhi_epi64(a, b) }
            });
            for i in 0..4 {
                let low = _mm256_permute2x128_si256::<0x20>(four[i], four[4 + i]);
                let high = _mm256_permute2x128_si256::<0x31>(four[i], four[4 + i]);
                for (tile, words) in [(first + i, low), (first + 4 + i, high)] {
                    let to = tiles[tile].as_mut_ptr().wrapping_add(32 * half);
                    // SAFETY: half of a tile.
                    unsafe { _mm256_storeu_si256(to.cast(), words) };
                }
            }
        }
    }
    generic::band_from(rows, tiles, whole);
}
