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
//! Keys and values of int8 are multiplied as integers, with queries and weights rounded to 16 bits.

use std::ops::Range;

use bitnet_core::numerics::{self, ATTENTION_SPLIT};

/// Columns of a panel.
pub(crate) const PANEL: usize = 16;

/// Where element (`row`, `col`) of a matrix `[rows, cols]` lies when it is stored in panels of
/// [`PANEL`] columns, one after another, each row by row. The last panel has the columns that are
/// left.
pub(crate) fn panel_place(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    let first = col / PANEL * PANEL;
    first * rows + row * PANEL.min(cols - first) + col % PANEL
}

/// Sixteen f32 lanes, and the integer products behind int8.
///
/// Implementations are compiled with the instructions that they need, and taken into the kernels,
/// which have them all, by inlining.
///
/// # Safety of the functions
/// The CPU has the instructions of the implementation, and every pointer is to sixteen elements.
pub(super) trait Lanes: Copy {
    /// Sixteen 32-bit sums.
    type Sums: Copy;
    /// Two rows of sixteen 8-bit numbers, widened and interleaved.
    type Pairs: Copy;
    /// Most rows of a register block: 1, 2, 3, 4, 6 or 8.
    const ROWS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(x: *const f32) -> Self;
    unsafe fn load_f16(x: *const [u8; 2]) -> Self;
    unsafe fn store(self, out: *mut f32);
    unsafe fn mul(self, other: Self) -> Self;
    /// `self + a * b`, fused.
    unsafe fn add_product(self, a: f32, b: Self) -> Self;

    unsafe fn no_sums() -> Self::Sums;
    unsafe fn load_sums(x: *const i32) -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32);
    unsafe fn pairs(first: *const i8, second: *const i8) -> Self::Pairs;
    /// `sums + a.0 * first + a.1 * second`, for `a` the two 16-bit halves of a word, low first.
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums;
    /// Rounded to the nearest f32.
    unsafe fn from_sums(sums: Self::Sums) -> Self;
}

/// Stored keys and values: per layer, side (key or value), head and block one piece of
/// `block_tokens * head_size` elements in panels. `PANEL` more elements follow, because panels are
/// read sixteen columns at a time whatever their width.
pub(crate) enum KvData {
    F32(Vec<f32>),
    /// Half-precision numbers, little-endian.
    F16(Vec<[u8; 2]>),
    /// Values, and one scale per token and head: `block_tokens` per piece.
    Int8(Vec<i8>, Vec<f32>),
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
    /// Pieces of block 0.
    pub(crate) keys: usize,
    pub(crate) values: usize,
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
    (rows * (head_size + SCORES + 1), rows * (head_size + 1 + SCORES))
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
    let scores = &mut scores[..rows * (SCORES + 1)];
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
            let (shorts, weights) = room.shorts.split_at_mut(rows * (head_size + 1));
            let width = head_size.next_multiple_of(2);
            let (scores, steps) = scores.split_at_mut(rows * SCORES);
            let levels = numerics::query_levels(head_size);
            let quantized = shorts.chunks_exact_mut(width);
            for ((query, short), step) in
                queries.chunks_exact(head_size).zip(quantized).zip(steps.iter_mut())
            {
                short[head_size..].fill(0);
                *step = numerics::quantize_i16(query, levels, &mut short[..head_size]);
            }
            let product = Integers { queries: shorts, weights, steps, data, scales };
            attend_with::<V, _>(attention, split, product, scores, partials);
        }
    }
}

