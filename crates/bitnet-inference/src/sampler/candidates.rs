//! The tokens still in play for one position, and the arithmetic that all filters share.

use std::ops::Range;

use bitnet_core::Candidate;

use super::SampleError;

/// Ascending ranks are the one order of candidates: logit descending, then id ascending. Not
/// for NaN. An integer sorts several times faster than two comparisons do.
fn rank(candidate: &Candidate) -> u64 {
    u64::from(descending(candidate)) << 32 | u64::from(candidate.id)
}

/// The logit as an integer that falls as it rises.
fn descending(candidate: &Candidate) -> u32 {
    // The sum turns -0 into +0, so that the two tie.
    let bits = (candidate.logit + 0.0).to_bits();
    if bits >> 31 == 0 { 0x7fff_ffff - bits } else { bits }
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
enum Order {
    /// Entry `i` is token `i`.
    Vocabulary,
    /// By rank, without negative infinities.
    Ranked,
    #[default]
    Unknown,
}

/// The candidates for one position. Filters change their logits and remove some; what is left is
/// the kept set. Buffers stay for the next position.
///
/// A probability is `exp(logit - largest logit)` in f64 over the sum of these, added one by one in
/// rank order (logit descending, id ascending). So probabilities depend on the set alone, not on
/// the order in which it was handed in, and with a portable `exp` not on the platform either. No
/// logit is ever NaN or positive infinity.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    entries: Vec<Candidate>,
    order: Order,
    /// `exp(logit - largest logit)` of the entries, or empty where not computed. While it is
    /// there, the entries are ranked.
    weights: Vec<f64>,
    /// Room for the sort of a whole vocabulary.
    spare: Vec<Candidate>,
}

/// Refuses logits that no distribution can be made of.
pub(super) fn check_logit(id: u32, logit: f32) -> Result<(), SampleError> {
    // The comparison is false for NaN too.
    if logit < f32::INFINITY { Ok(()) } else { Err(SampleError::BadLogit { id, logit }) }
}

impl Candidates {
    /// Room for a vocabulary. Memory that is never touched costs nothing.
    pub(crate) fn with_capacity(vocabulary: usize) -> Self {
        Candidates {
            entries: Vec::with_capacity(vocabulary),
            order: Order::Unknown,
            weights: Vec::with_capacity(vocabulary),
            spare: Vec::with_capacity(vocabulary),
        }
    }

    /// Starts from the whole vocabulary, `logits: [vocabulary]`. Negative infinity is a token that
    /// cannot come.
    ///
    /// # Errors
    /// If there are no logits, or one is NaN or positive infinity.
    pub fn set_logits(&mut self, logits: &[f32]) -> Result<(), SampleError> {
        self.weights.clear();
        self.entries.clear();
        self.entries.extend((0..).zip(logits).map(|(id, &logit)| Candidate { id, logit }));
        self.order = Order::Vocabulary;
        self.check()
    }

    /// Starts from some tokens of the vocabulary, in any order, each at most once.
    ///
    /// # Errors
    /// If there are none, or a logit is NaN or positive infinity.
    pub fn set_candidates(&mut self, candidates: &[Candidate]) -> Result<(), SampleError> {
        self.weights.clear();
        self.entries.clear();
        self.entries.extend_from_slice(candidates);
        self.order = Order::Unknown;
        self.check()
    }

    /// Starts from tokens of the vocabulary, each at most once, with their logits in
    /// `logits: [vocabulary]`.
    ///
    /// # Errors
    /// As [`set_candidates`](Candidates::set_candidates).
    pub(super) fn set_some(
        &mut self,
        logits: &[f32],
        ids: impl Iterator<Item = u32>,
    ) -> Result<(), SampleError> {
        self.weights.clear();
        self.entries.clear();
        self.entries.extend(ids.map(|id| Candidate { id, logit: logits[id as usize] }));
        self.order = Order::Unknown;
        self.check()
    }

