//! Rows of tables: decoded for the embedding, multiplied as they are loaded for the output head.
//!
//! The 32 virtual lanes of [`numerics::dot`] are two [`Lanes`] in registers, for each of a few tokens
//! that share what is loaded of a row.

use bitnet_core::DType;
use bitnet_core::numerics::{self, LANES};
use bitnet_quant::packing::blocks;

use super::lanes::{Bf16, Element, Lanes};
use super::{LINE, prefetch_second};

/// One row of an output head and the tokens it is multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct HeadRow<'a> {
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a [u8],
    /// The row that is multiplied next, or this one again: it is asked for meanwhile, since the
    /// hardware foresees neither a row far away nor, in time, the next page of memory.
    pub(crate) next: &'a [u8],
    /// `[tokens, cols]`.
    pub(crate) inputs: &'a [f32],
}

/// Most tokens of a pass over a row.
const TOKENS: usize = 4;

/// Elements that [`Lanes`] holds.
const WIDTH: usize = LANES / 2;

/// [`blocks::decode_row`] with this instruction set's conversion of half-precision numbers.
#[inline(always)]
pub(super) fn decode<V: Lanes>(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    if dtype != DType::F16 {
        return blocks::decode_row(dtype, bytes, out);
    }
    assert_eq!(bytes.len(), 2 * out.len());
    let (halves, halves_left) = bytes.as_chunks::<{ 2 * WIDTH }>();
    let (out, out_left) = out.as_chunks_mut::<WIDTH>();
    for (halves, out) in halves.iter().zip(out) {
        // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`);
        // sixteen elements of two bytes, and room for sixteen.
        unsafe { V::load_f16(halves.as_ptr().cast()).store(out.as_mut_ptr()) };
    }
    blocks::decode_row(dtype, halves_left, out_left);
}

/// `out[t] = row · inputs[t]`, as [`numerics::dot`] of the decoded row has it. `decoded` is room for
/// one row.
#[inline(always)]
pub(super) fn head_row<V: Lanes>(row: HeadRow<'_>, decoded: &mut [f32], out: &mut [f32]) {
    assert_eq!(row.inputs.len(), decoded.len() * out.len());
    match row.dtype {
        DType::F32 => dots::<V, f32>(row, decoded, out),
        DType::F16 => dots::<V, [u8; 2]>(row, decoded, out),
        DType::BF16 => dots::<V, Bf16>(row, decoded, out),
        _ => {
            blocks::decode_row(row.dtype, row.bytes, decoded);
            for (input, out) in row.inputs.chunks_exact(decoded.len()).zip(out) {
                *out = numerics::dot(decoded, input);
            }
        }
    }
}

/// [`head_row`] for rows of `T`. Only what is left beside whole rounds of lanes is decoded.
#[inline(always)]
fn dots<V: Lanes, T: Element<V>>(row: HeadRow<'_>, decoded: &mut [f32], out: &mut [f32]) {
    let cols = decoded.len();
    assert_eq!(row.bytes.len(), cols * size_of::<T>());
    let left = &row.bytes[cols / LANES * LANES * size_of::<T>()..];
    let left_decoded = &mut decoded[..cols % LANES];
    blocks::decode_row(row.dtype, left, left_decoded);
    // A token has two registers of lanes here, a row of attention one.
    let most = TOKENS.min(V::ROWS.div_ceil(2));
    for (inputs, out) in row.inputs.chunks(most * cols).zip(out.chunks_mut(most)) {
        let row = HeadRow { inputs, ..row };
        match out.len() {
            4 => pass::<V, T, 4>(row, left_decoded, out),
            3 => pass::<V, T, 3>(row, left_decoded, out),
            2 => pass::<V, T, 2>(row, left_decoded, out),
            _ => pass::<V, T, 1>(row, left_decoded, out),
        }
    }
}

