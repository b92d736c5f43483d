//! NEON: every 64-bit Arm CPU; with the dot-product instructions where the CPU has them (most since
//! 2018, all of Apple's).

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use bitnet_quant::packing::blocks::f16_to_f32;

use super::parts::*;

/// The kernels, if this CPU has the instructions.
pub(super) fn kernels() -> Option<&'static Kernels> {
    if !is_aarch64_feature_detected!("neon") {
        return None;
    }
    Some(if is_aarch64_feature_detected!("dotprod") { &dotprod::KERNELS } else { &KERNELS })
}

instantiate! {
    name: "neon",
    ternary_int8: ternary_int8,
    sparse: sparse::neon::TABLE,
    screen_sums: screen_sums,
    decode_f16: decode_f16,
    lanes: Sixteen,
    #[target_feature(enable = "neon")]
}

/// Half-precision numbers to f32 by integer operations, which the compiler vectorises: the
/// conversion instruction has no stable intrinsic.
#[inline(always)]
fn decode_f16(half: &[[u8; 2]], out: &mut [f32]) {
    for (value, &half) in out.iter_mut().zip(half) {
        *value = f16_to_f32(half);
    }
}

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
struct Sixteen([float32x4_t; 4]);

// SAFETY of the blocks below: the contract of `Lanes`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Sixteen {
    type Sums = [int32x4_t; 4];
    /// The two rows, each as two registers.
    type Pairs = [[int16x8_t; 2]; 2];
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Sixteen([vdupq_n_f32(x); 4]) }
    }

    #[inline(always)]
    unsafe fn load(x: *const f32) -> Self {
        unsafe { Sixteen([0, 4, 8, 12].map(|i| vld1q_f32(x.add(i)))) }
    }

    /// The conversion instruction has no stable intrinsic.
    #[inline(always)]
    unsafe fn load_f16(x: *const [u8; 2]) -> Self {
        unsafe {
            Sixteen([0, 4, 8, 12].map(|i| {
                let half = vld1_u16(x.add(i).cast());
                let value: float32x4_t;
                asm!(
                    "fcvtl {value:v}.4s, {half:v}.4h",
                    value = out(vreg) value,
                    half = in(vreg) half,
                    options(pure, nomem, nostack, preserves_flags),
                );
                value
            }))
        }
    }

    #[inline(always)]
    unsafe fn store(self, out: *mut f32) {
        for (i, x) in self.0.into_iter().enumerate() {
            unsafe { vst1q_f32(out.add(4 * i), x) }
        }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        let mut out = self.0;
        for (out, x) in out.iter_mut().zip(other.0) {
            *out = unsafe { vmulq_f32(*out, x) };
        }
        Sixteen(out)
    }

    #[inline(always)]
    unsafe fn add_product(self, a: f32, b: Self) -> Self {
        let mut sum = self.0;
        for (sum, b) in sum.iter_mut().zip(b.0) {
            *sum = unsafe { vfmaq_n_f32(*sum, b, a) };
        }
        Sixteen(sum)
    }

    #[inline(always)]
    unsafe fn no_sums() -> Self::Sums {
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    unsafe fn load_sums(x: *const i32) -> Self::Sums {
        unsafe { [0, 4, 8, 12].map(|i| vld1q_s32(x.add(i))) }
    }

    #[inline(always)]
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32) {
        for (i, x) in sums.into_iter().enumerate() {
            unsafe { vst1q_s32(out.add(4 * i), x) }
        }
    }

    #[inline(always)]
    unsafe fn pairs(first: *const i8, second: *const i8) -> Self::Pairs {
        unsafe {
            [first, second].map(|x| {
                let x = vld1q_s8(x);
                [vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)]
            })
        }
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums {
        let mut sums = sums;
        for (a, row) in [a as i16, (a >> 16) as i16].into_iter().zip(pairs) {
            for (half, row) in row.into_iter().enumerate() {
                unsafe {
                    sums[2 * half] = vmlal_n_s16(sums[2 * half], vget_low_s16(row), a);
                    sums[2 * half + 1] = vmlal_high_n_s16(sums[2 * half + 1], row, a);
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn from_sums(sums: Self::Sums) -> Self {
        unsafe { Sixteen(sums.map(|sum| vcvtq_f32_s32(sum))) }
    }
}

/// Tiles whose products a 16-bit lane can sum: a lane gets one product of a code (at most 2) and an
/// activation (-128..=127) per plane of a tile, at least -256, and 128 of them reach -32 768, the
/// very end of its range.
const TILES_PER_WIDENING: usize = 32;

/// See [`Kernels::ternary_int8`]. One band against one token at a time: smull and smlal make
/// 16-bit sums of products, four lanes per row, sixteen rows in eight registers.
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "neon")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    let mask = vdupq_n_u8(3);
    for (t, acc) in acc.iter_mut().enumerate() {
        let mut q = q.as_ptr().wrapping_add(t * stride);
        // wide[i]: rows 4 i .. 4 i + 4, after the pairwise addition at the end.
        let mut wide = [[vdupq_n_s32(0); 2]; 4];
        for run in tiles.chunks(TILES_PER_WIDENING) {
            let mut narrow = [[vdupq_n_s16(0); 2]; 4];
            for tile in run {
                for (quarter, narrow) in narrow.iter_mut().enumerate() {
                    // SAFETY: a tile has four times 16 bytes.
                    let mut rows = unsafe { vld1q_u8(tile.as_ptr().add(16 * quarter)) };
                    for plane in 0..4 {
                        let codes = vreinterpretq_s8_u8(vandq_u8(rows, mask));
                        // SAFETY: four of the activations that the contract promises.
                        let four = unsafe { q.add(4 * plane).cast::<i32>().read_unaligned() };
                        let four = vreinterpretq_s8_s32(vdupq_n_s32(four));
                        narrow[0] = vmlal_s8(narrow[0], vget_low_s8(codes), vget_low_s8(four));
                        narrow[1] = vmlal_high_s8(narrow[1], codes, four);
                        rows = vshrq_n_u8::<2>(rows);
                    }
                }
                q = q.wrapping_add(tile::COLS);
            }
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                wide[0] = vpadalq_s16(wide[0], narrow[0]);
                wide[1] = vpadalq_s16(wide[1], narrow[1]);
            }
        }
        for (quarter, wide) in wide.iter().enumerate() {
            // SAFETY: `acc` has four times four elements.
            unsafe {
                let acc = acc.as_mut_ptr().add(4 * quarter);
                vst1q_s32(acc, vaddq_s32(vld1q_s32(acc), vpaddq_s32(wide[0], wide[1])));
            }
        }
    }
}

