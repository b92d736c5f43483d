//! Absmean quantisation of float weights to {-1, 0, +1}.

use bitnet_core::{Error, Tensor, TernaryMatrix, WeightScale};

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
