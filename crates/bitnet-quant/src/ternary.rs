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

/// Recovers codes and row scales from float weights that are already ternary times a scale
/// (SpectraSuite's unpacked TriLM): in each row every non-zero weight must have one magnitude.
/// Rows that share their magnitude in whole runs are common (one scale per training shard).
///
/// The error names the first row that is not ternary.
pub fn exact(weights: &Tensor) -> Result<TernaryMatrix, Error> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut values = vec![0.0f32; cols];
    let mut scales = vec![0.0f32; rows];
    for (row, scale) in scales.iter_mut().enumerate() {
        decode_row(weights.dtype(), weights.row(row), &mut values);
        *scale = values.iter().map(|v| v.abs()).find(|&v| v != 0.0).unwrap_or(0.0);
        if let Some(odd) = values.iter().find(|v| **v != 0.0 && v.abs() != *scale) {
            return Err(Error::WeightScale {
                rows,
                cols,
                reason: format!("row {row} holds both {scale} and {odd}, so it is not ternary"),
            });
        }
    }
    TernaryMatrix::from_rows(rows, cols, WeightScale::Rows(scales), |row, codes| {
        decode_row(weights.dtype(), weights.row(row), &mut values);
        for (code, &value) in codes.iter_mut().zip(&values) {
            *code = 1 + u8::from(value > 0.0) - u8::from(value < 0.0);
        }
    })
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
}
