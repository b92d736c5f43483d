//! A reduced-precision copy of an output head, and what is asked of it.
//!
//! The copy gives an approximate logit of every row with a bound on its error, so that only rows
//! that can still matter are computed in full. How it is made, and the proof of the bound, is in
//! `bitnet_quant::screen` and docs/numerics.md.

use bytes::Bytes;

use crate::dtype::DType;
use crate::error::Error;

/// Rows of a band: they lie interleaved.
pub const ROWS: usize = 16;

/// Columns whose codes of one row lie side by side.
pub const COLS: usize = 4;

/// Bytes of the codes of [`ROWS`] rows in [`COLS`] columns.
pub const TILE: usize = ROWS * COLS;

/// Bytes behind the codes of a band: the scales of its rows, then the norms of their errors, then
/// the norms of the rows, f32 each.
const NUMBERS: usize = 3 * ROWS * 4;

/// Widest head: a sum of that many products of a code and a plane of the input fits 32 bits.
const MOST_COLS: usize = 1 << 16;

/// Bytes of a screen, or `None` if it is too large or too wide for one.
pub fn byte_len(rows: usize, cols: usize) -> Option<usize> {
    let bands = rows.div_ceil(ROWS);
    (cols <= MOST_COLS).then(|| bands.checked_mul(band_bytes(cols)))?
}

fn band_bytes(cols: usize) -> usize {
    cols.div_ceil(COLS) * TILE + NUMBERS
}

/// A screen as it is stored. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Screen {
    rows: usize,
    cols: usize,
    data: Bytes,
}

/// Sixteen rows of a [`Screen`].
#[derive(Debug, Clone, Copy)]
pub struct ScreenBand<'a> {
    /// Codes plus 128: tile `t` has columns `4 t ..`, row `r` its bytes `4 r .. 4 r + 4`.
    pub tiles: &'a [[u8; TILE]],
    /// Scale, norm of the error, norm.
    numbers: &'a [[u8; 4]],
}

impl ScreenBand<'_> {
    fn number(&self, index: usize) -> f32 {
        f32::from_le_bytes(self.numbers[index])
    }

    /// What a code of `row` of this band is worth.
    pub fn scale(&self, row: usize) -> f32 {
        self.number(row)
    }

    /// At least the norm of what the codes of `row` leave of the head's row.
    pub fn error(&self, row: usize) -> f32 {
        self.number(ROWS + row)
    }

    /// At least the norm of the head's row and that of its codes.
    pub fn norm(&self, row: usize) -> f32 {
        self.number(2 * ROWS + row)
    }
}

impl Screen {
    /// Checks that `data` has exactly the bytes that the shape says.
    ///
    /// # Errors
    /// If it has not, or the shape is one that no screen can have.
    pub fn new(rows: usize, cols: usize, data: Bytes) -> Result<Self, Error> {
        let shape = vec![rows, cols];
        match byte_len(rows, cols) {
            Some(_) if rows == 0 || cols == 0 => Err(Error::TensorShape {
                dtype: DType::U8,
                shape,
                reason: "a screen has rows and columns".to_owned(),
            }),
            None => Err(Error::TensorShape {
                dtype: DType::U8,
                shape,
                reason: format!("a screen has at most {MOST_COLS} columns"),
            }),
            Some(expected) if expected != data.len() => {
                Err(Error::TensorSize { dtype: DType::U8, shape, expected, found: data.len() })
            }
            Some(_) => Ok(Screen { rows, cols, data }),
        }
    }

    /// Rows of the head: the vocabulary.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the head: the hidden size.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes, band after band.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Rows `16 index ..`. The last band may have rows that the head has not.
    ///
    /// # Panics
    /// If there is no such band.
    pub fn band(&self, index: usize) -> ScreenBand<'_> {
        let bytes = band_bytes(self.cols);
        let (tiles, numbers) = self.data[index * bytes..][..bytes].split_at(bytes - NUMBERS);
        ScreenBand { tiles: tiles.as_chunks().0, numbers: numbers.as_chunks().0 }
    }
}

/// A token and its logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
}

/// Which logits are needed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// So many of the largest, and all that equal the last of them.
    Largest(usize),
    /// All that are at most this far below the largest, a finite number of at least 0. The test is
    /// slack by [`SLACK`] of both numbers, so that it holds after both were divided by a
    /// temperature in f32.
    Within(f64),
}

/// A row of hidden states, and which of its logits are needed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pick<'a> {
    /// The row.
    pub row: usize,
    /// Needed of the ids that are not among `exact_ids`; more may be given.
    pub keep: Keep,
    /// Ids that are needed whatever their logits, ascending, each once. Those that the head has not
    /// are passed over.
    pub exact_ids: &'a [u32],
}

/// See [`Keep::Within`].
pub const SLACK: f64 = 1.0 / (1 << 22) as f64;

impl Keep {
    /// What a logit must reach for one to be needed whose rivals are at least `bounds`, in any order
    /// (which changes): negative infinity if all are needed.
    pub fn threshold(self, bounds: &mut [f32]) -> f32 {
        match self {
            Keep::Largest(0) => f32::INFINITY,
            Keep::Largest(k) if k > bounds.len() => f32::NEG_INFINITY,
            Keep::Largest(1) => bounds.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)),
            Keep::Largest(k) => *bounds.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1,
            Keep::Within(margin) => {
                let largest = bounds.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                let largest = f64::from(largest);
                // l + SLACK |l| >= least follows from l >= least - 2 SLACK |least|, and never the
                // other way round.
                let least = largest - SLACK * largest.abs() - margin;
                let least = least - 2.0 * SLACK * least.abs();
                if least.is_nan() { f32::NEG_INFINITY } else { (least as f32).next_down() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_has_the_bytes_of_its_shape() {
        let len = byte_len(17, 5).unwrap();
        assert_eq!(len, 2 * (2 * 64 + 192));
        assert!(Screen::new(17, 5, vec![0; len].into()).is_ok());
        assert!(Screen::new(17, 5, vec![0; len - 1].into()).is_err());
        assert!(Screen::new(0, 5, Bytes::new()).is_err());
        assert!(Screen::new(usize::MAX, 60_000, Bytes::new()).is_err());
        assert!(Screen::new(1, 1 << 17, Bytes::new()).is_err());
    }

    #[test]
    fn thresholds_are_at_most_what_is_kept() {
        let logits = [3.0f32, -1.0, 7.0, 7.0, 2.0];
        let threshold = |keep: Keep| keep.threshold(&mut logits.clone());
        assert_eq!(threshold(Keep::Largest(1)), 7.0);
        assert_eq!(threshold(Keep::Largest(3)), 3.0);
        assert_eq!(threshold(Keep::Largest(6)), f32::NEG_INFINITY);
        assert_eq!(threshold(Keep::Largest(0)), f32::INFINITY);
        let within = threshold(Keep::Within(4.0));
        assert!(within < 3.0 && within > 2.999, "{within}");
        assert_eq!(Keep::Within(1.0).threshold(&mut []), f32::NEG_INFINITY);
    }
}
