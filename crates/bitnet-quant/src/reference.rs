//! Every backend operation in plain loops: short, slow, single-threaded, and the definition of the
//! bits that all CPU kernels must produce.

use std::ops::Range;

use bitnet_core::backend::{
    Activation, ActivationPrecision, AttentionShape, Backend, KvLayout, KvType, Norm, Span, Weigh,
};
use bitnet_core::numerics::{self, ATTENTION_SPLIT};
use bitnet_core::{
    Candidate, Error, LinearUse, Pick, Screen, Tensor, TernaryMatrix, TiledMatrix, WeightBytes,
    WeightScale,
};

use crate::activation::{QuantizedRow, quantize_row};
use crate::packing::blocks::{decode_row, f16_to_f32, f32_to_f16};
use crate::packing::tile;

/// The scalar reference backend.
#[derive(Debug, Default, Clone, Copy)]
pub struct ReferenceBackend;

/// f32 rows in host memory.
#[derive(Debug, Clone)]
pub struct Rows {
    values: Vec<f32>,
    cols: usize,
}

impl Rows {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.cols..(row + 1) * self.cols]
    }

    /// Sets the width of the rows that are about to be written.
    fn shape(&mut self, rows: usize, cols: usize) {
        assert!(rows * cols <= self.values.len(), "buffer too small for {rows} x {cols}");
        self.cols = cols;
    }
}

/// A ternary matrix and how its input is taken.
#[derive(Debug, Clone)]
pub struct Linear {
    matrix: TernaryMatrix,
    precision: ActivationPrecision,
}

impl Weigh for Linear {
    /// A byte for each code.
    fn weight_bytes(&self) -> WeightBytes {
        let codes = self.matrix.rows() * self.matrix.cols();
        let own = codes + size_of_val(self.matrix.scale().values());
        WeightBytes { mapped: 0, own: own as u64 }
    }
}

/// Keys and values, one slot per block, layer, side (key or value), token and head.
#[derive(Debug, Clone)]
pub struct KvStore {
    layout: KvLayout,
    /// Bytes of one head of one token.
    head_bytes: usize,
    data: Vec<u8>,
}

/// Which half of a block is meant.
#[derive(Debug, Clone, Copy)]
enum Side {
    Key,
    Value,
}

impl KvStore {
    /// Byte offset of one head of one token of a sequence.
    fn offset(
        &self,
        layer: usize,
        side: Side,
        span: &Span<'_>,
        token: usize,
        head: usize,
    ) -> usize {
        let KvLayout { layers, kv_heads, block_tokens, .. } = self.layout;
        let block = span.blocks[token / block_tokens] as usize;
        let slot = (block * layers + layer) * 2 + side as usize;
        ((slot * block_tokens + token % block_tokens) * kv_heads + head) * self.head_bytes
    }

    fn write(&mut self, at: usize, values: &[f32]) {
        let slot = &mut self.data[at..at + self.head_bytes];
        match self.layout.kv_type {
            KvType::F32 => {
                for (bytes, value) in slot.chunks_exact_mut(4).zip(values) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }
            KvType::F16 => {
                for (bytes, value) in slot.chunks_exact_mut(2).zip(values) {
                    bytes.copy_from_slice(&f32_to_f16(*value));
                }
            }
            KvType::Int8 => {
                let absmax = numerics::max_abs(values);
                let inverse = if absmax == 0.0 { 0.0 } else { 127.0 / absmax };
                let (scale, quantized) = slot.split_at_mut(4);
                scale.copy_from_slice(&(absmax / 127.0).to_le_bytes());
                for (byte, value) in quantized.iter_mut().zip(values) {
                    *byte = (value * inverse).round_ties_even() as i8 as u8;
                }
            }
        }
    }

    /// One head of one token as f32, int8 without their scale, which is returned (1 for the other
    /// types).
    fn read(&self, at: usize, out: &mut [f32]) -> f32 {
        let slot = &self.data[at..at + self.head_bytes];
        match self.layout.kv_type {
            KvType::F32 => {
                for (bytes, value) in slot.chunks_exact(4).zip(out) {
                    *value = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
                }
                1.0
            }
            KvType::F16 => {
                for (bytes, value) in slot.chunks_exact(2).zip(out) {
                    *value = f16_to_f32(bytes.try_into().expect("two bytes"));
                }
                1.0
            }
            KvType::Int8 => {
                let (scale, quantized) = slot.split_at(4);
                for (byte, value) in quantized.iter().zip(out) {
                    *value = f32::from(*byte as i8);
                }
                f32::from_le_bytes(scale.try_into().expect("four bytes"))
            }
        }
    }