    fn check(&self) -> Result<(), SampleError> {
        if self.entries.is_empty() {
            return Err(SampleError::NoLogits);
        }
        self.entries.iter().try_for_each(|c| check_logit(c.id, c.logit))
    }

    /// Changes every logit. Different logits may become equal, so the order is lost.
    ///
    /// # Errors
    /// If a logit becomes NaN or positive infinity.
    pub(super) fn map(&mut self, change: impl Fn(f32) -> f32) -> Result<(), SampleError> {
        self.logits_change();
        for candidate in &mut self.entries {
            candidate.logit = change(candidate.logit);
        }
        self.check()
    }

    /// Changes the logits of the tokens named, each with its own argument. Tokens that are not in
    /// play are passed over.
    ///
    /// # Errors
    /// As [`map`](Candidates::map).
    pub(super) fn map_tokens<T>(
        &mut self,
        tokens: impl Iterator<Item = (u32, T)>,
        change: impl Fn(f32, T) -> f32,
    ) -> Result<(), SampleError> {
        self.logits_change();
        let vocabulary = self.order == Order::Vocabulary;
        if !vocabulary {
            self.entries.sort_unstable_by_key(|c| c.id);
        }
        for (id, argument) in tokens {
            let place = if vocabulary {
                id as usize
            } else {
                let found = self.entries.binary_search_by_key(&id, |c| c.id);
                found.unwrap_or(self.entries.len())
            };
            if let Some(candidate) = self.entries.get_mut(place) {
                candidate.logit = change(candidate.logit, argument);
                check_logit(id, candidate.logit)?;
            }
        }
        Ok(())
    }

    fn logits_change(&mut self) {
        self.weights.clear();
        if self.order == Order::Ranked {
            self.order = Order::Unknown;
        }
    }

    /// The first candidate in rank order: the largest logit, and of several the lowest id.
    ///
    /// # Errors
    /// If no token can come.
    pub(super) fn best(&self) -> Result<Candidate, SampleError> {
        let first = match self.order {
            Order::Ranked => self.entries.first(),
            Order::Vocabulary | Order::Unknown => self.entries.iter().min_by_key(|c| rank(c)),
        };
        match first {
            Some(candidate) if candidate.logit != f32::NEG_INFINITY => Ok(*candidate),
            _ => Err(SampleError::NothingLeft),
        }
    }

    /// The first `count` candidates in rank order. Leaves the others in no order.
    pub(super) fn first(&mut self, count: usize) -> &[Candidate] {
        let count = count.min(self.entries.len());
        if count < self.entries.len() {
            self.entries.select_nth_unstable_by_key(count, rank);
        }
        self.weights.clear();
        self.order = Order::Unknown;
        self.entries[..count].sort_unstable_by_key(rank);
        &self.entries[..count]
    }

    /// Keeps the `k` largest logits and all that equal the `k`-th.
    pub(super) fn keep_largest(&mut self, k: usize) {
        if k < self.entries.len() {
            let (_, kth, _) = self.entries.select_nth_unstable_by_key(k - 1, rank);
            let least = kth.logit;
            self.entries.retain(|c| c.logit >= least);
            self.weights.clear();
            self.order = Order::Unknown;
        }
    }

    /// Keeps the candidates for which `keep` holds, in their order.
    pub(super) fn retain(&mut self, keep: impl Fn(&Candidate) -> bool) {
        let before = self.entries.len();
        self.entries.retain(keep);
        if self.entries.len() < before {
            self.weights.clear();
            if self.order == Order::Vocabulary {
                self.order = Order::Unknown;
            }
        }
    }

    /// Keeps the first `count` candidates of the distribution, which is there already.
    pub(super) fn truncate(&mut self, count: usize) {
        debug_assert_eq!(self.entries.len(), self.weights.len());
        self.entries.truncate(count);
        self.weights.truncate(count);
    }

