//! The products of attention, for each storage type of keys and values: `rows x panel`, once with
//! floats ([`Floats`]) and once with integers ([`Integers`]).

use std::ops::Range;

use bitnet_core::numerics;
use bitnet_quant::packing::tile;

use super::{Attention, PANEL, SCORES, partial_len};
use crate::arch::lanes::{Element, Lanes};
use crate::arch::prefetch_second;

/// How far ahead of the int8 panel in hand memory is asked for, in bytes: the next panels lie there.
const AHEAD: usize = 4096;

/// How queries are multiplied with keys and weights with values of one storage type.
pub(super) trait Product<V: Lanes> {
    /// Scores of the `R` rows from `row` on with the keys of a panel.
    fn score<const R: usize>(
        &self,
        attention: &Attention<'_>,
        row: usize,
        panel: KeyPanel,
        scores: &mut [f32],
    );
    /// Turns the weights of a row, which lie at `scores[PANEL + i]` for position `i` of the split,
    /// into what [`add_values`](Product::add_values) multiplies with.
    fn weigh(
        &mut self,
        attention: &Attention<'_>,
        row: usize,
        seen: WeightRange,
        scores: &mut [f32],
    );
    /// Adds weighted values of one block to the partial results of the `R` rows from `row` on.
    fn add_values<const R: usize>(
        &self,
        attention: &Attention<'_>,
        row: usize,
        values: ValueRows,
        scores: &[f32],
        partials: &mut [f32],
    );
    /// Turns what [`add_values`](Product::add_values) has summed into floats.
    fn finish_row(&self, row: usize, partial: &mut [f32]);
}

/// Keys of sixteen tokens at most.
#[derive(Clone, Copy)]
pub(super) struct KeyPanel {
    /// The piece, and the panel's first token within the block.
    pub(super) piece: usize,
    pub(super) first: usize,
    /// Where the scores go in each row.
    pub(super) at: usize,
}

/// Positions that a row sees.
pub(super) struct WeightRange {
    pub(super) seen: Range<usize>,
    /// First position of the split.
    pub(super) start: usize,
}

/// Values of consecutive tokens of one block.
#[derive(Clone, Copy)]
pub(super) struct ValueRows {
    pub(super) piece: usize,
    /// First token within the block, and how many.
    pub(super) first: usize,
    pub(super) count: usize,
    /// Where their weights are in each row.
    pub(super) at: usize,
}

/// A part of a panel: `rows` rows, `width` elements from one to the next, of which sixteen are read.
#[derive(Clone, Copy)]
struct Panel<'a, T> {
    data: &'a [T],
    rows: usize,
    width: usize,
}

impl<'a, T> Panel<'a, T> {
    /// Rows `first ..` of the panel that begins with column `col`, in a piece that is
    /// `[all_rows, cols]`.
    #[inline(always)]
    fn new(
        piece: &'a [T],
        (all_rows, cols): (usize, usize),
        col: usize,
        (first, rows): (usize, usize),
    ) -> Self {
        let width = PANEL.min(cols - col);
        let data = &piece[col * all_rows + first * width..];
        assert!(rows == 0 || (rows - 1) * width + PANEL <= data.len());
        Panel { data, rows, width }
    }

    /// Keys: rows are elements of the head, columns are tokens.
    #[inline(always)]
    fn keys(data: &'a [T], attention: &Attention<'_>, keys: KeyPanel) -> Self {
        let &Attention { head_size, block_tokens, .. } = attention;
        let piece = &data[keys.piece * block_tokens * head_size..];
        Panel::new(piece, (head_size, block_tokens), keys.first, (0, head_size))
    }

    /// Values from column `col` on: rows are tokens, columns are elements of the head.
    #[inline(always)]
    fn values(data: &'a [T], attention: &Attention<'_>, values: ValueRows, col: usize) -> Self {
        let &Attention { head_size, block_tokens, .. } = attention;
        let piece = &data[values.piece * block_tokens * head_size..];
        Panel::new(piece, (block_tokens, head_size), col, (values.first, values.count))
    }
}

/// Rows of a matrix, `stride` elements from one to the next.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
}

