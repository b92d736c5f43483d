//! Screens of output heads: making them, and the bounds that they give.
//!
//! A row `w` of the head becomes int8 codes `c` and a scale `s`; a normed hidden state `h` becomes
//! integers `q` of 14 bits and a scale `t`. Then `s t (c · q)` is near the logit, and Cauchy-Schwarz
//! bounds the distance by the stored norm of `w - s c` and the known norm of `h - t q`. The
//! inequality with every rounding is proved in docs/numerics.md.
//!
//! The layout is one blob of bands of 16 rows ([`bitnet_core::screen`]): first the codes plus 128,
//! in tiles of four columns, row after row of the band within a tile; then 16 scales, 16 norms of
//! errors, 16 norms. A code plus 128 is an unsigned byte and a plane of the input is 7 bits with
//! sign, so that vpmaddubsw sums two products in 16 bits without saturating
//! (`2 * 255 * 64 = 32 640`).

use bitnet_core::screen::{COLS, ROWS, Screen, ScreenBand, TILE};
use bitnet_core::{Error, Tensor, mmap, numerics};
use bytes::Bytes;
use rayon::prelude::*;

use crate::packing::blocks::decode_row;

pub use bitnet_core::screen::byte_len;

/// Largest magnitude of a quantised input: `128 * 63 + 63`.
const LARGEST: f64 = 8127.0;

/// Largest magnitude of a code.
const CODE: f32 = 127.0;

/// Makes the screen of a head `[vocabulary, hidden]` of any type that heads come in.
///
/// # Errors
/// If the head is empty or too wide.
pub fn build(table: &Tensor) -> Result<Screen, Error> {
    let (rows, cols) = (table.rows(), table.cols());
    let Some(len) = byte_len(rows, cols).filter(|&len| len > 0) else {
        return Screen::new(rows, cols, Bytes::new());
    };
    let band = len / rows.div_ceil(ROWS);
    let fill = |bytes: &mut [u8]| {
        bytes.par_chunks_exact_mut(band).enumerate().for_each_init(
            || vec![0.0; cols],
            |values, (index, band)| {
                let first = index * ROWS;
                let (codes, numbers) = band.split_at_mut(band.len() - 3 * ROWS * 4);
                codes.fill(128);
                for row in 0..ROWS.min(rows - first) {
                    decode_row(table.dtype(), table.row(first + row), values);
                    let (scale, error, norm) = quantize(values, row, codes.as_chunks_mut().0);
                    for (place, number) in [scale, error, norm].into_iter().enumerate() {
                        let at = 4 * (place * ROWS + row);
                        numbers[at..at + 4].copy_from_slice(&number.to_le_bytes());
                    }
                }
            },
        )
    };
    Screen::new(rows, cols, mmap::filled(len, fill)?)
}

/// Writes the codes of one row and returns scale, norm of the error and norm.
fn quantize(values: &[f32], row: usize, tiles: &mut [[u8; TILE]]) -> (f32, f32, f32) {
    let scale = numerics::max_abs(values) / CODE;
    if !scale.is_normal() {
        // Too small (or not finite) to divide by: all codes stay 0, and the error is the row.
        let squares: f64 = values.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        let norm = upper(squares.sqrt());
        return (0.0, norm, norm);
    }
    let inverse = 1.0 / scale;
    // Everything in units of the scale, so that no square underflows.
    const WIDTH: usize = 16;
    let (mut errors, mut squares) = ([0.0f32; WIDTH], [0.0f32; WIDTH]);
    for (values, tiles) in values.chunks(WIDTH).zip(tiles.chunks_mut(WIDTH / COLS)) {
        let mut padded = [0.0; WIDTH];
        padded[..values.len()].copy_from_slice(values);
        let mut codes = [0u8; WIDTH];
        for i in 0..WIDTH {
            let y = padded[i] * inverse;
            let code = numerics::round_to_i32(y);
            let rest = y - code as f32;
            errors[i] += rest * rest;
            squares[i] += y * y;
            codes[i] = (code + 128) as u8;
        }
        for (tile, codes) in tiles.iter_mut().zip(codes.as_chunks::<COLS>().0) {
            tile[COLS * row..][..COLS].copy_from_slice(codes);
        }
    }
    // The roundings of the sums are within 2^-11 of them, those of `y` within 2^-15 of each element.
    let inexact = (values.len() as f64).sqrt() / 32_768.0;
    let length = |sums: [f32; WIDTH]| {
        let sum: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
        f64::from(scale) * (sum.sqrt() * (1.0 + 1.0 / 2048.0) + inexact)
    };
    let (error, norm) = (length(errors), length(squares));
    (scale, upper(error), upper(norm + error))
}