/// See [`Kernels::screen_sums`]. A code plus 128, its highest bit flipped, is the code with its
/// sign; 128 times the sums of the planes make up for it.
///
/// # Safety
/// `planes` has as many elements as `tiles`.
#[target_feature(enable = "neon")]
unsafe fn screen_sums(tiles: &[[u8; screen::TILE]], planes: &[Planes]) -> [[i32; screen::ROWS]; 2] {
    let flip = vdupq_n_u8(128);
    // [plane][four rows]: lanes of pairs, two to a row.
    let mut sums = [[[vdupq_n_s32(0); 2]; 4]; 2];
    let mut inputs = [0i32; 2];
    for (tile, planes) in tiles.iter().zip(planes) {
        for quarter in 0..4 {
            // SAFETY: a tile has four times 16 bytes.
            let codes = unsafe { vld1q_u8(tile.as_ptr().add(16 * quarter)) };
            let codes = vreinterpretq_s8_u8(veorq_u8(codes, flip));
            for (sums, plane) in sums.iter_mut().zip(planes) {
                let four = vdupq_n_s32(i32::from_ne_bytes(plane.map(|q| q as u8)));
                let four = vreinterpretq_s8_s32(four);
                let [low, high] = &mut sums[quarter];
                *low = vpadalq_s16(*low, vmull_s8(vget_low_s8(codes), vget_low_s8(four)));
                *high = vpadalq_s16(*high, vmull_high_s8(codes, four));
            }
        }
        for (input, plane) in inputs.iter_mut().zip(planes) {
            *input += plane.iter().map(|&q| i32::from(q)).sum::<i32>();
        }
    }
    let mut out = [[0; screen::ROWS]; 2];
    for ((out, sums), input) in out.iter_mut().zip(sums).zip(inputs) {
        let offset = vdupq_n_s32(128 * input);
        for (quarter, [low, high]) in sums.into_iter().enumerate() {
            let sum = vaddq_s32(vpaddq_s32(low, high), offset);
            // SAFETY: `out` has four times four elements.
            unsafe { vst1q_s32(out.as_mut_ptr().add(4 * quarter), sum) };
        }
    }
    out
}

/// With `sdot`, which sums four products into each 32-bit lane.
pub(super) mod dotprod {
    use super::*;

