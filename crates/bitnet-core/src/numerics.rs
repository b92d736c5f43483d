//! The one float recipe that every backend on a CPU follows, so that scalar, AVX2, AVX-512 and
//! NEON code give the same bits.
//!
//! * Every reduction over elements of a row runs in [`LANES`] virtual lanes: element `i` goes to
//!   lane `i % LANES`, in ascending order, by fused multiply-add; the lanes are then folded in
//!   halves ([`fold`]). An instruction set with fewer physical lanes uses several registers, one
//!   with none uses an array.
//! * `exp` and what is built on it are written out here, from exactly rounded operations only.
//! * RoPE angles come from a portable maths library, never from the platform's.
//!
//! The functions are `inline(always)` so that a kernel compiled for an instruction set gets its
//! own copy, vectorised for it: strict IEEE semantics make every copy give the same bits.

/// Virtual lanes of a float reduction.
pub const LANES: usize = 32;

/// Tokens per split of the keys in attention: split `s` covers the positions
/// `s * ATTENTION_SPLIT ..` of a sequence, whatever the block size or the number of threads.
pub const ATTENTION_SPLIT: usize = 256;

/// Steps of a weight of attention over int8 values, which is rounded to 16 bits: the sum over a
/// split, at most `256 * 32767 * 128`, fits 32 bits.
pub const WEIGHT_LEVELS: f32 = 32_767.0;

/// Steps of a query against int8 keys, which is rounded to 16 bits: the products with the
/// `head_size` elements of a key, at most 128 each, sum up to no more than 32 bits.
pub fn query_levels(head_size: usize) -> f32 {
    (i32::MAX as usize / (128 * head_size)).min(32_767) as f32
}

/// Folds the lanes of a reduction: halves onto halves, 16, 8, 4, 2, 1.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = combine(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Accumulates pairs of elements into lanes by `step`, then folds with `combine`.
#[inline(always)]
fn reduce(
    x: &[f32],
    y: &[f32],
    start: f32,
    step: impl Fn(f32, f32, f32) -> f32,
    combine: impl Fn(f32, f32) -> f32,
) -> f32 {
    assert_eq!(x.len(), y.len());
    let mut lanes = [start; LANES];
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x.iter().zip(y) {
        // A new array each time: with a loop over the old one the compiler leaves the lanes in
        // memory, which made the dot products of AVX2 seven times slower.
        // Filled by a loop: `array::from_fn` is not always inlined into large kernels.
        let mut next = [start; LANES];
        for lane in 0..LANES {
            next[lane] = step(lanes[lane], x[lane], y[lane]);
        }
        lanes = next;
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane = step(*lane, *x, *y);
    }
    fold(lanes, combine)
}

/// `sum of x[i] * y[i]`.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    reduce(x, y, 0.0, |acc, x, y| x.mul_add(y, acc), |a, b| a + b)
}

/// `sum of x[i]`.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    reduce(x, x, 0.0, |acc, x, _| acc + x, |a, b| a + b)
}

/// `max of |x[i]|`, 0 for an empty row. A NaN is passed over.
#[inline(always)]
pub fn max_abs(x: &[f32]) -> f32 {
    reduce(x, x, 0.0, |acc, x, _| maximum(acc, x.abs()), maximum)
}

/// `max of x[i]`, negative infinity for an empty row. A NaN is passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    reduce(x, x, f32::NEG_INFINITY, |acc, x, _| maximum(acc, x), maximum)
}

/// The larger of an accumulator and a value; the accumulator if the value is NaN. Spelled as one
/// comparison so that it is the same everywhere (`f32::max` leaves the sign of zero open).
#[inline(always)]
fn maximum(acc: f32, value: f32) -> f32 {
    if value > acc { value } else { acc }
}

/// `out = weight * (x / rms(x))`: RMSNorm in f32, `x * (1 / sqrt(mean(x²) + eps))` and then times
/// the weight, as transformers' `BitNetRMSNorm`.
#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len());
    let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for i in 0..x.len() {
        out[i] = weight[i] * (x[i] * inverse);
    }
}

