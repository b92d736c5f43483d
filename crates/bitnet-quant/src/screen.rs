//! Screens of output heads: making them, and the bounds that they give.
//!
//! The columns of the head are first divided by weights, so that all are about equally large, and the
//! elements of a hidden state are multiplied with them. Then a row `w` becomes codes of 5 bits with a
//! step for each group of 32 columns, a multiple of the row's scale; a normed hidden state `h` becomes
//! integers `q` of 14 bits and a scale `t`. With `v` the values that the codes stand for, `t (v · q)` is
//! near the logit, and Cauchy-Schwarz bounds the distance by the stored norm of `w - v` and the known
//! norm of `h - t q`. The inequality with every rounding is proved in docs/numerics.md.
//!
//! The layout is that of [`bitnet_core::screen`]. A code is an unsigned byte below 32 and a plane of
//! the input is 7 bits with sign, so that the products of a group's 32 columns, two of them in
//! vpmaddubsw and eight of those sums, fit 16 bits (`16 * 31 * 64 = 31 744`).

use bitnet_core::screen::{
    BLOCK_COLS, Block, COLS, GROUP, ROWS, STEPS, Screen, ScreenBand, TILE, TILES,
};
use bitnet_core::{Error, Tensor, mmap, numerics};
use bytes::Bytes;
use rayon::prelude::*;

use crate::packing::blocks::decode_row;

pub use bitnet_core::screen::byte_len;

/// Largest magnitude of a quantised input: `128 * 63 + 63`.
const LARGEST: f64 = 8127.0;

/// Groups of columns in a block.
const GROUPS: usize = BLOCK_COLS / GROUP;

/// Sets of four columns in a group.
const QUADS: usize = GROUP / COLS;

/// Code `c` stands for `c - CENTER` steps.
const CENTER: f32 = 15.5;

/// Most scales that a step can be.
const MOST: f32 = 255.0;

/// Rows whose columns are summed together while the weights of the columns are found.
const ROWS_PER_SUM: usize = 4096;