/// An f32 that is at least `value`, whose own roundings are far below one of f32.
fn upper(value: f64) -> f32 {
    (value as f32).next_up()
}

/// A normed hidden state as screens take it.
#[derive(Debug, Default, Clone)]
pub struct Input {
    /// For each four columns their high planes, then their low planes: `q = 128 high + low`, both
    /// planes in -64..=63. The columns beyond the head's are 0.
    pub planes: Vec<[[i8; COLS]; 2]>,
    scale: f64,
    /// At least the norm of the state, and that of what the planes leave of it.
    norm: f64,
    residual: f64,
    /// Sums of the planes, 128 times.
    offsets: [i32; 2],
    /// Relative error of the head's own dot product and of the bounds' rounding.
    relative: f64,
    /// Of its underflows.
    absolute: f64,
}

impl Input {
    /// Takes a normed hidden state in. Returns false for one that has no bounds because it is
    /// not finite.
    pub fn set(&mut self, state: &[f32]) -> bool {
        if !state.iter().all(|h| h.is_finite()) {
            return false;
        }
        self.scale = f64::from(numerics::max_abs(state)) / LARGEST;
        let inverse = if self.scale == 0.0 { 0.0 } else { 1.0 / self.scale };
        self.planes.clear();
        let (mut squares, mut residuals) = (0.0, 0.0);
        let mut sums = [0i32; 2];
        for four in state.chunks(COLS) {
            let mut planes = [[0; COLS]; 2];
            for (i, &h) in four.iter().enumerate() {
                let h = f64::from(h);
                let q = (h * inverse).clamp(-LARGEST, LARGEST).round_ties_even();
                let rest = h - self.scale * q;
                squares += h * h;
                residuals += rest * rest;
                let q = q as i32;
                let low = ((q + 64) & 127) - 64;
                let high = (q - low) >> 7;
                sums[0] += high;
                sums[1] += low;
                planes[0][i] = high as i8;
                planes[1][i] = low as i8;
            }
            self.planes.push(planes);
        }
        let generous = 1.0 + 1.0 / (1u64 << 30) as f64;
        self.norm = squares.sqrt() * generous;
        self.residual = residuals.sqrt() * generous + self.norm / (1u64 << 50) as f64;
        self.offsets = sums.map(|sum| 128 * sum);
        let roundings = (state.len().div_ceil(numerics::LANES) + 5) as f64;
        let unit = 1.0 / (1 << 24) as f64;
        self.relative = roundings * unit / (1.0 - roundings * unit) + 8.0 * unit;
        self.absolute = state.len() as f64 * f64::from(f32::from_bits(2));
        true
    }

    /// Bounds of the logits of a band from the sums of code plus 128 times each plane,
    /// `sums[plane][row]`. A row whose logit may leave the range of f32 has infinite bounds.
    #[inline(always)]
    pub fn bounds(
        &self,
        band: &ScreenBand<'_>,
        sums: &[[i32; ROWS]; 2],
        lower: &mut [f32; ROWS],
        upper: &mut [f32; ROWS],
    ) {
        for row in 0..ROWS {
            let plane = |p: usize| f64::from(sums[p][row].wrapping_sub(self.offsets[p]));
            let product = 128.0 * plane(0) + plane(1);
            let approximate = f64::from(band.scale(row)) * self.scale * product;
            let norm = f64::from(band.norm(row));
            let bound = f64::from(band.error(row)) * self.norm
                + norm * (self.residual + self.relative * (self.norm + self.residual))
                + self.absolute;
            let large = norm * self.norm > 1e38;
            let bound = if large { f64::INFINITY } else { bound };
            lower[row] = (approximate - bound) as f32;
            upper[row] = (approximate + bound) as f32;
        }
    }
}

