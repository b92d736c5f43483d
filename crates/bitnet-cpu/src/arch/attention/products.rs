//! The products of attention, for each storage type of keys and values: `rows x panel`, once with
//! floats ([`Floats`]) and once with integers ([`Integers`]).

use std::ops::Range;

use bitnet_core::numerics::{self, ATTENTION_SPLIT};
use bitnet_quant::packing::tile;

use super::{Attention, PANEL, SCORES, exp_below, partial_len};
use crate::arch::lanes::{Element, Lanes};
use crate::arch::prefetch_second;

/// How far ahead of what is in hand memory is asked for, in bytes: the next panels lie there. Not for f32, which
/// needs so little arithmetic that the processor's own prefetchers do better alone.
const AHEAD: usize = 7168;

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
    /// Prepares for the weights of all rows, which see some of the positions `all`.
    fn scale_weights(&mut self, attention: &Attention<'_>, all: &Range<usize>);
    /// Turns the scores of a row into weights, `e^(score - max)`, and returns their sum.
    fn weigh(&mut self, row: usize, scores: &mut [f32], max: f32) -> f32;
    /// Turns the weights of a row, which are at a place in `scores`, into what
    /// [`add_values`](Product::add_values) multiplies with.
    fn round_weights(&mut self, row: usize, place: Range<usize>, scores: &[f32]);
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

/// A part of a panel of pairs ([`pair_place`](super::pair_place)).
#[derive(Clone, Copy)]
struct Pairs<'a> {
    /// From the first pair of which a row is in the part.
    data: &'a [i8],
    /// Rows, and whether the first of them is the second of its pair.
    rows: usize,
    odd: bool,
    /// Whether the last row lies alone.
    alone: bool,
    width: usize,
}

impl<'a> Pairs<'a> {
    /// As [`Panel::new`].
    #[inline(always)]
    fn new(
        piece: &'a [i8],
        (all_rows, cols): (usize, usize),
        col: usize,
        (first, rows): (usize, usize),
    ) -> Self {
        let (width, odd) = (PANEL.min(cols - col), first % 2);
        let data = &piece[col * all_rows + (first - odd) * width..];
        // The last pair, which begins at an even row.
        let last = (odd + rows).saturating_sub(1) & !1;
        assert!(last * width + 2 * PANEL <= data.len());
        let alone = first + rows == all_rows && all_rows % 2 == 1;
        Pairs { data, rows, odd: odd == 1, alone, width }
    }

    /// As [`Panel::keys`].
    #[inline(always)]
    fn keys(data: &'a [i8], attention: &Attention<'_>, keys: KeyPanel) -> Self {
        let &Attention { head_size, block_tokens, .. } = attention;
        let piece = &data[keys.piece * block_tokens * head_size..];
        Pairs::new(piece, (head_size, block_tokens), keys.first, (0, head_size))
    }

    /// As [`Panel::values`].
    #[inline(always)]
    fn values(data: &'a [i8], attention: &Attention<'_>, values: ValueRows, col: usize) -> Self {
        let &Attention { head_size, block_tokens, .. } = attention;
        let piece = &data[values.piece * block_tokens * head_size..];
        Pairs::new(piece, (block_tokens, head_size), col, (values.first, values.count))
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
        let asks = size_of::<T>() < size_of::<f32>();
        for k in 0..panel.rows {
            let b = b.add(k * panel.width);
            // Two rows of half precision are a line of memory.
            if asks && k.is_multiple_of(2) {
                prefetch_second(b.cast::<u8>().wrapping_add(AHEAD));
            }
            let b = T::load(b);
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = sum.add_product(*x.add(r * a.stride + k), b);
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            sum.store(out.add(r * stride));
        }
    }
}

