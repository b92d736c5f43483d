//! NEON: every 64-bit Arm CPU; with the dot-product instructions ([`dotprod`]) where the CPU has them
//! (most since 2018, all of Apple's), and with those that multiply 8-bit matrices ([`i8mm`]: Neoverse
//! V1 and N2, Apple's M2, and later).

pub(super) mod dotprod;
mod i8mm;

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::array;

use super::parts::*;

/// The tables of this level, the best one last, each with whether this CPU has the instructions.
pub(super) fn variants() -> [(&'static Kernels, bool); 3] {
    let neon = is_aarch64_feature_detected!("neon");
    let dotprod = neon && is_aarch64_feature_detected!("dotprod");
    let i8mm = dotprod && is_aarch64_feature_detected!("i8mm");
    [(&KERNELS, neon), (&dotprod::KERNELS, dotprod), (&i8mm::KERNELS, i8mm)]
}

/// The best kernels that this CPU has the instructions for.
pub(super) fn kernels() -> Option<&'static Kernels> {
    variants().into_iter().rev().find_map(|(kernels, detected)| detected.then_some(kernels))
}

instantiate! {
    name: "neon",
    ternary_int8: ternary_int8,
    sparse: sparse::neon::TABLE,
    upper_bounds: screen::neon::upper_bounds,
    lanes: Sixteen,
    #[target_feature(enable = "neon")]
}

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
struct Sixteen([float32x4_t; 4]);

