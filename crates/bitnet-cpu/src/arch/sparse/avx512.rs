//! AVX-512 with VNNI.

use std::arch::asm;
use std::arch::x86_64::*;

use bitnet_core::RunCodes;
use bitnet_quant::packing::tile;

use super::{AHEAD, Group, Quintuples, RunKernels, Table, ask, avx2, plane_len, quintuples};
use crate::arch::prefetch_second;

pub(crate) static TABLE: Table = Table {
    two_bits: RunKernels { rows: rows::<TWO_BITS>, columns: columns::<TWO_BITS> },
    quintuples: None,
    band: avx2::band,
};

/// With VBMI too.
pub(crate) static COMPACT: Table = Table {
    quintuples: Some(Quintuples {
        runs: RunKernels { rows: rows::<QUINTUPLES>, columns: columns::<QUINTUPLES> },
        tiles: quintuples::tiles,
    }),
    ..TABLE
};

/// Planes of each form of codes.
const TWO_BITS: usize = RunCodes::TwoBits.per_byte();
const QUINTUPLES: usize = RunCodes::Quintuples.per_byte();

/// Rows that share the loads of their inputs.
const GROUP: usize = 4;

/// See [`Kernels::ternary_rows`](crate::arch::Kernels::ternary_rows).
///
/// # Safety
/// The CPU has these instructions. Every live row lies in `rows`, and each of the planes has
/// `plane_len(row_bytes)` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn rows<const PLANES: usize>(
    rows: &[u8],
    row_bytes: usize,
    planes: &[i8],
    live: &[u32],
    acc: &mut [i32],
) {
    ask(rows, row_bytes, live.iter().copied());
    for (i, acc) in acc.chunks_mut(GROUP).enumerate() {
        let group = Group::new(rows, row_bytes, live.len(), i * GROUP, |i| live[i]);
        // SAFETY: the contract of this function.
        let [a, b, c, d] = unsafe { group_sums::<PLANES>(group, row_bytes, planes) };
        // Sums of pairs of lanes, then of fours, then of the four 128-bit lanes.
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let half = _mm512_extracti64x4_epi64::<1>(all);
        let half = _mm256_add_epi32(_mm512_castsi512_si256(all), half);
        let four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
        let mut out = [0; GROUP];
        // SAFETY: four 32-bit numbers are stored into four.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), four) };
        for (acc, out) in acc.iter_mut().zip(out) {
            *acc = out;
        }
    }
}

/// Per row sixteen sums whose sum is that of the row.
///
/// # Safety
/// As for [`rows`], for the rows of the group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn group_sums<const PLANES: usize>(
    group: Group<GROUP>,
    row_bytes: usize,
    planes: &[i8],
) -> [__m512i; GROUP] {
    let masks = [0b11, 0b11_00, 0b11_00_00, 0b11_00_00_00u8].map(|m| _mm512_set1_epi8(m as i8));
    let stride = plane_len(row_bytes);
    let mut totals = [_mm512_setzero_si512(); GROUP];
    for run in (0..row_bytes).step_by(BYTES_AT_ONCE) {
        let mut sums = [[_mm512_setzero_si512(); 4]; GROUP];
        for at in (run..row_bytes.min(run + BYTES_AT_ONCE)).step_by(64) {
            // SAFETY: the planes are padded to whole registers.
            let q: [__m512i; PLANES] = std::array::from_fn(|plane| unsafe {
                _mm512_loadu_si512(planes.as_ptr().wrapping_add(plane * stride + at).cast())
            });
            let there = match row_bytes - at {
                64.. => u64::MAX,
                left => (1 << left) - 1,
            };
            for (i, sums) in sums.iter_mut().enumerate() {
                _mm_prefetch::<_MM_HINT_T0>(group.next[i].wrapping_add(at).cast());
                _mm_prefetch::<_MM_HINT_T1>(group.ahead[i].wrapping_add(at).cast());
                let row = group.starts[i].wrapping_add(at);
                // SAFETY: only bytes of the row are read.
                let mut bytes = unsafe { _mm512_maskz_loadu_epi8(there, row.cast()) };
                for (plane, q) in q.into_iter().enumerate() {
                    match PLANES {
                        // Of the bytes and of what is left of them, in two chains.
                        QUINTUPLES => {
                            let chain = plane % 2 * 2;
                            sums[chain] = _mm512_dpbusd_epi32(sums[chain], bytes, q);
                            bytes = threefold(bytes);
                            sums[chain + 1] = _mm512_dpbusd_epi32(sums[chain + 1], bytes, q);
                        }
                        // Of each plane, whose codes are taken times `4^plane`, as they lie.
                        _ => {
                            let codes = _mm512_and_si512(bytes, masks[plane]);
                            sums[plane] = _mm512_dpbusd_epi32(sums[plane], codes, q);
                        }
                    }
                }
            }
        }
        for (total, [a, b, c, d]) in totals.iter_mut().zip(sums) {
            let sum = match PLANES {
                QUINTUPLES => sum_of_codes(_mm512_add_epi32(a, c), _mm512_add_epi32(b, d)),
                _ => {
                    let (b, c) = (_mm512_srai_epi32::<2>(b), _mm512_srai_epi32::<4>(c));
                    let d = _mm512_srai_epi32::<6>(d);
                    _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d))
                }
            };
            *total = _mm512_add_epi32(*total, sum);
        }
    }
    totals
}

