//! The screened output head: upper bounds of all logits from a reduced-precision copy, in full the
//! rows that promise most, and then those whose bounds reach what these have shown to be needed.

use std::ops::Range;
use std::sync::Mutex;

use bitnet_core::screen::ROWS;
use bitnet_core::{Candidate, Keep, Pick, Screen, Tensor};
use bitnet_quant::screen::Input;

use super::{Compute, ThreadScratch, at_least, count, lock};
use crate::arch::{HeadRow, prefetch, prefetch_pages};
use crate::buffer::Buffer;
use crate::profile::Call;
use crate::threads::{Chunks, Strips};

/// How many rows ahead the lines of one are asked for; and how many its pages, whose addresses have to
/// be looked up first.
const LINES_AHEAD: usize = 2;
const PAGES_AHEAD: usize = 8;

/// How many bands ahead the bounds of one are asked for.
const BANDS_AHEAD: usize = 16;

#[derive(Default)]
pub(super) struct Scratch {
    /// Of each pick.
    inputs: Vec<Input>,
    /// Whether a pick's logits have bounds: they have none if its state is not finite.
    bounded: Vec<bool>,
    /// Upper bounds of the logits `[bands, picks]`.
    upper: Vec<[f32; ROWS]>,
    /// The largest of each band's `[picks, bands]`.
    largest: Vec<f32>,
    /// Bands with bounds that are large enough.
    reached: Vec<u32>,
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
                let Scratch { upper, largest, reached, rivals, seeds, .. } = own;
                let bands = vocabulary.div_ceil(ROWS);
                let largest = &mut largest[i * bands..][..bands];
                let mut bounds =
                    Bounds { upper, largest, reached, picks: picks.len(), index: i, vocabulary };
                bounds.seeds(pick, rivals, seeds);
                self.compute(table, state, threads, seeds);
                rivals.clear();
                rivals.extend(seeds.iter().map(|seed| seed.logit));
                bounds.survivors(pick, pick.keep.threshold(rivals), out);
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
        let Scratch { inputs, upper, largest, .. } = scratch;
        let bands = screen.rows().div_ceil(ROWS);
        upper.resize(bands * picks, [0.0; ROWS]);
        largest.resize(bands * picks, 0.0);
        let inputs = &inputs[..picks];
        let cut = |unit| self.bands(bands, unit, screen.rows() * screen.cols());
        let unit = picks * ROWS;
        let strips = (
            Strips::new(upper.as_flattened_mut(), bands * unit, cut(unit)),
            Strips::new(largest, bands, cut(1)),
        );
        self.pool.run(strips, |_, (mut upper, mut largest)| {
            let first = upper.columns().start / unit;
            let (upper, _) = upper.row(0).as_chunks_mut();
            self.kernels.upper_bounds(screen, first, inputs, upper);
            for pick in 0..picks {
                let upper = upper.iter().skip(pick).step_by(picks);
                for (largest, upper) in largest.row(pick).iter_mut().zip(upper) {
                    *largest = largest_of(upper);
                }
            }
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
            let last = candidates.len() - 1;
            for i in 0..candidates.len() {
                let bytes = |i: usize| table.row(candidates[i.min(last)].id as usize);
                prefetch_pages(bytes(i + PAGES_AHEAD));
                let (dtype, next) = (table.dtype(), bytes(i + LINES_AHEAD));
                let row = HeadRow { dtype, bytes: bytes(i), next, inputs: state };
                self.kernels.head_row(row, decoded, std::slice::from_mut(&mut candidates[i].logit));
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
    /// Of all picks `[bands, picks]`.
    upper: &'a mut [[f32; ROWS]],
    /// The largest of each band.
    largest: &'a mut [f32],
    /// Room for the numbers of bands.
    reached: &'a mut Vec<u32>,
    picks: usize,
    index: usize,
    vocabulary: usize,
}

impl Bounds<'_> {
    fn band(&self, band: usize) -> &[f32; ROWS] {
        &self.upper[band * self.picks + self.index]
    }

    /// Gives a bound to some rows of a band.
    fn set(&mut self, band: usize, rows: Range<usize>, bound: f32) {
        let upper = &mut self.upper[band * self.picks + self.index];
        upper[rows].fill(bound);
        self.largest[band] = largest_of(upper);
    }

    /// Gives a bound to the ids that are computed whatever theirs is.
    fn set_exact_ids(&mut self, pick: &Pick<'_>, bound: f32) {
        for id in pick.exact_ids.iter().map(|&id| id as usize) {
            if id < self.vocabulary {
                self.set(id / ROWS, id % ROWS..id % ROWS + 1, bound);
            }
        }
    }

    /// The ids whose bounds reach `threshold`, ascending; not those without one.
    fn reaching(&mut self, threshold: f32, out: &mut Vec<Candidate>) {
        // Without jumps, which no processor could foresee.
        self.reached.resize(self.largest.len() + 1, 0);
        let mut count = 0;
        for (band, &largest) in (0..).zip(&*self.largest) {
            self.reached[count] = band;
            count += usize::from(largest >= threshold);
        }
        let reached = &self.reached[..count];
        for (i, &band) in reached.iter().enumerate() {
            // Other threads have written most of them.
            let next = reached.get(i + BANDS_AHEAD).unwrap_or(&band);
            prefetch(self.band(*next as usize));
            let reaches = |upper: f32| upper >= threshold && upper > f32::NEG_INFINITY;
            let mut rows = [0u32; ROWS];
            for (row, (bit, &upper)) in rows.iter_mut().zip(self.band(band as usize)).enumerate() {
                *bit = u32::from(reaches(upper)) << row;
            }
            let mut rows = rows.into_iter().fold(0, |rows, bit| rows | bit);
            while rows != 0 {
                let id = band * ROWS as u32 + rows.trailing_zeros();
                out.push(Candidate { id, logit: 0.0 });
                rows &= rows - 1;
            }
        }
    }

    /// At least as many ids as say what the others must reach, those of the largest bounds. The
    /// logits of any so many rows would do: the larger they are, the more rows they rule out.
    fn seeds(&mut self, pick: &Pick<'_>, rivals: &mut Vec<f32>, out: &mut Vec<Candidate>) {
        let last = self.vocabulary.div_ceil(ROWS) - 1;
        self.set(last, self.vocabulary - last * ROWS..ROWS, f32::NEG_INFINITY);
        self.set_exact_ids(pick, f32::NEG_INFINITY);
        let needed = pick.keep.rivals();
        rivals.clear();
        if needed > last / 8 {
            (0..=last).for_each(|band| rivals.extend(self.band(band)));
        } else {
            // Of each band the largest: for a few of many it hardly matters that a band may have
            // two.
            rivals.extend_from_slice(self.largest);
        }
        self.reaching(Keep::Largest(needed).threshold(rivals), out);
    }

    fn survivors(&mut self, pick: &Pick<'_>, threshold: f32, out: &mut Vec<Candidate>) {
        self.set_exact_ids(pick, f32::INFINITY);
        self.reaching(threshold, out);
    }
}

/// The largest bound of a band; a NaN is passed over.
fn largest_of(upper: &[f32; ROWS]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 4];
    for four in upper.as_chunks::<4>().0 {
        lanes.iter_mut().zip(four).for_each(|(lane, &bound)| *lane = larger(*lane, bound));
    }
    let [a, b, c, d] = lanes;
    larger(larger(a, b), larger(c, d))
}