impl Lanes for Sixteen {
    type Sums = [int32x4_t; 4];
    /// The two rows, each as two registers.
    type Pairs = [[int16x8_t; 2]; 2];
    const ROWS: usize = 4;
    const CHAINS: usize = 1;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn splat(x: f32) -> Self {
        Sixteen([vdupq_n_f32(x); 4])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(x: *const f32) -> Self {
        // SAFETY: sixteen elements, by the contract.
        Sixteen([0, 4, 8, 12].map(|i| unsafe { vld1q_f32(x.add(i)) }))
    }

    /// The conversion instruction has no stable intrinsic.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_f16(x: *const [u8; 2]) -> Self {
        Sixteen([0, 4, 8, 12].map(|i| {
            let value: float32x4_t;
            // SAFETY: four of sixteen elements, by the contract; then an instruction on registers
            // alone, which every CPU of this architecture has.
            unsafe {
                asm!(
                    "fcvtl {value:v}.4s, {half:v}.4h",
                    value = out(vreg) value,
                    half = in(vreg) vld1_u16(x.add(i).cast()),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            value
        }))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_bf16(x: *const [u8; 2]) -> Self {
        Sixteen([0, 4, 8, 12].map(|i| {
            // SAFETY: four of sixteen elements, by the contract.
            let high = vshll_n_u16::<16>(unsafe { vld1_u16(x.add(i).cast()) });
            vreinterpretq_f32_u32(high)
        }))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(self, out: *mut f32) {
        for (i, x) in self.0.into_iter().enumerate() {
            // SAFETY: room for sixteen elements, by the contract.
            unsafe { vst1q_f32(out.add(4 * i), x) }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(self, other: Self) -> Self {
        let mut out = self.0;
        for (out, x) in out.iter_mut().zip(other.0) {
            *out = vaddq_f32(*out, x);
        }
        Sixteen(out)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul(self, other: Self) -> Self {
        let mut out = self.0;
        for (out, x) in out.iter_mut().zip(other.0) {
            *out = vmulq_f32(*out, x);
        }
        Sixteen(out)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        let mut sum = sum.0;
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum = vfmaq_f32(*sum, self.0[i], factor.0[i]);
        }
        Sixteen(sum)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_product(self, a: f32, b: Self) -> Self {
        let mut sum = self.0;
        for (sum, b) in sum.iter_mut().zip(b.0) {
            *sum = vfmaq_n_f32(*sum, b, a);
        }
        Sixteen(sum)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn fold(lanes: [Self; 2]) -> f32 {
        let [Sixteen(a), Sixteen(b)] = lanes;
        let low = vaddq_f32(vaddq_f32(a[0], b[0]), vaddq_f32(a[2], b[2]));
        let high = vaddq_f32(vaddq_f32(a[1], b[1]), vaddq_f32(a[3], b[3]));
        let four = vaddq_f32(low, high);
        vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn max(self, other: Self) -> Self {
        let mut out = other.0;
        for (out, x) in out.iter_mut().zip(self.0) {
            *out = vbslq_f32(vcgtq_f32(x, *out), x, *out);
        }
        Sixteen(out)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn fold_max(lanes: [Self; 2]) -> f32 {
        let [Sixteen(a), Sixteen(b)] = lanes;
        let low = vmaxq_f32(vmaxq_f32(a[0], b[0]), vmaxq_f32(a[2], b[2]));
        let high = vmaxq_f32(vmaxq_f32(a[1], b[1]), vmaxq_f32(a[3], b[3]));
        vmaxvq_f32(vmaxq_f32(low, high))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn abs(self) -> Self {
        Sixteen(self.0.map(|x| vabsq_f32(x)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn power_of_two(self) -> Self {
        let one = vreinterpretq_s32_f32(vdupq_n_f32(1.0));
        Sixteen(self.0.map(|x| {
            let exponent = vshlq_n_s32::<23>(vreinterpretq_s32_f32(x));
            vreinterpretq_f32_s32(vaddq_s32(exponent, one))
        }))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        let mut out = self.0;
        for (i, out) in out.iter_mut().enumerate() {
            let less = vcltq_f32(x.0[i], limit.0[i]);
            *out = vbslq_f32(less, vdupq_n_f32(0.0), *out);
        }
        Sixteen(out)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_rounded(self, out: *mut i16) {
        for (i, x) in self.0.into_iter().enumerate() {
            // The instruction makes 0 of NaN.
            let rounded = vmovn_s32(vcvtnq_s32_f32(x));
            // SAFETY: four places of sixteen, by the contract.
            unsafe { vst1_s16(out.add(4 * i), rounded) }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn no_sums() -> Self::Sums {
        [vdupq_n_s32(0); 4]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_sums(x: *const i32) -> Self::Sums {
        // SAFETY: sixteen elements, by the contract.
        [0, 4, 8, 12].map(|i| unsafe { vld1q_s32(x.add(i)) })
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32) {
        for (i, x) in sums.into_iter().enumerate() {
            // SAFETY: room for sixteen elements, by the contract.
            unsafe { vst1q_s32(out.add(4 * i), x) }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn pairs(x: *const i8) -> Self::Pairs {
        // SAFETY: thirty-two elements, by the contract.
        let rows = unsafe { vld2q_s8(x) };
        [rows.0, rows.1].map(|row| [vmovl_s8(vget_low_s8(row)), vmovl_high_s8(row)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums {
        let mut sums = sums;
        for (a, row) in [a as i16, (a >> 16) as i16].into_iter().zip(pairs) {
            for (half, row) in row.into_iter().enumerate() {
                sums[2 * half] = vmlal_n_s16(sums[2 * half], vget_low_s16(row), a);
                sums[2 * half + 1] = vmlal_high_n_s16(sums[2 * half + 1], row, a);
            }
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn join_sums(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        let mut sums = a;
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = vaddq_s32(*sum, b);
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn from_sums(sums: Self::Sums) -> Self {
        Sixteen(sums.map(|sum| vcvtq_f32_s32(sum)))
    }
}

/// Tiles whose products a 16-bit lane can sum: a lane gets one product of a code (at most 2) and an
/// activation (-128..=127) per plane of a tile, at least -256, and 128 of them reach -32 768, the
/// very end of its range.
const TILES_PER_WIDENING: usize = 32;

/// A tile with a byte per code: for each quarter of the rows four registers, one of each plane.
type UnpackedTile = [[int8x16_t; 4]; 4];

/// A tile, packed or not.
trait Codes {
    /// The codes of four rows in the four columns of a plane.
    fn codes(&self, quarter: usize, plane: usize) -> int8x16_t;
}

impl Codes for Tile {
    #[inline(always)]
    fn codes(&self, quarter: usize, plane: usize) -> int8x16_t {
        // SAFETY: every CPU of this architecture has NEON, and a tile has four times 16 bytes.
        unsafe {
            let rows = vld1q_u8(self[16 * quarter..][..16].as_ptr());
            let mask = vdupq_n_u8(3);
            vreinterpretq_s8_u8(match plane {
                0 => vandq_u8(rows, mask),
                1 => vandq_u8(vshrq_n_u8::<2>(rows), mask),
                2 => vandq_u8(vshrq_n_u8::<4>(rows), mask),
                _ => vshrq_n_u8::<6>(rows),
            })
        }
    }
}

impl Codes for UnpackedTile {
    #[inline(always)]
    fn codes(&self, quarter: usize, plane: usize) -> int8x16_t {
        self[quarter][plane]
    }
}

#[inline(always)]
fn unpack(tile: &Tile) -> UnpackedTile {
    array::from_fn(|quarter| array::from_fn(|plane| tile.codes(quarter, plane)))
}

/// Writes a block out for each `$i` in 0..4. The compiler leaves a loop as it is if its body is
/// long, and then keeps the registers that the body indexes in memory.
macro_rules! four_times {
    ($i:ident => $body:block) => {
        four_times!(@ $i $body 0 1 2 3)
    };
    (@ $i:ident $body:block $($value:literal)*) => {
        $({
            const $i: usize = $value;
            $body
        })*
    };
}
use four_times;

/// `acc[4 quarter..][..4] += sums`.
#[inline(always)]
fn add_rows(acc: &mut [i32; tile::ROWS], quarter: usize, sums: int32x4_t) {
    let acc = acc[4 * quarter..][..4].as_mut_ptr();
    // SAFETY: every CPU of this architecture has NEON, and `acc` has four elements.
    unsafe { vst1q_s32(acc, vaddq_s32(vld1q_s32(acc), sums)) };
}

/// Tokens of a pass: their eight accumulators each leave sixteen registers.
const TOKENS_PER_PASS: usize = 2;

/// Tokens from which unpacking codes to memory costs less than unpacking them for each pass.
const UNPACK_FROM: usize = 2 * TOKENS_PER_PASS + 1;

/// See [`Kernels::ternary_int8`].
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "neon")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    let (q, next) = (q.as_ptr(), (tiles.as_ptr_range().end, tiles.len()));
    let per_pass = passes::evenly(acc.len(), TOKENS_PER_PASS);
    if acc.len() < UNPACK_FROM {
        passes::in_passes(tiles, next, q, stride, acc, per_pass, |tiles, q, stride, acc| {
            // SAFETY: the elements are those of these tokens, by the contract of this function.
            unsafe { pass_of_few(tiles, q, stride, acc) };
        });
    } else {
        passes::in_blocks(tiles, q, stride, acc, per_pass, unpack, |tiles, q, stride, acc| {
            // SAFETY: as above.
            unsafe { pass_of_few(tiles, q, stride, acc) };
        });
    }
}

/// One band against at most [`TOKENS_PER_PASS`] tokens.
///
/// # Safety
/// As for [`ternary_int8`].
#[target_feature(enable = "neon")]
unsafe fn pass_of_few<S: Codes>(
    tiles: &[S],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    // SAFETY: the same contract.
    unsafe {
        match acc.len() {
            2 => pass::<2, S>(tiles, q, stride, acc),
            _ => pass::<1, S>(tiles, q, stride, acc),
        }
    }
}

/// `sums[h][i] += codes[8 h + i] * activations[8 h + i]`. Of the intrinsics the compiler makes three
/// instructions when it sees that both halves of `activations` are the same.
#[inline(always)]
fn multiply(sums: &mut [int16x8_t; 2], codes: int8x16_t, activations: int8x16_t) {
    let [low, high] = sums;
    // SAFETY: instructions on registers alone, which every CPU of this architecture has.
    unsafe {
        asm!(
            "smlal {low:v}.8h, {codes:v}.8b, {activations:v}.8b",
            "smlal2 {high:v}.8h, {codes:v}.16b, {activations:v}.16b",
            low = inout(vreg) *low,
            high = inout(vreg) *high,
            codes = in(vreg) codes,
            activations = in(vreg) activations,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// One band against `T` tokens: smlal and smlal2 make 16-bit sums of products, four lanes per row,
/// sixteen rows in eight registers for each token.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pass<const T: usize, S: Codes>(
    tiles: &[S],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mut q = q;
    for run in tiles.chunks(TILES_PER_WIDENING) {
        let mut narrow = [[[vdupq_n_s16(0); 2]; 4]; T];
        for tile in run {
            let activations: [int32x4_t; T] = array::from_fn(|t| {
                // SAFETY: sixteen of the activations that the contract promises.
                unsafe { vld1q_s32(q.add(t * stride).cast()) }
            });
            four_times!(PLANE => {
                let four = activations
                    .map(|all| vreinterpretq_s8_s32(vdupq_laneq_s32::<{ PLANE as i32 }>(all)));
                four_times!(QUARTER => {
                    let codes = tile.codes(QUARTER, PLANE);
                    for (narrow, four) in narrow.iter_mut().zip(four) {
                        multiply(&mut narrow[QUARTER], codes, four);
                    }
                });
            });
            q = q.wrapping_add(tile::COLS);
        }
        for (acc, narrow) in acc.iter_mut().zip(narrow) {
            for (quarter, [low, high]) in narrow.into_iter().enumerate() {
                // Neighbours are of the same row.
                let sums = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
                add_rows(acc, quarter, sums);
            }
        }
    }
}
