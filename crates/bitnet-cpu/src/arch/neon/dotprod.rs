//! NEON with `sdot`, which sums four products into each 32-bit lane.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array;

use super::super::parts::*;
use super::{Codes, add_rows, four_times, unpack};

pub(super) static KERNELS: Kernels = Kernels {
    name: "neon with dotprod",
    ternary_int8,
    sparse: &sparse::neon::DOTPROD,
    upper_bounds: screen::neon::dotprod::upper_bounds,
    ..super::KERNELS
};

/// Tokens of a pass over packed tiles, whose registers a mask and the codes being unpacked share
/// with four accumulators and the activations of each, and of one over unpacked tiles.
const TOKENS_PER_PASS: usize = 5;
const TOKENS_PER_UNPACKED_PASS: usize = 6;

/// Tokens from which unpacking codes to memory costs less than unpacking them for each pass.
const UNPACK_FROM: usize = 2 * TOKENS_PER_PASS + 1;

/// `acc[i] += sum of codes[4 i + j] * four[4 i + j]` over `j` in 0..4. The intrinsic
/// (`vdotq_s32`) is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(in crate::arch) fn dot(mut acc: int32x4_t, codes: int8x16_t, four: int8x16_t) -> int32x4_t {
    // SAFETY: an instruction on registers alone, which the enclosing function's features include.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {codes:v}.16b, {four:v}.16b",
            acc = inout(vreg) acc,
            codes = in(vreg) codes,
            four = in(vreg) four,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// `sums[i] += sum over j in 0..4 of codes[4 i + j] * activations[4 PLANE + j]`. The intrinsic
/// (`vdotq_laneq_s32`) is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_lane<const PLANE: usize>(
    mut sums: int32x4_t,
    codes: int8x16_t,
    activations: int8x16_t,
) -> int32x4_t {
    // SAFETY: an instruction on registers alone, which the enclosing function's features include.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {activations:v}.4b[{plane}]",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            activations = in(vreg) activations,
            plane = const PLANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// See [`Kernels::ternary_int8`].
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn ternary_int8(
    tiles: &[Tile],
    q: &[i8],
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let (q, next) = (q.as_ptr(), (tiles.as_ptr_range().end, tiles.len()));
    if acc.len() < UNPACK_FROM {
        let per_pass = passes::evenly(acc.len(), TOKENS_PER_PASS);
        passes::in_passes(tiles, next, q, stride, acc, per_pass, |tiles, q, stride, acc| {
            // SAFETY: the elements are those of these tokens, by the contract of this function.
            unsafe { pass_of_few(tiles, q, stride, acc) };
        });
    } else {
        let per_pass = passes::evenly(acc.len(), TOKENS_PER_UNPACKED_PASS);
        passes::in_blocks(tiles, q, stride, acc, per_pass, unpack, |tiles, q, stride, acc| {
            // SAFETY: as above.
            unsafe { pass_of_few(tiles, q, stride, acc) };
        });
    }
}

/// One band against at most [`TOKENS_PER_UNPACKED_PASS`] tokens.
///
/// # Safety
/// As for [`ternary_int8`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn pass_of_few<S: Codes>(
    tiles: &[S],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    // SAFETY: the same contract.
    unsafe {
        match acc.len() {
            6 => pass::<6, 1, S>(tiles, q, stride, acc),
            5 => pass::<5, 1, S>(tiles, q, stride, acc),
            4 => pass::<4, 1, S>(tiles, q, stride, acc),
            3 => pass::<3, 1, S>(tiles, q, stride, acc),
            2 => pass::<2, 1, S>(tiles, q, stride, acc),
            _ => pass::<1, 2, S>(tiles, q, stride, acc),
        }
    }
}

/// One band against `T` tokens: a plane of a quarter of a tile is one register, and is multiplied
/// with every token's four activations of the plane. A lone token has several `CHAINS` of
/// accumulators, so that one sum need not wait for the one before.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn pass<const T: usize, const CHAINS: usize, S: Codes>(
    tiles: &[S],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mut sums = [[[vdupq_n_s32(0); 4]; CHAINS]; T];
    let mut q = q;
    for tile in tiles {
        let activations: [int8x16_t; T] = array::from_fn(|t| {
            // SAFETY: sixteen of the activations that the contract promises.
            unsafe { vld1q_s8(q.add(t * stride)) }
        });
        four_times!(QUARTER => {
            four_times!(PLANE => {
                let codes = tile.codes(QUARTER, PLANE);
                for (sums, activations) in sums.iter_mut().zip(activations) {
                    let sums = &mut sums[PLANE % CHAINS][QUARTER];
                    *sums = dot_lane::<PLANE>(*sums, codes, activations);
                }
            });
        });
        q = q.wrapping_add(tile::COLS);
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        for sums in sums {
            for (quarter, sums) in sums.into_iter().enumerate() {
                add_rows(acc, quarter, sums);
            }
        }
    }
}
