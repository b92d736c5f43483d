//! AVX-512 with VNNI: the four columns of sixteen rows are one register.

use std::arch::x86_64::*;

use bitnet_core::Screen;
use bitnet_core::screen::{Block, ROWS, STEPS, TILE, TILES};
use bitnet_quant::screen::Input;

use super::{GROUPS, center, four, in_passes};

in_passes! {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")]
    4 2 1
}

/// The products of a band with `N` inputs (see [`bitnet_quant::screen::products`]).
///
/// # Safety
/// As for [`upper_bounds`].
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn pass<const N: usize>(blocks: &[Block], inputs: &[Input; N], out: &mut [[f32; ROWS]]) {
    let (low, fifth) = (_mm512_set1_epi8(0x0f), _mm512_set1_epi8(0x10));
    let mut products = [_mm512_setzero_ps(); N];
    for (index, block) in blocks.iter().enumerate() {
        for group in 0..GROUPS {
            let steps = &block[ROWS * group..][..ROWS];
            // SAFETY: there are sixteen steps.
            let steps = unsafe { _mm_loadu_si128(steps.as_ptr().cast()) };
            let tiles = block[STEPS + TILES * TILE * group..].as_chunks::<TILE>().0;
            let tiles: [__m512i; TILES] = std::array::from_fn(|tile| {
                // SAFETY: a tile has 64 bytes.
                unsafe { _mm512_loadu_si512(tiles[tile].as_ptr().cast()) }
            });
            let fifths = tiles[TILES - 1];
            // [input][plane]
            let mut sums = [[_mm512_setzero_si512(); 2]; N];
            for quad in 0..8 {
                let tile = tiles[quad / 2];
                let tile = if quad % 2 == 0 { tile } else { _mm512_srli_epi16::<4>(tile) };
                let bit = match quad {
                    0 => fifths,
                    1 => _mm512_srli_epi16::<1>(fifths),
                    2 => _mm512_srli_epi16::<2>(fifths),
                    3 => _mm512_srli_epi16::<3>(fifths),
                    4 => _mm512_slli_epi16::<4>(fifths),
                    5 => _mm512_slli_epi16::<3>(fifths),
                    6 => _mm512_slli_epi16::<2>(fifths),
                    _ => _mm512_slli_epi16::<1>(fifths),
                };
                // (tile & low) | (bit & fifth)
                let codes = _mm512_and_si512(tile, low);
                let codes = _mm512_ternarylogic_epi32::<0xf8>(codes, bit, fifth);
                for (input, sums) in inputs.iter().zip(&mut sums) {
                    for (plane, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: the contract of this function.
                        let four = unsafe { four(input, index, group, quad, plane) };
                        *sum = _mm512_dpbusd_epi32(*sum, codes, _mm512_set1_epi32(four));
                    }
                }
            }
            let steps = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(steps));
            for ((input, [high, low]), product) in inputs.iter().zip(sums).zip(&mut products) {
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
                // SAFETY: the contract of this function.
                let center = unsafe { center(input, index, group) };
                let sum = _mm512_sub_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(center));
                *product = _mm512_fmadd_ps(steps, sum, *product);
            }
        }
    }
    for (out, product) in out.iter_mut().zip(products) {
        // SAFETY: sixteen elements.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), product) };
    }
}