    fn block(&self, block: u32) -> Range<usize> {
        let bytes = self.layout.block_bytes();
        block as usize * bytes..(block as usize + 1) * bytes
    }
}

/// `acc` of one row against int8 activations, per scale group.
fn integer_row(matrix: &TernaryMatrix, row: usize, q: &[i8], input: QuantizedRow) -> f32 {
    let product = |cols: Range<usize>| -> i32 {
        cols.map(|k| i32::from(q[k]) * i32::from(matrix.weight(row, k))).sum()
    };
    let cols = matrix.cols();
    match matrix.scale() {
        WeightScale::Multiply(scale) => (product(0..cols) as f32 / input.scale) * scale,
        WeightScale::Divide(scale) => product(0..cols) as f32 / (input.scale * scale),
        WeightScale::Rows(scales) => (product(0..cols) as f32 / input.scale) * scales[row],
        WeightScale::Groups { len, values } => {
            let scales = &values[row * (cols / len)..(row + 1) * (cols / len)];
            let mut total = 0.0f32;
            for (group, scale) in scales.iter().enumerate() {
                total = scale.mul_add(product(group * len..(group + 1) * len) as f32, total);
            }
            total / input.scale
        }
    }
}

/// One row against f32 activations: four accumulators by `k % 4` within each scale group.
fn float_row(matrix: &TernaryMatrix, row: usize, x: &[f32]) -> f32 {
    let product = |cols: Range<usize>| -> f32 {
        let mut acc = [0.0f32; 4];
        for k in cols {
            acc[k % 4] = f32::from(matrix.weight(row, k)).mul_add(x[k], acc[k % 4]);
        }
        (acc[0] + acc[1]) + (acc[2] + acc[3])
    };
    let cols = matrix.cols();
    match matrix.scale() {
        WeightScale::Multiply(scale) => product(0..cols) * scale,
        WeightScale::Divide(scale) => product(0..cols) / scale,
        WeightScale::Rows(scales) => product(0..cols) * scales[row],
        WeightScale::Groups { len, values } => {
            let scales = &values[row * (cols / len)..(row + 1) * (cols / len)];
            let mut total = 0.0f32;
            for (group, scale) in scales.iter().enumerate() {
                total = scale.mul_add(product(group * len..(group + 1) * len), total);
            }
            total
        }
    }
}

/// Attention of one query head over the keys of one split of positions: running maximum, sum of
/// weights, and weighted sum of values.
struct Split {
    max: f32,
    sum: f32,
    out: Vec<f32>,
}

impl Backend for ReferenceBackend {
    type Buffer = Rows;
    type Vector = Vec<f32>;
    type Linear = Linear;
    type Table = Tensor;
    type Screen = ();
    type Kv = KvStore;

    fn name(&self) -> String {
        "reference".to_owned()
    }

    fn replica(&self) -> Result<Self, Error> {
        Ok(ReferenceBackend)
    }

    fn load_vector(&self, values: &[f32]) -> Result<Vec<f32>, Error> {
        Ok(values.to_vec())
    }

    fn load_linear(
        &self,
        matrix: &TernaryMatrix,
        precision: ActivationPrecision,
        _usage: LinearUse,
    ) -> Result<Linear, Error> {
        Ok(Linear { matrix: matrix.clone(), precision })
    }

    fn load_tiled(
        &self,
        matrix: &TiledMatrix,
        precision: ActivationPrecision,
    ) -> Result<Linear, Error> {
        Ok(Linear { matrix: tile::untiled(matrix)?, precision })
    }

    fn load_table(&self, table: &Tensor) -> Result<Tensor, Error> {
        Ok(table.clone())
    }

    fn load_screen(&self, _screen: &Screen) -> Result<Option<()>, Error> {
        Ok(Some(()))
    }

    fn buffer(&self, rows: usize, cols: usize) -> Result<Rows, Error> {
        Ok(Rows { values: vec![0.0; rows * cols], cols })
    }

