//! The kernels that are plain code, written once and compiled for each instruction set by
//! [`instantiate`](super::instantiate). All are `inline(always)` so that they take on the
//! instructions of the function that they are called from.

use std::ops::Range;

use bitnet_core::DType;
use bitnet_core::backend::Activation;
use bitnet_core::numerics::{self, ATTENTION_SPLIT};
use bitnet_quant::packing::{blocks, tile};

use super::Tile;

/// See [`Kernels::ternary_int8`](super::Kernels::ternary_int8): plain code. The sixteen rows are
/// the lanes of the inner loops, as in [`ternary_f32`].
#[inline(always)]
pub(super) fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    for (t, acc) in acc.iter_mut().enumerate() {
        let (q, _) = q[t * stride..].as_chunks::<{ tile::COLS }>();
        let mut sums = [0i32; tile::ROWS];
        for (tile, q) in tiles.iter().zip(q) {
            for (k, &q) in q.iter().enumerate() {
                let (byte, bit) = tile::place(0, k);
                for (sum, row) in sums.iter_mut().zip(tile.as_chunks::<4>().0) {
                    let code = u32::from_le_bytes(*row) >> (8 * byte + bit) & 3;
                    *sum += code as i32 * i32::from(q);
                }
            }
        }
        *acc = sums;
    }
}

/// See [`Kernels::ternary_f32`](super::Kernels::ternary_f32).
#[inline(always)]
pub(super) fn ternary_f32(
    tiles: &[Tile],
    x: &[f32],
    stride: usize,
    sums: &mut [[f32; tile::ROWS]],
) {
    let mut x = x;
    let mut sums = sums;
    while !sums.is_empty() {
        let tokens = match sums.len() {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let (now, later) = sums.split_at_mut(tokens);
        match tokens {
            4 => ternary_f32_pass::<4>(tiles, x, stride, now),
            2 => ternary_f32_pass::<2>(tiles, x, stride, now),
            _ => ternary_f32_pass::<1>(tiles, x, stride, now),
        }
        sums = later;
        x = if sums.is_empty() { &[] } else { &x[tokens * stride..] };
    }
}

/// One band against `T` tokens. The four accumulators of a sum (`k % 4`) are the four bytes of a
/// 32-bit lane: each is finished before the next begins, so that `T` of them stay in registers.
#[inline(always)]
fn ternary_f32_pass<const T: usize>(
    tiles: &[Tile],
    x: &[f32],
    stride: usize,
    sums: &mut [[f32; tile::ROWS]],
) {
    let x: [&[f32]; T] = std::array::from_fn(|t| &x[t * stride..][..tiles.len() * tile::COLS]);
    let mut acc = [[[0.0f32; tile::ROWS]; T]; 4];
    for (byte, acc) in acc.iter_mut().enumerate() {
        let mut lanes = [[0.0f32; tile::ROWS]; T];
        for (i, tile) in tiles.iter().enumerate() {
            for plane in 0..4 {
                let shift = 8 * byte + 2 * plane;
                let mut weights = [0.0f32; tile::ROWS];
                for (weight, row) in weights.iter_mut().zip(tile.as_chunks::<4>().0) {
                    let code = u32::from_le_bytes(*row) >> shift & 3;
                    *weight = (code as i32 - 1) as f32;
                }
                let k = i * tile::COLS + 4 * plane + byte;
                for (lanes, x) in lanes.iter_mut().zip(x) {
                    for (lane, weight) in lanes.iter_mut().zip(weights) {
                        *lane = weight.mul_add(x[k], *lane);
                    }
                }
            }
        }
        *acc = lanes;
    }
    for (t, sums) in sums.iter_mut().enumerate() {
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = (acc[0][t][row] + acc[1][t][row]) + (acc[2][t][row] + acc[3][t][row]);
        }
    }
}

/// `q = round_half_even(x * (127 / absmax))`; the scale returned is `absmax / 127`, 0 for a head of
/// zeros.
#[inline(always)]
pub(super) fn quantize_head(x: &[f32], q: &mut [i8]) -> f32 {
    assert_eq!(x.len(), q.len());
    let absmax = numerics::max_abs(x);
    let inverse = if absmax == 0.0 { 0.0 } else { 127.0 / absmax };
    for (q, x) in q.iter_mut().zip(x) {
        *q = numerics::round_to_i8(x * inverse);
    }
    absmax / 127.0
}

