//! AVX2 with FMA and F16C: x86 CPUs since 2013.

use std::arch::x86_64::*;

use bitnet_quant::packing::blocks::f16_to_f32;

use super::parts::*;

/// The kernels, if this CPU has the instructions.
pub(super) fn kernels() -> Option<&'static Kernels> {
    detected().then_some(&KERNELS)
}

/// Whether this CPU has all that this file is compiled for.
pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

instantiate! {
    name: "avx2",
    ternary_int8: ternary_int8,
    screen_sums: screen_sums,
    decode_f16: decode_f16,
    #[target_feature(enable = "avx2,fma,f16c")]
}

/// Half-precision numbers to f32, eight at a time.
#[inline]
#[target_feature(enable = "avx,f16c")]
pub(super) fn decode_f16(half: &[[u8; 2]], out: &mut [f32]) {
    let (half, half_tail) = half.as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    for (half, out) in half.iter().zip(out) {
        // SAFETY: 16 bytes are read from a [[u8; 2]; 8] and 32 written to an [f32; 8].
        unsafe {
            let values = _mm256_cvtph_ps(_mm_loadu_si128(half.as_ptr().cast()));
            _mm256_storeu_ps(out.as_mut_ptr(), values);
        }
    }
    for (half, out) in half_tail.iter().zip(out_tail) {
        *out = f16_to_f32(*half);
    }
}

/// Tiles whose products a 16-bit lane can sum: vpmaddubsw adds two products of a code (at most 2)
/// and an activation (-128..=127), hence at least -512 and at most 508; a lane gets one such sum
/// per plane of a tile, and 64 of them reach -32 768, the very end of its range. vpmaddubsw itself
/// never saturates.
const TILES_PER_WIDENING: usize = 16;

/// See [`Kernels::ternary_int8`].
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "avx2")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    let mut start = q.as_ptr();
    for group in acc.chunks_mut(4) {
        // SAFETY: the elements are those of these tokens, by the contract of this function.
        unsafe {
            match group.len() {
                4 => pass::<4>(tiles, start, stride, group),
                3 => pass::<3>(tiles, start, stride, group),
                2 => pass::<2>(tiles, start, stride, group),
                _ => pass::<1>(tiles, start, stride, group),
            }
        }
        start = start.wrapping_add(4 * stride);
    }
}

/// One band against `T` tokens. A tile is two registers of eight rows; each plane is shifted out
/// once and multiplied with every token's four activations, which vpbroadcastd spreads over the
/// rows. Per token there are two accumulators of 16-bit pair sums, two lanes per row.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pass<const T: usize>(
    tiles: &[Tile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mask = _mm256_set1_epi8(3);
    let mut wide = [[_mm256_setzero_si256(); 2]; T];
    let mut q = q;
    for run in tiles.chunks(TILES_PER_WIDENING) {
        let mut narrow = [[_mm256_setzero_si256(); 2]; T];
        for tile in run {
            // SAFETY: a tile has 64 bytes.
            let mut rows = unsafe {
                let start = tile.as_ptr().cast::<__m256i>();
                [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))]
            };
            for plane in 0..4 {
                let codes = rows.map(|rows| _mm256_and_si256(rows, mask));
                for (t, narrow) in narrow.iter_mut().enumerate() {
                    // SAFETY: four of the activations that the contract promises.
                    let four =
                        unsafe { q.add(t * stride + 4 * plane).cast::<i32>().read_unaligned() };
                    let four = _mm256_set1_epi32(four);
                    for half in 0..2 {
                        let pairs = _mm256_maddubs_epi16(codes[half], four);
                        narrow[half] = _mm256_add_epi16(narrow[half], pairs);
                    }
                }
                // Bits that cross a byte are masked off: a plane is at most at bit 6 of its byte.
                rows = rows.map(|rows| _mm256_srli_epi16::<2>(rows));
            }
            q = q.wrapping_add(tile::COLS);
        }
        let ones = _mm256_set1_epi16(1);
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            for half in 0..2 {
                wide[half] = _mm256_add_epi32(wide[half], _mm256_madd_epi16(narrow[half], ones));
            }
        }
    }
    for (acc, wide) in acc.iter_mut().zip(wide) {
        // SAFETY: `acc` has 16 32-bit elements, two registers of eight.
        unsafe {
            let start = acc.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(start, wide[0]);
            _mm256_storeu_si256(start.add(1), wide[1]);
        }
    }
}

/// See [`Kernels::screen_sums`]. vpmaddubsw cannot saturate here: two products are at most
/// `2 * 255 * 64`.
///
/// # Safety
/// `planes` has as many elements as `tiles`.
#[target_feature(enable = "avx2")]
unsafe fn screen_sums(tiles: &[[u8; screen::TILE]], planes: &[Planes]) -> [[i32; screen::ROWS]; 2] {
    let ones = _mm256_set1_epi16(1);
    // [plane][half of the rows]
    let mut sums = [[_mm256_setzero_si256(); 2]; 2];
    for (tile, planes) in tiles.iter().zip(planes) {
        // SAFETY: a tile has 64 bytes.
        let codes = unsafe {
            let start = tile.as_ptr().cast::<__m256i>();
            [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))]
        };
        for (sums, plane) in sums.iter_mut().zip(planes) {
            let four = _mm256_set1_epi32(i32::from_ne_bytes(plane.map(|q| q as u8)));
            for (sum, codes) in sums.iter_mut().zip(codes) {
                let pairs = _mm256_maddubs_epi16(codes, four);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    let mut out = [[0; screen::ROWS]; 2];
    for (out, sums) in out.iter_mut().zip(sums) {
        // SAFETY: 16 32-bit elements, two registers of eight.
        unsafe {
            let start = out.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(start, sums[0]);
            _mm256_storeu_si256(start.add(1), sums[1]);
        }
    }
    out
}