/// The sums of [`multiply`] for 16-bit rows and an 8-bit panel. They are loaded from `sums` first if
/// there are any.
///
/// # Safety
/// As for [`Lanes`]; `a` has `R` rows of `panel.rows` elements, and `sums` is null or has `R` rows of 16
/// elements.
#[inline(always)]
unsafe fn multiply_pairs<V: Lanes, const R: usize>(
    a: Rows<'_, i16>,
    panel: Pairs<'_>,
    sums: *const i32,
    stride: usize,
) -> [V::Sums; R] {
    // SAFETY: by the contract of this function and `Pairs::new`.
    unsafe {
        let rows: [*const i16; R] = std::array::from_fn(|r| a.data.as_ptr().add(r * a.stride));
        let mut acc = [[V::no_sums(); R]; 2];
        if !sums.is_null() {
            for (r, acc) in acc[0].iter_mut().enumerate() {
                *acc = V::load_sums(sums.add(r * stride));
            }
        }
        // Written out: a closure would not have the instructions of the function around it.
        macro_rules! add {
            ($chain:expr, $pairs:expr, $row:ident => $words:expr) => {
                let pairs = V::pairs($pairs);
                for (acc, $row) in acc[$chain].iter_mut().zip(rows) {
                    *acc = V::add_pairs(*acc, $words, pairs);
                }
            };
        }
        let (mut b, mut k) = (panel.data.as_ptr(), 0);
        if panel.odd && panel.rows != 0 {
            add!(0, b, row => i32::from(*row) << 16);
            b = b.add(2 * panel.width);
            k = 1;
        }
        if panel.width == PANEL {
            // A line of memory at a time.
            while k + 4 <= panel.rows {
                prefetch_second(b.wrapping_add(AHEAD));
                let next = b.add(2 * PANEL);
                add!(0, b, row => row.add(k).cast::<i32>().read_unaligned());
                add!(V::CHAINS - 1, next, row => row.add(k + 2).cast::<i32>().read_unaligned());
                b = b.add(tile::LINE);
                k += 4;
            }
        }
        while k + 2 <= panel.rows {
            add!(0, b, row => row.add(k).cast::<i32>().read_unaligned());
            b = b.add(2 * panel.width);
            k += 2;
        }
        if k < panel.rows {
            let mut last = [0; 2 * PANEL];
            let row = std::slice::from_raw_parts(b, 2 * PANEL);
            if panel.alone {
                for (pair, x) in last.chunks_exact_mut(2).zip(row) {
                    pair[0] = *x;
                }
            } else {
                last.copy_from_slice(row);
            }
            add!(0, last.as_ptr(), row => i32::from(*row.add(k) as u16));
        }
        let [mut acc, others] = acc;
        if V::CHAINS == 2 {
            for (acc, other) in acc.iter_mut().zip(others) {
                *acc = V::join_sums(*acc, other);
            }
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
    fn scale_weights(&mut self, _: &Attention<'_>, _: &Range<usize>) {}

    #[inline(always)]
    fn weigh(&mut self, _: usize, scores: &mut [f32], max: f32) -> f32 {
        let (rounds, rest) = scores.as_chunks_mut::<{ numerics::LANES }>();
        assert!(rest.is_empty());
        // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`), and a
        // round is twice sixteen elements.
        unsafe {
            let mut sums = [V::splat(0.0); 2];
            for round in rounds {
                for (sum, half) in sums.iter_mut().zip(round.as_chunks_mut::<PANEL>().0) {
                    let weight = exp_below(V::load(half.as_ptr()), max);
                    weight.store(half.as_mut_ptr());
                    *sum = sum.add(weight);
                }
            }
            V::fold(sums)
        }
    }

    #[inline(always)]
    fn round_weights(&mut self, _: usize, _: Range<usize>, _: &[f32]) {}

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
    /// Queries `[rows, head_size]`.
    pub(super) queries: &'a [i16],
    /// Weights, as the scores lie.
    pub(super) weights: &'a mut [i16],
    /// What one is worth in a row: of its query, then of its weights.
    pub(super) steps: &'a mut [f32],
    /// Scales of the values of a split, 0 for those that no row sees.
    pub(super) weight_scales: &'a mut [f32],
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
        let keys = Pairs::keys(self.data, attention, panel);
        let scales = &self.scales[panel.piece * block_tokens + panel.first..][..PANEL];
        let queries = Rows { data: &self.queries[row * head_size..], stride: head_size };
        let out = &mut scores[row * SCORES + panel.at..];
        let steps = &self.steps[row..row + R];
        assert!(queries.data.len() >= R * head_size && (R - 1) * SCORES + PANEL <= out.len());
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
    fn scale_weights(&mut self, attention: &Attention<'_>, all: &Range<usize>) {
        let block_tokens = attention.block_tokens;
        self.weight_scales.fill(0.0);
        for block in attention.blocks(all) {
            let first = block * block_tokens;
            let held = first.max(all.start)..(first + block_tokens).min(all.end);
            let piece = attention.slabs.piece(attention.values, attention.blocks[block]);
            let scales = &self.scales[piece * block_tokens + held.start - first..][..held.len()];
            self.weight_scales[held.start % ATTENTION_SPLIT..][..held.len()]
                .copy_from_slice(scales);
        }
    }

    #[inline(always)]
    fn weigh(&mut self, row: usize, scores: &mut [f32], max: f32) -> f32 {
        let (rounds, rest) = scores.as_chunks_mut::<{ numerics::LANES }>();
        let scales = self.weight_scales.as_chunks::<{ numerics::LANES }>().0;
        assert!(rest.is_empty());
        // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`), and a
        // round is twice sixteen elements.
        unsafe {
            let mut sums = [V::splat(0.0); 2];
            let mut largest = [V::splat(0.0); 2];
            for (round, scales) in rounds.iter_mut().zip(scales) {
                for half in 0..2 {
                    let at = round.as_mut_ptr().add(half * PANEL);
                    let weight = exp_below(V::load(at), max);
                    sums[half] = sums[half].add(weight);
                    let scaled = weight.mul(V::load(scales.as_ptr().add(half * PANEL)));
                    scaled.store(at);
                    largest[half] = scaled.abs().max(largest[half]);
                }
            }
            self.steps[row] = V::fold_max(largest);
            V::fold(sums)
        }
    }

    #[inline(always)]
    fn round_weights(&mut self, row: usize, place: Range<usize>, scores: &[f32]) {
        let step = &mut self.steps[row];
        let factor = numerics::level_factor(*step, numerics::WEIGHT_LEVELS);
        *step /= numerics::WEIGHT_LEVELS;
        let scores = scores[place.clone()].as_chunks::<PANEL>().0;
        let weights = self.weights[place].as_chunks_mut::<PANEL>().0;
        // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`), and
        // there are sixteen elements.
        unsafe {
            let factor = V::splat(factor);
            for (scores, weights) in scores.iter().zip(weights) {
                V::load(scores.as_ptr()).mul(factor).store_rounded(weights.as_mut_ptr());
            }
        }
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
        assert!((R - 1) * SCORES + values.count <= weights.data.len());
        for col in (0..attention.head_size).step_by(PANEL) {
            let panel = Pairs::values(self.data, attention, values, col);
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