/// Bytes of a row whose products a lane sums before they become sums of products of codes. Four per register
/// and plane, each at most `2 * 128` for a code, fit 31 bits times 64, of the last plane of two bits, and
/// all five planes together times 256, of quintuples.
const BYTES_AT_ONCE: usize = 1024 * 64;

/// Three times each byte, of which eight bits are kept. Of intrinsics alone the compiler would make
/// multiplications by 9, 27 and 81, which take more instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn threefold(x: __m512i) -> __m512i {
    let mut sum = _mm512_add_epi8(x, x);
    // SAFETY: an instruction on registers alone, which the enclosing function's features include.
    unsafe {
        asm!(
            "vpaddb {sum}, {sum}, {x}",
            sum = inout(zmm_reg) sum,
            x = in(zmm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Sums of products of codes of quintuples: three times those of the bytes less those of what is left of
/// these in the next plane is 256 times as much (see [`bitnet_quant::packing::tile::runs`]).
#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_codes(bytes: __m512i, lefts: __m512i) -> __m512i {
    let threefold = _mm512_add_epi32(_mm512_add_epi32(bytes, bytes), bytes);
    _mm512_srai_epi32::<8>(_mm512_sub_epi32(threefold, lefts))
}

/// Columns whose products are summed in registers before the next line of the sums: 20 kB of columns
/// of 2560 rows in two bits, which stay in the first-level cache.
const COLUMNS: usize = AHEAD;

/// Columns whose bytes vpdpbusd multiplies at once.
const QUAD: usize = 4;

/// See [`Kernels::ternary_columns`](crate::arch::Kernels::ternary_columns). The bytes of four columns
/// are interleaved, so that vpdpbusd adds their products.
///
/// # Safety
/// The CPU has these instructions. Every live column lies in `columns`, `column_bytes` is a multiple
/// of 64, and `sums` has `PLANES` elements per byte of a column.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn columns<const PLANES: usize>(
    columns: &[u8],
    column_bytes: usize,
    live: &[(u32, i8)],
    _: &mut [i16],
    sums: &mut [i32],
) {
    let start = |i: usize| {
        let column = live[i.min(live.len() - 1)].0 as usize;
        columns.as_ptr().wrapping_add(column * column_bytes)
    };
    transpose(sums);
    ask(columns, column_bytes, live.iter().map(|&(column, _)| column));
    for (block, block_of_live) in live.chunks(COLUMNS).enumerate() {
        let first = block * COLUMNS;
        let count = block_of_live.len();
        // Past the end of the list its last column is repeated, times 0.
        let starts: [*const u8; COLUMNS] = std::array::from_fn(|i| start(first + i));
        let ahead: [*const u8; COLUMNS] = std::array::from_fn(|i| start(first + COLUMNS + i));
        let mut values = [0i8; COLUMNS];
        for (value, &(_, q)) in values.iter_mut().zip(block_of_live) {
            *value = q;
        }
        let (values, _) = values.as_chunks::<QUAD>();
        let quads = count.div_ceil(QUAD);
        for (line, sums) in sums.chunks_exact_mut(PLANES * tile::LINE).enumerate() {
            let at = line * tile::LINE;
            let values = &values[..quads];
            // SAFETY: a line of each column, and four registers of sums per plane.
            unsafe {
                match PLANES {
                    QUINTUPLES => add_quintuples(&starts, &ahead, at, values, sums),
                    _ => add_two_bits(&starts, &ahead, at, values, sums),
                }
            };
        }
    }
    transpose(sums);
}

/// Adds the products of a line of some columns to its sums, in the order of [`transpose`]; and asks
/// memory for that line of the columns that follow.
///
/// # Safety
/// There are 64 bytes from `at` of each column, of four times as many as there are `values`, and
/// `sums` has a line's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add_two_bits(
    starts: &[*const u8; COLUMNS],
    ahead: &[*const u8; COLUMNS],
    at: usize,
    values: &[[i8; QUAD]],
    sums: &mut [i32],
) {
    let mask = _mm512_set1_epi8(3);
    let out = sums.as_mut_ptr().cast::<__m512i>();
    // [plane][rows]
    let mut sums: [[__m512i; 4]; 4] = std::array::from_fn(|plane| {
        // SAFETY: sixteen registers of sums.
        std::array::from_fn(|i| unsafe { _mm512_loadu_si512(out.add(4 * plane + i)) })
    });
    let (starts, _) = starts.as_chunks::<QUAD>();
    let (ahead, _) = ahead.as_chunks::<QUAD>();
    for ((starts, ahead), values) in starts.iter().zip(ahead).zip(values) {
        // SAFETY: a line of each of these columns.
        let mut codes = unsafe { interleaved(starts, ahead, at) };
        let four = four(values);
        for sums in &mut sums {
            for (codes, sum) in codes.iter_mut().zip(sums) {
                *sum = _mm512_dpbusd_epi32(*sum, _mm512_and_si512(*codes, mask), four);
                // Bits that cross a byte are masked off.
                *codes = _mm512_srli_epi16::<2>(*codes);
            }
        }
    }
    for (plane, sums) in sums.iter().enumerate() {
        for (i, &sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(out.add(4 * plane + i), sum) };
        }
    }
}

