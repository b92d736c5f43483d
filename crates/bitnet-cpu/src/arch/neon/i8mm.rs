//! NEON with `smmla`, which multiplies two rows of eight codes with two tokens' eight activations.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array;

use super::super::parts::*;
use super::{UnpackedTile, add_rows, dotprod, four_times};

pub(super) static KERNELS: Kernels =
    Kernels { name: "neon with i8mm", ternary_int8, ..dotprod::KERNELS };

/// Pairs of tokens of a pass, whose eight accumulators and two registers of activations each leave
/// two for codes.
const PAIRS_PER_PASS: usize = 3;

/// Tokens from which bringing codes into the order of `smmla` costs less than it saves against
/// `sdot`.
const FROM: usize = 4;

/// `sums[2 i + j] += sum over k in 0..8 of codes[8 i + k] * activations[8 j + k]`. The intrinsic
/// (`vmmlaq_s32`) is not stable yet. Not `pure`, so that it stays where it is: in another order the
/// registers do not suffice.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn multiply(mut sums: int32x4_t, codes: int8x16_t, activations: int8x16_t) -> int32x4_t {
    // SAFETY: an instruction on registers alone, which the enclosing function's features include.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {codes:v}.16b, {activations:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            activations = in(vreg) activations,
            options(nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The first eight activations of two tokens, and the next eight. One block, so that it needs
/// three registers: the compiler would load the activations of all pairs first.
///
/// # Safety
/// There are sixteen activations from each of the `offsets`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_pair(q: *const i8, offsets: [usize; 2]) -> [int8x16_t; 2] {
    let (first, last): (int8x16_t, int8x16_t);
    // SAFETY: reads what the contract promises.
    unsafe {
        asm!(
            "ldr {first:q}, [{q}, {one}]",
            "ldr {other_all:q}, [{q}, {other}]",
            "zip2 {last:v}.2d, {first:v}.2d, {other_all:v}.2d",
            "zip1 {first:v}.2d, {first:v}.2d, {other_all:v}.2d",
            q = in(reg) q,
            one = in(reg) offsets[0],
            other = in(reg) offsets[1],
            first = out(vreg) first,
            last = out(vreg) last,
            other_all = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    [first, last]
}

/// See [`Kernels::ternary_int8`].
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    if acc.len() < FROM {
        // SAFETY: the same contract.
        return unsafe { dotprod::ternary_int8(tiles, q, stride, acc) };
    }
    let per_pass = 2 * passes::evenly(acc.len().div_ceil(2), PAIRS_PER_PASS);
    let q = q.as_ptr();
    passes::in_blocks(tiles, q, stride, acc, per_pass, unpack, |tiles, q, stride, acc| {
        // SAFETY: the elements are those of these tokens, by the contract of this function.
        unsafe { pass_of_few(tiles, q, stride, acc) };
    });
}

/// A tile with a byte per code: for each quarter of the rows, the first two of them in the first
/// eight columns and in the last eight, then the other two.
#[inline(always)]
fn unpack(tile: &Tile) -> UnpackedTile {
    array::from_fn(|quarter| {
        // SAFETY: every CPU of this architecture has NEON, and a tile has four times 16 bytes.
        unsafe {
            let mask = vdupq_n_u8(3);
            // Planes 0 and 2, and beside them planes 1 and 3 at the same bits.
            let even = vld1q_u8(tile[16 * quarter..][..16].as_ptr());
            let odd = vshrq_n_u8::<2>(even);
            let (even, odd) = (vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd));
            let first = vreinterpretq_u8_u32(vzip1q_u32(even, odd));
            let last = vreinterpretq_u8_u32(vzip2q_u32(even, odd));
            [
                vandq_u8(first, mask),
                vandq_u8(vshrq_n_u8::<4>(first), mask),
                vandq_u8(last, mask),
                vandq_u8(vshrq_n_u8::<4>(last), mask),
            ]
            .map(|codes| vreinterpretq_s8_u8(codes))
        }
    })
}

/// One band against at most [`PAIRS_PER_PASS`] pairs of tokens.
///
/// # Safety
/// As for [`ternary_int8`].
#[target_feature(enable = "neon,i8mm")]
unsafe fn pass_of_few(
    tiles: &[UnpackedTile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    // SAFETY: the same contract.
    unsafe {
        match acc.len().div_ceil(2) {
            3 => pass::<3>(tiles, q, stride, acc),
            2 => pass::<2>(tiles, q, stride, acc),
            _ => pass::<1>(tiles, q, stride, acc),
        }
    }
}

/// One band against `PAIRS` pairs of tokens; an odd token is its own partner.
///
/// # Safety
/// As for [`ternary_int8`], with the tokens from `q`; `acc` has `2 * PAIRS` elements, or one less.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn pass<const PAIRS: usize>(
    tiles: &[UnpackedTile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let last = acc.len() - 1;
    let mut sums = [[[vdupq_n_s32(0); 2]; 4]; PAIRS];
    let mut q = q;
    for tile in tiles {
        let activations: [[int8x16_t; 2]; PAIRS] = array::from_fn(|pair| {
            let tokens = [2 * pair, (2 * pair + 1).min(last)];
            // SAFETY: sixteen of the activations that the contract promises, twice.
            unsafe { load_pair(q, tokens.map(|t| t * stride)) }
        });
        four_times!(QUARTER => {
            four_times!(OPERAND => {
                let codes = tile[QUARTER][OPERAND];
                for (sums, activations) in sums.iter_mut().zip(activations) {
                    let sums = &mut sums[QUARTER][OPERAND / 2];
                    *sums = multiply(*sums, codes, activations[OPERAND % 2]);
                }
            });
        });
        q = q.wrapping_add(tile::COLS);
    }
    for (acc, sums) in acc.chunks_mut(2).zip(sums) {
        for (quarter, [first, last]) in sums.into_iter().enumerate() {
            // A register holds two rows of the one token, each beside that of the other.
            let tokens = [vuzp1q_s32(first, last), vuzp2q_s32(first, last)];
            for (acc, sums) in acc.iter_mut().zip(tokens) {
                add_rows(acc, quarter, sums);
            }
        }
    }
}