/// Rotates each head of `head_size` elements: element `i` with `i + head_size / 2`.
#[inline(always)]
pub(super) fn rope(x: &mut [f32], head_size: usize, cos: &[f32], sin: &[f32]) {
    let half = head_size / 2;
    let (cos, sin) = (&cos[..half], &sin[..half]);
    for head in x.chunks_exact_mut(head_size) {
        let (low, high) = head.split_at_mut(half);
        let high = &mut high[..half];
        for i in 0..half {
            let (a, b) = (low[i], high[i]);
            low[i] = (-b).mul_add(sin[i], a * cos[i]);
            high[i] = a.mul_add(sin[i], b * cos[i]);
        }
    }
}

/// `gate = activation(gate) * up`.
#[inline(always)]
pub(super) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    #[inline(always)]
    fn apply(gate: &mut [f32], up: &[f32], gated: impl Fn(f32, f32) -> f32) {
        assert_eq!(gate.len(), up.len());
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = gated(*gate, *up);
        }
    }
    match activation {
        Activation::Relu2 => apply(gate, up, numerics::gated_relu2),
        Activation::Silu => apply(gate, up, |gate, up| numerics::silu(gate) * up),
        Activation::GeluTanh => apply(gate, up, |gate, up| numerics::gelu_tanh(gate) * up),
    }
}

/// `x += y`.
#[inline(always)]
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// [`blocks::decode_row`] with this instruction set's conversion of half-precision numbers.
#[inline(always)]
pub(super) fn decode(
    dtype: DType,
    bytes: &[u8],
    out: &mut [f32],
    decode_f16: impl Fn(&[[u8; 2]], &mut [f32]),
) {
    match dtype {
        DType::F16 => {
            let (half, rest) = bytes.as_chunks::<2>();
            assert!(rest.is_empty() && half.len() == out.len());
            decode_f16(half, out);
        }
        _ => blocks::decode_row(dtype, bytes, out),
    }
}

/// One row of an output head and the tokens it is multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct HeadRow<'a> {
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a [u8],
    /// `[tokens, cols]`.
    pub(crate) inputs: &'a [f32],
}

/// `out[t] = row · inputs[t]`. `decoded` is room for one row.
#[inline(always)]
pub(super) fn head_row(
    row: HeadRow<'_>,
    decoded: &mut [f32],
    out: &mut [f32],
    decode_f16: impl Fn(&[[u8; 2]], &mut [f32]),
) {
    decode(row.dtype, row.bytes, decoded, decode_f16);
    for (input, out) in row.inputs.chunks_exact(decoded.len()).zip(out) {
        *out = numerics::dot(decoded, input);
    }
}

/// Stored keys and values, one row of `head_size` elements per token and head.
pub(crate) enum KvRows {
    F32(Vec<f32>),
    /// Half-precision numbers, little-endian.
    F16(Vec<[u8; 2]>),
    /// Values and one scale per row.
    Int8(Vec<i8>, Vec<f32>),
}

/// Where the rows of one side (key or value) of one head in one layer are.
#[derive(Clone, Copy)]
pub(crate) struct HeadPlace {
    /// Row of token 0 of block 0.
    pub(crate) first: usize,
    /// Rows from a block to the next.
    pub(crate) block_rows: usize,
    pub(crate) block_tokens: usize,
}

impl HeadPlace {
    #[inline(always)]
    pub(crate) fn row(&self, blocks: &[u32], token: usize) -> usize {
        blocks[token / self.block_tokens] as usize * self.block_rows
            + self.first
            + token % self.block_tokens
    }
}

/// Attention of the query heads that share a key/value head, over some of the tokens of a split.
#[derive(Clone, Copy)]
pub(crate) struct Query<'a> {
    /// `[query heads, head_size]`.
    pub(crate) queries: &'a [f32],
    pub(crate) head_size: usize,
    /// Factor on `q · k`.
    pub(crate) scale: f32,
    pub(crate) rows: &'a KvRows,
    pub(crate) keys: HeadPlace,
    pub(crate) values: HeadPlace,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
}

/// Numbers that [`attend`] leaves per query head: the weighted sum of values, then the largest
/// score and the sum of the weights.
pub(crate) const fn partial_len(head_size: usize) -> usize {
    head_size + 2
}

/// Rows that may need converting to f32.
trait Rows {
    fn load<'r>(&'r self, row: usize, room: &'r mut [f32]) -> &'r [f32];
}

struct F32Rows<'a>(&'a [f32]);

impl Rows for F32Rows<'_> {
    #[inline(always)]
    fn load<'r>(&'r self, row: usize, room: &'r mut [f32]) -> &'r [f32] {
        &self.0[row * room.len()..][..room.len()]
    }
}

