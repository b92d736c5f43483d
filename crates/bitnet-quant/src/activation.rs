//! Per-token absmax int8 quantisation of activations.

use bitnet_core::numerics;

/// What multiplies and corrects the integer products of a quantised row.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct QuantizedRow {
    /// `127 / max(absmax, 1e-5)`: a quantised value is about `scale` times the original.
    pub scale: f32,
    /// Sum of the quantised values; `sum of q * (w + 1)` minus this is `sum of q * w`.
    pub sum: i32,
}

/// Quantises one token's activations: `q = clamp(round_half_even(x * scale), -128, 127)` with
/// `scale = 127 / max(absmax, 1e-5)`. The order of operations matters at exact ties:
/// `x / (absmax / 127)` gives other values. Formula of `ActQuant` in transformers'
/// `integrations/bitnet.py`, where torch evaluates a number over a tensor as `(1 / absmax) * 127`,
/// two roundings to f32; so does this.
///
/// # Panics
/// If the two rows differ in length.
#[inline(always)]
pub fn quantize_row(x: &[f32], q: &mut [i8]) -> QuantizedRow {
    assert_eq!(x.len(), q.len());
    let scale = (1.0 / at_least(numerics::max_abs(x), 1e-5)) * 127.0;
    let mut sum = 0i32;
    for (q, &x) in q.iter_mut().zip(x) {
        *q = numerics::round_to_i8(x * scale);
        sum += i32::from(*q);
    }
    QuantizedRow { scale, sum }
}

#[inline(always)]
fn at_least(value: f32, floor: f32) -> f32 {
    if value < floor { floor } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_scaled_to_127() {
        let mut q = [0; 4];
        let row = quantize_row(&[1.0, -2.0, 0.5, 0.0], &mut q);
        assert_eq!(row, QuantizedRow { scale: 63.5, sum: 64 - 127 + 32 });
        // 63.5 is a tie and goes to the even 64; 31.75 goes to 32.
        assert_eq!(q, [64, -127, 32, 0]);
    }

    #[test]
    fn a_row_of_zeros_stays_zero() {
        let mut q = [1; 3];
        let row = quantize_row(&[0.0; 3], &mut q);
        assert_eq!((q, row.sum), ([0; 3], 0));
        assert_eq!(row.scale, (1.0 / 1e-5) * 127.0);
    }
}
