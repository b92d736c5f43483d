//! Operations on each row, or each element, by itself.

use bitnet_core::backend::Activation;

use super::{Compute, at_least, lock};
use crate::buffer::Buffer;
use crate::profile::Call;
use crate::threads::Chunks;

impl Compute {
    /// Elements of a part of whole rows.
    fn part_of_rows(&self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(self.parts(rows * cols)).max(1) * cols.max(1)
    }

    pub(crate) fn rms_norm(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut Buffer,
    ) {
        let start = self.profile.start();
        let cols = x.cols();
        let part = self.part_of_rows(rows, cols);
        let (x, out) = (x.rows(rows), out.shape(rows, cols));
        self.pool.run(Chunks::new(out, part), |_, (index, out)| {
            for (x, out) in x[index * part..].chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
                self.kernels.rms_norm(x, weight, eps, out);
            }
        });
        self.profile.note(start, || Call::of_rows("norm", rows));
    }

    pub(crate) fn head_norm(
        &self,
        x: &mut Buffer,
        rows: usize,
        weight: &[f32],
        eps: f32,
        head_size: usize,
    ) {
        let start = self.profile.start();
        let part = self.part_of_rows(rows, x.cols());
        assert!(x.cols().is_multiple_of(head_size), "rows are not whole heads of {head_size}");
        let scratch = self.scratch();
        self.pool.run(Chunks::new(x.rows_mut(rows), part), |thread, (_, rows)| {
            let mut own = lock(&scratch.threads[thread]);
            let copy = at_least(&mut own.floats, head_size);
            for head in rows.chunks_exact_mut(head_size) {
                copy.copy_from_slice(head);
                self.kernels.rms_norm(copy, weight, eps, head);
            }
        });
        self.profile.note(start, || Call::of_rows("norm of heads", rows));
    }

    pub(crate) fn rope(
        &self,
        x: &mut Buffer,
        rows: usize,
        head_size: usize,
        cos: &Buffer,
        sin: &Buffer,
    ) {
        let start = self.profile.start();
        let cols = x.cols();
        let part = self.part_of_rows(rows, cols);
        assert!(cols.is_multiple_of(head_size), "rows are not whole heads of {head_size}");
        self.pool.run(Chunks::new(x.rows_mut(rows), part), |_, (index, x)| {
            for (row, x) in (index * part / cols..).zip(x.chunks_exact_mut(cols)) {
                self.kernels.rope(x, head_size, cos.row(row), sin.row(row));
            }
        });
        self.profile.note(start, || Call::of_rows("rope", rows));
    }

    pub(crate) fn gate(&self, gate: &mut Buffer, up: &Buffer, rows: usize, activation: Activation) {
        let start = self.profile.start();
        assert_eq!(gate.cols(), up.cols());
        let up = up.rows(rows);
        let part = up.len().div_ceil(self.parts(up.len())).max(1);
        self.pool.run(Chunks::new(gate.rows_mut(rows), part), |_, (index, gate)| {
            self.kernels.gate(activation, gate, &up[index * part..][..gate.len()]);
        });
        self.profile.note(start, || Call::of_rows("gate", rows));
    }

    pub(crate) fn add(&self, x: &mut Buffer, y: &Buffer, rows: usize) {
        let start = self.profile.start();
        assert_eq!(x.cols(), y.cols());
        let y = y.rows(rows);
        let part = y.len().div_ceil(self.parts(y.len())).max(1);
        self.pool.run(Chunks::new(x.rows_mut(rows), part), |_, (index, x)| {
            self.kernels.add(x, &y[index * part..][..x.len()]);
        });
        self.profile.note(start, || Call::of_rows("add", rows));
    }
}