struct F16Rows<'a, D>(&'a [[u8; 2]], D);

impl<D: Fn(&[[u8; 2]], &mut [f32])> Rows for F16Rows<'_, D> {
    #[inline(always)]
    fn load<'r>(&'r self, row: usize, room: &'r mut [f32]) -> &'r [f32] {
        (self.1)(&self.0[row * room.len()..][..room.len()], room);
        room
    }
}

struct Int8Rows<'a>(&'a [i8], &'a [f32]);

impl Rows for Int8Rows<'_> {
    #[inline(always)]
    fn load<'r>(&'r self, row: usize, room: &'r mut [f32]) -> &'r [f32] {
        let (scale, q) = (self.1[row], &self.0[row * room.len()..]);
        for (value, &q) in room.iter_mut().zip(q) {
            *value = f32::from(q) * scale;
        }
        room
    }
}

/// Attention over `tokens`, which lie within one split. `partials` is `[query heads,
/// partial_len(head_size)]`; `room` is scratch of `ATTENTION_SPLIT` per query head and one head.
#[inline(always)]
pub(super) fn attend(
    query: Query<'_>,
    tokens: Range<usize>,
    room: &mut [f32],
    partials: &mut [f32],
    decode_f16: impl Fn(&[[u8; 2]], &mut [f32]),
) {
    match query.rows {
        KvRows::F32(rows) => attend_rows(query, tokens, room, partials, F32Rows(rows)),
        KvRows::F16(rows) => attend_rows(query, tokens, room, partials, F16Rows(rows, decode_f16)),
        KvRows::Int8(rows, scales) => {
            attend_rows(query, tokens, room, partials, Int8Rows(rows, scales));
        }
    }
}

#[inline(always)]
fn attend_rows(
    query: Query<'_>,
    tokens: Range<usize>,
    room: &mut [f32],
    partials: &mut [f32],
    rows: impl Rows,
) {
    let Query { queries, head_size, scale, keys, values, blocks, .. } = query;
    let heads = queries.len() / head_size;
    let count = tokens.len();
    let (room, weights) = room[..head_size + heads * ATTENTION_SPLIT].split_at_mut(head_size);

    for (i, token) in tokens.clone().enumerate() {
        let key = rows.load(keys.row(blocks, token), room);
        for (head, query) in queries.chunks_exact(head_size).enumerate() {
            weights[head * ATTENTION_SPLIT + i] = numerics::dot(query, key) * scale;
        }
    }
    for (weights, partial) in
        weights.chunks_exact_mut(ATTENTION_SPLIT).zip(partials.chunks_exact_mut(head_size + 2))
    {
        let weights = &mut weights[..count];
        let max = numerics::max(weights);
        for weight in weights.iter_mut() {
            *weight = numerics::exp(*weight - max);
        }
        partial.fill(0.0);
        partial[head_size] = max;
        partial[head_size + 1] = numerics::sum(weights);
    }
    for (i, token) in tokens.enumerate() {
        let value = rows.load(values.row(blocks, token), room);
        for (head, partial) in partials.chunks_exact_mut(head_size + 2).enumerate() {
            let weight = weights[head * ATTENTION_SPLIT + i];
            for (out, value) in partial.iter_mut().zip(value) {
                *out = weight.mul_add(*value, *out);
            }
        }
    }
}

/// Joins the partial results of neighbouring splits, `total` being the earlier one.
#[inline(always)]
pub(super) fn merge(head_size: usize, totals: &mut [f32], parts: &[f32]) {
    let len = partial_len(head_size);
    for (total, part) in totals.chunks_exact_mut(len).zip(parts.chunks_exact(len)) {
        let (before, after) = (total[head_size], part[head_size]);
        let max = if after > before { after } else { before };
        let (old, new) = (numerics::exp(before - max), numerics::exp(after - max));
        for (total, part) in total[..head_size].iter_mut().zip(&part[..head_size]) {
            *total = part.mul_add(new, *total * old);
        }
        total[head_size] = max;
        total[head_size + 1] = part[head_size + 1].mul_add(new, total[head_size + 1] * old);
    }
}

/// `out = weighted sum / sum of weights`, head by head.
#[inline(always)]
pub(super) fn finish(head_size: usize, totals: &[f32], out: &mut [f32]) {
    for (total, out) in
        totals.chunks_exact(partial_len(head_size)).zip(out.chunks_exact_mut(head_size))
    {
        let sum = total[head_size + 1];
        for (out, total) in out.iter_mut().zip(total) {
            *out = total / sum;
        }
    }
}
