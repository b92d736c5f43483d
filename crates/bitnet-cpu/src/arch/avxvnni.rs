//! AVX2 with AVX-VNNI, the dot product of AVX-512 VNNI in registers of 256 bits: Intel since Alder
//! Lake, without AVX-512 in most models.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx2;
use super::parts::*;

/// The kernels, if this CPU has the instructions.
pub(super) fn kernels() -> Option<&'static Kernels> {
    (avx2::detected() && is_x86_feature_detected!("avxvnni")).then_some(&KERNELS)
}

static KERNELS: Kernels =
    Kernels { name: "avxvnni", ternary_int8: ternary_int8::<true>, ..avx2::KERNELS };

/// The same kernel with the instruction as AVX-512 has it, for tests on CPUs without AVX-VNNI.
#[cfg(test)]
pub(super) fn stand_in() -> Option<&'static Kernels> {
    static STAND_IN: Kernels = Kernels {
        name: "avxvnni with the instruction of avx512",
        ternary_int8: ternary_int8::<false>,
        ..avx2::KERNELS
    };
    super::avx512::kernels().is_some().then_some(&STAND_IN)
}

/// `sums[i] + sum over j in 0..4 of codes[4 i + j] * four[4 i + j]`, in the encoding of AVX-VNNI
/// (`VEX`) or of AVX-512. It sums in 32 bits, so that nothing here can overflow before the result
/// does.
///
/// # Safety
/// The CPU has the instruction in this encoding.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<const VEX: bool>(mut sums: __m256i, codes: __m256i, four: __m256i) -> __m256i {
    macro_rules! vpdpbusd {
        ($encoding:literal) => {
            asm!(
                concat!($encoding, " vpdpbusd {sums}, {codes}, {four}"),
                sums = inout(ymm_reg) sums,
                codes = in(ymm_reg) codes,
                four = in(ymm_reg) four,
                options(pure, nomem, nostack, preserves_flags),
            )
        };
    }
    // SAFETY: an instruction on registers alone, which the CPU has by the contract.
    unsafe {
        if VEX {
            vpdpbusd!("{{vex}}");
        } else {
            vpdpbusd!("{{evex}}");
        }
    }
    sums
}

/// Tokens of one pass: their ten accumulators leave six registers for a mask, rows, codes and
/// activations.
const TOKENS_PER_PASS: usize = 5;

/// See [`Kernels::ternary_int8`].
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`;
/// the CPU has the instruction of [`dot`].
#[target_feature(enable = "avx2")]
unsafe fn ternary_int8<const VEX: bool>(
    tiles: &[Tile],
    q: &[i8],
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let (q, next) = (q.as_ptr(), (tiles.as_ptr_range().end, tiles.len()));
    passes::in_passes(tiles, next, q, stride, acc, TOKENS_PER_PASS, |tiles, q, stride, acc| {
        // SAFETY: the elements are those of these tokens, by the contract of this function.
        unsafe {
            match acc.len() {
                5 => pass::<5, 1, VEX>(tiles, q, stride, acc),
                4 => pass::<4, 1, VEX>(tiles, q, stride, acc),
                3 => pass::<3, 1, VEX>(tiles, q, stride, acc),
                2 => pass::<2, 2, VEX>(tiles, q, stride, acc),
                _ => pass::<1, 4, VEX>(tiles, q, stride, acc),
            }
        }
    });
}

/// One band against `T` tokens: a tile is two registers of eight rows, and each plane, shifted out
/// once, is multiplied with every token's four activations. With few tokens each has `CHAINS` pairs
/// of accumulators, so that one sum need not wait for the one before.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pass<const T: usize, const CHAINS: usize, const VEX: bool>(
    tiles: &[Tile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mask = _mm256_set1_epi8(3);
    let mut sums = [[[_mm256_setzero_si256(); 2]; CHAINS]; T];
    let mut q = q;
    for tile in tiles {
        let mut rows = avx2::load_tile(tile);
        for plane in 0..4 {
            let codes = rows.map(|rows| _mm256_and_si256(rows, mask));
            for (t, sums) in sums.iter_mut().enumerate() {
                // SAFETY: four of the activations that the contract promises.
                let four = unsafe { q.add(t * stride + 4 * plane).cast::<i32>().read_unaligned() };
                let four = _mm256_set1_epi32(four);
                let chain = &mut sums[plane % CHAINS];
                for half in 0..2 {
                    // SAFETY: the CPU has the instruction, by the contract.
                    chain[half] = unsafe { dot::<VEX>(chain[half], codes[half], four) };
                }
            }
            // Bits that cross a byte are masked off: a plane is at most at bit 6 of its byte.
            rows = rows.map(|rows| _mm256_srli_epi16::<2>(rows));
        }
        q = q.wrapping_add(tile::COLS);
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        let mut total = avx2::load_rows(acc);
        for chain in sums {
            for (total, sum) in total.iter_mut().zip(chain) {
                *total = _mm256_add_epi32(*total, sum);
            }
        }
        avx2::store_rows(acc, total);
    }
}
