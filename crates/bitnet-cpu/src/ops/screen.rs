//! The screened output head: upper bounds of all logits from a reduced-precision copy, in full the
//! rows that promise most, and then those whose bounds reach what these have shown to be needed.

use std::sync::Mutex;

use bitnet_core::screen::ROWS;
use bitnet_core::{Candidate, Keep, Pick, Screen, Tensor};
use bitnet_quant::screen::Input;

use super::{Compute, ThreadScratch, at_least, count, lock};
use crate::arch::HeadRow;
use crate::buffer::Buffer;
use crate::profile::Call;
use crate::threads::{Chunks, Strips};

#[derive(Default)]
pub(super) struct Scratch {
    /// Of each pick.
    inputs: Vec<Input>,
    /// Whether a pick's logits have bounds: they have none if its state is not finite.
    bounded: Vec<bool>,
    /// Upper bounds of the logits `[bands, picks]`.
    upper: Vec<[f32; ROWS]>,
    /// Bounds or logits that a threshold is chosen from.
    rivals: Vec<f32>,
    /// The rows that promise most.
    seeds: Vec<Candidate>,
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
        let super::Scratch { inputs: room, screen: own, threads, .. } = &mut *scratch;
        let states = at_least(&mut room.floats, picks.len() * cols);
        let inputs = at_least(&mut own.inputs, picks.len());
        own.bounded.clear();
        for ((pick, state), input) in picks.iter().zip(states.chunks_exact_mut(cols)).zip(inputs) {
            self.kernels.rms_norm(x.row(pick.row), weight, eps, state);
            own.bounded.push(input.set(state, screen));
        }
        self.upper_bounds(own, picks.len(), screen);
        for (i, ((pick, state), out)) in
            picks.iter().zip(states.chunks_exact(cols)).zip(outs).enumerate()
        {
            out.clear();
            own.seeds.clear();
            if own.bounded[i] {
                let mut bounds =
                    Bounds { upper: &mut own.upper, picks: picks.len(), index: i, vocabulary };
                bounds.seeds(pick, &mut own.rivals, &mut own.seeds);
                self.compute(table, state, threads, &mut own.seeds);
                own.rivals.clear();
                own.rivals.extend(own.seeds.iter().map(|seed| seed.logit));
                bounds.survivors(pick, pick.keep.threshold(&mut own.rivals), out);
            } else {
                out.extend((0..vocabulary as u32).map(|id| Candidate { id, logit: 0.0 }));
            }
            self.compute(table, state, threads, out);
            count(&self.counts.head_rows, vocabulary);
            count(&self.counts.head_rows_rescored, own.seeds.len() + out.len());
        }
    }

    /// Upper bounds of every logit of every pick. Each band of the screen is read from memory once.
    fn upper_bounds(&self, scratch: &mut Scratch, picks: usize, screen: &Screen) {
        let start = self.profile.start();
        let Scratch { inputs, upper, .. } = scratch;
        let bands = screen.rows().div_ceil(ROWS);
        upper.resize(bands * picks, [0.0; ROWS]);
        let inputs = &inputs[..picks];
        let unit = picks * ROWS;
        let cut = self.bands(bands, unit, screen.rows() * screen.cols());
        let strips = Strips::new(upper.as_flattened_mut(), bands * unit, cut);
        self.pool.run(strips, |_, mut strip| {
            let first = strip.columns().start / unit;
            let (upper, _) = strip.row(0).as_chunks_mut();
            self.kernels.upper_bounds(screen, first, inputs, upper);
        });
        self.profile.note(start, || Call {
            bytes: screen.data().len(),
            macs: picks * screen.rows() * screen.cols(),
            ..Call::of_rows("screen of head", picks)
        });
    }

    /// The logits of candidates by the head's own recipe.
    fn compute(
        &self,
        table: &Tensor,
        state: &[f32],
        threads: &[Mutex<ThreadScratch>],
        candidates: &mut [Candidate],
    ) {
        let (start, count) = (self.profile.start(), candidates.len());
        let part = candidates.len().div_ceil(self.parts(candidates.len() * state.len())).max(1);
        self.pool.run(Chunks::new(candidates, part), |thread, (_, candidates)| {
            let mut own = lock(&threads[thread]);
            let decoded = at_least(&mut own.floats, state.len());
            let bytes = |candidate: &Candidate| table.row(candidate.id as usize);
            let mut left = candidates;
            while let [candidate, rest @ ..] = left {
                let next = bytes(rest.first().unwrap_or(candidate));
                let bytes = bytes(candidate);
                let row = HeadRow { dtype: table.dtype(), bytes, next, inputs: state };
                self.kernels.head_row(row, decoded, std::slice::from_mut(&mut candidate.logit));
                left = rest;
            }
        });
        self.profile.note(start, || Call {
            bytes: count * table.row(0).len(),
            macs: count * state.len(),
            ..Call::of_rows("rows of head", 1)
        });
    }
}

/// The upper bounds of one pick.
struct Bounds<'a> {
    upper: &'a mut [[f32; ROWS]],
    picks: usize,
    index: usize,
    vocabulary: usize,
}

impl Bounds<'_> {
    fn bands(&self) -> impl Iterator<Item = &[f32; ROWS]> {
        self.upper.iter().skip(self.index).step_by(self.picks)
    }

    /// Gives a bound to the ids that are computed whatever theirs is.
    fn set_exact_ids(&mut self, pick: &Pick<'_>, bound: f32) {
        for id in pick.exact_ids.iter().map(|&id| id as usize).filter(|&id| id < self.vocabulary) {
            self.upper[id / ROWS * self.picks + self.index][id % ROWS] = bound;
        }
    }

    /// The ids whose bounds reach `threshold`, ascending; not those without one.
    fn reaching(&self, threshold: f32, out: &mut Vec<Candidate>) {
        for (first, upper) in (0u32..).step_by(ROWS).zip(self.bands()) {
            if upper.iter().any(|&upper| upper >= threshold) {
                let alive = (first..).zip(upper).filter(|&(_, &upper)| upper >= threshold);
                let alive = alive.filter(|&(id, &upper)| {
                    (id as usize) < self.vocabulary && upper > f32::NEG_INFINITY
                });
                out.extend(alive.map(|(id, _)| Candidate { id, logit: 0.0 }));
            }
        }
    }

    /// At least as many ids as say what the others must reach, those of the largest bounds. The
    /// logits of any so many rows would do: the larger they are, the more rows they rule out.
    fn seeds(&mut self, pick: &Pick<'_>, rivals: &mut Vec<f32>, out: &mut Vec<Candidate>) {
        let last = self.vocabulary.div_ceil(ROWS) - 1;
        let rows = self.vocabulary - last * ROWS;
        self.upper[last * self.picks + self.index][rows..].fill(f32::NEG_INFINITY);
        self.set_exact_ids(pick, f32::NEG_INFINITY);
        let needed = pick.keep.rivals();
        rivals.clear();
        if needed > last / 8 {
            self.bands().for_each(|band| rivals.extend(band));
        } else {
            // Of each band the largest: for a few of many it hardly matters that a band may have
            // two.
            rivals.extend(self.bands().map(|band| {
                band.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
            }));
        }
        self.reaching(Keep::Largest(needed).threshold(rivals), out);
    }

    fn survivors(&mut self, pick: &Pick<'_>, threshold: f32, out: &mut Vec<Candidate>) {
        self.set_exact_ids(pick, f32::INFINITY);
        self.reaching(threshold, out);
    }
}