/// `e^x` to within 2 units in the last place: 0 below -87.3, infinity above 88.7, NaN for NaN.
///
/// Range reduction `x = n ln 2 + r` and the degree-5 polynomial of Cephes' `expf`, with every
/// multiply-add fused.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    use exp_parts::*;
    let n = (x * LOG2_E).round_ties_even();
    let r = (-n).mul_add(LN2_LO, (-n).mul_add(LN2_HI, x));
    let mut p = POLYNOMIAL[0];
    for factor in &POLYNOMIAL[1..] {
        p = p.mul_add(r, *factor);
    }
    let value = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors: n reaches 128, whose power alone is not finite.
    let exponent = round_to_i32(n.clamp(-126.0, 128.0));
    let low = exponent >> 1;
    let power = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
    let scaled = value * power(low) * power(exponent - low);
    if x < LEAST {
        0.0
    } else if x > 88.72 {
        f32::INFINITY
    } else {
        scaled
    }
}

/// The numbers in [`exp`], for code that computes it in registers.
pub mod exp_parts {
    /// Binary logarithm of e.
    pub const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// The natural logarithm of 2 in two parts, whose multiples lose nothing.
    pub const LN2_HI: f32 = 0.693_359_4;
    /// The smaller part.
    pub const LN2_LO: f32 = -2.121_944_4e-4;
    /// From the highest power on; what follows are r and 1.
    pub const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    /// Below this the result is 0.
    pub const LEAST: f32 = -87.3;
    /// The sum with it has the nearest integer in its low bits, for magnitudes below 2^22.
    pub const ABOVE: f32 = 12_582_912.0;
}

/// A number of magnitude below 2^22 rounded to an integer, halves to even; any integer for NaN. The
/// sum with 1.5 * 2^23 has the integer in its low bits: unlike `as`, which saturates, this is
/// vector code on every instruction set.
#[inline(always)]
pub fn round_to_i32(x: f32) -> i32 {
    use exp_parts::ABOVE;
    ((x + ABOVE).to_bits() as i32).wrapping_sub(ABOVE.to_bits() as i32)
}

/// `clamp(round_half_even(x), -128, 127)`, 0 for NaN: what `x.round_ties_even() as i8` is.
#[inline(always)]
pub fn round_to_i8(x: f32) -> i8 {
    let x = if x.is_nan() { 0.0 } else { x };
    let x = if x > 127.0 { 127.0 } else { x };
    let x = if x < -128.0 { -128.0 } else { x };
    round_to_i32(x) as i8
}

/// Rounds a row to `-levels ..= levels` (at most 32 767): `q = round_half_even(x * (levels /
/// absmax))`, 0 for NaN. Returns what one is worth, `absmax / levels`. A row that is too small for
/// its factor to be finite becomes zeros.
#[inline(always)]
pub fn quantize_i16(x: &[f32], levels: f32, q: &mut [i16]) -> f32 {
    assert_eq!(x.len(), q.len());
    let absmax = max_abs(x);
    let inverse = level_factor(absmax, levels);
    for (q, x) in q.iter_mut().zip(x) {
        let x = x * inverse;
        *q = round_to_i32(if x.is_nan() { 0.0 } else { x }) as i16;
    }
    absmax / levels
}

/// What [`quantize_i16`] multiplies with: levels per unit, 0 where that is not finite.
#[inline(always)]
pub fn level_factor(absmax: f32, levels: f32) -> f32 {
    let factor = levels / absmax;
    if factor.is_finite() { factor } else { 0.0 }
}

/// `sum of x[i] * y[i]` as one chain of fused multiply-adds in ascending order: a score of
/// attention, of which many are computed side by side.
#[inline(always)]
pub fn chain(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).fold(0.0, |acc, (x, y)| x.mul_add(*y, acc))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `max(gate, 0)² * up`, and +0 wherever `gate <= 0`, whatever `up` is: there `up` need not be known.
/// A NaN is not at most zero and stays NaN.
#[inline(always)]
pub fn gated_relu2(gate: f32, up: f32) -> f32 {
    if gate <= 0.0 { 0.0 } else { gate * gate * up }
}

