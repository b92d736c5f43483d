//! Ternary linear layers that share an input: norm, quantise, multiply.
//!
//! The input is prepared once, row by row. Then the bands of sixteen output features of all the
//! matrices are shared out, and each band's tiles pass once for every [`TOKENS`] tokens.

use std::ops::Range;
use std::sync::Mutex;

use bitnet_core::backend::ActivationPrecision;
use bitnet_quant::activation::QuantizedRow;
use bitnet_quant::packing::tile;

use super::{Compute, InputScratch, Scratch, ThreadScratch, at_least, lock};
use crate::arch::{Band, BandScale, prefetch_all};
use crate::buffer::Buffer;
use crate::linear::{Linear, Scale};
use crate::profile::Call;
use crate::threads::{Chunks, Cut, Strip, Strips};

/// Tokens whose inputs stay in the cache (160 kB at 2560 columns) while bands pass by.
pub(super) const TOKENS: usize = 64;

/// Bands whose results are written together: a cache line of each token's row at a time would keep
/// the processor busy with address translation.
const BANDS: usize = 4;

/// Matrices of one fork-join: q, k and v.
const MATRICES: usize = 4;

/// One number per row of a band, for some tokens.
type Sums = [[f32; tile::ROWS]];

/// Prepared inputs `[rows, stride]`, zero in the columns past the last. As floats they are there for
/// matrices that take them so.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    floats: &'a [f32],
    pub(super) quantized: &'a [i8],
    pub(super) rows: &'a [QuantizedRow],
    stride: usize,
}

/// A matrix, and the sums `[rows, groups]` of its quantised inputs if its scales are grouped.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    linear: &'a Linear,
    group_sums: &'a [i32],
}

impl Compute {
    pub(crate) fn linears(
        &self,
        x: &Buffer,
        rows: usize,
        norm: Option<(&[f32], f32)>,
        linears: &[&Linear],
        outs: &mut [&mut Buffer],
    ) {
        assert_eq!(linears.len(), outs.len());
        assert!(linears.iter().all(|linear| linear.cols() == x.cols()), "input width");
        if rows == 0 {
            return;
        }
        let mut scratch = self.scratch();
        let Scratch { inputs, group_sums, threads, .. } = &mut *scratch;
        let inputs = self.prepare(x, rows, norm, linears, inputs, threads);
        self.multiply(inputs, linears, outs, group_sums, threads);
    }

