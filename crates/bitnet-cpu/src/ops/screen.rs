//! The screened output head: bounds of all logits from a reduced-precision copy, then the rows that
//! can still matter in full.

use bitnet_core::screen::ROWS;
use bitnet_core::{Candidate, Keep, Pick, Screen, Tensor};
use bitnet_quant::screen::Input;

use super::{Compute, at_least, count, lock};
use crate::arch::HeadRow;
use crate::buffer::Buffer;
use crate::threads::Chunks;

#[derive(Default)]
pub(super) struct Scratch {
    /// Of each pick.
    inputs: Vec<Input>,
    /// Whether a pick's logits have bounds: they have none if its state is not finite.
    bounded: Vec<bool>,
    /// Bounds of the logits `[bands, picks]`.
    lower: Vec<[f32; ROWS]>,
    upper: Vec<[f32; ROWS]>,
    /// What the threshold is chosen from.
    rivals: Vec<f32>,
}

impl Compute {
    pub(crate) fn screened_head(
        &self,
        x: &Buffer,
        picks: &[Pick<'_>],
        (weight, eps): (&[f32], f32),
        table: &Tensor,
        screen: &Screen,
        outs: &mut [Vec<Candidate>],
    ) {
        let (vocabulary, cols) = (table.rows(), table.cols());
        assert_eq!(x.cols(), cols, "width of the head");
        assert_eq!((screen.rows(), screen.cols()), (vocabulary, cols), "shape of the screen");
        assert_eq!(picks.len(), outs.len());
        let mut scratch = self.scratch();
        let scratch = &mut *scratch;
        let states = at_least(&mut scratch.inputs.floats, picks.len() * cols);
        let own = &mut scratch.screen;
        let inputs = at_least(&mut own.inputs, picks.len());
        own.bounded.clear();
        for ((pick, state), input) in picks.iter().zip(states.chunks_exact_mut(cols)).zip(inputs) {
            self.kernels.rms_norm(x.row(pick.row), weight, eps, state);
            own.bounded.push(input.set(state));
        }
        self.bounds(own, picks.len(), screen);
        for (i, ((pick, state), out)) in
            picks.iter().zip(states.chunks_exact(cols)).zip(outs).enumerate()
        {
            out.clear();
            if own.bounded[i] {
                own.survivors(i, picks.len(), pick, vocabulary, out);
            } else {
                out.extend((0..vocabulary as u32).map(|id| Candidate { id, logit: 0.0 }));
            }
            let part = out.len().div_ceil(self.parts(out.len() * cols)).max(1);
            let (survivors, threads) = (out.len(), &scratch.threads);
            self.pool.run(Chunks::new(out, part), |thread, (_, candidates)| {
                let mut own = lock(&threads[thread]);
                let decoded = at_least(&mut own.floats, cols);
                for candidate in candidates {
                    let bytes = table.row(candidate.id as usize);
                    let row = HeadRow { dtype: table.dtype(), bytes, inputs: state };
                    self.kernels.head_row(row, decoded, std::slice::from_mut(&mut candidate.logit));
                }
            });
            count(&self.counts.head_rows, vocabulary);
            count(&self.counts.head_rows_rescored, survivors);
        }
    }

    /// Bounds of every logit of every pick. Each band of the screen is read from memory once.
    fn bounds(&self, scratch: &mut Scratch, picks: usize, screen: &Screen) {
        let Scratch { inputs, bounded, lower, upper, .. } = scratch;
        let bands = screen.rows().div_ceil(ROWS);
        lower.resize(bands * picks, [0.0; ROWS]);
        upper.resize(bands * picks, [0.0; ROWS]);
        let part = bands.div_ceil(self.parts(screen.rows() * screen.cols())).max(1);
        let (inputs, bounded) = (&inputs[..picks], &*bounded);
        let places = (Chunks::new(lower, part * picks), Chunks::new(upper, part * picks));
        self.pool.run(places, |_, ((index, lower), (_, upper))| {
            let places = lower.chunks_exact_mut(picks).zip(upper.chunks_exact_mut(picks));
            for (band, (lower, upper)) in (index * part..).zip(places) {
                let band = screen.band(band);
                let picks = inputs.iter().zip(bounded).zip(lower.iter_mut().zip(upper));
                for ((input, _), (lower, upper)) in picks.filter(|((_, bounded), _)| **bounded) {
                    let sums = self.kernels.screen_sums(band.tiles, &input.planes);
                    input.bounds(&band, &sums, lower, upper);
                }
            }
        });
    }
}

impl Scratch {
    /// The ids whose upper bounds reach what `pick` asks for, ascending.
    fn survivors(
        &mut self,
        index: usize,
        picks: usize,
        pick: &Pick<'_>,
        vocabulary: usize,
        out: &mut Vec<Candidate>,
    ) {
        let Scratch { lower, upper, rivals, .. } = self;
        let place = |id: usize| (id / ROWS * picks + index, id % ROWS);
        for id in vocabulary..vocabulary.next_multiple_of(ROWS) {
            let (band, row) = place(id);
            lower[band][row] = f32::NEG_INFINITY;
            upper[band][row] = f32::NEG_INFINITY;
        }
        for id in pick.exact_ids.iter().map(|&id| id as usize).filter(|&id| id < vocabulary) {
            let (band, row) = place(id);
            lower[band][row] = f32::NEG_INFINITY;
            upper[band][row] = f32::INFINITY;
        }
        // Of each band the largest lower bound: so many different rows reach at least that, and for
        // a few of many it hardly matters that a band may have two.
        let bands = vocabulary.div_ceil(ROWS);
        rivals.clear();
        let own = lower.iter().skip(index).step_by(picks);
        match pick.keep {
            Keep::Largest(k) if k > bands / 8 => own.for_each(|band| rivals.extend(band)),
            _ => rivals.extend(own.map(|band| {
                band.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
            })),
        }
        let threshold = pick.keep.threshold(rivals);
        let own = upper.iter().skip(index).step_by(picks);
        for (first, upper) in (0u32..).step_by(ROWS).zip(own) {
            if upper.iter().any(|&upper| upper >= threshold) {
                let alive = (first..).zip(upper).filter(|&(_, &upper)| upper >= threshold);
                let alive = alive.filter(|&(id, _)| (id as usize) < vocabulary);
                out.extend(alive.map(|(id, _)| Candidate { id, logit: 0.0 }));
            }
        }
    }
}
