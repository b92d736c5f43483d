//! Rows of stored numbers to f32 and back: plain floats and ggml's block formats, to the same bits as
//! ggml's `dequantize_row_*` (`ggml/src/ggml-quants.c` in llama.cpp).
//!
//! Every product below is exact: an f16 scale has 11 significant bits, group scales and quants
//! have at most 13 between them, and f32 has 24. Only the subtraction of `Q4_K` rounds, once, so it
//! makes no difference whether ggml's compiler fused it with the product.

mod encode;

use bitnet_core::DType;
use half::slice::HalfFloatSliceExt;

use super::BlockPacking;
pub use encode::encode_row;

/// Decodes one row of `out.len()` elements.
///
/// F64 is rounded to the nearest f32; ternary blocks (TQ1_0, TQ2_0, Q2_0) become their values
/// `(code - 1) * d`. There is no alignment requirement on `bytes`.
///
/// # Panics
/// If `bytes` is not exactly a row of that many elements, or for types that have no f32 rows: the
/// integers and [`DType::I2S`].
#[inline(always)]
pub fn decode_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let (len, size) = (dtype.block_len(), dtype.block_bytes());
    assert!(
        out.len().is_multiple_of(len) && bytes.len() == out.len() / len * size,
        "{} bytes are not a {dtype} row of {}",
        bytes.len(),
        out.len()
    );
    match dtype {
        DType::F64 => {
            for (value, b) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *value = f64::from_le_bytes(*b) as f32;
            }
        }
        DType::F32 => {
            for (value, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            for (value, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16_to_f32(*b);
            }
        }
        DType::BF16 => {
            for (value, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        DType::Q8_0 => each_block(bytes, out, size, len, q8_0),
        DType::Q4K => each_block(bytes, out, size, len, q4_k),
        DType::Q6K => each_block(bytes, out, size, len, q6_k),
        DType::Tq1_0 | DType::Tq2_0 | DType::Q2_0 | DType::Q2_0Wide => {
            let packing = BlockPacking::of(dtype).expect("a ternary block format");
            each_block(bytes, out, size, len, |block, out| packing.values(block, out));
        }
        DType::U8 | DType::I8 | DType::I32 | DType::I64 | DType::I2S => {
            panic!("{dtype} has no rows of f32 values")
        }
    }
}

/// An IEEE half-precision number, little-endian, as f32. Written without branches on integers and
/// one exact subtraction, so that loops over it become vector code on every instruction set.
#[inline(always)]
pub fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    let half = u32::from(u16::from_le_bytes(bytes));
    let (sign, magnitude) = ((half & 0x8000) << 16, half & 0x7fff);
    // Move the mantissa up and the exponent bias from 15 to 127; infinities and NaNs (exponent 31)
    // go on to 255.
    let rebias = if magnitude >= 0x7c00 { 224 << 23 } else { 112 << 23 };
    let normal = (magnitude << 13) + rebias;
    // A subnormal is m * 2^-24: put m below an implicit leading one and take that one off.
    const TWO_TO_MINUS_14: u32 = 113 << 23;
    let subnormal =
        f32::from_bits((magnitude << 13) + TWO_TO_MINUS_14) - f32::from_bits(TWO_TO_MINUS_14);
    let value = if magnitude < 0x0400 { subnormal.to_bits() } else { normal };
    f32::from_bits(sign | value)
}

/// The largest finite half-precision number.
const LARGEST: f32 = 65_504.0;

/// Numbers that are converted at a time.
const CONVERTED: usize = 64;

/// The nearest half-precision number, little-endian, ties to even; the largest finite one where the
/// nearest would be an infinity.
pub fn f32_to_f16(x: f32) -> [u8; 2] {
    half::f16::from_f32(x.clamp(-LARGEST, LARGEST)).to_le_bytes()
}

/// [`f32_to_f16`] of each number.
///
/// # Panics
/// If the two rows differ in length.
pub fn f32_to_f16_row(x: &[f32], out: &mut [[u8; 2]]) {
    assert_eq!(x.len(), out.len());
    for (x, out) in x.chunks(CONVERTED).zip(out.chunks_mut(CONVERTED)) {
        let (mut clamped, mut halves) = ([0.0; CONVERTED], [half::f16::ZERO; CONVERTED]);
        clamped.iter_mut().zip(x).for_each(|(clamped, x)| *clamped = x.clamp(-LARGEST, LARGEST));
        halves.convert_from_f32_slice(&clamped);
        out.iter_mut().zip(halves).for_each(|(out, half)| *out = half.to_le_bytes());
    }
}