    instantiate! {
        name: "neon with dotprod",
        ternary_int8: ternary_int8,
        sparse: sparse::neon::DOTPROD,
        screen_sums: screen_sums,
        decode_f16: decode_f16,
        lanes: Sixteen,
        #[target_feature(enable = "neon,dotprod")]
    }

    /// `acc[i] += sum of codes[4 i + j] * four[4 i + j]` over `j` in 0..4. The intrinsic
    /// (`vdotq_s32`) is not stable yet.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub(in crate::arch) fn dot(mut acc: int32x4_t, codes: int8x16_t, four: int8x16_t) -> int32x4_t {
        // SAFETY: an instruction on registers alone, which the enclosing function's features
        // include.
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

    /// See [`Kernels::ternary_int8`].
    ///
    /// # Safety
    /// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()`
    /// tokens `t`.
    #[target_feature(enable = "neon,dotprod")]
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

    /// One band against `T` tokens: a tile is four registers of four rows, and each plane, shifted
    /// out once, is multiplied with every token's four activations.
    ///
    /// # Safety
    /// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn pass<const T: usize>(
        tiles: &[Tile],
        q: *const i8,
        stride: usize,
        acc: &mut [[i32; tile::ROWS]],
    ) {
        let mask = vdupq_n_u8(3);
        let mut sums = [[vdupq_n_s32(0); 4]; T];
        let mut q = q;
        for tile in tiles {
            // SAFETY: a tile has four times 16 bytes.
            let mut rows: [uint8x16_t; 4] =
                std::array::from_fn(|i| unsafe { vld1q_u8(tile.as_ptr().add(16 * i)) });
            for plane in 0..4 {
                let codes = rows.map(|rows| vreinterpretq_s8_u8(vandq_u8(rows, mask)));
                for (t, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: four of the activations that the contract promises.
                    let four =
                        unsafe { q.add(t * stride + 4 * plane).cast::<i32>().read_unaligned() };
                    let four = vreinterpretq_s8_s32(vdupq_n_s32(four));
                    for (sum, codes) in sums.iter_mut().zip(codes) {
                        *sum = dot(*sum, codes, four);
                    }
                }
                rows = rows.map(|rows| vshrq_n_u8::<2>(rows));
            }
            q = q.wrapping_add(tile::COLS);
        }
        for (acc, sums) in acc.iter_mut().zip(sums) {
            for (quarter, sum) in sums.into_iter().enumerate() {
                // SAFETY: `acc` has four times four elements.
                unsafe {
                    let acc = acc.as_mut_ptr().add(4 * quarter);
                    vst1q_s32(acc, vaddq_s32(vld1q_s32(acc), sum));
                }
            }
        }
    }

    /// See [`Kernels::screen_sums`] and the function of this name without `sdot`.
    ///
    /// # Safety
    /// `planes` has as many elements as `tiles`.
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn screen_sums(
        tiles: &[[u8; screen::TILE]],
        planes: &[Planes],
    ) -> [[i32; screen::ROWS]; 2] {
        let flip = vdupq_n_u8(128);
        let mut sums = [[vdupq_n_s32(0); 4]; 2];
        let mut inputs = [0i32; 2];
        for (tile, planes) in tiles.iter().zip(planes) {
            for quarter in 0..4 {
                // SAFETY: a tile has four times 16 bytes.
                let codes = unsafe { vld1q_u8(tile.as_ptr().add(16 * quarter)) };
                let codes = vreinterpretq_s8_u8(veorq_u8(codes, flip));
                for (sums, plane) in sums.iter_mut().zip(planes) {
                    let four = vdupq_n_s32(i32::from_ne_bytes(plane.map(|q| q as u8)));
                    sums[quarter] = dot(sums[quarter], codes, vreinterpretq_s8_s32(four));
                }
            }
            for (input, plane) in inputs.iter_mut().zip(planes) {
                *input += plane.iter().map(|&q| i32::from(q)).sum::<i32>();
            }
        }
        let mut out = [[0; screen::ROWS]; 2];
        for ((out, sums), input) in out.iter_mut().zip(sums).zip(inputs) {
            let offset = vdupq_n_s32(128 * input);
            for (quarter, sum) in sums.into_iter().enumerate() {
                // SAFETY: `out` has four times four elements.
                unsafe { vst1q_s32(out.as_mut_ptr().add(4 * quarter), vaddq_s32(sum, offset)) };
            }
        }
        out
    }
}
