//! Gated feed-forward networks: gate and `up` of the same rows in one go, and for a single token
//! without what zeros make needless.
//!
//! Where the gate of relu² is zero or less, the product with `up` is zero whatever `up` is, so that
//! row of `up` is not computed. A zero among the quantised inputs of `down` adds nothing to any
//! sum, so that column of `down` is not read. Whether that pays is decided from the zeros of the
//! very input: few of them do not make up for jumping over them. The sums are of integers, so that
//! no bit depends on the decision.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnet_core::backend::Activation;
use bitnet_quant::activation::QuantizedRow;
use bitnet_quant::packing::tile;

use super::linears::{Inputs, tasks};
use super::{Compute, Scratch, ThreadScratch, at_least, count, lock};
use crate::arch::{Runs, planes_len, spread};
use crate::buffer::Buffer;
use crate::linear::Linear;
use crate::profile::Call;
use crate::threads::{Chunks, Strip, Strips};

/// The largest share of live rows of `up`, in per cent, at which leaving the others out was faster
/// than reading all of them in one go.
const MOST_LIVE_ROWS: usize = 85;

/// The same of columns of `down`, whose alternative is the product by bands.
const MOST_LIVE_COLUMNS: usize = 40;

/// The parts of a network whose matrices have no norms of their own.
#[derive(Clone, Copy)]
pub(crate) struct Ffn<'a> {
    pub(crate) norm: Option<(&'a [f32], f32)>,
    pub(crate) gate: &'a Linear,
    pub(crate) up: &'a Linear,
    pub(crate) activation: Activation,
    pub(crate) sub_norm: Option<(&'a [f32], f32)>,
    pub(crate) down: &'a Linear,
}

impl Compute {
    /// `out = down(sub_norm(activation(gate(norm(x))) * up(norm(x))))`; `gate` and `up` are room for
    /// the rows in between.
    pub(crate) fn gated_ffn(
        &self,
        x: &Buffer,
        rows: usize,
        ffn: Ffn<'_>,
        gate: &mut Buffer,
        up: &mut Buffer,
        out: &mut Buffer,
    ) {
        let Ffn { norm, sub_norm, down, .. } = ffn;
        let width = ffn.up.rows();
        assert!(ffn.gate.cols() == x.cols() && ffn.up.cols() == x.cols(), "input width");
        assert!(ffn.gate.rows() == width && down.cols() == width, "intermediate width");
        if rows == 0 {
            return;
        }
        let mut scratch = self.scratch();
        let Scratch { inputs: room, planes, columns, group_sums, threads, .. } = &mut *scratch;
        let inputs = self.prepare(x, rows, norm, &[ffn.gate, ffn.up], room, threads);
        match ffn.up.by_row().filter(|_| rows == 1) {
            Some(matrix) => {
                // All gates first: going from one matrix to the other and back would break off what
                // the hardware reads ahead.
                self.multiply(inputs, &[ffn.gate], &mut [&mut *gate], group_sums, threads);
                let planes = at_least(planes, planes_len(matrix));
                spread(inputs.quantized, matrix, planes);
                self.live_rows(ffn, matrix, inputs, planes, threads, gate, up);
            }
            None => self.gate_and_up(ffn, inputs, group_sums, threads, gate, up),
        }

        let inputs = self.prepare(gate, rows, sub_norm, &[down], room, threads);
        if rows == 1
            && self.shortcuts.sparsity
            && let Some(matrix) = down.by_column()
        {
            let live = not_zero(inputs.quantized);
            count(&self.counts.down_columns, width);
            if live * 100 < width * MOST_LIVE_COLUMNS {
                count(&self.counts.down_columns_skipped, width - live);
                return self.down_columns(down, matrix, inputs, columns, threads, out);
            }
        }
        self.multiply(inputs, &[down], &mut [out], group_sums, threads);
    }

    /// `gate = activation(gate · inputs) * (up · inputs)`, strip by strip.
    fn gate_and_up(
        &self,
        ffn: Ffn<'_>,
        inputs: Inputs<'_>,
        group_sums: &mut Vec<i32>,
        threads: &[Mutex<ThreadScratch>],
        gate: &mut Buffer,
        up: &mut Buffer,
    ) {
        let start = self.profile.start();
        let (rows, width, cols) = (inputs.rows.len(), ffn.up.rows(), ffn.up.cols());
        let cut = self.bands(width.div_ceil(tile::ROWS), tile::ROWS, rows * 2 * width * cols);
        let strips = (
            Strips::new(gate.shape(rows, width), width, cut),
            Strips::new(up.shape(rows, width), width, cut),
        );
        let [gate_task, up_task, ..] = tasks(&[ffn.gate, ffn.up], inputs, group_sums);
        let (gate_task, up_task) = (gate_task.expect("the first"), up_task.expect("the second"));
        self.pool.run(strips, |thread, (mut gate, mut up)| {
            let own = &mut lock(&threads[thread]);
            self.strip(gate_task, inputs, own, &mut gate);
            self.strip(up_task, inputs, own, &mut up);
            for row in 0..rows {
                self.kernels.gate(ffn.activation, gate.row(row), up.row(row));
            }
        });
        self.profile.note(start, || Call {
            shape: Some([cols, 2 * width]),
            bytes: ffn.gate.byte_len() + ffn.up.byte_len(),
            macs: 2 * rows * width * cols,
            ..Call::of_rows("gate and up", rows)
        });
    }

    /// `gate = activation(gate) * (up · inputs)` of one token, from the rows of `up` that have a live
    /// gate.
    #[allow(clippy::too_many_arguments)] // a part of `gated_ffn`
    fn live_rows(
        &self,
        ffn: Ffn<'_>,
        matrix: Runs<'_>,
        inputs: Inputs<'_>,
        planes: &[i8],
        threads: &[Mutex<ThreadScratch>],
        gate: &mut Buffer,
        up: &mut Buffer,
    ) {
        let (start, skipped) = (self.profile.start(), AtomicUsize::new(0));
        let (width, cols) = (ffn.up.rows(), ffn.up.cols());
        let cut = self.bands(width.div_ceil(tile::ROWS), tile::ROWS, width * cols);
        let strips = (
            Strips::new(gate.shape(1, width), width, cut),
            Strips::new(up.shape(1, width), width, cut),
        );
        self.pool.run(strips, |thread, (mut gate, mut up)| {
            let own = &mut lock(&threads[thread]);
            let dead = self.up_rows(ffn, matrix, inputs, planes, own, gate.row(0), &mut up);
            skipped.fetch_add(dead, Ordering::Relaxed);
            self.kernels.gate(ffn.activation, gate.row(0), up.row(0));
        });
        self.profile.note(start, || {
            let live = width - skipped.into_inner();
            Call {
                shape: Some([cols, width]),
                bytes: ffn.up.byte_len() / width * live,
                macs: live * cols,
                ..Call::of_rows("live rows", 1)
            }
        });
    }

    /// Rows of `up` by themselves for one token: those with a live gate, or all of the strip. What
    /// the others get is of no use. Returns how many were left out.
    #[allow(clippy::too_many_arguments)] // a part of a closure
    fn up_rows(
        &self,
        ffn: Ffn<'_>,
        matrix: Runs<'_>,
        inputs: Inputs<'_>,
        planes: &[i8],
        own: &mut ThreadScratch,
        gate: &[f32],
        up: &mut Strip<'_>,
    ) -> usize {
        let rows = up.columns();
        let ThreadScratch { live_rows, row_order, live_sums, row_sums: sums, .. } = own;
        let first = rows.start as u32;
        // Room for all rows: whichever part a thread gets later, it need not grow.
        let all = ffn.up.rows();
        let list = at_least(live_rows, all);
        let mut live = rows.len();
        if self.shortcuts.sparsity && ffn.activation == Activation::Relu2 {
            live = 0;
            for (row, &gate) in (first..).zip(gate) {
                list[live] = row;
                // A NaN is not at most zero, and stays.
                let dead = gate <= 0.0;
                live += usize::from(!dead);
            }
            count(&self.counts.up_rows, rows.len());
            if live * 100 < rows.len() * MOST_LIVE_ROWS {
                count(&self.counts.up_rows_skipped, rows.len() - live);
            } else {
                live = rows.len();
            }
        }
        let order = &mut at_least(row_order, all)[..live];
        if live == rows.len() {
            order.iter_mut().zip(first..).for_each(|(row, next)| *row = next);
        } else {
            take_turns(&list[..live], order);
        }
        let list = &*order;
        let acc = &mut at_least(live_sums, all)[..live];
        self.kernels.ternary_rows(matrix, planes, list, acc);
        let QuantizedRow { scale, sum } = inputs.rows[0];
        let sums = &mut at_least(sums, all)[..rows.len()];
        sums.fill(0);
        for (&row, &acc) in list.iter().zip(&*acc) {
            // A code is a weight plus 1.
            sums[(row - first) as usize] = acc - sum;
        }
        let left_out = sums.len() - live;
        self.kernels.scale_outputs(sums, scale, ffn.up.output_scale(rows), up.row(0));
        left_out
    }

    /// `down` of one token from the columns that meet an input that is not zero.
    fn down_columns(
        &self,
        down: &Linear,
        matrix: Runs<'_>,
        inputs: Inputs<'_>,
        room: &mut Vec<(u32, i8)>,
        threads: &[Mutex<ThreadScratch>],
        out: &mut Buffer,
    ) {
        let start = self.profile.start();
        let height = matrix.codes.per_byte() * matrix.len;
        let columns = &inputs.quantized[..down.cols()];
        // Each part waits for memory when it begins, so these are fewer than elsewhere.
        let parts = self.parts(height * columns.len()).div_ceil(2);
        let share = columns.len().div_ceil(parts);
        let lists = Chunks::new(at_least(room, columns.len()), share);
        threads.iter().for_each(|own| lock(own).column_sums.clear());
        self.pool.run(lists, |thread, (part, list)| {
            let ThreadScratch { live_columns, narrow, column_sums, .. } =
                &mut *lock(&threads[thread]);
            let live_columns = at_least(live_columns, list.len());
            let mut live = 0;
            let first = part * share;
            for (column, &q) in (first as u32..).zip(&columns[first..][..list.len()]) {
                live_columns[live] = (column, q);
                live += usize::from(q != 0);
            }
            let list = &mut list[..live];
            take_turns(&live_columns[..live], list);
            // Each thread has sums for all rows, of the columns in its parts.
            let sums = at_least(column_sums, height);
            let narrow = at_least(narrow, height);
            self.kernels.ternary_columns(matrix, list, narrow, sums);
        });
        let [first, others @ ..] = threads else { unreachable!("a pool has a thread") };
        let mut first = lock(first);
        let sums = at_least(&mut first.column_sums, height);
        for other in others {
            let other = lock(other);
            sums.iter_mut().zip(&other.column_sums).for_each(|(sum, other)| *sum += other);
        }
        let QuantizedRow { scale, sum } = inputs.rows[0];
        let sums = &mut sums[..down.rows()];
        // A code is a weight plus 1.
        sums.iter_mut().for_each(|acc| *acc -= sum);
        let scales = down.output_scale(0..down.rows());
        self.kernels.scale_outputs(sums, scale, scales, out.shape(1, down.rows()));
        self.profile.note(start, || {
            let live = columns.iter().filter(|&&q| q != 0).count();
            Call {
                shape: Some([down.cols(), down.rows()]),
                bytes: live * matrix.len,
                macs: live * down.rows(),
                ..Call::of_rows("live columns", 1)
            }
        });
    }
}

/// How many are not zero. A byte counts to 255, so that the inner loop is vector code.
fn not_zero(values: &[i8]) -> usize {
    let counts = values.chunks(255).map(|part| part.iter().map(|&q| u8::from(q != 0)).sum::<u8>());
    counts.map(usize::from).sum()
}

/// How many places of a matrix are read in turn.
const PLACES: usize = 16;

/// Orders an ascending list of runs in a matrix so that those that follow each other lie far apart: of
/// neighbours with gaps between them the hardware reads the gaps too.
fn take_turns<T: Copy>(list: &[T], out: &mut [T]) {
    let section = list.len().div_ceil(PLACES).max(1);
    let mut out = out.iter_mut();
    for i in 0..section {
        for (&run, out) in list.iter().skip(i).step_by(section).zip(&mut out) {
            *out = run;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_zero_is_counted_at_every_length() {
        for len in [0, 1, 254, 255, 256, 511, 6912] {
            assert_eq!(not_zero(&vec![-1; len]), len);
            let values: Vec<i8> = (0..len).map(|i| (i % 3) as i8 - 1).collect();
            assert_eq!(not_zero(&values), values.iter().filter(|&&value| value != 0).count());
        }
    }

    #[test]
    fn runs_that_take_turns_are_each_there_once_and_far_from_the_next() {
        for len in [0, 1, 5, 15, 16, 17, 64, 1000, 6912] {
            let list: Vec<usize> = (0..len).collect();
            let mut order = vec![usize::MAX; len];
            take_turns(&list, &mut order);
            let far = len.div_ceil(PLACES);
            assert!(order.windows(2).all(|pair| pair[0].abs_diff(pair[1]) >= far), "{order:?}");
            order.sort_unstable();
            assert_eq!(order, list);
        }
    }
}