    /// `outs[j] = linears[j] · inputs`.
    pub(super) fn multiply(
        &self,
        inputs: Inputs<'_>,
        linears: &[&Linear],
        outs: &mut [&mut Buffer],
        group_sums: &mut Vec<i32>,
        threads: &[Mutex<ThreadScratch>],
    ) {
        let start = self.profile.start();
        let (rows, stride) = (inputs.rows.len(), inputs.stride);
        for (linears, outs) in linears.chunks(MATRICES).zip(outs.chunks_mut(MATRICES)) {
            let tasks = tasks(linears, inputs, group_sums);
            let features: usize = linears.iter().map(|linear| linear.rows()).sum();
            let columns_of_bands = rows * features.div_ceil(tile::ROWS) * stride;
            let parts = self.parts(columns_of_bands);
            let mut outs = outs.iter_mut();
            let strips: [Option<Strips<'_>>; MATRICES] = std::array::from_fn(|j| {
                let (linear, out) = (linears.get(j)?, outs.next()?);
                let bands = linear.rows().div_ceil(tile::ROWS);
                let cut = if linears.len() == 1 {
                    self.bands(bands, tile::ROWS, columns_of_bands)
                } else {
                    let share = (parts * linear.rows()).div_ceil(features);
                    Cut::Even(bands.div_ceil(share) * tile::ROWS)
                };
                let out = out.shape(rows, linear.rows());
                Some(Strips::new(out, linear.rows(), cut))
            });
            self.pool.run(strips, |thread, (which, mut strip)| {
                let task = tasks[which].expect("a strip belongs to a matrix");
                self.strip(task, inputs, &mut lock(&threads[thread]), &mut strip);
            });
        }
        self.profile.note(start, || {
            let features: usize = linears.iter().map(|linear| linear.rows()).sum();
            Call {
                shape: Some([linears[0].cols(), features]),
                bytes: linears.iter().map(|linear| linear.byte_len()).sum(),
                macs: rows * features * linears[0].cols(),
                ..Call::of_rows("linears", rows)
            }
        });
    }

    /// Norms each row, and quantises it for the matrices that take it so.
    pub(super) fn prepare<'a>(
        &self,
        x: &Buffer,
        rows: usize,
        norm: Option<(&[f32], f32)>,
        linears: &[&Linear],
        room: &'a mut InputScratch,
        threads: &[Mutex<ThreadScratch>],
    ) -> Inputs<'a> {
        let start = self.profile.start();
        if let Some((weight, _)) = norm {
            prefetch_all(weight);
        }
        let stride = x.cols().next_multiple_of(tile::COLS);
        let has = |precision| linears.iter().any(|linear| linear.precision == precision);
        let kept = if has(ActivationPrecision::F32) { rows * stride } else { 0 };
        let floats = at_least(&mut room.floats, kept);
        let quantized = at_least(&mut room.quantized, rows * stride);
        let facts = at_least(&mut room.rows, rows);
        if !floats.is_empty() {
            self.norm_rows(x, norm, floats);
        }
        if has(ActivationPrecision::Int8) {
            self.quantize_rows(x, norm, quantized, facts, threads);
        }
        self.profile.note(start, || Call::of_rows("norm, quantise", rows));
        Inputs { floats, quantized, rows: facts, stride }
    }

    /// Norms each row into `floats`.
    fn norm_rows(&self, x: &Buffer, norm: Option<(&[f32], f32)>, floats: &mut [f32]) {
        let cols = x.cols();
        let stride = cols.next_multiple_of(tile::COLS);
        let part = (floats.len() / stride).div_ceil(self.parts(floats.len()));
        self.pool.run(Chunks::new(floats, part * stride), |_, (index, floats)| {
            for (i, floats) in floats.chunks_exact_mut(stride).enumerate() {
                let x = x.row(index * part + i);
                let (input, padding) = floats.split_at_mut(cols);
                match norm {
                    Some((weight, eps)) => self.kernels.rms_norm(x, weight, eps, input),
                    None => input.copy_from_slice(x),
                }
                padding.fill(0.0);
            }
        });
    }

    /// Norms and quantises each row into `quantized`. The normed row itself stays in the cache.
    fn quantize_rows(
        &self,
        x: &Buffer,
        norm: Option<(&[f32], f32)>,
        quantized: &mut [i8],
        facts: &mut [QuantizedRow],
        threads: &[Mutex<ThreadScratch>],
    ) {
        let cols = x.cols();
        let stride = cols.next_multiple_of(tile::COLS);
        let part = facts.len().div_ceil(self.parts(quantized.len()));
        let parts = (Chunks::new(quantized, part * stride), Chunks::new(facts, part));
        self.pool.run(parts, |thread, ((index, quantized), (_, facts))| {
            let mut own = lock(&threads[thread]);
            let room = at_least(&mut own.floats, cols);
            for (i, (quantized, fact)) in quantized.chunks_exact_mut(stride).zip(facts).enumerate()
            {
                let x = x.row(index * part + i);
                let (quantized, padding) = quantized.split_at_mut(cols);
                *fact = match norm {
                    Some((weight, eps)) => {
                        self.kernels.norm_quantize(x, weight, eps, room, quantized)
                    }
                    None => self.kernels.quantize_row(x, quantized),
                };
                padding.fill(0);
            }
        });
    }

    /// All tokens of a strip of one matrix's output.
    pub(super) fn strip(
        &self,
        task: Task<'_>,
        inputs: Inputs<'_>,
        own: &mut ThreadScratch,
        strip: &mut Strip<'_>,
    ) {
        let columns = strip.columns();
        let bands = columns.start / tile::ROWS..columns.end.div_ceil(tile::ROWS);
        if let ([row], Some(by_band)) = (inputs.rows, task.linear.by_band(bands.clone())) {
            // One token: nothing comes between the bands, which are read in one go.
            // Room for all bands: whichever part a thread gets later, it need not grow.
            let acc = at_least(&mut own.acc, task.linear.rows().div_ceil(tile::ROWS));
            let acc = &mut acc[..bands.len()];
            // A code is a weight plus 1.
            acc.fill([-row.sum; tile::ROWS]);
            for (band, acc) in by_band.zip(&mut *acc) {
                let acc = std::slice::from_mut(acc);
                self.kernels.ternary_int8(band, inputs.quantized, inputs.stride, acc);
            }
            let sums = &acc.as_flattened()[..columns.len()];
            let scale = task.linear.output_scale(columns);
            return self.kernels.scale_outputs(sums, row.scale, scale, strip.row(0));
        }
        let mut totals = std::mem::take(&mut own.totals);
        totals.resize(BANDS, [[0.0; tile::ROWS]; TOKENS]);
        for first in (0..inputs.rows.len()).step_by(TOKENS) {
            let tokens = first..inputs.rows.len().min(first + TOKENS);
            // A factor of 1 changes no bit.
            let mut s_x = [1.0; TOKENS];
            if task.linear.precision == ActivationPrecision::Int8 {
                for (s_x, row) in s_x.iter_mut().zip(&inputs.rows[tokens.clone()]) {
                    *s_x = row.scale;
                }
            }
            for start in bands.clone().step_by(BANDS) {
                let bands = start..bands.end.min(start + BANDS);
                for (band, totals) in bands.clone().zip(&mut totals) {
                    let totals = &mut totals[..tokens.len()];
                    self.band(task, inputs, tokens.clone(), band, own, totals);
                    let scale = match &task.linear.scale {
                        Scale::Multiply(scale) => BandScale::Multiply(*scale),
                        Scale::Divide(scale) => BandScale::Divide(*scale),
                        Scale::Rows(scales) => BandScale::Rows(&scales[band]),
                        Scale::Groups { .. } => BandScale::Applied,
                    };
                    self.kernels.scale_sums(totals, &s_x[..tokens.len()], scale);
                }
                for (i, token) in tokens.clone().enumerate() {
                    let out = &mut strip.row(token)[start * tile::ROWS - columns.start..];
                    for (out, totals) in out.chunks_mut(tile::ROWS).zip(&totals[..bands.len()]) {
                        out.copy_from_slice(&totals[i][..out.len()]);
                    }
                }
            }
        }
        own.totals = totals;
    }

    /// The sums of one band, with the scales of groups applied where there are any.
    fn band(
        &self,
        task: Task<'_>,
        inputs: Inputs<'_>,
        tokens: Range<usize>,
        band: usize,
        own: &mut ThreadScratch,
        totals: &mut Sums,
    ) {
        let linear = task.linear;
        let ThreadScratch { tiles, acc, floats: own_floats, bytes: own_bytes, .. } = own;
        let weights = linear.band(band, self.kernels, tiles);
        let Scale::Groups { len, values } = &linear.scale else {
            let sum = |token: usize| inputs.rows[token].sum;
            return self.products(linear, weights, inputs, tokens, sum, acc, totals);
        };
        // Only exact sums are taken from triples.
        let tiles = weights.tiles;
        let groups = linear.cols() / len;
        totals.fill([0.0; tile::ROWS]);
        let mut sums = [[0.0; tile::ROWS]; TOKENS];
        let sums = &mut sums[..tokens.len()];
        for (group, scales) in values[band * groups..(band + 1) * groups].iter().enumerate() {
            let sum = |token: usize| task.group_sums[token * groups + group];
            let cols = group * len..(group + 1) * len;
            let tiles = &tiles[cols.start / tile::COLS..cols.end.div_ceil(tile::COLS)];
            let part = Band { blocks: &[], tiles };
            if len.is_multiple_of(tile::COLS) {
                let shifted = Inputs {
                    // Inputs that are all quantised are not there as floats.
                    floats: inputs.floats.get(cols.start..).unwrap_or_default(),
                    quantized: &inputs.quantized[cols.start..],
                    ..inputs
                };
                self.products(linear, part, shifted, tokens.clone(), sum, acc, sums);
            } else {
                // The group shares tiles with its neighbours: a copy of the inputs, zero outside of
                // the group, takes only its own columns from them.
                let first = cols.start / tile::COLS * tile::COLS;
                let stride = tiles.len() * tile::COLS;
                let own_cols = cols.start - first..cols.end - first;
                let floats = at_least(own_floats, tokens.len() * stride);
                let quantized = at_least(own_bytes, tokens.len() * stride);
                floats.fill(0.0);
                quantized.fill(0);
                for (i, token) in tokens.clone().enumerate() {
                    let to = i * stride + own_cols.start..i * stride + own_cols.end;
                    let from = token * inputs.stride + cols.start..token * inputs.stride + cols.end;
                    if let Some(input) = inputs.floats.get(from.clone()) {
                        floats[to.clone()].copy_from_slice(input);
                    }
                    quantized[to].copy_from_slice(&inputs.quantized[from]);
                }
                let copied = Inputs { floats, quantized, rows: inputs.rows, stride };
                let sum = |i: usize| sum(tokens.start + i);
                self.products(linear, part, copied, 0..tokens.len(), sum, acc, sums);
            }
            for (total, sums) in totals.iter_mut().zip(&*sums) {
                self.kernels.add_scaled(scales, sums, total);
            }
        }
    }

    /// The sums of weight times input over the columns of `band`; `input_sum(token)` is the sum of
    /// the token's quantised inputs in these columns. `acc` is room for integer sums.
    #[allow(clippy::too_many_arguments)] // a part of `band`
    fn products(
        &self,
        linear: &Linear,
        band: Band<'_>,
        inputs: Inputs<'_>,
        tokens: Range<usize>,
        input_sum: impl Fn(usize) -> i32,
        acc: &mut Vec<[i32; tile::ROWS]>,
        sums: &mut Sums,
    ) {
        let start = tokens.start * inputs.stride;
        match linear.precision {
            ActivationPrecision::F32 => {
                self.kernels.ternary_f32(band.tiles, &inputs.floats[start..], inputs.stride, sums);
            }
            ActivationPrecision::Int8 => {
                let acc = at_least(acc, tokens.len());
                for (acc, token) in acc.iter_mut().zip(tokens) {
                    // A code is a weight plus 1.
                    *acc = [-input_sum(token); tile::ROWS];
                }
                self.kernels.ternary_int8(band, &inputs.quantized[start..], inputs.stride, acc);
                self.kernels.to_float(acc, sums);
            }
        }
    }
}

/// The matrices that share an input. The sums of the quantised inputs `[rows, groups]` lie one after
/// another in `sums`, for each matrix that needs them.
pub(super) fn tasks<'a>(
    linears: &[&'a Linear],
    inputs: Inputs<'_>,
    sums: &'a mut Vec<i32>,
) -> [Option<Task<'a>>; MATRICES] {
    sums.clear();
    let mut places = [const { 0..0 }; MATRICES];
    for (linear, place) in linears.iter().zip(&mut places) {
        let start = sums.len();
        if let (Scale::Groups { len, .. }, ActivationPrecision::Int8) =
            (&linear.scale, linear.precision)
        {
            for row in inputs.quantized.chunks_exact(inputs.stride) {
                let groups = row[..linear.cols()].chunks_exact(*len);
                sums.extend(groups.map(|group| group.iter().map(|&q| i32::from(q)).sum::<i32>()));
            }
        }
        *place = start..sums.len();
    }
    std::array::from_fn(|j| {
        let group_sums = &sums[places[j].clone()];
        linears.get(j).map(|&linear| Task { linear, group_sums })
    })
}
