//! The kernels that are plain code, written once and compiled for each instruction set by
//! [`instantiate`](super::instantiate). All are `inline(always)` so that they take on the
//! instructions of the function that they are called from.

use bitnet_core::backend::Activation;
use bitnet_core::numerics;
use bitnet_quant::packing::tile;

use super::Tile;

/// See [`Kernels::ternary_int8`](super::Kernels::ternary_int8): plain code. The sixteen rows are
/// the lanes of the inner loops, as in [`ternary_f32`].
#[inline(always)]
pub(super) fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    for (t, acc) in acc.iter_mut().enumerate() {
        let (q, _) = q[t * stride..].as_chunks::<{ tile::COLS }>();
        let mut sums = [0i32; tile::ROWS];
        for (tile, q) in tiles.iter().zip(q) {
            for (k, &q) in q.iter().enumerate() {
                let (byte, bit) = tile::place(0, k);
                for (sum, row) in sums.iter_mut().zip(tile.as_chunks::<4>().0) {
                    let code = u32::from_le_bytes(*row) >> (8 * byte + bit) & 3;
                    *sum += code as i32 * i32::from(q);
                }
            }
        }
        acc.iter_mut().zip(sums).for_each(|(acc, sum)| *acc += sum);
    }
}

/// See [`Kernels::ternary_f32`](super::Kernels::ternary_f32).
#[inline(always)]
pub(super) fn ternary_f32(
    tiles: &[Tile],
    x: &[f32],
    stride: usize,
    sums: &mut [[f32; tile::ROWS]],
) {
    let mut x = x;
    let mut sums = sums;
    while !sums.is_empty() {
        let tokens = match sums.len() {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let (now, later) = sums.split_at_mut(tokens);
        match tokens {
            4 => ternary_f32_pass::<4>(tiles, x, stride, now),
            2 => ternary_f32_pass::<2>(tiles, x, stride, now),
            _ => ternary_f32_pass::<1>(tiles, x, stride, now),
        }
        sums = later;
        x = if sums.is_empty() { &[] } else { &x[tokens * stride..] };
    }
}

/// One band against `T` tokens. The four accumulators of a sum (`k % 4`) are the four bytes of a
/// 32-bit lane: each is finished before the next begins, so that `T` of them stay in registers.
#[inline(always)]
fn ternary_f32_pass<const T: usize>(
    tiles: &[Tile],
    x: &[f32],
    stride: usize,
    sums: &mut [[f32; tile::ROWS]],
) {
    let x: [&[f32]; T] = std::array::from_fn(|t| &x[t * stride..][..tiles.len() * tile::COLS]);
    let mut acc = [[[0.0f32; tile::ROWS]; T]; 4];
    for (byte, acc) in acc.iter_mut().enumerate() {
        let mut lanes = [[0.0f32; tile::ROWS]; T];
        for (i, tile) in tiles.iter().enumerate() {
            for plane in 0..4 {
                let shift = 8 * byte + 2 * plane;
                let mut weights = [0.0f32; tile::ROWS];
                for (weight, row) in weights.iter_mut().zip(tile.as_chunks::<4>().0) {
                    let code = u32::from_le_bytes(*row) >> shift & 3;
                    *weight = (code as i32 - 1) as f32;
                }
                let k = i * tile::COLS + 4 * plane + byte;
                for (lanes, x) in lanes.iter_mut().zip(x) {
                    for (lane, weight) in lanes.iter_mut().zip(weights) {
                        *lane = weight.mul_add(x[k], *lane);
                    }
                }
            }
        }
        *acc = lanes;
    }
    for (t, sums) in sums.iter_mut().enumerate() {
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = (acc[0][t][row] + acc[1][t][row]) + (acc[2][t][row] + acc[3][t][row]);
        }
    }
}

/// `sums = acc`, as floats.
#[inline(always)]
pub(super) fn to_float(acc: &[[i32; tile::ROWS]], sums: &mut [[f32; tile::ROWS]]) {
    for (sum, acc) in sums.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
        *sum = *acc as f32;
    }
}

