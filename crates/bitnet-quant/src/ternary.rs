//! Absmean quantisation of float weights to {-1, 0, +1}, and back.

use bitnet_core::{Error, Tensor, TernaryMatrix, WeightScale};
use half::bf16;

use crate::packing::blocks::decode_row;

/// Ternarises a float matrix `[rows, cols]` as transformers does while running on master weights
/// (`WeightQuant` in `integrations/bitnet.py`): over the whole matrix `s = 1 / max(mean|W|, 1e-5)`,
/// `w = clamp(round_half_even(W * s), -1, 1)`, and outputs are divided by `s`.
///
/// The mean is summed in f64 and rounded once. A weight that is not finite is an error.
pub fn absmean(weights: &Tensor) -> Result<TernaryMatrix, Error> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut values = vec![0.0f32; cols];
    let mut total = 0.0f64;
    for row in 0..rows {
        decode_row(weights.dtype(), weights.row(row), &mut values);
        total += values.iter().map(|v| f64::from(v.abs())).sum::<f64>();
    }
    let mean = (total / (rows * cols).max(1) as f64) as f32;
    let scale = 1.0 / if mean < 1e-5 { 1e-5 } else { mean };
    TernaryMatrix::from_rows(rows, cols, WeightScale::Divide(scale), |row, codes| {
        decode_row(weights.dtype(), weights.row(row), &mut values);
        for (code, value) in codes.iter_mut().zip(&values) {
            let scaled = (value * scale).round_ties_even();
            *code = 1 + u8::from(scaled > 0.0) - u8::from(scaled < 0.0);
        }
    })
}

/// Float weights in BF16 that [`absmean`] makes the matrix of again, its scale included wherever the
/// mean of the weights can be told from its neighbours: the inverse of quantisation.
///
/// The magnitude of weights that are not zero would be `scale / share of such weights` for a scale
/// that multiplies. BF16 has two neighbours of it, of which as many of each are taken, spread evenly,
/// as make the mean right.
///
/// # Errors
/// The matrix has several scales, or one that BF16 or [`absmean`]'s smallest mean cannot give.
pub fn master(matrix: &TernaryMatrix) -> Result<Vec<u8>, Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let unusable = |reason: String| Error::WeightScale { rows, cols, reason };
    let mean = match matrix.scale() {
        WeightScale::Multiply(scale) => *scale,
        WeightScale::Divide(scale) => 1.0 / scale,
        WeightScale::Rows(_) | WeightScale::Groups { .. } => {
            return Err(unusable("master weights of one matrix have one scale".to_owned()));
        }
    };
    let nonzero = (0..rows).flat_map(|row| matrix.packed_row(row)).fold(0u64, |count, &byte| {
        // The low bit of each pair is set for the code 1 alone.
        count + u64::from(4 - (byte & 0b01_01_01_01).count_ones())
    });
    let magnitude = f64::from(mean) * (rows * cols) as f64 / nonzero.max(1) as f64;
    if nonzero > 0 && !(mean >= 1e-5 && magnitude < f64::from(f32::MAX)) {
        return Err(unusable(format!("{mean:e} is no mean of master weights")));
    }
    // Truncated, so that the magnitude is between the two.
    let low = bf16::from_bits(((magnitude as f32).to_bits() >> 16) as u16);
    let high = bf16::from_bits(low.to_bits() + 1);
    let step = high.to_f64() - low.to_f64();
    let nearest = ((magnitude - low.to_f64()) / step * nonzero as f64).round();
    // Of numbers beside each other, which round to one mean, the one that gives the scale itself.
    let gives_scale = |highs: &f64| {
        let total = low.to_f64() * nonzero as f64 + step * highs;
        let found = (total / (rows * cols) as f64) as f32;
        match matrix.scale() {
            WeightScale::Divide(scale) => 1.0 / found == *scale,
            _ => found == mean,
        }
    };
    let beside = [0.0, 1.0, -1.0, 2.0, -2.0].map(|more| nearest + more);
    let highs = beside.into_iter().find(gives_scale).unwrap_or(nearest);
    let highs = highs.clamp(0.0, nonzero as f64) as u64;
    let mut bytes = Vec::with_capacity(2 * rows * cols);
    // Counts up by `highs` per weight; at each wrap around `nonzero` a weight gets the higher value.
    let mut counter = 0;
    for row in 0..rows {
        for col in 0..cols {
            let code = matrix.code(row, col);
            let magnitude = if code == 1 {
                bf16::ZERO
            } else {
                counter += highs;
                let wraps = counter >= nonzero;
                counter -= if wraps { nonzero } else { 0 };
                if wraps { high } else { low }
            };
            bytes.extend(if code == 0 { -magnitude } else { magnitude }.to_le_bytes());
        }
    }
    Ok(bytes)
}