/// GELU by its tanh approximation, `x / 2 * (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`
/// (`gelu_pytorch_tanh`), written as `x / (1 + e^(-2u))`.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-2.0 * u))
}

/// Inverse frequencies of rotary position embedding, `theta^(-2i/dim)` for `i` in `0..dim/2`,
/// each step rounded to f32 as transformers does.
pub fn rope_inverse_frequencies(theta: f32, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            1.0 / libm::pow(f64::from(theta), f64::from(exponent)) as f32
        })
        .collect()
}

/// Cosine and sine of the angle `position * inverse_frequency`, the product rounded to f32.
pub fn rope_angle(position: usize, inverse_frequency: f32) -> (f32, f32) {
    let angle = f64::from(position as f32 * inverse_frequency);
    (libm::cos(angle) as f32, libm::sin(angle) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        let mut worst = 0.0f64;
        for step in 0..400_000 {
            let x = -87.0 + step as f32 * (175.5 / 400_000.0);
            let exact = f64::from(x).exp();
            let ulp = exact * f64::from(f32::EPSILON) / 2.0;
            worst = worst.max(((f64::from(exp(x)) - exact) / ulp / 2.0).abs());
        }
        assert!(worst < 2.0, "{worst} units");
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(88.7).is_finite() && exp(-87.29) > 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn rounding_agrees_with_the_standard_library() {
        for step in -300_000..300_000 {
            // Eighths, so that every half is met, and numbers right beside halves.
            let x = step as f32 / 8.0;
            for x in [x, f32::from_bits(x.to_bits() + 1), f32::from_bits(x.to_bits() ^ 1)] {
                assert_eq!(round_to_i32(x), x.round_ties_even() as i32, "{x}");
                assert_eq!(round_to_i8(x), x.round_ties_even() as i8, "{x}");
            }
        }
        for x in [f32::NAN, -f32::NAN, f32::INFINITY, -f32::INFINITY, 3e38, -0.0, 1e-45] {
            assert_eq!(round_to_i8(x), x.round_ties_even() as i8, "{x}");
        }
    }

    #[test]
    fn reductions_agree_with_plain_sums_at_every_length() {
        for len in 0..200usize {
            let x: Vec<f32> = (0..len).map(|i| ((i * 37 % 19) as f32 - 9.0) / 8.0).collect();
            let y: Vec<f32> = (0..len).map(|i| ((i * 11 % 23) as f32 - 11.0) / 4.0).collect();
            // Small multiples of powers of two: every order of summation is exact.
            assert_eq!(dot(&x, &y), x.iter().zip(&y).map(|(a, b)| a * b).sum::<f32>());
            assert_eq!(sum(&x), x.iter().sum::<f32>());
            assert_eq!(max_abs(&x), x.iter().fold(0.0, |m, v| v.abs().max(m)));
        }
    }

    #[test]
    fn activations_match_their_definitions() {
        for step in -400..400 {
            let x = step as f32 / 20.0;
            let d = f64::from(x);
            let tanh = (0.797_884_560_802_865_4 * (d + 0.044715 * d * d * d)).tanh();
            assert!((f64::from(gelu_tanh(x)) - 0.5 * d * (1.0 + tanh)).abs() < 2e-6);
            assert!((f64::from(silu(x)) - d / (1.0 + (-d).exp())).abs() < 2e-6);
            assert_eq!(gated_relu2(x, 0.5), x.max(0.0).powi(2) * 0.5);
        }
    }

    #[test]
    fn a_gate_of_zero_or_less_gives_plus_zero_whatever_it_meets() {
        for gate in [0.0, -0.0, -1e-30, -3.0, f32::NEG_INFINITY] {
            for up in [1.0, -1.0, f32::INFINITY, f32::NAN] {
                assert_eq!(gated_relu2(gate, up).to_bits(), 0, "{gate} and {up}");
            }
        }
        assert!(gated_relu2(f32::NAN, 1.0).is_nan());
        assert!(gated_relu2(1.0, -0.0).is_sign_negative());
    }
}
