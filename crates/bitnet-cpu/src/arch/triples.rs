//! Bands of triples (see [`bitnet_quant::packing::tile::triples`]) on AVX-512 with VBMI, whose vpermb looks 64
//! bytes up at once: Intel since Ice Lake, AMD since Zen 4.
//!
//! A sixth fewer bytes than two bits a weight, and about as many instructions:
//!
//! ```text
//! for each of the eight lines of triples of a block:   // five as they lie, three put together
//!     codes = vpermb(line, CODES)                      // three codes of two bits per byte
//!     for plane in 0..3: sums += (codes >> 2 plane & 3) * four activations
//! ```

use std::arch::x86_64::*;

use bitnet_quant::packing::tile::{self, triples};

use super::{Band, passes};

/// The codes of triples, by the low six bits of a byte. Bit 5 belongs to another triple.
static CODES: [u8; 64] = {
    let mut codes = [0; 64];
    let mut i = 0;
    while i < 64 {
        codes[i] = triples::codes_of_triple(i as u8 % 32);
        i += 1;
    }
    codes
};

/// Blocks whose sums fit 32 bits also where they are kept times 16: at most 48 * 128 * 4 per line.
const MOST_BLOCKS: usize = 8192;

/// See [`Kernels::ternary_int8`](super::Kernels::ternary_int8).
///
/// # Safety
/// The CPU has these instructions, and `q` has the elements of all columns of the band from `t * stride`
/// for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
pub(super) unsafe fn ternary_int8(
    band: Band<'_>,
    q: &[i8],
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mut q = q.as_ptr();
    let mut left = band.blocks;
    loop {
        let (blocks, after) = left.split_at(left.len().min(MOST_BLOCKS));
        let tiles = if after.is_empty() { band.tiles } else { &[] };
        let lines = (size_of_val(blocks) + size_of_val(tiles)) / tile::LINE;
        let next = (blocks.as_ptr_range().end.cast(), lines);
        passes::in_passes(blocks, next, q, stride, acc, 8, |blocks, q, stride, acc| {
            let band = Band { blocks, tiles };
            // SAFETY: the elements are those of these tokens, by the contract of this function.
            unsafe {
                match acc.len() {
                    8 => pass::<8, 1>(band, q, stride, acc),
                    7 => pass::<7, 1>(band, q, stride, acc),
                    6 => pass::<6, 1>(band, q, stride, acc),
                    5 => pass::<5, 1>(band, q, stride, acc),
                    4 => pass::<4, 3>(band, q, stride, acc),
                    3 => pass::<3, 3>(band, q, stride, acc),
                    2 => pass::<2, 3>(band, q, stride, acc),
                    _ => pass::<1, 6>(band, q, stride, acc),
                }
            }
        });
        if after.is_empty() {
            return;
        }
        q = q.wrapping_add(blocks.len() * triples::BLOCK_COLS);
        left = after;
    }
}

/// One band against `T` tokens with `SUMS` registers of sums for each. With one, codes are shifted to
/// the low bits of their bytes. With three, each plane has sums of its own, whose codes are taken times
/// 1, 4 and 16, as they lie; with six, so have odd and even triples, and no sum waits for the one before.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`, at most [`MOST_BLOCKS`] blocks, fewer tiles than a
/// block has, and `acc` of `T` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
unsafe fn pass<const T: usize, const SUMS: usize>(
    band: Band<'_>,
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    // SAFETY: a register's worth of bytes.
    let table = unsafe { _mm512_loadu_si512(CODES.as_ptr().cast()) };
    let (low_three, bit_three) = (_mm512_set1_epi8(7), _mm512_set1_epi8(8));
    let masks = [0b11, 0b11_00, 0b11_00_00].map(|mask| _mm512_set1_epi8(mask));
    let mut sums = [[_mm512_setzero_si512(); SUMS]; T];
    let mut q = q;
    // Written out: a closure would not have the instructions of the function around it.
    macro_rules! add {
        ($codes:expr, $mask:expr, $sum:expr, $at:expr) => {
            let codes = _mm512_and_si512($codes, masks[$mask]);
            for (t, sums) in sums.iter_mut().enumerate() {
                let four = q.wrapping_add(t * stride + $at);
                // SAFETY: four of the activations that the contract promises.
                let four = unsafe { four.cast::<i32>().read_unaligned() };
                sums[$sum] = _mm512_dpbusd_epi32(sums[$sum], codes, _mm512_set1_epi32(four));
            }
        };
    }
    for block in band.blocks {
        let (lines, _) = block.as_chunks::<{ tile::LINE }>();
        let line: [__m512i; 5] = std::array::from_fn(|i| {
            // SAFETY: a line has 64 bytes.
            unsafe { _mm512_loadu_si512(lines[i].as_ptr().cast()) }
        });
        // The low three bits of the one, the others of the other. What bits 5 to 7 then are is of no
        // matter, nor that the shifts are of 16 bits.
        macro_rules! join {
            ($mask:expr, $low:expr, $high:expr) => {
                _mm512_ternarylogic_epi32::<0xca>($mask, $low, $high)
            };
        }
        let five =
            join!(low_three, _mm512_srli_epi16::<5>(line[0]), _mm512_srli_epi16::<3>(line[1]));
        let six =
            join!(low_three, _mm512_srli_epi16::<5>(line[2]), _mm512_srli_epi16::<3>(line[3]));
        let high =
            join!(bit_three, _mm512_srli_epi16::<2>(line[1]), _mm512_srli_epi16::<1>(line[3]));
        let seven = join!(low_three, _mm512_srli_epi16::<5>(line[4]), high);
        macro_rules! add_triples {
            ($($triple:literal: $line:expr),*) => {$(
                let mut codes = _mm512_permutexvar_epi8($line, table);
                for plane in 0..3 {
                    let at = 12 * $triple + 4 * plane;
                    match SUMS {
                        1 => {
                            add!(codes, 0, 0, at);
                            codes = _mm512_srli_epi16::<2>(codes);
                        }
                        3 => { add!(codes, plane, plane, at); }
                        _ => { add!(codes, plane, $triple % 2 * 3 + plane, at); }
                    }
                }
            )*};
        }
        add_triples!(
            0: line[0], 1: line[1], 2: line[2], 3: line[3], 4: line[4], 5: five, 6: six, 7: seven
        );
        q = q.wrapping_add(triples::BLOCK_COLS);
    }
    for tile in band.tiles {
        // SAFETY: a tile has 64 bytes.
        let mut codes = unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) };
        for plane in 0..4 {
            add!(codes, 0, 0, 4 * plane);
            codes = _mm512_srli_epi16::<2>(codes);
        }
        q = q.wrapping_add(tile::COLS);
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        let acc: *mut __m512i = acc.as_mut_ptr().cast();
        // SAFETY: `acc` has 16 32-bit elements.
        let mut total = unsafe { _mm512_loadu_si512(acc) };
        for (i, sum) in sums.into_iter().enumerate() {
            let sum = match i % 3 {
                0 => sum,
                1 => _mm512_srai_epi32::<2>(sum),
                _ => _mm512_srai_epi32::<4>(sum),
            };
            total = _mm512_add_epi32(total, sum);
        }
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(acc, total) };
    }
}