/// The shortest group of columns that [`exact`] looks for. Published models have 128; much shorter
/// ones could be found by chance in weights that are merely coarse.
const SHORTEST_GROUP: usize = 16;

/// Recovers codes and scales from float weights that are already ternary times a scale.
///
/// One scale per row is tried first: SpectraSuite's unpacked TriLM has one per training shard, and
/// a layer split by outputs gives runs of rows. Where a row holds several magnitudes, the widest
/// equal groups of columns that hold one each are looked for: a TriLM layer split by inputs, or
/// Ternary-Bonsai's groups of 128.
///
/// The error names the first row that holds two magnitudes.
pub fn exact(weights: &Tensor) -> Result<TernaryMatrix, Error> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let scale = match group_scales(weights, cols.max(1)) {
        Ok(scales) => WeightScale::Rows(scales),
        Err(mixed) => {
            let groups = (2..=cols / SHORTEST_GROUP)
                .filter(|count| cols.is_multiple_of(*count) && (cols / count).is_multiple_of(4))
                .find_map(|count| {
                    let len = cols / count;
                    let values = group_scales(weights, len).ok()?;
                    Some(WeightScale::Groups { len, values })
                });
            let MixedGroup { row, first, second } = mixed;
            groups.ok_or_else(|| Error::WeightScale {
                rows,
                cols,
                reason: format!(
                    "row {row} holds both {first} and {second}, and not in groups of columns, so \
                     it is not ternary"
                ),
            })?
        }
    };
    let mut values = vec![0.0f32; cols];
    TernaryMatrix::from_rows(rows, cols, scale, |row, codes| {
        decode_row(weights.dtype(), weights.row(row), &mut values);
        for (code, &value) in codes.iter_mut().zip(&values) {
            *code = 1 + u8::from(value > 0.0) - u8::from(value < 0.0);
        }
    })
}

/// Two magnitudes where there should be one.
struct MixedGroup {
    row: usize,
    first: f32,
    second: f32,
}