    /// Keeps the candidates of a range of the distribution, which is there already.
    pub(super) fn keep_range(&mut self, range: Range<usize>) {
        debug_assert_eq!(self.entries.len(), self.weights.len());
        self.truncate(range.end);
        if range.start > 0 {
            self.entries.drain(..range.start);
            // Another candidate is the largest now.
            self.weights.clear();
        }
    }

    /// Puts the candidates in rank order.
    fn sort(&mut self) {
        if self.order == Order::Vocabulary && self.entries.len() >= RADIX_SORT_FROM {
            // The ids ascend already, so a stable sort by logit is all it takes.
            sort_by_logit(&mut self.entries, &mut self.spare);
        } else {
            self.entries.sort_unstable_by_key(rank);
        }
        self.order = Order::Ranked;
    }

    /// Puts the candidates in rank order, drops those that cannot come and gives every other its
    /// probability.
    ///
    /// # Errors
    /// If no token can come.
    pub(super) fn distribution(&mut self) -> Result<Distribution<'_>, SampleError> {
        if self.weights.is_empty() {
            if self.order != Order::Ranked {
                self.sort();
            }
            let largest = f64::from(self.best()?.logit);
            let possible = self.entries.partition_point(|c| c.logit != f32::NEG_INFINITY);
            self.entries.truncate(possible);
            let weight = |c: &Candidate| libm::exp(f64::from(c.logit) - largest);
            self.weights.extend(self.entries.iter().map(weight));
        }
        let total = self.weights.iter().fold(0.0, |sum, weight| sum + weight);
        Ok(Distribution {
            candidates: &self.entries,
            weights: &self.weights,
            total,
            log_total: libm::log(total),
        })
    }
}

/// Candidates in rank order (logit descending, id ascending) and their probabilities. There is at
/// least one.
#[derive(Debug, Clone, Copy)]
pub struct Distribution<'a> {
    candidates: &'a [Candidate],
    /// `exp(logit - largest logit)`, so that the first is 1.
    pub(super) weights: &'a [f64],
    /// Sum of the weights, added in order.
    pub(super) total: f64,
    log_total: f64,
}

impl<'a> Distribution<'a> {
    /// The kept candidates.
    pub fn candidates(&self) -> &'a [Candidate] {
        self.candidates
    }

    /// Probabilities of the candidates, in the same order.
    pub fn probabilities(&self) -> impl ExactSizeIterator<Item = f64> + 'a {
        let total = self.total;
        self.weights.iter().map(move |weight| weight / total)
    }

    /// `-ln p` of a candidate. Taken from the logits, so that it stays finite where the
    /// probability underflows.
    fn surprisal(&self, candidate: &Candidate) -> f64 {
        self.log_total + (f64::from(self.candidates[0].logit) - f64::from(candidate.logit))
    }

    /// The mean surprisal, in nats.
    pub(super) fn entropy(&self) -> f64 {
        let terms = self.candidates.iter().zip(self.weights).map(|(c, w)| w * self.surprisal(c));
        terms.fold(0.0, |sum, term| sum + term) / self.total
    }

    /// The fewest places whose surprisals are nearest to `surprisal` and whose weights add up to
    /// `mass`, with all places as near as the last of them.
    ///
    /// In rank order surprisals rise, so these places lie side by side: the range grows from where
    /// they pass the one given to whichever side is nearer, of equal ones the left.
    pub(super) fn around(&self, surprisal: f64, mass: f64) -> Range<usize> {
        let distance = |candidate: Option<&Candidate>| match candidate {
            Some(candidate) => (self.surprisal(candidate) - surprisal).abs(),
            None => f64::INFINITY,
        };
        let middle = self.candidates.partition_point(|c| self.surprisal(c) <= surprisal);
        let mut range = middle..middle;
        let (mut sum, mut farthest) = (0.0, 0.0);
        loop {
            let left = distance(self.candidates[..range.start].last());
            let right = distance(self.candidates.get(range.end));
            let nearer = left.min(right);
            if nearer == f64::INFINITY || (sum >= mass && nearer > farthest) {
                return range;
            }
            farthest = nearer;
            if left <= right {
                range.start -= 1;
                sum += self.weights[range.start];
            } else {
                sum += self.weights[range.end];
                range.end += 1;
            }
        }
    }

    /// The first candidate at which the probabilities, added in order, exceed `uniform`, a number
    /// in `[0, 1)`.
    pub fn choose(&self, uniform: f64) -> Candidate {
        let target = uniform * self.total;
        let mut sum = 0.0;
        let place = self.weights.iter().position(|weight| {
            sum += weight;
            sum > target
        });
        // For `uniform < 1` the product is below the total, which the sum reaches.
        self.candidates[place.unwrap_or(self.candidates.len() - 1)]
    }
}