    fn write(&self, buffer: &mut Rows, cols: usize, values: &[f32]) {
        buffer.shape(values.len() / cols, cols);
        buffer.values[..values.len()].copy_from_slice(values);
    }

    fn read(&self, buffer: &Rows, rows: usize, out: &mut Vec<f32>) -> Result<(), Error> {
        out.clear();
        out.extend_from_slice(&buffer.values[..rows * buffer.cols]);
        Ok(())
    }

    fn embed(&self, table: &Tensor, tokens: &[u32], scale: f32, out: &mut Rows) {
        out.shape(tokens.len(), table.cols());
        for (row, &token) in tokens.iter().enumerate() {
            let values = out.row_mut(row);
            decode_row(table.dtype(), table.row(token as usize), values);
            if scale != 1.0 {
                values.iter_mut().for_each(|v| *v *= scale);
            }
        }
    }

    fn rms_norm(&self, x: &Rows, rows: usize, norm: &Norm<Self>, out: &mut Rows) {
        out.shape(rows, x.cols);
        for row in 0..rows {
            numerics::rms_norm(x.row(row), &norm.weight, norm.eps, out.row_mut(row));
        }
    }

    fn head_norm(&self, x: &mut Rows, rows: usize, norm: &Norm<Self>, head_size: usize) {
        for row in 0..rows {
            for head in x.row_mut(row).chunks_exact_mut(head_size) {
                let values = head.to_vec();
                numerics::rms_norm(&values, &norm.weight, norm.eps, head);
            }
        }
    }

    fn linears(
        &self,
        x: &Rows,
        rows: usize,
        norm: Option<&Norm<Self>>,
        linears: &[&Linear],
        outs: &mut [&mut Rows],
    ) {
        assert_eq!(linears.len(), outs.len());
        let mut input = vec![0.0f32; x.cols];
        let mut q = vec![0i8; x.cols];
        for (linear, out) in linears.iter().zip(outs.iter_mut()) {
            assert_eq!(linear.matrix.cols(), x.cols, "input width");
            out.shape(rows, linear.matrix.rows());
        }
        for row in 0..rows {
            match norm {
                Some(norm) => numerics::rms_norm(x.row(row), &norm.weight, norm.eps, &mut input),
                None => input.copy_from_slice(x.row(row)),
            }
            let quantized = quantize_row(&input, &mut q);
            for (linear, out) in linears.iter().zip(outs.iter_mut()) {
                for (j, value) in out.row_mut(row).iter_mut().enumerate() {
                    *value = match linear.precision {
                        ActivationPrecision::Int8 => integer_row(&linear.matrix, j, &q, quantized),
                        ActivationPrecision::F32 => float_row(&linear.matrix, j, &input),
                    };
                }
            }
        }
    }

    fn rope(&self, x: &mut Rows, rows: usize, head_size: usize, cos: &Rows, sin: &Rows) {
        let half = head_size / 2;
        for row in 0..rows {
            for head in x.row_mut(row).chunks_exact_mut(head_size) {
                for i in 0..half {
                    let (a, b) = (head[i], head[i + half]);
                    let (cos, sin) = (cos.row(row)[i], sin.row(row)[i]);
                    head[i] = (-b).mul_add(sin, a * cos);
                    head[i + half] = a.mul_add(sin, b * cos);
                }
            }
        }
    }

    fn gate(&self, gate: &mut Rows, up: &Rows, rows: usize, activation: Activation) {
        assert_eq!(gate.cols, up.cols);
        let n = rows * gate.cols;
        for (gate, up) in gate.values[..n].iter_mut().zip(&up.values[..n]) {
            *gate = match activation {
                Activation::Relu2 => numerics::gated_relu2(*gate, *up),
                Activation::Silu => numerics::silu(*gate) * up,
                Activation::GeluTanh => numerics::gelu_tanh(*gate) * up,
            };
        }
    }

    fn add(&self, x: &mut Rows, y: &Rows, rows: usize) {
        assert_eq!(x.cols, y.cols);
        let n = rows * x.cols;
        for (x, y) in x.values[..n].iter_mut().zip(&y.values[..n]) {
            *x += y;
        }
    }

