//! NEON: the four columns of four rows are one register. Codes are small enough to be taken with a
//! sign, and the products of a group to be summed in 16 bits.

use std::arch::aarch64::*;

use bitnet_core::Screen;
use bitnet_core::screen::{Block, ROWS, STEPS, TILE, TILES};
use bitnet_quant::screen::Input;

use super::{GROUPS, center, four, in_passes};

in_passes! {
    #[target_feature(enable = "neon")]
    1
}

/// The products of a band with an input (see [`bitnet_quant::screen::products`]).
///
/// # Safety
/// As for [`upper_bounds`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pass<const N: usize>(blocks: &[Block], inputs: &[Input; N], out: &mut [[f32; ROWS]]) {
    // SAFETY: the contract of this function.
    unsafe {
        products(blocks, inputs, out, |codes, planes| {
            // Two halves of each plane.
            let mut sums = [[vdupq_n_s16(0); 2]; 2];
            for (codes, planes) in codes.into_iter().zip(planes) {
                for (sums, four) in sums.iter_mut().zip(planes) {
                    sums[0] = vmlal_s8(sums[0], vget_low_s8(codes), vget_low_s8(four));
                    sums[1] = vmlal_high_s8(sums[1], codes, four);
                }
            }
            sums.map(|[low, high]| vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
        });
    }
}

/// [`pass`] by a function that multiplies the eight sets of four columns of four rows with both
/// planes of their inputs and sums them over the group.
///
/// # Safety
/// As for [`upper_bounds`].
#[inline(always)]
unsafe fn products<const N: usize>(
    blocks: &[Block],
    inputs: &[Input; N],
    out: &mut [[f32; ROWS]],
    multiply: impl Fn([int8x16_t; 8], [[int8x16_t; 2]; 8]) -> [int32x4_t; 2],
) {
    // SAFETY: loads and stores of whole tiles, steps and outputs, and of the input's elements, of
    // which there are enough by the contract of this function; the rest are instructions on
    // registers that every aarch64 CPU has.
    unsafe {
        let (low, fifth) = (vdupq_n_u8(0x0f), vdupq_n_u8(0x10));
        for (input, out) in inputs.iter().zip(out) {
            let mut products = [vdupq_n_f32(0.0); 4];
            for (index, block) in blocks.iter().enumerate() {
                for group in 0..GROUPS {
                    let planes: [[int8x16_t; 2]; 8] = std::array::from_fn(|quad| {
                        [0, 1].map(|plane| {
                            let four = four(input, index, group, quad, plane);
                            vreinterpretq_s8_s32(vdupq_n_s32(four))
                        })
                    });
                    let center = vdupq_n_f32(center(input, index, group));
                    let steps = vld1q_u8(block.as_ptr().add(ROWS * group));
                    let halves = [vmovl_u8(vget_low_u8(steps)), vmovl_high_u8(steps)];
                    let steps = [
                        vmovl_u16(vget_low_u16(halves[0])),
                        vmovl_high_u16(halves[0]),
                        vmovl_u16(vget_low_u16(halves[1])),
                        vmovl_high_u16(halves[1]),
                    ];
                    for (quarter, product) in products.iter_mut().enumerate() {
                        let rows = STEPS + TILES * TILE * group + 16 * quarter;
                        let tiles: [uint8x16_t; TILES] = std::array::from_fn(|tile| {
                            vld1q_u8(block.as_ptr().add(rows + TILE * tile))
                        });
                        let fifths = tiles[TILES - 1];
                        let bits = [
                            fifths,
                            vshrq_n_u8::<1>(fifths),
                            vshrq_n_u8::<2>(fifths),
                            vshrq_n_u8::<3>(fifths),
                            vshlq_n_u8::<4>(fifths),
                            vshlq_n_u8::<3>(fifths),
                            vshlq_n_u8::<2>(fifths),
                            vshlq_n_u8::<1>(fifths),
                        ];
                        let codes = std::array::from_fn(|quad| {
                            let tile = tiles[quad / 2];
                            let tile = match quad % 2 {
                                0 => vandq_u8(tile, low),
                                _ => vshrq_n_u8::<4>(tile),
                            };
                            vreinterpretq_s8_u8(vorrq_u8(tile, vandq_u8(bits[quad], fifth)))
                        });
                        let [high, low] = multiply(codes, planes);
                        let sum = vaddq_s32(vshlq_n_s32::<7>(high), low);
                        let sum = vsubq_f32(vcvtq_f32_s32(sum), center);
                        let steps = vcvtq_f32_u32(steps[quarter]);
                        *product = vfmaq_f32(*product, steps, sum);
                    }
                }
            }
            for (quarter, product) in products.into_iter().enumerate() {
                vst1q_f32(out.as_mut_ptr().add(4 * quarter), product);
            }
        }
    }
}

/// With `sdot`, which sums four products into each 32-bit lane.
pub(in crate::arch) mod dotprod {
    use super::*;
    use crate::arch::neon::dotprod::dot;

    in_passes! {
        #[target_feature(enable = "neon,dotprod")]
        1
    }

    /// See the function of this name without `sdot`.
    ///
    /// # Safety
    /// As for [`upper_bounds`].
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn pass<const N: usize>(blocks: &[Block], inputs: &[Input; N], out: &mut [[f32; ROWS]]) {
        // SAFETY: the contract of this function.
        unsafe {
            products(blocks, inputs, out, |codes, planes| {
                let mut sums = [vdupq_n_s32(0); 2];
                for (codes, planes) in codes.into_iter().zip(planes) {
                    for (sum, four) in sums.iter_mut().zip(planes) {
                        *sum = dot(*sum, codes, four);
                    }
                }
                sums
            });
        }
    }
}