/// Makes the screen of a head `[vocabulary, hidden]` of any type that heads come in.
///
/// # Errors
/// If the head is empty or too wide.
pub fn build(table: &Tensor) -> Result<Screen, Error> {
    let (rows, cols) = (table.rows(), table.cols());
    let Some(len) = byte_len(rows, cols).filter(|_| rows > 0 && cols > 0) else {
        return Screen::new(rows, cols, Bytes::new());
    };
    let bands = rows.div_ceil(ROWS);
    let fill = |bytes: &mut [u8]| {
        let weights = column_weights(table);
        let inverses: Vec<f32> =
            weights.iter().map(|&weight| if weight == 0.0 { 0.0 } else { 1.0 / weight }).collect();
        let (codes, end) = bytes.split_at_mut(len - 4 * cols);
        for (bytes, weight) in end.as_chunks_mut().0.iter_mut().zip(&weights) {
            *bytes = weight.to_le_bytes();
        }
        codes.par_chunks_exact_mut(codes.len() / bands).enumerate().for_each_init(
            || vec![0.0; cols],
            |values, (index, band)| {
                let first = index * ROWS;
                let (blocks, numbers) = band.split_at_mut(band.len() - 3 * ROWS * 4);
                for row in 0..ROWS.min(rows - first) {
                    decode_row(table.dtype(), table.row(first + row), values);
                    values.iter_mut().zip(&inverses).for_each(|(value, inverse)| *value *= inverse);
                    let (scale, error, norm) = quantize(values, row, blocks.as_chunks_mut().0);
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

/// The power of two nearest to the root mean square of each column, 0 for a column of zeros: dividing
/// by it is exact.
fn column_weights(table: &Tensor) -> Vec<f32> {
    let (rows, cols) = (table.rows(), table.cols());
    let firsts: Vec<usize> = (0..rows).step_by(ROWS_PER_SUM).collect();
    let sum = |&first: &usize| {
        let (mut values, mut squares) = (vec![0.0; cols], vec![0.0f64; cols]);
        for row in first..rows.min(first + ROWS_PER_SUM) {
            decode_row(table.dtype(), table.row(row), &mut values);
            for (sum, &value) in squares.iter_mut().zip(&values) {
                *sum += f64::from(value) * f64::from(value);
            }
        }
        squares
    };
    let parts: Vec<Vec<f64>> = firsts.par_iter().map(sum).collect();
    let weight = |col: usize| {
        let sum: f64 = parts.iter().map(|part| part[col]).sum();
        if sum == 0.0 {
            return 0.0;
        }
        // Half of the exponent of twice the mean square, rounded down: that of the root, rounded to
        // the nearest.
        let bits = (2.0 * sum / rows as f64).to_bits();
        let exponent = ((bits >> 52) as i32 - 1023).div_euclid(2);
        f32::from_bits(((exponent.clamp(-126, 126) + 127) as u32) << 23)
    };
    (0..cols).map(weight).collect()
}

/// Writes the codes and steps of one row and returns scale, norm of the error and norm.
fn quantize(values: &[f32], row: usize, blocks: &mut [Block]) -> (f32, f32, f32) {
    let scale = numerics::max_abs(values) / (CENTER * MOST);
    if !scale.is_normal() {
        // Too small (or not finite) to divide by: all steps stay 0, and the error is the row.
        let squares: f64 = values.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        let norm = upper(squares.sqrt());
        return (0.0, norm, norm);
    }
    let inverse = 1.0 / scale;
    // Everything in units of the scale, so that no square underflows.
    let (mut errors, mut squares) = ([0.0f32; GROUP], [0.0f32; GROUP]);
    for (index, values) in values.chunks(GROUP).enumerate() {
        let step = (numerics::max_abs(values) * inverse / CENTER).ceil().min(MOST);
        let per_step = if step == 0.0 { 0.0 } else { 1.0 / step };
        let mut codes = [0u8; GROUP];
        let sums = errors.iter_mut().zip(&mut squares);
        for ((value, code), (error, square)) in values.iter().zip(&mut codes).zip(sums) {
            let y = value * inverse;
            let nearest = numerics::round_to_i32(y * per_step + CENTER).clamp(0, 31);
            let rest = y - step * (nearest as f32 - CENTER);
            *error += rest * rest;
            *square += y * y;
            *code = nearest as u8;
        }
        let (block, group) = (&mut blocks[index / GROUPS], index % GROUPS);
        block[ROWS * group + row] = step as u8;
        let (tiles, _) = block[STEPS + group * TILES * TILE..].as_chunks_mut::<TILE>();
        let (quads, _) = codes.as_chunks::<COLS>();
        for (quad, codes) in quads.iter().enumerate() {
            for (i, code) in codes.iter().enumerate() {
                tiles[quad / 2][COLS * row + i] |= (code & 15) << (4 * (quad % 2));
                tiles[TILES - 1][COLS * row + i] |= (code >> 4) << ((quad + 4) % 8);
            }
        }
    }
    // The roundings of the sums are within 2^-11 of them, and `y` is within 2^-22 of itself.
    let length = |sums: [f32; GROUP]| {
        let sum: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
        f64::from(scale) * sum.sqrt() * (1.0 + 1.0 / 2048.0)
    };
    let norm = length(squares) * (1.0 + 1.0 / (1 << 21) as f64);
    let error = length(errors) + norm / (1 << 21) as f64;
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
    /// planes in -64..=63. The columns of padding are 0.
    pub planes: Vec<[[i8; COLS]; 2]>,
    /// Of each group of columns the sum of `q`, times what code 0 is below zero: 15.5.
    pub centers: Vec<f32>,
    scale: f64,
    /// At least the norm of the state, and that of what the planes leave of it, each element times
    /// the weight of its column.
    norm: f64,
    residual: f64,
    /// Relative error of the head's own dot product and of the bounds' rounding.
    relative: f64,
    /// Of its underflows.
    absolute: f64,
}

impl Input {
    /// Takes in a normed hidden state for `screen`. Returns false for one that has no bounds because
    /// it is not finite, and leaves zeros.
    ///
    /// # Panics
    /// If the state has another width than the screen.
    pub fn set(&mut self, state: &[f32], screen: &Screen) -> bool {
        assert_eq!(state.len(), screen.cols());
        let groups = state.len().div_ceil(BLOCK_COLS) * GROUPS;
        self.planes.clear();
        self.planes.resize(groups * QUADS, [[0; COLS]; 2]);
        self.centers.clear();
        self.centers.resize(groups, 0.0);
        if !state.iter().all(|h| h.is_finite()) {
            return false;
        }
        let weighted =
            || state.iter().zip(screen.column_weights()).map(|(&h, w)| f64::from(h) * f64::from(w));
        self.scale = weighted().fold(0.0, |most: f64, h| most.max(h.abs())) / LARGEST;
        let inverse = if self.scale == 0.0 { 0.0 } else { 1.0 / self.scale };
        let (mut squares, mut residuals) = (0.0, 0.0);
        for (k, h) in weighted().enumerate() {
            let q = (h * inverse).clamp(-LARGEST, LARGEST).round_ties_even();
            let rest = h - self.scale * q;
            squares += h * h;
            residuals += rest * rest;
            self.centers[k / GROUP] += CENTER * q as f32;
            let q = q as i32;
            let low = ((q + 64) & 127) - 64;
            self.planes[k / COLS][0][k % COLS] = ((q - low) >> 7) as i8;
            self.planes[k / COLS][1][k % COLS] = low as i8;
        }
        let generous = 1.0 + 1.0 / (1u64 << 30) as f64;
        self.norm = squares.sqrt() * generous;
        self.residual = residuals.sqrt() * generous + self.norm / (1u64 << 50) as f64;
        let unit = 1.0 / (1 << 24) as f64;
        let error = |roundings: usize| {
            let error = roundings as f64 * unit;
            error / (1.0 - error)
        };
        let full = error(state.len().div_ceil(numerics::LANES) + 5);
        self.relative = full + error(groups) + 8.0 * unit;
        self.absolute = state.len() as f64 * f64::from(f32::from_bits(2));
        true
    }

    /// What the logit of a row is near and how far from it at most, from the row's [`products`]. A
    /// row whose logit may leave the range of f32 has an infinite bound.
    #[inline(always)]
    pub fn bound(&self, band: &ScreenBand<'_>, row: usize, product: f32) -> (f64, f64) {
        let approximate = f64::from(band.scale(row)) * self.scale * f64::from(product);
        let norm = f64::from(band.norm(row));
        let bound = f64::from(band.error(row)) * self.norm
            + norm * (self.residual + self.relative * (self.norm + self.residual))
            + self.absolute;
        let large = norm * self.norm > 1e38;
        (approximate, if large { f64::INFINITY } else { bound })
    }

    /// Turns the [`products`] of a band into upper bounds of its logits.
    #[inline(always)]
    pub fn upper_bounds(&self, band: &ScreenBand<'_>, products: &mut [f32; ROWS]) {
        for (row, product) in products.iter_mut().enumerate() {
            let (approximate, bound) = self.bound(band, row, *product);
            *product = (approximate + bound) as f32;
        }
    }
}

/// The products of a band's rows with an input, in units of their scales: of each group of columns
/// the exact sum, rounded once, times the step, added in ascending order by fused multiply-adds.
#[inline(always)]
pub fn products(blocks: &[Block], input: &Input) -> [f32; ROWS] {
    let mut products = [0.0f32; ROWS];
    let (planes, _) = input.planes.as_chunks::<QUADS>();
    let groups = blocks.iter().flat_map(|block| (0..GROUPS).map(move |group| (block, group)));
    for ((block, group), (planes, center)) in groups.zip(planes.iter().zip(&input.centers)) {
        let (tiles, _) = block[STEPS + group * TILES * TILE..].as_chunks::<TILE>();
        let mut sums = [[0i32; ROWS]; 2];
        let words = |tile: usize| tiles[tile].as_chunks::<COLS>().0.iter();
        for (quad, planes) in planes.iter().enumerate() {
            for col in 0..COLS {
                let (low, fifth) = (8 * col + 4 * (quad % 2), 8 * col + (quad + 4) % 8);
                // The rows are the lanes.
                for (row, (tile, last)) in words(quad / 2).zip(words(TILES - 1)).enumerate() {
                    let code = u32::from_le_bytes(*tile) >> low & 15;
                    let code = code | (u32::from_le_bytes(*last) >> fifth & 1) << 4;
                    for (sums, plane) in sums.iter_mut().zip(planes) {
                        sums[row] += code as i32 * i32::from(plane[col]);
                    }
                }
            }
        }
        for (row, product) in products.iter_mut().enumerate() {
            let sum = 128 * sums[0][row] + sums[1][row];
            let step = f32::from(block[ROWS * group + row]);
            *product = step.mul_add(sum as f32 - center, *product);
        }
    }
    products
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
        assert!(input.set(state, &screen));
        let mut values = vec![0.0; table.cols()];
        let mut worst = 0.0f64;
        for row in 0..table.rows() {
            let band = screen.band(row / ROWS);
            let mut products = products(band.blocks, &input);
            let (middle, bound) = input.bound(&band, row % ROWS, products[row % ROWS]);
            input.upper_bounds(&band, &mut products);
            decode_row(table.dtype(), table.row(row), &mut values);
            let exact = numerics::dot(&values, state);
            let (lower, upper) = ((middle - bound) as f32, products[row % ROWS]);
            let within = lower <= exact && exact <= upper;
            assert!(within || upper == f32::INFINITY, "row {row}: {lower} {exact} {upper}");
            if bound > 0.0 && bound.is_finite() {
                worst = worst.max((f64::from(exact) - middle).abs() / bound);
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
                // What the codes leave of a row: no state is farther from its approximation.
                let aligned: Vec<f32> = rest(&table, 1).iter().map(|rest| rest * size).collect();
                if exponent > -126 && aligned.iter().all(|h| h.is_finite()) {
                    let share = worst(&table, &aligned);
                    let ordinary = other > -126 && (exponent + other).abs() < 100;
                    assert!(share > 0.9 || !ordinary, "2^{exponent}, 2^{other}: {share}");
                }
            }
            assert_eq!(worst(&table, &vec![0.0; cols]), 0.0);
        }
    }

    /// What the codes of a row leave of it, in units of its scale and divided once more by the
    /// weights of the columns, so that a hidden state in this direction has it all.
    fn rest(table: &Tensor, row: usize) -> Vec<f32> {
        let screen = build(table).unwrap();
        let band = screen.band(row / ROWS);
        let mut values = vec![0.0; table.cols()];
        decode_row(table.dtype(), table.row(row), &mut values);
        values
            .iter()
            .zip(screen.column_weights())
            .enumerate()
            .map(|(k, (&value, weight))| {
                // One column alone: its product is its code's value.
                let mut state = vec![0.0; table.cols()];
                state[k] = 1.0 / weight;
                let mut input = Input::default();
                assert!(input.set(&state, &screen));
                let worth = products(band.blocks, &input)[row % ROWS] / LARGEST as f32;
                (value / weight / band.scale(row % ROWS) - worth) / weight
            })
            .map(|rest| if rest.is_finite() { rest } else { 0.0 })
            .collect()
    }

    #[test]
    fn columns_of_any_sizes_are_equally_precise() {
        let mut random = Random::new(9);
        let (rows, cols) = (64, 160);
        let plain: Vec<f32> = (0..rows * cols).map(|_| normal(&mut random)).collect();
        // Powers of four, so that the weights take them up whole.
        let factor = |k: usize| ((k % 23) as f32 * 2.0 - 20.0).exp2();
        let uneven: Vec<f32> = (0..rows * cols).map(|i| plain[i] * factor(i % cols)).collect();
        let state: Vec<f32> = (0..cols).map(|_| normal(&mut random)).collect();
        let other: Vec<f32> = (0..cols).map(|k| state[k] / factor(k)).collect();
        let bounds = |values: &[f32], state: &[f32]| -> Vec<f64> {
            let screen = build(&Tensor::from_f32(vec![rows, cols], values)).unwrap();
            let mut input = Input::default();
            assert!(input.set(state, &screen));
            (0..rows).map(|row| input.bound(&screen.band(row / ROWS), row % ROWS, 0.0).1).collect()
        };
        let (even, uneven) = (bounds(&plain, &state), bounds(&uneven, &other));
        for (even, uneven) in even.iter().zip(uneven) {
            assert!((uneven / even - 1.0).abs() < 1e-6, "{even} {uneven}");
        }
    }

    #[test]
    fn states_that_are_not_finite_have_no_bounds() {
        let screen = build(&Tensor::from_f32(vec![1, 2], &[1.0, 2.0])).unwrap();
        let set = |state: [f32; 2]| Input::default().set(&state, &screen);
        assert!(!set([1.0, f32::NAN]));
        assert!(!set([f32::INFINITY, 0.0]));
        assert!(set([f32::MAX, -f32::MAX]));
    }

    #[test]
    fn a_screen_of_anything_ends_in_numbers() {
        for byte in [0u8, 127, 128, 255] {
            let screen = Screen::new(5, 9, vec![byte; byte_len(5, 9).unwrap()].into()).unwrap();
            let mut input = Input::default();
            input.set(&[-f32::MAX; 9], &screen);
            let band = screen.band(0);
            input.upper_bounds(&band, &mut products(band.blocks, &input));
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
