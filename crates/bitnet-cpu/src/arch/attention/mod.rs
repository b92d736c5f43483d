//! Attention, written once over the sixteen lanes that each instruction set brings ([`Lanes`]).
//!
//! Keys and values lie in *panels* of sixteen columns ([`panel_place`]): for keys a column is a token
//! and a row an element of the head, for values a column is an element and a row a token. So scores
//! (queries x keys) and outputs (weights x values) are the same product,
//!
//! ```text
//! for k in 0..rows of the panel:
//!     b = panel[k]                        // sixteen numbers, loaded (and widened) once
//!     for r in 0..R: sums[r] += a[r][k] * b
//! ```
//!
//! without a sum over lanes, and a panel is read from its first byte to its last. The `R` rows are
//! query heads that share the key/value head, of one or more tokens. Nothing depends on `R`: a lane
//! is one chain of fused multiply-adds in ascending `k`.
//!
//! Keys and values of int8 are multiplied as integers, two rows of a panel at a time ([`pair_place`]), with
//! queries and weights rounded to 16 bits.

mod products;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bitnet_core::mmap::Zeroed;
use bitnet_core::numerics::{self, ATTENTION_SPLIT};

use super::lanes::Lanes;
use products::{Floats, Integers, KeyPanel, Product, ValueRows};

/// Columns of a panel.
pub(crate) const PANEL: usize = 16;

/// Where element (`row`, `col`) of a matrix `[rows, cols]` lies when it is stored in panels of
/// [`PANEL`] columns, one after another, each row by row. The last panel has the columns that are
/// left.
pub(crate) fn panel_place(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    let first = col / PANEL * PANEL;
    first * rows + row * PANEL.min(cols - first) + col % PANEL
}

/// [`panel_place`] where two rows lie together, column by column, as products of pairs of 16-bit numbers
/// take them. A last odd row lies alone.
pub(crate) fn pair_place(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    let first = col / PANEL * PANEL;
    let pair = row & !1;
    let each = 2.min(rows - pair);
    first * rows + pair * PANEL.min(cols - first) + each * (col - first) + row % 2
}

/// How the pieces of blocks lie: those of some blocks of a head one after another, then those of its other side, then
/// the other heads; then all that of the next blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slabs {
    /// Blocks of a slab.
    pub(crate) blocks: usize,
    /// Pieces of a slab: its blocks' keys and values of all heads.
    pub(crate) pieces: usize,
}

impl Slabs {
    /// The slab that holds a block, and the block's place in it.
    pub(crate) fn place(self, block: u32) -> (usize, usize) {
        (block as usize / self.blocks, block as usize % self.blocks)
    }

    /// The piece of a block, from the piece of block 0.
    pub(crate) fn piece(self, first: usize, block: u32) -> usize {
        let (slab, place) = self.place(block);
        first + slab * self.pieces + place
    }
}

/// Stored keys and values: per layer, head, side (key or value) and block one piece of `block_tokens * head_size` elements
/// in panels. `2 * PANEL` more elements follow, because panels are read sixteen columns at a time whatever
/// their width, those of int8 two rows at a time.
pub(crate) enum KvData {
    F32(Zeroed<f32>),
    /// Half-precision numbers, little-endian.
    F16(Zeroed<[u8; 2]>),
    /// Values, in pairs of rows ([`pair_place`]), and one scale per token and head: `block_tokens` per
    /// piece.
    Int8(Zeroed<i8>, Zeroed<f32>),
}

/// Consecutive tokens of one sequence and the query heads that share one key/value head.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    /// Queries of the first token, `[shared, head_size]`; those of the next token are `stride`
    /// elements on.
    pub(crate) queries: &'a [f32],
    pub(crate) stride: usize,
    /// Query heads per token.
    pub(crate) shared: usize,
    pub(crate) head_size: usize,
    /// Position of the first token, and how many tokens there are.
    pub(crate) position: usize,
    pub(crate) tokens: usize,
    pub(crate) window: Option<usize>,
    /// Factor on `q · k`.
    pub(crate) scale: f32,
    pub(crate) data: &'a KvData,
    /// Pieces of block 0, and where those of the others lie.
    pub(crate) keys: usize,
    pub(crate) values: usize,
    pub(crate) slabs: Slabs,
    pub(crate) block_tokens: usize,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
}