/// Entries from which the radix sort is used; below, clearing its counters costs more than it saves.
/// With a vocabulary of 128 256, a sample that needs all of it takes 2.0 ms, with a comparison sort
/// 4.7 ms (AMD EPYC virtual machine, `examples/sampling_time.rs`).
const RADIX_SORT_FROM: usize = 4096;

/// Stable sort by logit, largest first: a radix sort from the low to the high 11 bits.
fn sort_by_logit(entries: &mut Vec<Candidate>, spare: &mut Vec<Candidate>) {
    const BITS: u32 = 11;
    const BUCKETS: usize = 1 << BITS;
    const PASSES: usize = u32::BITS.div_ceil(BITS) as usize;
    let bucket = |candidate: &Candidate, pass: usize| {
        (descending(candidate) >> (pass as u32 * BITS)) as usize % BUCKETS
    };
    let mut places = [[0usize; BUCKETS]; PASSES];
    for candidate in entries.iter() {
        for (pass, places) in places.iter_mut().enumerate() {
            places[bucket(candidate, pass)] += 1;
        }
    }
    spare.clear();
    spare.resize(entries.len(), Candidate { id: 0, logit: 0.0 });
    for (pass, places) in places.iter_mut().enumerate() {
        let mut before = 0;
        for place in places.iter_mut() {
            before += std::mem::replace(place, before);
        }
        for candidate in entries.iter() {
            let place = &mut places[bucket(candidate, pass)];
            spare[*place] = *candidate;
            *place += 1;
        }
        std::mem::swap(entries, spare);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_order_by_logit_descending_then_id() {
        let ordered = [
            (5, f32::MAX),
            (0, 2.0),
            (1, 1.0),
            (2, 1.0),
            (3, f32::MIN_POSITIVE),
            (4, 0.0),
            (6, -0.0),
            (7, 0.0),
            (1, -1e-30),
            (0, -1.0),
            (0, f32::MIN),
            (9, f32::NEG_INFINITY),
        ];
        let ranks: Vec<u64> =
            ordered.iter().map(|&(id, logit)| rank(&Candidate { id, logit })).collect();
        assert!(ranks.is_sorted_by(|a, b| a < b), "{ranks:x?}");
    }

    #[test]
    fn both_sorts_give_the_same_order() {
        let mut logits: Vec<f32> = (0..RADIX_SORT_FROM as u64 + 37)
            .map(|i| crate::random::uniform(0, i, 0) as f32 * 40.0 - 20.0)
            .collect();
        for i in (0..logits.len()).step_by(3) {
            logits[i] = logits[i].round();
        }
        logits[17] = f32::NEG_INFINITY;
        logits[18] = -0.0;
        logits[19] = f32::MAX;
        logits[20] = f32::MIN;
        let mut candidates = Candidates::default();
        candidates.set_logits(&logits).unwrap();
        let mut expected = candidates.entries.clone();
        expected.sort_unstable_by_key(rank);
        candidates.sort();
        assert_eq!(candidates.entries, expected);
    }
}