/// How queries are multiplied with keys and weights with values of one storage type.
trait Product<V: Lanes> {
    /// Scores of the `R` rows from `row` on with the keys of a panel: the columns of piece `piece`
    /// from `first` on.
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
    /// Adds the values of `tokens` of a block to the partial results of the `R` rows from `row` on.
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
struct KeyPanel {
    /// The piece, and the panel's first token within the block.
    piece: usize,
    first: usize,
    /// Where the scores go in each row.
    at: usize,
}

/// Positions that a row sees.
struct WeightRange {
    seen: Range<usize>,
    /// First position of the split.
    start: usize,
}

/// Values of consecutive tokens of one block.
#[derive(Clone, Copy)]
struct ValueRows {
    piece: usize,
    /// First token within the block, and how many.
    first: usize,
    count: usize,
    /// Where their weights are in each row.
    at: usize,
}

#[inline(always)]
fn attend_with<V: Lanes, P: Product<V>>(
    attention: &Attention<'_>,
    split: usize,
    mut product: P,
    scores: &mut [f32],
    partials: &mut [f32],
) {
    let &Attention { head_size, block_tokens, blocks, .. } = attention;
    let (rows, len) = (attention.rows(), partial_len(head_size));
    let start = split * ATTENTION_SPLIT;
    // Later rows see later positions, the first and the last of them.
    let all = attention.seen(0, split).start..attention.seen(rows - 1, split).end;

    for block in attention.blocks(&all) {
        let piece = attention.keys + blocks[block] as usize;
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

    for (row, partial) in partials.chunks_exact_mut(len).take(rows).enumerate() {
        partial.fill(0.0);
        let seen = attention.seen(row, split);
        if seen.is_empty() {
            continue;
        }
        // In whole rounds of lanes: what is not seen has the weight zero.
        let own = &mut scores[row * SCORES + PANEL..][..ATTENTION_SPLIT];
        own[..seen.start - start].fill(f32::NEG_INFINITY);
        let own = &mut own[..(seen.end - start).next_multiple_of(numerics::LANES)];
        own[seen.end - start..].fill(f32::NEG_INFINITY);
        let max = numerics::max(own);
        for weight in own.iter_mut() {
            *weight = numerics::exp(*weight - max);
        }
        partial[stats(head_size)] = max;
        partial[stats(head_size) + 1] = numerics::sum(own);
        product.weigh(attention, row, WeightRange { seen, start }, scores);
    }

    for block in attention.blocks(&all) {
        let piece = attention.values + blocks[block] as usize;
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

/// A storage type that becomes f32 lanes as it is loaded.
trait Element<V>: Copy {
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load(x: *const Self) -> V;
}

impl<V: Lanes> Element<V> for f32 {
    #[inline(always)]
    unsafe fn load(x: *const f32) -> V {
        // SAFETY: passed on.
        unsafe { V::load(x) }
    }
}

impl<V: Lanes> Element<V> for [u8; 2] {
    #[inline(always)]
    unsafe fn load(x: *const [u8; 2]) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f16(x) }
    }
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
    let none = [0i8; PANEL];
    let (a_stride, a, b) = (a.stride, a.data.as_ptr(), panel.data.as_ptr());
    // SAFETY: by the contract of this function and `Panel::new`.
    unsafe {
        let mut acc = [V::no_sums(); R];
        if !sums.is_null() {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = V::load_sums(sums.add(r * stride));
            }
        }
        for k in (0..panel.rows).step_by(2) {
            let first = b.add(k * panel.width);
            let second = if k + 1 < panel.rows { first.add(panel.width) } else { none.as_ptr() };
            let pairs = V::pairs(first, second);
            for (r, acc) in acc.iter_mut().enumerate() {
                let two = a.add(r * a_stride + k).cast::<i32>().read_unaligned();
                *acc = V::add_pairs(*acc, two, pairs);
            }
        }
        acc
    }
}

/// f32 queries and weights with keys and values that become f32.
struct Floats<'a, T> {
    /// Scaled queries `[rows, head_size]`.
    a: &'a [f32],
    data: &'a [T],
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
        let &Attention { head_size, block_tokens, .. } = attention;
        let piece = &self.data[panel.piece * block_tokens * head_size..];
        let keys = Panel::new(piece, (head_size, block_tokens), panel.first, (0, head_size));
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
        let &Attention { head_size, block_tokens, .. } = attention;
        let len = partial_len(head_size);
        let piece = &self.data[values.piece * block_tokens * head_size..];
        let weights = Rows { data: &scores[row * SCORES + values.at..], stride: SCORES };
        for col in (0..head_size).step_by(PANEL) {
            let rows = (values.first, values.count);
            let panel = Panel::new(piece, (block_tokens, head_size), col, rows);
            multiply::<V, T, R>(weights, panel, &mut partials[row * len + col..], len, true);
        }
    }

    #[inline(always)]
    fn finish_row(&self, _: usize, _: &mut [f32]) {}
}

/// 16-bit queries and weights with keys and values of int8.
struct Integers<'a> {
    /// Queries `[rows, head_size rounded up to an even number]`.
    queries: &'a [i16],
    /// Weights, as the scores lie.
    weights: &'a mut [i16],
    /// What one is worth in a row: of its query, then of its weights.
    steps: &'a mut [f32],
    data: &'a [i8],
    scales: &'a [f32],
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
        let piece = &self.data[panel.piece * block_tokens * head_size..];
        let keys = Panel::new(piece, (head_size, block_tokens), panel.first, (0, head_size));
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
        let &Attention { head_size, block_tokens, .. } = attention;
        let len = partial_len(head_size);
        let piece = &self.data[values.piece * block_tokens * head_size..];
        let weights = Rows { data: &self.weights[row * SCORES + values.at..], stride: SCORES };
        assert!((R - 1) * SCORES + values.count < weights.data.len());
        for col in (0..head_size).step_by(PANEL) {
            let rows = (values.first, values.count);
            let panel = Panel::new(piece, (block_tokens, head_size), col, rows);
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
