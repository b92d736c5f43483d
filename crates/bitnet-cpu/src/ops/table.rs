//! Embedding look-up and the output head.

use bitnet_core::Tensor;

use super::{Compute, at_least, lock};
use crate::arch::HeadRow;
use crate::buffer::Buffer;
use crate::profile::Call;
use crate::threads::{Chunks, Cut, Strips};

/// Tokens whose inputs stay in the cache while the head's rows pass by.
const TOKENS: usize = 16;

impl Compute {
    pub(crate) fn embed(&self, table: &Tensor, tokens: &[u32], scale: f32, out: &mut Buffer) {
        let start = self.profile.start();
        let cols = table.cols();
        let part = tokens.len().div_ceil(self.parts(tokens.len() * cols)).max(1);
        let out = out.shape(tokens.len(), cols);
        self.pool.run(Chunks::new(out, part * cols), |_, (index, out)| {
            for (&token, out) in tokens[index * part..].iter().zip(out.chunks_exact_mut(cols)) {
                self.kernels.decode(table.dtype(), table.row(token as usize), out);
                if scale != 1.0 {
                    out.iter_mut().for_each(|value| *value *= scale);
                }
            }
        });
        self.profile.note(start, || Call {
            bytes: tokens.len() * table.row(0).len(),
            ..Call::of_rows("embedding", tokens.len())
        });
    }

    pub(crate) fn head(
        &self,
        x: &Buffer,
        picks: &[usize],
        weight: &[f32],
        eps: f32,
        table: &Tensor,
        out: &mut Buffer,
    ) {
        let (vocabulary, cols) = (table.rows(), table.cols());
        assert_eq!(x.cols(), cols, "width of the head");
        if picks.is_empty() {
            return;
        }
        let start = self.profile.start();
        let mut scratch = self.scratch();
        let scratch = &mut *scratch;
        let inputs = at_least(&mut scratch.inputs.floats, picks.len() * cols);
        for (&pick, input) in picks.iter().zip(inputs.chunks_exact_mut(cols)) {
            self.kernels.rms_norm(x.row(pick), weight, eps, input);
        }
        let (inputs, threads) = (&*inputs, &scratch.threads);
        let strip = vocabulary.div_ceil(self.parts(vocabulary * cols)).max(1);
        let out = out.shape(picks.len(), vocabulary);
        self.pool.run(Strips::new(out, vocabulary, Cut::Even(strip)), |thread, mut strip| {
            let mut own = lock(&threads[thread]);
            let decoded = at_least(&mut own.floats, cols);
            let mut logits = [0.0; TOKENS];
            for (block, inputs) in inputs.chunks(TOKENS * cols).enumerate() {
                let logits = &mut logits[..inputs.len() / cols];
                for (column, token) in strip.columns().enumerate() {
                    let bytes = table.row(token);
                    let next = table.row((token + 1).min(vocabulary - 1));
                    let row = HeadRow { dtype: table.dtype(), bytes, next, inputs };
                    self.kernels.head_row(row, decoded, logits);
                    for (i, &logit) in logits.iter().enumerate() {
                        strip.row(block * TOKENS + i)[column] = logit;
                    }
                }
            }
        });
        self.profile.note(start, || Call {
            bytes: table.data().len(),
            macs: picks.len() * vocabulary * cols,
            ..Call::of_rows("head in full", picks.len())
        });
    }
}
