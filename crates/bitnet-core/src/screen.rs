//! A reduced-precision copy of an output head, and what is asked of it.
//!
//! The copy gives an approximate logit of every row with a bound on its error, so that only rows
//! that can still matter are computed in full. How it is made, and the proof of the bound, is in
//! `bitnet_quant::screen` and docs/numerics.md.

use bytes::Bytes;

use crate::dtype::DType;
use crate::error::Error;
use crate::numerics;

/// Rows of a band: they lie interleaved.
pub const ROWS: usize = 16;

/// Columns whose codes of one row lie side by side.
pub const COLS: usize = 4;

/// Columns that share a step of the codes.
pub const GROUP: usize = 32;

/// Columns of a [`Block`].
pub const BLOCK_COLS: usize = 4 * GROUP;

/// Bytes of a tile: one for each of [`ROWS`] rows in [`COLS`] columns.
pub const TILE: usize = ROWS * COLS;

/// Bytes of the steps at the beginning of a [`Block`]: of each group of columns those of the rows.
pub const STEPS: usize = ROWS * BLOCK_COLS / GROUP;

/// Tiles of a group of columns: four of low bits and one of fifth bits.
pub const TILES: usize = 5;

/// Bytes of a [`Block`].
const BLOCK: usize = STEPS + BLOCK_COLS / GROUP * TILES * TILE;

/// Sixteen rows in four groups of columns: a step per row and group, and then the codes of each
/// group, which have 5 bits, in tiles.
///
/// Column `4 q + j` of a group (`q` below 8) of row `r` has its low four bits in byte `4 r + j` of
/// tile `q / 2` of the group, in the lower half for even `q`, and its fifth bit in byte `4 r + j` of
/// the group's last tile, there bit `(q + 4) % 8`.
///
/// Kernels read a block from its first byte to its last: what the hardware foresees.
pub type Block = [u8; BLOCK];

/// Bytes behind the blocks of a band: the scales of its rows, then the norms of their errors, then
/// the norms of the rows, f32 each.
const NUMBERS: usize = 3 * ROWS * 4;

/// Widest head for which the bounds are proved.
const MOST_COLS: usize = 1 << 16;

/// Bytes of a screen, or `None` if it is too large or too wide for one.
pub fn byte_len(rows: usize, cols: usize) -> Option<usize> {
    if cols > MOST_COLS {
        return None;
    }
    rows.div_ceil(ROWS).checked_mul(band_bytes(cols))?.checked_add(4 * cols)
}

fn band_bytes(cols: usize) -> usize {
    cols.div_ceil(BLOCK_COLS) * BLOCK + NUMBERS
}

/// A screen as it is stored: the bands, then the weight of each column. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Screen {
    rows: usize,
    cols: usize,
    data: Bytes,
}

/// Sixteen rows of a [`Screen`].
#[derive(Debug, Clone, Copy)]
pub struct ScreenBand<'a> {
    /// The codes, less than [`BLOCK_COLS`] columns of padding at the end.
    pub blocks: &'a [Block],
    /// Scale, norm of the error, norm.
    numbers: &'a [[u8; 4]],
}

impl ScreenBand<'_> {
    #[inline(always)]
    fn number(&self, index: usize) -> f32 {
        f32::from_le_bytes(self.numbers[index])
    }

    /// What a step of one is worth in `row` of this band.
    #[inline(always)]
    pub fn scale(&self, row: usize) -> f32 {
        self.number(row)
    }

    /// At least the norm of what the codes of `row` leave of the head's row, each column divided by
    /// its weight.
    #[inline(always)]
    pub fn error(&self, row: usize) -> f32 {
        self.number(ROWS + row)
    }

    /// At least the norm of the head's row, each column divided by its weight, and that of its
    /// codes.
    #[inline(always)]
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

    /// The bytes, band after band, and then the weights of the columns.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Rows `16 index ..`. The last band may have rows that the head has not.
    ///
    /// # Panics
    /// If there is no such band.
    #[inline(always)]
    pub fn band(&self, index: usize) -> ScreenBand<'_> {
        assert!(index < self.rows.div_ceil(ROWS));
        let bytes = band_bytes(self.cols);
        let (blocks, numbers) = self.data[index * bytes..][..bytes].split_at(bytes - NUMBERS);
        ScreenBand { blocks: blocks.as_chunks().0, numbers: numbers.as_chunks().0 }
    }

    /// The weight of each column: what an element of a hidden state is multiplied with, and an
    /// element of the head divided by.
    pub fn column_weights(&self) -> impl ExactSizeIterator<Item = f32> {
        let (_, weights) = self.data.split_at(self.data.len() - 4 * self.cols);
        weights.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
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
    /// How many of the largest logits say what the others must reach.
    pub fn rivals(self) -> usize {
        match self {
            Keep::Largest(k) => k,
            Keep::Within(_) => 1,
        }
    }

    /// What a logit must reach for one to be needed whose rivals are `logits`, in any order (which
    /// changes): negative infinity if all are needed.
    pub fn threshold(self, logits: &mut [f32]) -> f32 {
        match self {
            Keep::Largest(0) => f32::INFINITY,
            Keep::Largest(k) if k > logits.len() => f32::NEG_INFINITY,
            Keep::Largest(1) => numerics::max(logits),
            Keep::Largest(k) => *logits.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1,
            Keep::Within(margin) => {
                let largest = f64::from(numerics::max(logits));
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
        let len = byte_len(17, 130).unwrap();
        assert_eq!(len, 2 * (2 * (16 * 128 * 5 / 8 + 64) + 192) + 4 * 130);
        assert!(Screen::new(17, 130, vec![0; len].into()).is_ok());
        assert!(Screen::new(17, 130, vec![0; len - 1].into()).is_err());
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