/// The one magnitude besides zero of each `len` columns of each row; 0 where all are zero.
fn group_scales(weights: &Tensor, len: usize) -> Result<Vec<f32>, MixedGroup> {
    let mut values = vec![0.0f32; weights.cols()];
    let mut scales = Vec::with_capacity(weights.rows() * weights.cols().div_ceil(len));
    for row in 0..weights.rows() {
        decode_row(weights.dtype(), weights.row(row), &mut values);
        for group in values.chunks(len) {
            let first = group.iter().map(|v| v.abs()).find(|&v| v != 0.0).unwrap_or(0.0);
            if let Some(&second) = group.iter().find(|v| **v != 0.0 && v.abs() != first) {
                return Err(MixedGroup { row, first, second });
            }
            scales.push(first);
        }
    }
    Ok(scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absmean_rounds_half_to_even_around_the_mean() {
        // mean 1, s = 1: 0.5 and -0.5 are ties and go to 0, 1.5 goes to 2 and is clamped.
        let weights = Tensor::from_f32(vec![2, 3], &[0.5, -0.5, 1.5, -1.5, 0.51, -1.49]);
        let matrix = absmean(&weights).unwrap();
        let codes: Vec<i8> = (0..6).map(|i| matrix.weight(i / 3, i % 3)).collect();
        assert_eq!(codes, [0, 0, 1, -1, 1, -1]);
        assert_eq!(*matrix.scale(), WeightScale::Divide(1.0));
    }

    #[test]
    fn master_weights_become_the_matrix_again_with_its_scale_to_the_last_bit() {
        for (rows, cols, scale) in [(512, 512, 0.0371f32), (300, 1000, 1.7e-3), (1024, 256, 5.0)] {
            let divide = WeightScale::Divide(1.0 / scale);
            let matrix = TernaryMatrix::from_rows(rows, cols, divide, |row, codes| {
                for (col, code) in codes.iter_mut().enumerate() {
                    *code = ((row * 7 + col * 5 + row * col / 3) % 3) as u8;
                }
            })
            .unwrap();
            let bytes = master(&matrix).unwrap().into();
            let weights = Tensor::new(bitnet_core::DType::BF16, vec![rows, cols], bytes).unwrap();
            assert_eq!(absmean(&weights).unwrap(), matrix);
        }
        let zeros = TernaryMatrix::from_rows(2, 4, WeightScale::Multiply(0.0), |_, codes| {
            codes.fill(1);
        });
        assert!(master(&zeros.unwrap()).unwrap().iter().all(|&byte| byte == 0));
        let tiny = TernaryMatrix::from_rows(1, 4, WeightScale::Multiply(1e-6), |_, _| {});
        assert!(master(&tiny.unwrap()).unwrap().iter().all(|&byte| byte == 0));
        let tiny = TernaryMatrix::from_rows(1, 4, WeightScale::Multiply(1e-6), |_, codes| {
            codes.fill(2);
        });
        assert!(master(&tiny.unwrap()).is_err());
    }

    #[test]
    fn weights_that_are_not_finite_are_refused() {
        let weights = Tensor::from_f32(vec![1, 2], &[f32::NAN, 1.0]);
        assert!(absmean(&weights).is_err());
        assert!(exact(&weights).is_err());
    }

    #[test]
    fn exact_recovers_one_scale_per_row() {
        let weights = Tensor::from_f32(vec![2, 3], &[0.25, 0.0, -0.25, 3.0, 3.0, 0.0]);
        let matrix = exact(&weights).unwrap();
        assert_eq!(*matrix.scale(), WeightScale::Rows(vec![0.25, 3.0]));
        assert_eq!(matrix.weight(0, 2), -1);
        let mixed = Tensor::from_f32(vec![1, 2], &[0.25, 0.5]);
        assert!(exact(&mixed).unwrap_err().to_string().contains("row 0"));
    }

    #[test]
    fn exact_recovers_the_widest_groups_of_columns_that_have_one_scale_each() {
        let sign = |i: usize| [1.0, 0.0, -1.0][i % 3];
        // Scales change every 128 columns in one row only; the other would do with one.
        let values: Vec<f32> = (0..2 * 384)
            .map(|i| sign(i) * if i < 384 { [0.5, 0.25, 2.0][i / 128] } else { 0.125 })
            .collect();
        let matrix = exact(&Tensor::from_f32(vec![2, 384], &values)).unwrap();
        let expected = vec![0.5, 0.25, 2.0, 0.125, 0.125, 0.125];
        assert_eq!(*matrix.scale(), WeightScale::Groups { len: 128, values: expected });
        for (i, value) in values.iter().enumerate() {
            assert_eq!(f32::from(matrix.weight(i / 384, i % 384)), sign(i), "{value} at {i}");
        }
        // Halves of 12 columns each are too short to be told from chance.
        let short: Vec<f32> = (0..24).map(|i| if i < 12 { 0.5 } else { 0.25 }).collect();
        assert!(exact(&Tensor::from_f32(vec![1, 24], &short)).is_err());
    }
}