impl Attention<'_> {
    /// Rows of scores: every query head of every token.
    fn rows(&self) -> usize {
        self.tokens * self.shared
    }

    /// Positions that a row sees in a split; none if the end is not after the start.
    fn seen(&self, row: usize, split: usize) -> Range<usize> {
        let position = self.position + row / self.shared;
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let split = split * ATTENTION_SPLIT..(split + 1) * ATTENTION_SPLIT;
        first.max(split.start)..(position + 1).min(split.end)
    }

    /// The splits in which some token sees something.
    pub(crate) fn splits(&self) -> Range<usize> {
        let first = self.window.map_or(0, |window| (self.position + 1).saturating_sub(window));
        first / ATTENTION_SPLIT..(self.position + self.tokens).div_ceil(ATTENTION_SPLIT)
    }

    /// The blocks that hold some of the positions.
    fn blocks(&self, seen: &Range<usize>) -> Range<usize> {
        seen.start / self.block_tokens..seen.end.div_ceil(self.block_tokens)
    }
}

/// Scratch of [`attend`], see [`room_len`].
pub(crate) struct Room<'a> {
    pub(crate) floats: &'a mut [f32],
    pub(crate) shorts: &'a mut [i16],
}

/// Floats and 16-bit integers that [`attend`] needs for so many rows.
pub(crate) const fn room_len(rows: usize, head_size: usize) -> (usize, usize) {
    (rows * (head_size + SCORES + 1) + ATTENTION_SPLIT, rows * (head_size + SCORES))
}

/// Distance of the scores of two rows. A panel that begins before the split or ends after it is
/// stored whole, so there is room for one on either side; 288 floats do not all fall into the same
/// sets of a cache.
const SCORES: usize = PANEL + ATTENTION_SPLIT + PANEL;

/// Numbers that [`attend`] leaves per row: the weighted sum of values, padded to whole panels, then
/// the largest score and the sum of the weights, which is 0 if the row sees nothing.
pub(crate) const fn partial_len(head_size: usize) -> usize {
    stats(head_size) + PANEL
}

const fn stats(head_size: usize) -> usize {
    head_size.next_multiple_of(PANEL)
}

/// Attention over the keys of one split, into `partials` `[rows, partial_len(head_size)]`.
#[inline(always)]
pub(super) fn attend<V: Lanes>(
    attention: &Attention<'_>,
    split: usize,
    room: Room<'_>,
    partials: &mut [f32],
) {
    let &Attention { shared, head_size, scale, .. } = attention;
    let rows = attention.rows();
    let (queries, scores) = room.floats.split_at_mut(rows * head_size);
    let scores = &mut scores[..rows * (SCORES + 1) + ATTENTION_SPLIT];
    let tokens = attention.queries.chunks(attention.stride);
    for (scaled, token) in queries.chunks_exact_mut(shared * head_size).zip(tokens) {
        for (scaled, x) in scaled.iter_mut().zip(token) {
            *scaled = x * scale;
        }
    }
    match attention.data {
        KvData::F32(data) => {
            let product = Floats { a: queries, data };
            attend_with::<V, _>(attention, split, product, scores, partials);
        }
        KvData::F16(data) => {
            let product = Floats { a: queries, data };
            attend_with::<V, _>(attention, split, product, scores, partials);
        }
        KvData::Int8(data, scales) => {
            let (shorts, weights) = room.shorts.split_at_mut(rows * head_size);
            let (scores, steps) = scores.split_at_mut(rows * SCORES);
            let (steps, weight_scales) = steps.split_at_mut(rows);
            let levels = numerics::query_levels(head_size);
            let quantized = shorts.chunks_exact_mut(head_size);
            for ((query, short), step) in
                queries.chunks_exact(head_size).zip(quantized).zip(steps.iter_mut())
            {
                *step = numerics::quantize_i16(query, levels, short);
            }
            let product = Integers { queries: shorts, weights, steps, weight_scales, data, scales };
            attend_with::<V, _>(attention, split, product, scores, partials);
        }
    }
}

