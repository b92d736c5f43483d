//! NEON, with the dot-product instruction for rows where the CPU has it.

use std::arch::aarch64::*;

use bitnet_quant::packing::tile;

use super::{COLUMNS_PER_WIDENING, LINE_ROWS, RunKernels, Table, generic, plane_len};

pub(crate) static TABLE: Table =
    Table { two_bits: RunKernels { rows, columns }, quintuples: None, band: generic::band };
pub(crate) static DOTPROD: Table =
    Table { two_bits: RunKernels { rows: rows_dotprod, columns }, ..TABLE };

/// Bytes of a row whose products a 16-bit lane can sum: a lane gets one product of a code (at most
/// 2) and an activation (-128..=127) per plane of 16 bytes, at least -256, and 128 of them reach
/// -32 768, the very end of its range.
const BYTES_PER_WIDENING: usize = 32 * 16;

/// The 16 bytes from `at` of a row, zeros past its end.
///
/// # Safety
/// The row at `row` has `row_bytes` bytes, more than `at` of them.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(row: *const u8, row_bytes: usize, at: usize) -> uint8x16_t {
    if at + 16 <= row_bytes {
        // SAFETY: 16 bytes of the row.
        return unsafe { vld1q_u8(row.wrapping_add(at)) };
    }
    let mut bytes = [0u8; 16];
    // SAFETY: the bytes that the row has left, fewer than 16; then the copy itself.
    unsafe {
        std::ptr::copy_nonoverlapping(row.wrapping_add(at), bytes.as_mut_ptr(), row_bytes - at);
        vld1q_u8(bytes.as_ptr())
    }
}

/// See [`Kernels::ternary_rows`](crate::arch::Kernels::ternary_rows).
///
/// # Safety
/// Every live row lies in `rows`, and each of the four planes has `plane_len(row_bytes)` elements.
#[target_feature(enable = "neon")]
unsafe fn rows(rows: &[u8], row_bytes: usize, planes: &[i8], live: &[u32], acc: &mut [i32]) {
    let stride = plane_len(row_bytes);
    for (acc, &row) in acc.iter_mut().zip(live) {
        let row = rows.as_ptr().wrapping_add(row as usize * row_bytes);
        let mut wide = vdupq_n_s32(0);
        for run in (0..row_bytes).step_by(BYTES_PER_WIDENING) {
            let mut narrow = [vdupq_n_s16(0); 2];
            for at in (run..row_bytes.min(run + BYTES_PER_WIDENING)).step_by(16) {
                // SAFETY: `at` is in the row.
                let mut bytes = unsafe { load(row, row_bytes, at) };
                for plane in 0..4 {
                    let codes = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(3)));
                    // SAFETY: the planes are padded to whole registers.
                    let q = unsafe { vld1q_s8(planes.as_ptr().wrapping_add(plane * stride + at)) };
                    narrow[0] = vmlal_s8(narrow[0], vget_low_s8(codes), vget_low_s8(q));
                    narrow[1] = vmlal_high_s8(narrow[1], codes, q);
                    bytes = vshrq_n_u8::<2>(bytes);
                }
            }
            wide = vpadalq_s16(vpadalq_s16(wide, narrow[0]), narrow[1]);
        }
        *acc = vaddvq_s32(wide);
    }
}

/// As [`rows`], with `sdot`: four rows share the loads of their inputs.
///
/// # Safety
/// As for [`rows`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn rows_dotprod(
    rows: &[u8],
    row_bytes: usize,
    planes: &[i8],
    live: &[u32],
    acc: &mut [i32],
) {
    const GROUP: usize = 4;
    let stride = plane_len(row_bytes);
    for (acc, live) in acc.chunks_mut(GROUP).zip(live.chunks(GROUP)) {
        // A short last group repeats a row.
        let starts: [*const u8; GROUP] = std::array::from_fn(|i| {
            rows.as_ptr().wrapping_add(live[i.min(live.len() - 1)] as usize * row_bytes)
        });
        let mut sums = [vdupq_n_s32(0); GROUP];
        for at in (0..row_bytes).step_by(16) {
            // SAFETY: the planes are padded to whole registers.
            let q: [int8x16_t; 4] = std::array::from_fn(|plane| unsafe {
                vld1q_s8(planes.as_ptr().wrapping_add(plane * stride + at))
            });
            for (sum, start) in sums.iter_mut().zip(starts) {
                // SAFETY: `at` is in the row.
                let mut bytes = unsafe { load(start, row_bytes, at) };
                for q in q {
                    let codes = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(3)));
                    *sum = crate::arch::neon::dotprod::dot(*sum, codes, q);
                    bytes = vshrq_n_u8::<2>(bytes);
                }
            }
        }
        for (acc, sum) in acc.iter_mut().zip(sums) {
            *acc = vaddvq_s32(sum);
        }
    }
}

/// See [`Kernels::ternary_columns`](crate::arch::Kernels::ternary_columns). Four columns share the
/// loads and stores of the sums.
///
/// # Safety
/// Every live column lies in `columns`, `column_bytes` is a multiple of 64, and `narrow` and `sums`
/// have four elements per byte of a column.
#[target_feature(enable = "neon")]
unsafe fn columns(
    columns: &[u8],
    column_bytes: usize,
    live: &[(u32, i8)],
    narrow: &mut [i16],
    sums: &mut [i32],
) {
    const GROUP: usize = 4;
    for live in live.chunks(COLUMNS_PER_WIDENING) {
        narrow.fill(0);
        for group in live.chunks(GROUP) {
            // A short last group repeats a column, times 0.
            let starts: [*const u8; GROUP] = std::array::from_fn(|i| {
                let column = group[i.min(group.len() - 1)].0 as usize;
                columns.as_ptr().wrapping_add(column * column_bytes)
            });
            let values: [int8x16_t; GROUP] =
                std::array::from_fn(|i| vdupq_n_s8(group.get(i).map_or(0, |&(_, value)| value)));
            for at in (0..column_bytes).step_by(16) {
                // SAFETY: 16 bytes of a column.
                let mut bytes = starts.map(|start| unsafe { vld1q_u8(start.wrapping_add(at)) });
                let row = at / tile::LINE * LINE_ROWS + at % tile::LINE;
                for plane in 0..4 {
                    let to = narrow.as_mut_ptr().wrapping_add(row + plane * tile::LINE);
                    // SAFETY: 16 of the four elements per byte.
                    let mut sum = unsafe { [vld1q_s16(to), vld1q_s16(to.wrapping_add(8))] };
                    for (bytes, value) in bytes.iter_mut().zip(values) {
                        let codes = vreinterpretq_s8_u8(vandq_u8(*bytes, vdupq_n_u8(3)));
                        sum[0] = vmlal_s8(sum[0], vget_low_s8(codes), vget_low_s8(value));
                        sum[1] = vmlal_high_s8(sum[1], codes, value);
                        *bytes = vshrq_n_u8::<2>(*bytes);
                    }
                    // SAFETY: as above.
                    unsafe {
                        vst1q_s16(to, sum[0]);
                        vst1q_s16(to.wrapping_add(8), sum[1]);
                    }
                }
            }
        }
        for (sum, &narrow) in sums.iter_mut().zip(&*narrow) {
            *sum += i32::from(narrow);
        }
    }
}