/// `out[r] (+)= a[r] · panel`: the register block that everything here is made of.
#[inline(always)]
fn multiply<V: Lanes, T: Element<V>, const R: usize>(
    a: Rows<'_, f32>,
    panel: Panel<'_, T>,
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    assert!((R - 1) * a.stride + panel.rows <= a.data.len());
    assert!((R - 1) * stride + PANEL <= out.len());
    let (x, b, out) = (a.data.as_ptr(), panel.data.as_ptr(), out.as_mut_ptr());
    // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`). Rows of `a`
    // and of `out` end within their slices as just checked, those of the panel by `Panel::new`.
    unsafe {
        let mut sums = [V::splat(0.0); R];
        if add {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = V::load(out.add(r * stride));
            }
        }
        for k in 0..panel.rows {
            let b = T::load(b.add(k * panel.width));
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = sum.add_product(*x.add(r * a.stride + k), b);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            sum.store(out.add(r * stride));
        }
    }
}

/// The sums of [`multiply`] for 16-bit rows and an 8-bit panel. `next` is what the last row is paired
/// with if their number is odd. They are loaded from `sums` first if there are any.
///
/// # Safety
/// As for [`Lanes`]; `a` has `R` rows of `panel.rows` elements, rounded up to an even number, and
/// `sums` is null or has `R` rows of 16 elements.
#[inline(always)]
unsafe fn multiply_pairs<V: Lanes, const R: usize>(
    a: Rows<'_, i16>,
    panel: Panel<'_, i8>,
    sums: *const i32,
    stride: usize,
) -> [V::Sums; R] {
    let b = panel.data.as_ptr();
    // SAFETY: by the contract of this function and `Panel::new`.
    unsafe {
        let rows: [*const i16; R] = std::array::from_fn(|r| a.data.as_ptr().add(r * a.stride));
        let mut acc = [V::no_sums(); R];
        if !sums.is_null() {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = V::load_sums(sums.add(r * stride));
            }
        }
        // Written out: a closure would not have the instructions of the function around it.
        macro_rules! add {
            ($k:expr, $pairs:expr) => {
                let pairs = $pairs;
                for (acc, row) in acc.iter_mut().zip(rows) {
                    *acc = V::add_pairs(*acc, row.add($k).cast::<i32>().read_unaligned(), pairs);
                }
            };
        }
        let mut k = 0;
        if panel.width == PANEL {
            while k + 2 <= panel.rows {
                let pairs = b.add(k * PANEL);
                // Once per line of memory.
                if (k * PANEL).is_multiple_of(tile::LINE) {
                    prefetch_second(pairs.wrapping_add(AHEAD));
                }
                add!(k, V::adjacent_pairs(pairs));
                k += 2;
            }
        }
        while k + 2 <= panel.rows {
            let first = b.add(k * panel.width);
            add!(k, V::pairs(first, first.add(panel.width)));
            k += 2;
        }
        if k < panel.rows {
            add!(k, V::pairs(b.add(k * panel.width), [0i8; PANEL].as_ptr()));
        }
        acc
    }
}

/// f32 queries and weights with keys and values that become f32.
pub(super) struct Floats<'a, T> {
    /// Scaled queries `[rows, head_size]`.
    pub(super) a: &'a [f32],
    pub(super) data: &'a [T],
}

impl<V: Lanes, T: Element<V>> Product<V> for Floats<'_, T> {
    #[inline(always)]
    fn score<const R: usize>(
        &self,
        attention: &Attention<'_>,
        row: usize,
        panel: KeyPanel,
        scores: &mut [f32],
    ) {
        let head_size = attention.head_size;
        let keys = Panel::keys(self.data, attention, panel);
        let queries = Rows { data: &self.a[row * head_size..], stride: head_size };
        let out = &mut scores[row * SCORES + panel.at..];
        multiply::<V, T, R>(queries, keys, out, SCORES, false);
    }

    #[inline(always)]
    fn weigh(&mut self, _: &Attention<'_>, _: usize, _: WeightRange, _: &mut [f32]) {}

    #[inline(always)]
    fn add_values<const R: usize>(
        &self,
        attention: &Attention<'_>,
        row: usize,
        values: ValueRows,
        scores: &[f32],
        partials: &mut [f32],
    ) {
        let len = partial_len(attention.head_size);
        let weights = Rows { data: &scores[row * SCORES + values.at..], stride: SCORES };
        for col in (0..attention.head_size).step_by(PANEL) {
            let panel = Panel::values(self.data, attention, values, col);
            multiply::<V, T, R>(weights, panel, &mut partials[row * len + col..], len, true);
        }
    }

    #[inline(always)]
    fn finish_row(&self, _: usize, _: &mut [f32]) {}
}