    fn head(&self, x: &Rows, picks: &[usize], norm: &Norm<Self>, table: &Tensor, out: &mut Rows) {
        out.shape(picks.len(), table.rows());
        let mut input = vec![0.0f32; x.cols];
        let mut weights = vec![0.0f32; table.cols()];
        for (row, &pick) in picks.iter().enumerate() {
            numerics::rms_norm(x.row(pick), &norm.weight, norm.eps, &mut input);
            for (token, value) in out.row_mut(row).iter_mut().enumerate() {
                decode_row(table.dtype(), table.row(token), &mut weights);
                *value = numerics::dot(&weights, &input);
            }
        }
    }

    fn screened_head(
        &self,
        x: &Rows,
        picks: &[Pick<'_>],
        norm: &Norm<Self>,
        table: &Tensor,
        _screen: &(),
        outs: &mut [Vec<Candidate>],
    ) -> Result<(), Error> {
        let mut logits = self.buffer(1, table.rows())?;
        for (pick, out) in picks.iter().zip(outs) {
            self.head(x, &[pick.row], norm, table, &mut logits);
            let all = (0..).zip(&logits.values).map(|(id, &logit)| Candidate { id, logit });
            let all: Vec<Candidate> = all.collect();
            let named = |c: &Candidate| pick.exact_ids.contains(&c.id);
            let mut others: Vec<f32> = all.iter().filter(|c| !named(c)).map(|c| c.logit).collect();
            let finite = all.iter().all(|c| c.logit.is_finite());
            let least = pick.keep.threshold(&mut others);
            out.clear();
            out.extend(all.iter().filter(|c| named(c) || !finite || c.logit >= least));
        }
        Ok(())
    }

    fn kv_allocate(&self, layout: KvLayout, blocks: usize) -> Result<KvStore, Error> {
        let bytes = layout.block_bytes();
        let per_token = 2 * layout.layers * layout.kv_heads * layout.block_tokens;
        Ok(KvStore { layout, head_bytes: bytes / per_token, data: vec![0; blocks * bytes] })
    }

    fn kv_copy(&self, kv: &mut KvStore, pairs: &[(u32, u32)]) {
        for &(from, to) in pairs {
            let (from, to) = (kv.block(from), kv.block(to));
            kv.data.copy_within(from, to.start);
        }
    }

    fn kv_export(&self, kv: &KvStore, blocks: &[u32]) -> Result<Vec<u8>, Error> {
        Ok(blocks.iter().flat_map(|&block| &kv.data[kv.block(block)]).copied().collect())
    }

    fn kv_import(&self, kv: &mut KvStore, blocks: &[u32], data: &[u8]) -> Result<(), Error> {
        let bytes = kv.layout.block_bytes();
        if data.len() != blocks.len() * bytes {
            return Err(Error::KvImport(format!(
                "{} blocks take {} bytes but {} are given",
                blocks.len(),
                blocks.len() * bytes,
                data.len()
            )));
        }
        for (&block, contents) in blocks.iter().zip(data.chunks_exact(bytes)) {
            let range = kv.block(block);
            kv.data[range].copy_from_slice(contents);
        }
        Ok(())
    }

    fn kv_write(&self, kv: &mut KvStore, layer: usize, k: &Rows, v: &Rows, spans: &[Span<'_>]) {
        let head_size = kv.layout.head_size;
        for span in spans {
            for (token, row) in (span.position..).zip(span.rows.clone()) {
                for (side, values) in [(Side::Key, k.row(row)), (Side::Value, v.row(row))] {
                    for (head, values) in values.chunks_exact(head_size).enumerate() {
                        let at = kv.offset(layer, side, span, token, head);
                        kv.write(at, values);
                    }
                }
            }
        }
    }

    fn attention(
        &self,
        shape: AttentionShape,
        layer: usize,
        q: &Rows,
        kv: &KvStore,
        spans: &[Span<'_>],
        out: &mut Rows,
    ) {
        let AttentionShape { heads, scale, window } = shape;
        let KvLayout { kv_heads, head_size, kv_type, .. } = kv.layout;
        let rows = spans.iter().map(|span| span.rows.end).max().unwrap_or(0);
        out.shape(rows, heads * head_size);
        for span in spans {
            for (position, row) in (span.position..).zip(span.rows.clone()) {
                let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let place = |side, token| kv.offset(layer, side, span, token, kv_head);
                    let query = &q.row(row)[head * head_size..(head + 1) * head_size];
                    let query: Vec<f32> = query.iter().map(|x| x * scale).collect();
                    let total = (first / ATTENTION_SPLIT..=position / ATTENTION_SPLIT)
                        .map(|split| {
                            let split = split * ATTENTION_SPLIT..(split + 1) * ATTENTION_SPLIT;
                            let seen = split.start.max(first)..split.end.min(position + 1);
                            match kv_type {
                                KvType::F32 | KvType::F16 => {
                                    kv.attend_in_floats(&query, place, split.start, seen)
                                }
                                KvType::Int8 => {
                                    kv.attend_in_integers(&query, place, split.start, seen)
                                }
                            }
                        })
                        .reduce(combine)
                        .expect("a token sees at least itself");
                    let slot = &mut out.row_mut(row)[head * head_size..(head + 1) * head_size];
                    for (slot, value) in slot.iter_mut().zip(total.out) {
                        *slot = value / total.sum;
                    }
                }
            }
        }
    }
}

/// Largest score, sum of the weights and weights, for the scores of consecutive positions that
/// begin `skipped` positions after their split.
fn softmax(mut scores: Vec<f32>, skipped: usize) -> (f32, f32, Vec<f32>) {
    let max = numerics::max(&scores);
    scores.iter_mut().for_each(|score| *score = numerics::exp(*score - max));
    // A weight's lane is its position's place in the split.
    let placed: Vec<f32> =
        std::iter::repeat_n(0.0, skipped).chain(scores.iter().copied()).collect();
    (max, numerics::sum(&placed), scores)
}

impl KvStore {
    /// Attention of a scaled query over the positions `seen` of the split that begins at `start`.
    fn attend_in_floats(
        &self,
        query: &[f32],
        place: impl Fn(Side, usize) -> usize,
        start: usize,
        seen: Range<usize>,
    ) -> Split {
        let mut stored = vec![0.0f32; query.len()];
        let scores = seen.clone().map(|token| {
            self.read(place(Side::Key, token), &mut stored);
            numerics::chain(query, &stored)
        });
        let (max, sum, weights) = softmax(scores.collect(), seen.start - start);
        let mut out = vec![0.0f32; query.len()];
        for (token, weight) in seen.zip(weights) {
            self.read(place(Side::Value, token), &mut stored);
            for (out, value) in out.iter_mut().zip(&stored) {
                *out = weight.mul_add(*value, *out);
            }
        }
        Split { max, sum, out }
    }

    /// The same over int8 keys and values, the query and the weights rounded to 16 bits.
    fn attend_in_integers(
        &self,
        query: &[f32],
        place: impl Fn(Side, usize) -> usize,
        start: usize,
        seen: Range<usize>,
    ) -> Split {
        let mut stored = vec![0.0f32; query.len()];
        let mut short = vec![0i16; query.len()];
        let step = numerics::quantize_i16(query, numerics::query_levels(query.len()), &mut short);
        let scores = seen.clone().map(|token| {
            let scale = self.read(place(Side::Key, token), &mut stored);
            let products = short.iter().zip(&stored).map(|(&q, &k)| i32::from(q) * k as i32);
            products.sum::<i32>() as f32 * scale * step
        });
        let (max, sum, mut weights) = softmax(scores.collect(), seen.start - start);
        for (token, weight) in seen.clone().zip(&mut weights) {
            *weight *= self.read(place(Side::Value, token), &mut stored);
        }
        let mut short = vec![0i16; weights.len()];
        let step = numerics::quantize_i16(&weights, numerics::WEIGHT_LEVELS, &mut short);
        let mut sums = vec![0i32; query.len()];
        for (token, weight) in seen.zip(short) {
            self.read(place(Side::Value, token), &mut stored);
            for (sum, &value) in sums.iter_mut().zip(&stored) {
                *sum += i32::from(weight) * value as i32;
            }
        }
        let out = sums.into_iter().map(|sum| sum as f32 * step).collect();
        Split { max, sum, out }
    }
}

/// Joins the results of two neighbouring splits, the earlier one first.
fn combine(before: Split, part: Split) -> Split {
    let max = if part.max > before.max { part.max } else { before.max };
    let old = numerics::exp(before.max - max);
    let new = numerics::exp(part.max - max);
    let out = before.out.iter().zip(&part.out).map(|(o, p)| p.mul_add(new, o * old)).collect();
    Split { max, sum: part.sum.mul_add(new, before.sum * old), out }
}