#[inline(always)]
fn attend_with<V: Lanes, P: Product<V>>(
    attention: &Attention<'_>,
    split: usize,
    mut product: P,
    scores: &mut [f32],
    partials: &mut [f32],
) {
    let &Attention { head_size, block_tokens, slabs, blocks, .. } = attention;
    let (rows, len) = (attention.rows(), partial_len(head_size));
    let start = split * ATTENTION_SPLIT;
    // Later rows see later positions, the first and the last of them.
    let all = attention.seen(0, split).start..attention.seen(rows - 1, split).end;

    for block in attention.blocks(&all) {
        let piece = slabs.piece(attention.keys, blocks[block]);
        for first in (0..block_tokens).step_by(PANEL) {
            let token = block * block_tokens + first;
            let panel = token..token + PANEL.min(block_tokens - first);
            if panel.start >= all.end || panel.end <= all.start {
                continue;
            }
            let panel_at = KeyPanel { piece, first, at: PANEL + token - start };
            let mut next = 0;
            while next < rows {
                let (row, count) = (next, row_block::<V>(rows - next));
                next += count;
                let (low, high) =
                    (attention.seen(row, split), attention.seen(row + count - 1, split));
                if panel.start >= high.end || panel.end <= low.start {
                    continue;
                }
                match count {
                    8 => product.score::<8>(attention, row, panel_at, scores),
                    6 => product.score::<6>(attention, row, panel_at, scores),
                    4 => product.score::<4>(attention, row, panel_at, scores),
                    3 => product.score::<3>(attention, row, panel_at, scores),
                    2 => product.score::<2>(attention, row, panel_at, scores),
                    _ => product.score::<1>(attention, row, panel_at, scores),
                }
            }
        }
    }

    // Step by step for all rows, so that what each waits for at the end of a step is not waited for.
    product.scale_weights(attention, &all);
    // In whole rounds of lanes: what is not seen has the weight zero.
    let rounds = |row: usize| {
        let seen = attention.seen(row, split);
        let len = if seen.is_empty() { 0 } else { seen.end - start };
        row * SCORES + PANEL..row * SCORES + PANEL + len.next_multiple_of(numerics::LANES)
    };
    for (row, partial) in partials.chunks_exact_mut(len).take(rows).enumerate() {
        partial.fill(0.0);
        let seen = attention.seen(row, split);
        let own = &mut scores[rounds(row)];
        if !own.is_empty() {
            own[..seen.start - start].fill(f32::NEG_INFINITY);
            own[seen.end - start..].fill(f32::NEG_INFINITY);
            partial[stats(head_size)] = max::<V>(own);
        }
    }
    for (row, partial) in partials.chunks_exact_mut(len).take(rows).enumerate() {
        let [max, sum] = &mut partial[stats(head_size)..][..2] else { unreachable!() };
        *sum = product.weigh(row, &mut scores[rounds(row)], *max);
    }
    for row in 0..rows {
        product.round_weights(row, rounds(row), scores);
    }

    for block in attention.blocks(&all) {
        let piece = slabs.piece(attention.values, blocks[block]);
        let first = block * block_tokens;
        let held = first..first + block_tokens;
        let values = |seen: &Range<usize>| ValueRows {
            piece,
            first: seen.start - first,
            count: seen.len(),
            at: PANEL + seen.start - start,
        };
        let mut next = 0;
        while next < rows {
            let (row, count) = (next, row_block::<V>(rows - next));
            next += count;
            let (low, high) = (attention.seen(row, split), attention.seen(row + count - 1, split));
            // All of these rows see `both`; what only some of them see goes row by row, so that each
            // takes its positions in ascending order and none that it does not see.
            let both = high.start.max(held.start)..low.end.min(held.end);
            let both = if both.is_empty() { held.end..held.end } else { both };
            if low != high {
                for row in row..row + count {
                    let seen = attention.seen(row, split);
                    let before = seen.start.max(held.start)..seen.end.min(both.start);
                    if !before.is_empty() {
                        product.add_values::<1>(attention, row, values(&before), scores, partials);
                    }
                }
            }
            if both.is_empty() {
                continue;
            }
            let seen = values(&both);
            match count {
                8 => product.add_values::<8>(attention, row, seen, scores, partials),
                6 => product.add_values::<6>(attention, row, seen, scores, partials),
                4 => product.add_values::<4>(attention, row, seen, scores, partials),
                3 => product.add_values::<3>(attention, row, seen, scores, partials),
                2 => product.add_values::<2>(attention, row, seen, scores, partials),
                _ => product.add_values::<1>(attention, row, seen, scores, partials),
            }
            if low != high {
                for row in row..row + count {
                    let after = both.end..attention.seen(row, split).end.min(held.end);
                    if !after.is_empty() {
                        product.add_values::<1>(attention, row, values(&after), scores, partials);
                    }
                }
            }
        }
    }
    for (row, partial) in partials.chunks_exact_mut(len).take(rows).enumerate() {
        product.finish_row(row, &mut partial[..stats(head_size)]);
    }
}

