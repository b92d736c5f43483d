//! f32 activations in host memory.

/// Rows of f32 activations; see [`Backend`](bitnet_core::backend::Backend).
#[derive(Debug)]
pub struct Buffer {
    values: Vec<f32>,
    cols: usize,
}

impl Buffer {
    pub(crate) fn new(elements: usize, cols: usize) -> Self {
        Buffer { values: vec![0.0; elements], cols }
    }

    /// Elements per row, as the last writer left it.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The first `rows` rows.
    pub(crate) fn rows(&self, rows: usize) -> &[f32] {
        &self.values[..rows * self.cols]
    }

    /// The first `rows` rows, to change in place.
    pub(crate) fn rows_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.values[..rows * self.cols]
    }

    /// One row.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }

    /// Room for rows that are about to be written, which sets their width.
    pub(crate) fn shape(&mut self, rows: usize, cols: usize) -> &mut [f32] {
        assert!(rows * cols <= self.values.len(), "buffer too small for {rows} x {cols}");
        self.cols = cols;
        &mut self.values[..rows * cols]
    }
}