/// A row against `N` tokens. `left` is the decoded end of the row, less than a round of lanes.
#[inline(always)]
fn pass<V: Lanes, T: Element<V>, const N: usize>(row: HeadRow<'_>, left: &[f32], out: &mut [f32]) {
    let cols = row.bytes.len() / size_of::<T>();
    let whole = cols - left.len();
    assert!(row.inputs.len() == N * cols && out.len() == N && whole.is_multiple_of(LANES));
    let (weights, x) = (row.bytes.as_ptr().cast::<T>(), row.inputs.as_ptr());
    // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`); the row
    // and each input have `whole` elements, a multiple of the 32 that are loaded at a time, and
    // `lanes` is 32 elements.
    unsafe {
        let mut sums = [[V::splat(0.0); 2]; N];
        for k in (0..whole).step_by(LANES) {
            for byte in (0..LANES * size_of::<T>()).step_by(LINE) {
                prefetch_second(row.next.as_ptr().wrapping_add(k * size_of::<T>() + byte));
            }
            let weights = [T::load(weights.add(k)), T::load(weights.add(k + WIDTH))];
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = x.add(t * cols + k);
                sums[0] = weights[0].mul_add(V::load(x), sums[0]);
                sums[1] = weights[1].mul_add(V::load(x.add(WIDTH)), sums[1]);
            }
        }
        for (t, (mut sums, out)) in sums.into_iter().zip(out).enumerate() {
            if !left.is_empty() {
                let mut lanes = [0.0; LANES];
                sums[0].store(lanes.as_mut_ptr());
                sums[1].store(lanes.as_mut_ptr().add(WIDTH));
                let x = &row.inputs[t * cols + whole..];
                for (lane, (weight, x)) in lanes.iter_mut().zip(left.iter().zip(x)) {
                    *lane = weight.mul_add(*x, *lane);
                }
                sums = [V::load(lanes.as_ptr()), V::load(lanes.as_ptr().add(WIDTH))];
            }
            *out = V::fold(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use bitnet_testing::Random;

    use super::*;
    use crate::arch::tests::all_kernels;

    /// A row of finite values: floats of magnitude below 2, and blocks of any contents whose scales
    /// are no larger.
    fn row(random: &mut Random, dtype: DType, cols: usize) -> Vec<u8> {
        let size = dtype.block_bytes();
        let mut bytes: Vec<u8> =
            (0..cols / dtype.block_len() * size).map(|_| random.bits() as u8 & 0xbf).collect();
        if dtype.block_len() == 1 {
            let high = bytes.iter_mut().skip(size - 1).step_by(size);
            high.for_each(|byte| *byte = *byte & 0x83 | 0x3c);
        }
        bytes
    }

    #[test]
    fn rows_of_the_head_are_dot_products_of_decoded_rows() {
        let mut random = Random::new(5);
        let all = all_kernels();
        for dtype in [
            DType::F64,
            DType::F32,
            DType::F16,
            DType::BF16,
            DType::Q8_0,
            DType::Q4K,
            DType::Q6K,
            DType::Tq1_0,
            DType::Tq2_0,
            DType::Q2_0,
            DType::Q2_0Wide,
        ] {
            let widths = [1usize, 31, 32, 33, 100, 128, 256, 2560];
            for cols in widths.into_iter().filter(|cols| cols.is_multiple_of(dtype.block_len())) {
                // Rows of a mapped file begin at any byte.
                let bytes = [vec![0], row(&mut random, dtype, cols)].concat();
                let bytes = &bytes[1..];
                let mut values = vec![0.0; cols];
                blocks::decode_row(dtype, bytes, &mut values);
                for tokens in 1..=9 {
                    let inputs = random.activations(cols * tokens);
                    let expected: Vec<u32> = inputs
                        .chunks_exact(cols)
                        .map(|input| numerics::dot(&values, input).to_bits())
                        .collect();
                    for kernels in &all {
                        let case = format!("{}, {dtype}, {cols} x {tokens}", kernels.name);
                        let mut room = vec![7.0; cols];
                        let mut out = vec![f32::NAN; tokens];
                        let row = HeadRow { dtype, bytes, next: bytes, inputs: &inputs };
                        kernels.head_row(row, &mut room, &mut out);
                        let out: Vec<u32> = out.into_iter().map(f32::to_bits).collect();
                        assert_eq!(out, expected, "{case}");
                        kernels.decode(dtype, bytes, &mut room);
                        assert_eq!(room, values, "{case}");
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn inputs_of_another_width_are_refused() {
        let row = HeadRow { dtype: DType::F32, bytes: &[0; 256], next: &[], inputs: &[0.0; 63] };
        let kernels = crate::arch::Kernels::for_isa(crate::Isa::Scalar).unwrap();
        kernels.head_row(row, &mut [0.0; 64], &mut [0.0]);
    }
}