/// [`numerics::max`] of whole rounds of lanes.
#[inline(always)]
fn max<V: Lanes>(x: &[f32]) -> f32 {
    let (rounds, rest) = x.as_chunks::<{ numerics::LANES }>();
    assert!(rest.is_empty());
    // SAFETY: the kernels are called on CPUs that have their instructions (see `Kernels`), and a round
    // is twice sixteen elements.
    unsafe {
        let mut lanes = [V::splat(f32::NEG_INFINITY); 2];
        for round in rounds {
            lanes[0] = V::load(round.as_ptr()).max(lanes[0]);
            lanes[1] = V::load(round.as_ptr().add(PANEL)).max(lanes[1]);
        }
        V::fold_max(lanes)
    }
}

/// [`numerics::exp`] of `x - max`, neither more than zero nor NaN unless `x` is: the power of two is then
/// at most one, and where the result is not zero it is a normal number, so that one factor does.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
unsafe fn exp_below<V: Lanes>(x: V, max: f32) -> V {
    use numerics::exp_parts::*;
    // SAFETY: passed on.
    unsafe {
        let x = x.add(V::splat(-max));
        let above = x.mul(V::splat(LOG2_E)).add(V::splat(ABOVE));
        let minus_n = above.mul_add(V::splat(-1.0), V::splat(ABOVE));
        let r = minus_n.mul_add(V::splat(LN2_HI), x);
        let r = minus_n.mul_add(V::splat(LN2_LO), r);
        let mut p = V::splat(POLYNOMIAL[0]);
        for factor in &POLYNOMIAL[1..] {
            p = p.mul_add(r, V::splat(*factor));
        }
        let value = p.mul_add(r.mul(r), r).add(V::splat(1.0));
        value.mul(above.power_of_two()).zero_where_less(x, V::splat(LEAST))
    }
}

/// How many of the rows that are left form the next register block.
#[inline(always)]
fn row_block<V: Lanes>(left: usize) -> usize {
    match V::ROWS.min(left) {
        8.. => 8,
        6 | 7 => 6,
        4 | 5 => 4,
        few => few,
    }
}

/// Joins the partial results of a later split to `totals`, row by row.
#[inline(always)]
pub(super) fn merge(head_size: usize, totals: &mut [f32], parts: &[f32]) {
    let (len, stats) = (partial_len(head_size), stats(head_size));
    for (total, part) in totals.chunks_exact_mut(len).zip(parts.chunks_exact(len)) {
        if part[stats + 1] == 0.0 {
            continue;
        }
        if total[stats + 1] == 0.0 {
            total.copy_from_slice(part);
            continue;
        }
        let (before, after) = (total[stats], part[stats]);
        let max = if after > before { after } else { before };
        let (old, new) = (numerics::exp(before - max), numerics::exp(after - max));
        for (total, part) in total[..head_size].iter_mut().zip(&part[..head_size]) {
            *total = part.mul_add(new, *total * old);
        }
        total[stats] = max;
        total[stats + 1] = part[stats + 1].mul_add(new, total[stats + 1] * old);
    }
}

/// `out = weighted sum / sum of weights`, row by row.
#[inline(always)]
pub(super) fn finish(head_size: usize, totals: &[f32], out: &mut [f32]) {
    for (total, out) in
        totals.chunks_exact(partial_len(head_size)).zip(out.chunks_exact_mut(head_size))
    {
        let sum = total[stats(head_size) + 1];
        for (out, total) in out.iter_mut().zip(total) {
            *out = total / sum;
        }
    }
}
