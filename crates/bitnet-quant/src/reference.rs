//! Every backend operation in plain loops: short, slow, single-threaded, and the definition of the
//! bits that all CPU kernels must produce.

use bitnet_core::backend::{
    Activation, ActivationPrecision, AttentionShape, Backend, KvLayout, KvType, Norm, Span,
};
use bitnet_core::numerics::{self, ATTENTION_SPLIT};
use bitnet_core::{
    Candidate, Error, Keep, LinearUse, Screen, Tensor, TernaryMatrix, TiledMatrix, WeightScale,
};
use half::f16;

use crate::activation::{QuantizedRow, quantize_row};
use crate::packing::{blocks::decode_row, tile};

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
                    bytes.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
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

    fn read(&self, at: usize, out: &mut [f32]) {
        let slot = &self.data[at..at + self.head_bytes];
        match self.layout.kv_type {
            KvType::F32 => {
                for (bytes, value) in slot.chunks_exact(4).zip(out) {
                    *value = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
                }
            }
            KvType::F16 => {
                for (bytes, value) in slot.chunks_exact(2).zip(out) {
                    *value = f16::from_le_bytes(bytes.try_into().expect("two bytes")).to_f32();
                }
            }
            KvType::Int8 => {
                let (scale, quantized) = slot.split_at(4);
                let scale = f32::from_le_bytes(scale.try_into().expect("four bytes"));
                for (byte, value) in quantized.iter().zip(out) {
                    *value = f32::from(*byte as i8) * scale;
                }
            }
        }
    }

    fn block(&self, block: u32) -> std::ops::Range<usize> {
        let bytes = self.layout.block_bytes();
        block as usize * bytes..(block as usize + 1) * bytes
    }
}

/// `acc` of one row against int8 activations, per scale group.
fn integer_row(matrix: &TernaryMatrix, row: usize, q: &[i8], input: QuantizedRow) -> f32 {
    let product = |cols: std::ops::Range<usize>| -> i32 {
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
    let product = |cols: std::ops::Range<usize>| -> f32 {
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
            *gate = up
                * match activation {
                    Activation::Relu2 => numerics::relu2(*gate),
                    Activation::Silu => numerics::silu(*gate),
                    Activation::GeluTanh => numerics::gelu_tanh(*gate),
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
        pick: usize,
        norm: &Norm<Self>,
        table: &Tensor,
        _screen: &(),
        keep: Keep,
        exact_ids: &[u32],
        out: &mut Vec<Candidate>,
    ) -> Result<(), Error> {
        let mut logits = self.buffer(1, table.rows())?;
        self.head(x, &[pick], norm, table, &mut logits);
        let all = (0..).zip(logits.values).map(|(id, logit)| Candidate { id, logit });
        let all: Vec<Candidate> = all.collect();
        let named = |c: &Candidate| exact_ids.contains(&c.id);
        let mut others: Vec<f32> = all.iter().filter(|c| !named(c)).map(|c| c.logit).collect();
        let finite = all.iter().all(|c| c.logit.is_finite());
        let least = keep.threshold(&mut others);
        out.clear();
        out.extend(all.iter().filter(|c| named(c) || !finite || c.logit >= least));
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
        let KvLayout { kv_heads, head_size, .. } = kv.layout;
        let rows = spans.iter().map(|span| span.rows.end).max().unwrap_or(0);
        out.shape(rows, heads * head_size);
        let mut stored = vec![0.0f32; head_size];
        for span in spans {
            for (position, row) in (span.position..).zip(span.rows.clone()) {
                let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let query = &q.row(row)[head * head_size..(head + 1) * head_size];
                    let mut total: Option<Split> = None;
                    for split in first / ATTENTION_SPLIT..=position / ATTENTION_SPLIT {
                        let start = first.max(split * ATTENTION_SPLIT);
                        let end = (position + 1).min((split + 1) * ATTENTION_SPLIT);
                        let mut weights: Vec<f32> = (start..end)
                            .map(|token| {
                                let at = kv.offset(layer, Side::Key, span, token, kv_head);
                                kv.read(at, &mut stored);
                                numerics::dot(query, &stored) * scale
                            })
                            .collect();
                        let max = numerics::max(&weights);
                        weights.iter_mut().for_each(|w| *w = numerics::exp(*w - max));
                        let sum = numerics::sum(&weights);
                        let mut part = Split { max, sum, out: vec![0.0; head_size] };
                        for (token, weight) in (start..end).zip(&weights) {
                            let at = kv.offset(layer, Side::Value, span, token, kv_head);
                            kv.read(at, &mut stored);
                            for (out, value) in part.out.iter_mut().zip(&stored) {
                                *out = weight.mul_add(*value, *out);
                            }
                        }
                        total = Some(match total {
                            None => part,
                            Some(before) => combine(before, part),
                        });
                    }
                    let total = total.expect("a token sees at least itself");
                    let slot = &mut out.row_mut(row)[head * head_size..(head + 1) * head_size];
                    for (slot, value) in slot.iter_mut().zip(total.out) {
                        *slot = value / total.sum;
                    }
                }
            }
        }
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
