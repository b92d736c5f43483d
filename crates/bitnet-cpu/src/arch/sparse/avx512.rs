//! AVX-512 with VNNI.

use std::arch::x86_64::*;

use super::{Group, Table, avx2, plane_len};

pub(crate) static TABLE: Table = Table { rows, columns: avx2::columns, band: avx2::band };

/// Rows that share the loads of their inputs.
const GROUP: usize = 4;

/// See [`Kernels::ternary_rows`](crate::arch::Kernels::ternary_rows).
///
/// # Safety
/// The CPU has these instructions. Every live row lies in `rows`, and each of the four planes has
/// `plane_len(row_bytes)` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn rows(rows: &[u8], row_bytes: usize, planes: &[i8], live: &[u32], acc: &mut [i32]) {
    for (i, acc) in acc.chunks_mut(GROUP).enumerate() {
        let group = Group::new(rows, row_bytes, live.len(), i * GROUP, |i| live[i]);
        // SAFETY: the contract of this function.
        let [a, b, c, d] = unsafe { group_sums(group, row_bytes, planes) };
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

/// Per row sixteen sums whose sum is that of the row. The codes of plane `p` are taken times `4^p`,
/// as they lie, and have their own sums. A lane has a sixteenth of a row, so that its sum times 64
/// is no larger than the largest sum of a whole row.
///
/// # Safety
/// As for [`rows`], for the rows of the group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn group_sums(group: Group<GROUP>, row_bytes: usize, planes: &[i8]) -> [__m512i; GROUP] {
    let masks = [0b11, 0b11_00, 0b11_00_00, 0b11_00_00_00u8].map(|m| _mm512_set1_epi8(m as i8));
    let stride = plane_len(row_bytes);
    let mut sums = [[_mm512_setzero_si512(); 4]; GROUP];
    for at in (0..row_bytes).step_by(64) {
        // SAFETY: the planes are padded to whole registers.
        let q: [__m512i; 4] = std::array::from_fn(|plane| unsafe {
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
            let codes = unsafe { _mm512_maskz_loadu_epi8(there, row.cast()) };
            for (plane, sum) in sums.iter_mut().enumerate() {
                let codes = _mm512_and_si512(codes, masks[plane]);
                *sum = _mm512_dpbusd_epi32(*sum, codes, q[plane]);
            }
        }
    }
    sums.map(|[a, b, c, d]| {
        let (b, c) = (_mm512_srai_epi32::<2>(b), _mm512_srai_epi32::<4>(c));
        let d = _mm512_srai_epi32::<6>(d);
        _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d))
    })
}
