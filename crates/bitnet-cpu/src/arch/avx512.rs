//! AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4. CPUs with AVX-512 but without VNNI use
//! the AVX2 kernels.

use std::arch::x86_64::*;

use super::avx2;
use super::parts::*;

/// The kernels, if this CPU has the instructions.
pub(super) fn kernels() -> Option<&'static Kernels> {
    let detected = avx2::detected()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    detected.then_some(&KERNELS)
}

instantiate! {
    name: "avx512",
    ternary_int8: ternary_int8,
    screen_sums: screen_sums,
    decode_f16: avx2::decode_f16,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
}

/// See [`Kernels::ternary_int8`]. vpdpbusd sums in 32 bits, so nothing here can overflow before
/// the result does.
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    let mut start = q.as_ptr();
    for group in acc.chunks_mut(8) {
        // SAFETY: the elements are those of these tokens, by the contract of this function.
        unsafe {
            match group.len() {
                8 => pass::<8, 1>(tiles, start, stride, group),
                7 => pass::<7, 1>(tiles, start, stride, group),
                6 => pass::<6, 1>(tiles, start, stride, group),
                5 => pass::<5, 1>(tiles, start, stride, group),
                4 => pass::<4, 1>(tiles, start, stride, group),
                3 => pass::<3, 2>(tiles, start, stride, group),
                2 => pass::<2, 2>(tiles, start, stride, group),
                _ => pass::<1, 4>(tiles, start, stride, group),
            }
        }
        start = start.wrapping_add(8 * stride);
    }
}

/// One band against `T` tokens: a tile is one register of 16 rows, and each plane, shifted out once,
/// is multiplied with every token's four activations. With few tokens each has `CHAINS`
/// accumulators, so that one sum need not wait for the one before.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn pass<const T: usize, const CHAINS: usize>(
    tiles: &[Tile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mask = _mm512_set1_epi8(3);
    let mut sums = [[_mm512_setzero_si512(); CHAINS]; T];
    let mut q = q;
    for tile in tiles {
        // SAFETY: a tile has 64 bytes.
        let mut rows = unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) };
        for plane in 0..4 {
            let codes = _mm512_and_si512(rows, mask);
            for (t, sums) in sums.iter_mut().enumerate() {
                // SAFETY: four of the activations that the contract promises.
                let four = unsafe { q.add(t * stride + 4 * plane).cast::<i32>().read_unaligned() };
                let chain = &mut sums[plane % CHAINS];
                *chain = _mm512_dpbusd_epi32(*chain, codes, _mm512_set1_epi32(four));
            }
            // Bits that cross a byte are masked off: a plane is at most at bit 6 of its byte.
            rows = _mm512_srli_epi16::<2>(rows);
        }
        q = q.wrapping_add(tile::COLS);
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        let mut sum = sums[0];
        for &chain in &sums[1..] {
            sum = _mm512_add_epi32(sum, chain);
        }
        // SAFETY: `acc` has 16 32-bit elements.
        unsafe { _mm512_storeu_si512(acc.as_mut_ptr().cast(), sum) };
    }
}

/// See [`Kernels::screen_sums`]. Each plane has four sums, so that one need not wait for the one
/// before.
///
/// # Safety
/// `planes` has as many elements as `tiles`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn screen_sums(tiles: &[[u8; screen::TILE]], planes: &[Planes]) -> [[i32; screen::ROWS]; 2] {
    const CHAINS: usize = 4;
    let mut sums = [[_mm512_setzero_si512(); 2]; CHAINS];
    for (tiles, planes) in tiles.chunks(CHAINS).zip(planes.chunks(CHAINS)) {
        for (sums, (tile, planes)) in sums.iter_mut().zip(tiles.iter().zip(planes)) {
            // SAFETY: a tile has 64 bytes.
            let codes = unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) };
            for (sum, plane) in sums.iter_mut().zip(planes) {
                let four = _mm512_set1_epi32(i32::from_ne_bytes(plane.map(|q| q as u8)));
                *sum = _mm512_dpbusd_epi32(*sum, codes, four);
            }
        }
    }
    let mut out = [[0; screen::ROWS]; 2];
    for (plane, out) in out.iter_mut().enumerate() {
        let [a, b, c, d] = sums.map(|sums| sums[plane]);
        let sum = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
        // SAFETY: `out` has 16 32-bit elements.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum) };
    }
    out
}