/// 16-bit queries and weights with keys and values of int8.
pub(super) struct Integers<'a> {
    /// Queries `[rows, head_size rounded up to an even number]`.
    pub(super) queries: &'a [i16],
    /// Weights, as the scores lie.
    pub(super) weights: &'a mut [i16],
    /// What one is worth in a row: of its query, then of its weights.
    pub(super) steps: &'a mut [f32],
    pub(super) data: &'a [i8],
    pub(super) scales: &'a [f32],
}

impl<V: Lanes> Product<V> for Integers<'_> {
    #[inline(always)]
    fn score<const R: usize>(
        &self,
        attention: &Attention<'_>,
        row: usize,
        panel: KeyPanel,
        scores: &mut [f32],
    ) {
        let &Attention { head_size, block_tokens, .. } = attention;
        let width = head_size.next_multiple_of(2);
        let keys = Panel::keys(self.data, attention, panel);
        let scales = &self.scales[panel.piece * block_tokens + panel.first..][..PANEL];
        let queries = Rows { data: &self.queries[row * width..], stride: width };
        let out = &mut scores[row * SCORES + panel.at..];
        let steps = &self.steps[row..row + R];
        assert!(queries.data.len() >= R * width && (R - 1) * SCORES + PANEL <= out.len());
        // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`), and
        // the lengths were just checked.
        unsafe {
            let sums = multiply_pairs::<V, R>(queries, keys, std::ptr::null(), 0);
            let scales = V::load(scales.as_ptr());
            for (r, sums) in sums.iter().enumerate() {
                let score = V::from_sums(*sums).mul(scales).mul(V::splat(steps[r]));
                score.store(out.as_mut_ptr().add(r * SCORES));
            }
        }
    }

    #[inline(always)]
    fn weigh(
        &mut self,
        attention: &Attention<'_>,
        row: usize,
        range: WeightRange,
        scores: &mut [f32],
    ) {
        let WeightRange { seen, start } = range;
        let block_tokens = attention.block_tokens;
        let own =
            row * SCORES + PANEL + seen.start - start..row * SCORES + PANEL + seen.end - start;
        let weights = &mut scores[own.clone()];
        let mut rest = &mut *weights;
        for block in attention.blocks(&seen) {
            let first = block * block_tokens;
            let held = first.max(seen.start)..(first + block_tokens).min(seen.end);
            let piece = attention.values + attention.blocks[block] as usize;
            let scales = &self.scales[piece * block_tokens + held.start - first..][..held.len()];
            let (now, later) = rest.split_at_mut(held.len());
            for (weight, scale) in now.iter_mut().zip(scales) {
                *weight *= scale;
            }
            rest = later;
        }
        let shorts = &mut self.weights[own];
        self.steps[row] = numerics::quantize_i16(weights, numerics::WEIGHT_LEVELS, shorts);
    }

    #[inline(always)]
    fn add_values<const R: usize>(
        &self,
        attention: &Attention<'_>,
        row: usize,
        values: ValueRows,
        _: &[f32],
        partials: &mut [f32],
    ) {
        let len = partial_len(attention.head_size);
        let weights = Rows { data: &self.weights[row * SCORES + values.at..], stride: SCORES };
        assert!((R - 1) * SCORES + values.count < weights.data.len());
        for col in (0..attention.head_size).step_by(PANEL) {
            let panel = Panel::values(self.data, attention, values, col);
            let out = &mut partials[row * len + col..];
            assert!((R - 1) * len + PANEL <= out.len());
            let out = out.as_mut_ptr().cast::<i32>();
            // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`),
            // and the lengths were just checked. Integers are kept in the place of floats.
            unsafe {
                let sums = multiply_pairs::<V, R>(weights, panel, out, len);
                for (r, sums) in sums.iter().enumerate() {
                    V::store_sums(*sums, out.add(r * len));
                }
            }
        }
    }

    #[inline(always)]
    fn finish_row(&self, row: usize, partial: &mut [f32]) {
        for value in partial {
            *value = value.to_bits() as i32 as f32 * self.steps[row];
        }
    }
}