/// The sums that [`Input::bounds`] takes, in plain loops.
pub fn sums(tiles: &[[u8; TILE]], planes: &[[[i8; COLS]; 2]]) -> [[i32; ROWS]; 2] {
    let mut sums = [[0i32; ROWS]; 2];
    for (tile, planes) in tiles.iter().zip(planes) {
        for (sums, plane) in sums.iter_mut().zip(planes) {
            for (sum, codes) in sums.iter_mut().zip(tile.as_chunks::<COLS>().0) {
                for (code, q) in codes.iter().zip(plane) {
                    *sum += i32::from(*code) * i32::from(*q);
                }
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use bitnet_core::DType;
    use bitnet_testing::Random;

    use super::*;

    /// The largest distance of a logit from the middle of its bounds, as a share of theirs.
    fn worst(table: &Tensor, state: &[f32]) -> f64 {
        let screen = build(table).unwrap();
        let mut input = Input::default();
        assert!(input.set(state));
        let mut values = vec![0.0; table.cols()];
        let mut worst = 0.0f64;
        for row in 0..table.rows() {
            let band = screen.band(row / ROWS);
            let (mut lower, mut upper) = ([0.0; ROWS], [0.0; ROWS]);
            input.bounds(&band, &sums(band.tiles, &input.planes), &mut lower, &mut upper);
            decode_row(table.dtype(), table.row(row), &mut values);
            let exact = numerics::dot(&values, state);
            let (lower, upper) = (lower[row % ROWS], upper[row % ROWS]);
            let within = lower <= exact && exact <= upper;
            assert!(within || upper == f32::INFINITY, "row {row}: {lower} {exact} {upper}");
            if upper > lower && upper.is_finite() {
                let (lower, upper) = (f64::from(lower), f64::from(upper));
                let middle = (lower + upper) / 2.0;
                worst = worst.max((f64::from(exact) - middle).abs() / (upper - lower) * 2.0);
            }
        }
        worst
    }

    fn normal(random: &mut Random) -> f32 {
        (0..12).map(|_| random.signed()).sum::<f32>() / 2.0
    }

    #[test]
    fn every_logit_lies_within_its_bounds() {
        let mut random = Random::new(5);
        let (rows, cols) = (37, 203);
        for exponent in [-140i32, -126, -60, -20, 0, 30, 60] {
            let size = (f64::from(exponent)).exp2() as f32;
            let values: Vec<f32> = (0..rows * cols).map(|_| normal(&mut random) * size).collect();
            let table = Tensor::from_f32(vec![rows, cols], &values);
            for other in [-149, -126, -30, 0, 66, 100] {
                let size = (f64::from(other)).exp2() as f32;
                let dense: Vec<f32> = (0..cols).map(|_| normal(&mut random) * size).collect();
                worst(&table, &dense);
                let mut one = vec![0.0; cols];
                one[random.below(cols)] = size;
                worst(&table, &one);
                // The error of a row itself: nothing is farther from its approximation.
                let row = &values[cols..2 * cols];
                let scale = numerics::max_abs(row) / CODE;
                let error = |w: &f32| w / scale - (w / scale).round();
                let aligned: Vec<f32> = row.iter().map(|w| error(w) * size).collect();
                if scale.is_normal() && aligned.iter().all(|h| h.is_finite()) {
                    let share = worst(&table, &aligned);
                    let ordinary = other > -126 && (exponent + other).abs() < 100;
                    assert!(share > 0.9 || !ordinary, "2^{exponent}, 2^{other}: {share}");
                }
            }
            assert_eq!(worst(&table, &vec![0.0; cols]), 0.0);
        }
    }

    #[test]
    fn states_that_are_not_finite_have_no_bounds() {
        assert!(!Input::default().set(&[1.0, f32::NAN]));
        assert!(!Input::default().set(&[f32::INFINITY, 0.0]));
        assert!(Input::default().set(&[f32::MAX, -f32::MAX]));
    }

    #[test]
    fn a_screen_of_anything_ends_in_numbers() {
        for byte in [0u8, 127, 128, 255] {
            let screen = Screen::new(5, 9, vec![byte; byte_len(5, 9).unwrap()].into()).unwrap();
            let mut input = Input::default();
            assert!(input.set(&[-f32::MAX; 9]));
            let band = screen.band(0);
            let sums = sums(band.tiles, &input.planes);
            input.bounds(&band, &sums, &mut [0.0; ROWS], &mut [0.0; ROWS]);
        }
    }

    #[test]
    fn heads_that_no_screen_can_have_are_refused() {
        let empty = Tensor::new(DType::F32, vec![0, 4], Bytes::new()).unwrap();
        assert!(build(&empty).is_err());
        let wide = Tensor::from_f32(vec![1, 70_000], &vec![0.0; 70_000]);
        assert!(build(&wide).unwrap_err().to_string().contains("65536 columns"));
    }
}
