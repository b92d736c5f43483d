//! Rows of f32 to stored numbers, as ggml's quantisers round them (`quantize_row_*_ref` in
//! `ggml/src/ggml-quants.c` of llama.cpp).

use bitnet_core::DType;
use bitnet_core::numerics::round_to_i32;
use half::{bf16, f16};

use super::{f16_to_f32, f32_to_f16};

/// Appends one row of `values` in a type that [`decode_row`](super::decode_row) reads.
///
/// F16 and BF16 round to the nearest, ties to even, F16 to its largest finite number where the
/// nearest would be an infinity. The values must be finite.
///
/// # Panics
/// If the row does not fill whole blocks, or the type is none of F32, F16, BF16, Q8_0 and Q6_K.
pub fn encode_row(dtype: DType, values: &[f32], out: &mut Vec<u8>) {
    let len = dtype.block_len();
    assert!(values.len().is_multiple_of(len), "{} values as {dtype}", values.len());
    match dtype {
        DType::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        DType::F16 => out.extend(values.iter().flat_map(|&value| f32_to_f16(value))),
        DType::BF16 => {
            out.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
        }
        DType::Q8_0 => values.chunks_exact(len).for_each(|block| q8_0(block, out)),
        DType::Q6K => values.chunks_exact(len).for_each(|block| q6_k(block, out)),
        other => panic!("{other} rows are not written"),
    }
}

/// The largest absolute value becomes 127.
fn q8_0(values: &[f32], out: &mut Vec<u8>) {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let d = largest / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(values.iter().map(|value| (value * inverse).round() as i8 as u8));
}

/// Sixteen groups of 16, each with the scale that loses least, and these scales in 8 bits.
fn q6_k(values: &[f32], out: &mut Vec<u8>) {
    let mut scales = [0.0f32; 16];
    for (scale, group) in scales.iter_mut().zip(values.chunks_exact(16)) {
        *scale = best_scale(group);
    }
    let largest = scales.iter().fold(0.0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    let (mut low, mut high) = ([0u8; 128], [0u8; 64]);
    let mut steps = [0i8; 16];
    // Below it everything is zero, as for ggml.
    const SMALLEST: f32 = 1e-15;
    let d = if largest.abs() < SMALLEST { [0; 2] } else { f32_to_f16(largest / -128.0) };
    if d != [0; 2] {
        for (step, scale) in steps.iter_mut().zip(scales) {
            *step = round_to_i32(scale * (-128.0 / largest)).min(127) as i8;
        }
    }
    for (index, &value) in values.iter().enumerate() {
        let scale = f16_to_f32(d) * f32::from(steps[index / 16]);
        let q = if scale == 0.0 { 0.0 } else { (value / scale).clamp(-32.0, 31.0) };
        let q = (round_to_i32(q) + 32) as u8;
        // Each half of 128 values is four quarters of 32; `decode_row` describes their places.
        let (half, quarter, m) = (index / 128, index % 128 / 32, index % 32);
        low[64 * half + 32 * (quarter % 2) + m] |= (q & 15) << (4 * (quarter / 2));
        high[32 * half + m] |= q >> 4 << (2 * quarter);
    }
    out.extend(low);
    out.extend(high);
    out.extend(steps.map(|step| step as u8));
    out.extend(d);
}

/// The scale by which a group as whole steps from -32 to 31 has the least squared error, each error
/// weighed by the square of its value (`make_qx_quants`). Nineteen scales near the one that uses the
/// range up are tried.
fn best_scale(group: &[f32]) -> f32 {
    let largest = group.iter().fold(0.0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
    if largest.abs() < 1e-15 {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, f32::NEG_INFINITY);
    // The unshifted scale first: of equal gains the first counts.
    for shift in std::iter::once(0).chain((-9..=9).filter(|&shift| shift != 0)) {
        let inverse = -(32.0 + 0.1 * shift as f32) / largest;
        let (mut with_value, mut squares) = (0.0f32, 0.0f32);
        for value in group {
            let q = round_to_i32(value * inverse).clamp(-32, 31) as f32;
            let weight = value * value;
            with_value += weight * value * q;
            squares += weight * q * q;
        }
        if squares > 0.0 && with_value * with_value > best_gain * squares {
            best = with_value / squares;
            best_gain = best * with_value;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::super::decode_row;
    use super::*;

    /// Numbers of many sizes, the largest near 1.
    fn values() -> Vec<f32> {
        let mut state = 1u32;
        let random = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        });
        random.take(1024).map(|x| x * x * x).collect()
    }

    fn through(dtype: DType, values: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        encode_row(dtype, values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        decode_row(dtype, &bytes, &mut back);
        back
    }

    #[test]
    fn rounding_stays_within_half_a_step_and_a_second_time_changes_nothing() {
        let values = values();
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0] {
            let back = through(dtype, &values);
            let blocks = values.chunks(32).zip(back.chunks(32));
            for (values, back) in blocks {
                let largest = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                for (value, back) in values.iter().zip(back) {
                    let half_step = match dtype {
                        DType::F32 => 0.0,
                        DType::F16 => (value.abs() / 2048.0).max(2f32.powi(-25)),
                        DType::BF16 => value.abs() / 256.0,
                        // The step itself is rounded to 11 bits.
                        _ => largest / 127.0 * (0.5 + 127.0 / 2048.0),
                    };
                    assert!((value - back).abs() <= half_step, "{dtype}: {value} {back}");
                }
            }
            assert_eq!(through(dtype, &back), back, "{dtype}");
        }
    }

    #[test]
    fn six_bits_lose_less_than_a_step_of_their_group() {
        let values = values();
        let back = through(DType::Q6K, &values);
        for (values, back) in values.chunks(16).zip(back.chunks(16)) {
            let largest = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            for (value, back) in values.iter().zip(back) {
                // One of 32 steps, whose size may be a tenth off, and an 8-bit scale.
                assert!((value - back).abs() <= largest / 20.0 + 1.0 / 256.0, "{value} {back}");
            }
        }
        let mean = |square: &dyn Fn(usize) -> f32| (0..values.len()).map(square).sum::<f32>();
        let lost = mean(&|i| (values[i] - back[i]).powi(2)) / mean(&|i| values[i].powi(2));
        assert!(lost.sqrt() < 0.02, "{lost}");
        assert_eq!(through(DType::Q6K, &[0.0; 256]), [0.0; 256]);
    }

    #[test]
    #[should_panic(expected = "Q4_K rows are not written")]
    fn other_types_are_not_written() {
        encode_row(DType::Q4K, &[0.0; 256], &mut Vec::new());
    }
}
