//! AVX2: the four columns of eight rows are one register. The products of a group are summed in 16
//! bits, for which they are small enough.

use std::arch::x86_64::*;

use bitnet_core::Screen;
use bitnet_core::screen::{Block, ROWS, STEPS, TILE, TILES};
use bitnet_quant::screen::Input;

use super::{GROUPS, center, four, in_passes};

in_passes! {
    #[target_feature(enable = "avx2,fma")]
    2 1
}

/// The products of a band with `N` inputs (see [`bitnet_quant::screen::products`]).
///
/// # Safety
/// As for [`upper_bounds`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn pass<const N: usize>(blocks: &[Block], inputs: &[Input; N], out: &mut [[f32; ROWS]]) {
    let (low, fifth) = (_mm256_set1_epi8(0x0f), _mm256_set1_epi8(0x10));
    let ones = _mm256_set1_epi16(1);
    // [input][half of the rows]
    let mut products = [[_mm256_setzero_ps(); 2]; N];
    for (index, block) in blocks.iter().enumerate() {
        for group in 0..GROUPS {
            let tiles = block[STEPS + TILES * TILE * group..].as_chunks::<TILE>().0;
            for half in 0..2 {
                let halves: [__m256i; TILES] = std::array::from_fn(|tile| {
                    // SAFETY: a tile has two times 32 bytes.
                    unsafe { _mm256_loadu_si256(tiles[tile].as_ptr().add(32 * half).cast()) }
                });
                let fifths = halves[TILES - 1];
                // [input][plane]
                let mut sums = [[_mm256_setzero_si256(); 2]; N];
                for quad in 0..8 {
                    let tile = halves[quad / 2];
                    let tile = if quad % 2 == 0 { tile } else { _mm256_srli_epi16::<4>(tile) };
                    let bit = match quad {
                        0 => fifths,
                        1 => _mm256_srli_epi16::<1>(fifths),
                        2 => _mm256_srli_epi16::<2>(fifths),
                        3 => _mm256_srli_epi16::<3>(fifths),
                        4 => _mm256_slli_epi16::<4>(fifths),
                        5 => _mm256_slli_epi16::<3>(fifths),
                        6 => _mm256_slli_epi16::<2>(fifths),
                        _ => _mm256_slli_epi16::<1>(fifths),
                    };
                    let codes = _mm256_and_si256(tile, low);
                    let codes = _mm256_or_si256(codes, _mm256_and_si256(bit, fifth));
                    for (input, sums) in inputs.iter().zip(&mut sums) {
                        for (plane, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: the contract of this function.
                            let four = unsafe { four(input, index, group, quad, plane) };
                            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(four));
                            *sum = _mm256_add_epi16(*sum, pairs);
                        }
                    }
                }
                let steps = &block[ROWS * group..][..ROWS];
                // SAFETY: there are two times eight steps.
                let steps = unsafe { _mm_loadl_epi64(steps.as_ptr().add(8 * half).cast()) };
                let steps = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(steps));
                for ((input, sums), products) in inputs.iter().zip(sums).zip(&mut products) {
                    let [high, low] = sums.map(|sum| _mm256_madd_epi16(sum, ones));
                    let sum = _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low);
                    // SAFETY: the contract of this function.
                    let center = unsafe { center(input, index, group) };
                    let sum = _mm256_sub_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(center));
                    products[half] = _mm256_fmadd_ps(steps, sum, products[half]);
                }
            }
        }
    }
    for (out, product) in out.iter_mut().zip(products) {
        let (halves, _) = out.as_chunks_mut::<8>();
        for (half, product) in halves.iter_mut().zip(product) {
            // SAFETY: eight elements.
            unsafe { _mm256_storeu_ps(half.as_mut_ptr(), product) };
        }
    }
}