/// The scales of a band, to be applied in the order of [`bitnet_core::WeightScale`].
#[derive(Clone, Copy)]
pub(crate) enum BandScale<'a> {
    Multiply(f32),
    Divide(f32),
    Rows(&'a [f32; tile::ROWS]),
    /// The sums have theirs already.
    Applied,
}

/// Applies the scales of a band and the activation scale `s_x[t]` to `sums[t]`.
#[inline(always)]
pub(super) fn scale_sums(sums: &mut [[f32; tile::ROWS]], s_x: &[f32], scale: BandScale<'_>) {
    for (sums, &s_x) in sums.iter_mut().zip(s_x) {
        *sums = match scale {
            BandScale::Multiply(scale) => sums.map(|y| y / s_x * scale),
            BandScale::Divide(scale) => {
                let divisor = s_x * scale;
                sums.map(|y| y / divisor)
            }
            BandScale::Rows(scales) => std::array::from_fn(|row| sums[row] / s_x * scales[row]),
            BandScale::Applied => sums.map(|y| y / s_x),
        };
    }
}

/// The scales of one token's outputs, to be applied in the order of [`bitnet_core::WeightScale`].
#[derive(Clone, Copy)]
pub(crate) enum OutputScale<'a> {
    Multiply(f32),
    Divide(f32),
    Rows(&'a [f32]),
}

/// One token's outputs from their sums and the activation scale `s_x`.
#[inline(always)]
pub(super) fn scale_outputs(sums: &[i32], s_x: f32, scale: OutputScale<'_>, out: &mut [f32]) {
    assert_eq!(sums.len(), out.len());
    let sums = sums.iter().map(|&sum| sum as f32);
    match scale {
        OutputScale::Multiply(scale) => {
            out.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum / s_x * scale)
        }
        OutputScale::Divide(scale) => {
            let divisor = s_x * scale;
            out.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum / divisor);
        }
        OutputScale::Rows(scales) => {
            assert_eq!(scales.len(), out.len());
            out.iter_mut()
                .zip(sums)
                .zip(scales)
                .for_each(|((y, sum), scale)| *y = sum / s_x * scale);
        }
    }
}

/// `q = round_half_even(x * (127 / absmax))`; the scale returned is `absmax / 127`, 0 for a head of
/// zeros.
#[inline(always)]
pub(super) fn quantize_head(x: &[f32], q: &mut [i8]) -> f32 {
    assert_eq!(x.len(), q.len());
    let absmax = numerics::max_abs(x);
    let inverse = if absmax == 0.0 { 0.0 } else { 127.0 / absmax };
    for (q, x) in q.iter_mut().zip(x) {
        *q = numerics::round_to_i8(x * inverse);
    }
    absmax / 127.0
}

/// Rotates each head of `head_size` elements: element `i` with `i + head_size / 2`.
#[inline(always)]
pub(super) fn rope(x: &mut [f32], head_size: usize, cos: &[f32], sin: &[f32]) {
    let half = head_size / 2;
    let (cos, sin) = (&cos[..half], &sin[..half]);
    for head in x.chunks_exact_mut(head_size) {
        let (low, high) = head.split_at_mut(half);
        let high = &mut high[..half];
        for i in 0..half {
            let (a, b) = (low[i], high[i]);
            low[i] = (-b).mul_add(sin[i], a * cos[i]);
            high[i] = a.mul_add(sin[i], b * cos[i]);
        }
    }
}

/// `gate = activation(gate) * up`.
#[inline(always)]
pub(super) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    #[inline(always)]
    fn apply(gate: &mut [f32], up: &[f32], gated: impl Fn(f32, f32) -> f32) {
        assert_eq!(gate.len(), up.len());
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = gated(*gate, *up);
        }
    }
    match activation {
        Activation::Relu2 => apply(gate, up, numerics::gated_relu2),
        Activation::Silu => apply(gate, up, |gate, up| numerics::silu(gate) * up),
        Activation::GeluTanh => apply(gate, up, |gate, up| numerics::gelu_tanh(gate) * up),
    }
}

/// `x += y`.
#[inline(always)]
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