/// As [`add_two_bits`], for quintuples (see [`sum_of_codes`]).
///
/// # Safety
/// As for [`add_two_bits`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add_quintuples(
    starts: &[*const u8; COLUMNS],
    ahead: &[*const u8; COLUMNS],
    at: usize,
    values: &[[i8; QUAD]],
    sums: &mut [i32],
) {
    // [plane][rows], of the bytes and of what is left of them in each plane.
    let mut lefts = [[_mm512_setzero_si512(); 4]; QUINTUPLES + 1];
    let (starts, _) = starts.as_chunks::<QUAD>();
    let (ahead, _) = ahead.as_chunks::<QUAD>();
    for ((starts, ahead), values) in starts.iter().zip(ahead).zip(values) {
        let four = four(values);
        // SAFETY: a line of each of these columns.
        for (i, mut left) in unsafe { interleaved(starts, ahead, at) }.into_iter().enumerate() {
            for sums in &mut lefts {
                sums[i] = _mm512_dpbusd_epi32(sums[i], left, four);
                left = threefold(left);
            }
        }
    }
    let out = sums.as_mut_ptr().cast::<__m512i>();
    for (plane, pair) in lefts.windows(2).enumerate() {
        for (i, (&bytes, &lefts)) in pair[0].iter().zip(&pair[1]).enumerate() {
            let sum = sum_of_codes(bytes, lefts);
            let out = out.wrapping_add(4 * plane + i);
            // SAFETY: four registers of sums per plane.
            unsafe { _mm512_storeu_si512(out, _mm512_add_epi32(_mm512_loadu_si512(out), sum)) };
        }
    }
}

/// What four columns are multiplied with, in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn four(values: &[i8; QUAD]) -> __m512i {
    _mm512_set1_epi32(i32::from_ne_bytes(values.map(|value| value as u8)))
}

/// The bytes of a line of four columns, interleaved; and asks memory for that line of those `ahead`.
///
/// # Safety
/// There are 64 bytes from `at` of each column.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleaved(
    columns: &[*const u8; QUAD],
    ahead: &[*const u8; QUAD],
    at: usize,
) -> [__m512i; 4] {
    ahead.iter().for_each(|ahead| prefetch_second(ahead.wrapping_add(at)));
    let [a, b, c, d] = columns.map(|column| {
        // SAFETY: the contract of this function.
        unsafe { _mm512_loadu_si512(column.wrapping_add(at).cast()) }
    });
    let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
    [
        _mm512_unpacklo_epi16(ab, cd),
        _mm512_unpackhi_epi16(ab, cd),
        _mm512_unpacklo_epi16(ab_high, cd_high),
        _mm512_unpackhi_epi16(ab_high, cd_high),
    ]
}

/// Takes sums of whole lines from the order of their rows to that of [`add_two_bits`], or back: interleaving
/// bytes leaves rows `16 lane + 4 i..` of a plane in the 128-bit lane `lane` of register `i`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(sums: &mut [i32]) {
    for plane in sums.as_chunks_mut::<64>().0 {
        let at = plane.as_mut_ptr().cast::<__m512i>();
        // SAFETY: four registers of sixteen sums.
        let [a, b, c, d] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(at.add(i)) });
        let ab = [_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b)];
        let cd = [_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d)];
        let turned = [
            _mm512_shuffle_i32x4::<0x88>(ab[0], cd[0]),
            _mm512_shuffle_i32x4::<0xdd>(ab[0], cd[0]),
            _mm512_shuffle_i32x4::<0x88>(ab[1], cd[1]),
            _mm512_shuffle_i32x4::<0xdd>(ab[1], cd[1]),
        ];
        for (i, turned) in turned.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(at.add(i), turned) };
        }
    }
}