#[inline(always)]
fn each_block(
    bytes: &[u8],
    out: &mut [f32],
    size: usize,
    len: usize,
    decode: impl Fn(&[u8], &mut [f32]),
) {
    for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(len)) {
        decode(block, out);
    }
}

/// 32 values: f16 `d`, then i8 `q`; value `d q`.
#[inline(always)]
fn q8_0(block: &[u8], out: &mut [f32]) {
    let (d, q) = block.split_at(2);
    let d = f16_to_f32([d[0], d[1]]);
    for (value, &q) in out.iter_mut().zip(q) {
        *value = f32::from(q as i8) * d;
    }
}

/// 256 values in eight groups of 32: f16 `d`, f16 `dmin`, 12 bytes of 6-bit group scales and minima,
/// then 128 bytes of nibbles; value `d scale q - dmin min`. Each 32 bytes hold the group with even
/// number in their low nibbles and the next in their high ones.
#[inline(always)]
fn q4_k(block: &[u8], out: &mut [f32]) {
    let d = f16_to_f32([block[0], block[1]]);
    let dmin = f16_to_f32([block[2], block[3]]);
    let (packed, nibbles) = block[4..].split_at(12);
    // Groups 0..4 have their scale in the low six bits of bytes 0..4 and their minimum in those of
    // 4..8. Groups 4..8 have the low four bits of both in bytes 8..12 (minimum in the high nibble) and
    // the upper two in the top bits of the bytes of group - 4.
    let group = |g: usize| {
        let (scale, min) = if g < 4 {
            (packed[g] & 63, packed[g + 4] & 63)
        } else {
            let low = packed[g + 4];
            (low & 15 | packed[g - 4] >> 6 << 4, low >> 4 | packed[g] >> 6 << 4)
        };
        (d * f32::from(scale), dmin * f32::from(min))
    };
    for (pair, (q, out)) in nibbles.chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        let (low, high) = out.split_at_mut(32);
        let (scale, min) = group(2 * pair);
        for (value, &q) in low.iter_mut().zip(q) {
            *value = scale * f32::from(q & 15) - min;
        }
        let (scale, min) = group(2 * pair + 1);
        for (value, &q) in high.iter_mut().zip(q) {
            *value = scale * f32::from(q >> 4) - min;
        }
    }
}

/// 256 values in sixteen groups of 16: 128 bytes of low nibbles, 64 bytes of upper bit pairs,
/// sixteen i8 group scales, f16 `d`; value `d scale (q - 32)`. Each half of 128 values has 64 bytes
/// of nibbles, the first 64 values in the low ones, and 32 bytes of bit pairs, value `32 l + m` in bits
/// `2 l` of byte `m`.
#[inline(always)]
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, d) = rest.split_at(16);
    let d = f16_to_f32([d[0], d[1]]);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&low[64 * half..][..64], &high[32 * half..][..32]);
        for (g, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(scales[8 * half + g] as i8);
            let low = &low[16 * (g % 4)..][..16];
            let high = &high[16 * (g % 2)..][..16];
            let (nibble, pair) = (4 * (g / 4), 2 * (g / 2));
            for ((value, low), high) in out.iter_mut().zip(low).zip(high) {
                let q = low >> nibble & 15 | (high >> pair & 3) << 4;
                *value = scale * f32::from(q as i8 - 32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_precision_number_has_the_value_that_the_half_crate_gives() {
        for bits in 0..=u16::MAX {
            let ours = f16_to_f32(bits.to_le_bytes());
            let theirs = half::f16::from_bits(bits).to_f32_const();
            if theirs.is_nan() {
                assert!(ours.is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#06x}");
            }
        }
    }

    #[test]
    fn a_row_becomes_the_halves_that_its_numbers_become_alone() {
        // Every sign and exponent with several fractions, so that ties, numbers too small and too
        // large, infinities and NaNs are among them; and a length that is no whole round.
        let bits = (0..=u32::MAX >> 11).map(|high| high << 11 | u32::from(high % 3 == 0));
        let x: Vec<f32> = bits.step_by(61).map(f32::from_bits).collect();
        assert_ne!(x.len() % CONVERTED, 0);
        let mut row = vec![[0; 2]; x.len()];
        f32_to_f16_row(&x, &mut row);
        for (x, half) in x.iter().zip(row) {
            assert_eq!(half, f32_to_f16(*x), "{:#010x}", x.to_bits());
        }
    }

    #[test]
    #[should_panic(expected = "33 bytes are not a Q8_0 row of 32")]
    fn a_row_of_the_wrong_length_panics() {
        decode_row(DType::Q8_0, &[0; 33], &mut [0.0; 32]);
    }
}
