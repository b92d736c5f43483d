//! The screened output head: bounds of all logits from a reduced-precision copy, then the rows that
//! can still matter in full.

use bitnet_core::screen::ROWS;
use bitnet_core::{Candidate, Keep, Screen, Tensor};
use bitnet_quant::screen::Input;

use super::{Compute, at_least, count, lock};
use crate::arch::HeadRow;
use crate::threads::Chunks;

#[derive(Default)]
pub(super) struct Scratch {
    input: Input,
    /// Bounds of the logits of whole bands.
    lower: Vec<[f32; ROWS]>,
    upper: Vec<[f32; ROWS]>,
    /// What the threshold is chosen from.
    rivals: Vec<f32>,
}

impl Compute {
    #[allow(clippy::too_many_arguments)] // those of the operation
    pub(crate) fn screened_head(
        &self,
        state: &[f32],
        weight: &[f32],
        eps: f32,
        table: &Tensor,
        screen: &Screen,
        keep: Keep,
        exact_ids: &[u32],
        out: &mut Vec<Candidate>,
    ) {
        let (vocabulary, cols) = (table.rows(), table.cols());
        assert_eq!(state.len(), cols, "width of the head");
        assert_eq!((screen.rows(), screen.cols()), (vocabulary, cols), "shape of the screen");
        let mut scratch = self.scratch();
        let scratch = &mut *scratch;
        let input = at_least(&mut scratch.inputs.floats, cols);
        self.kernels.rms_norm(state, weight, eps, input);
        let own = &mut scratch.screen;
        out.clear();
        if own.input.set(input) {
            let threshold = self.bounds(own, screen, keep, exact_ids);
            for (first, upper) in (0..).step_by(ROWS).zip(&own.upper) {
                if upper.iter().any(|&upper| upper >= threshold) {
                    let rows = (first..vocabulary as u32).zip(upper);
                    let alive = rows.filter(|&(_, &upper)| upper >= threshold);
                    out.extend(alive.map(|(id, _)| Candidate { id, logit: 0.0 }));
                }
            }
        } else {
            out.extend((0..vocabulary as u32).map(|id| Candidate { id, logit: 0.0 }));
        }
        let part = out.len().div_ceil(self.parts(out.len() * cols)).max(1);
        let (input, threads) = (&*input, &scratch.threads);
        self.pool.run(Chunks::new(out, part), |thread, (_, candidates)| {
            let mut own = lock(&threads[thread]);
            let decoded = at_least(&mut own.floats, cols);
            for candidate in candidates {
                let bytes = table.row(candidate.id as usize);
                let row = HeadRow { dtype: table.dtype(), bytes, inputs: input };
                self.kernels.head_row(row, decoded, std::slice::from_mut(&mut candidate.logit));
            }
        });
        count(&self.counts.head_rows, vocabulary);
        count(&self.counts.head_rows_rescored, out.len());
    }

    /// Bounds of every logit, and the number that an upper bound must reach for its row to matter.
    fn bounds(&self, scratch: &mut Scratch, screen: &Screen, keep: Keep, exact_ids: &[u32]) -> f32 {
        let Scratch { input, lower, upper, rivals } = scratch;
        let vocabulary = screen.rows();
        let bands = vocabulary.div_ceil(ROWS);
        lower.resize(bands, [0.0; ROWS]);
        upper.resize(bands, [0.0; ROWS]);
        let part = bands.div_ceil(self.parts(vocabulary * screen.cols())).max(1);
        let input = &*input;
        let places = (Chunks::new(lower, part), Chunks::new(upper, part));
        self.pool.run(places, |_, ((index, lower), (_, upper))| {
            for (band, (lower, upper)) in (index * part..).zip(lower.iter_mut().zip(upper)) {
                let band = screen.band(band);
                let sums = self.kernels.screen_sums(band.tiles, &input.planes);
                input.bounds(&band, &sums, lower, upper);
            }
        });
        let (lower, upper) = (lower.as_flattened_mut(), upper.as_flattened_mut());
        lower[vocabulary..].fill(f32::NEG_INFINITY);
        upper[vocabulary..].fill(f32::NEG_INFINITY);
        for &id in exact_ids.iter().filter(|&&id| (id as usize) < vocabulary) {
            lower[id as usize] = f32::NEG_INFINITY;
            upper[id as usize] = f32::INFINITY;
        }
        // Of each band the largest lower bound: so many different rows reach at least that, and for
        // a few of many it hardly matters that a band may have two.
        let group = match keep {
            Keep::Largest(k) if k > bands / 8 => 1,
            _ => ROWS,
        };
        rivals.clear();
        let largest =
            |rows: &[f32]| rows.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        rivals.extend(lower.chunks(group).map(largest));
        keep.threshold(rivals)
    }
}
