//! From logits to a token: penalties, filters and the draw.
//!
//! This file knows logits and token ids, no model and no text. [`Chain`] applies [`Filter`]s in any
//! order; [`SamplingParams`] is the fixed chain of the command line; [`Sampler`]
//! draws from what a chain leaves. Formulas, sources and the reasons for the order are in
//! `docs/sampling.md`.

mod candidates;
mod chain;

use bitnet_core::{Keep, numerics};
use thiserror::Error;

pub use bitnet_core::Candidate;

pub use candidates::{Candidates, Distribution};
pub use chain::{Chain, Filter, History};

use crate::random;

/// A sampling parameter with a value it cannot have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{name} is {value}; give {allowed}")]
pub struct InvalidParameter {
    /// Name of the parameter.
    pub name: &'static str,
    /// The value given.
    pub value: String,
    /// What it may be.
    pub allowed: &'static str,
}

/// Why no token could be sampled.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum SampleError {
    /// There was nothing to choose from.
    #[error("there are no logits to sample from")]
    NoLogits,
    /// A logit no distribution can be made of: NaN or positive infinity.
    #[error("the logit of token {id} is {logit}: the model's numbers or a bias overflowed")]
    BadLogit {
        /// Token id.
        id: u32,
        /// Its logit.
        logit: f32,
    },
    /// Every logit is negative infinity, in the model's output or after biases and bans.
    #[error("no token is left to sample from: each has probability 0 or was banned")]
    NothingLeft,
    /// Log-probabilities were asked for, and only some of the logits were given.
    #[error("log-probabilities need the logits of the whole vocabulary")]
    LogprobsOfSomeLogits,
}

/// How to sample, as the command line takes it.
///
/// Every value starts out neutral, so the default is greedy. The filters apply in the order of the
/// fields: bias, penalties, top-k, temperature, top-p, min-p, typical.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Token ids and what to add to their logits; negative infinity bans a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// See [`Filter::RepetitionPenalty`]. 1: off.
    pub repetition_penalty: f32,
    /// See [`Filter::PresenceFrequency`]. 0: off.
    pub presence_penalty: f32,
    /// See [`Filter::PresenceFrequency`]. 0: off.
    pub frequency_penalty: f32,
    /// How many of the last tokens the three penalties look at; `None`: all.
    pub repeat_last_n: Option<usize>,
    /// See [`Filter::TopK`]. 0: off.
    pub top_k: usize,
    /// See [`Filter::Temperature`]. 0: greedy, which takes the largest logit after bias and
    /// penalties and looks at none of the filters.
    pub temperature: f32,
    /// See [`Filter::TopP`]. 1: off.
    pub top_p: f64,
    /// See [`Filter::MinP`]. 0: off.
    pub min_p: f64,
    /// See [`Filter::Typical`]. 1: off.
    pub typical_p: f64,
    /// Seed of the [random numbers](crate::random).
    pub seed: u64,
    /// Reports the log-probability of the token, and of this many most probable ones.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: None,
            top_k: 0,
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            seed: 0,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Checks every value, also of filters that greedy sampling does not look at.
    ///
    /// # Errors
    /// Names the first bad value and what it may be.
    pub fn validate(&self) -> Result<(), InvalidParameter> {
        self.filters().iter().try_for_each(Filter::validate)
    }

    /// Whether the most probable token is taken without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The filters whose values are not neutral, in their order.
    pub fn filters(&self) -> Vec<Filter> {
        let last_n = self.repeat_last_n;
        let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
        // A NaN is neutral to nothing, so that `validate` gets to see it.
        [
            (!self.logit_bias.is_empty()).then(|| Filter::LogitBias(self.logit_bias.clone())),
            (self.repetition_penalty != 1.0)
                .then_some(Filter::RepetitionPenalty { penalty: self.repetition_penalty, last_n }),
            (presence != 0.0 || frequency != 0.0).then_some(Filter::PresenceFrequency {
                presence,
                frequency,
                last_n,
            }),
            (self.top_k != 0).then_some(Filter::TopK(self.top_k)),
            (self.temperature != 0.0 && self.temperature != 1.0)
                .then_some(Filter::Temperature(self.temperature)),
            (self.top_p != 1.0).then_some(Filter::TopP(self.top_p)),
            (self.min_p != 0.0).then_some(Filter::MinP(self.min_p)),
            (self.typical_p != 1.0).then_some(Filter::Typical(self.typical_p)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of the probability the model gave it, where asked for: log-softmax of the
    /// logits as they came, before any bias, penalty, temperature or filter.
    pub logprob: Option<f64>,
    /// The most probable tokens of that distribution with their log-probabilities, as many as asked
    /// for, largest first and of equal ones the lowest id first.
    pub top_logprobs: Vec<(u32, f64)>,
}

/// Which logits a [`Sampler`] needs for the next token, if not all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selection<'a> {
    /// Needed of the tokens that are not among `exact_ids`.
    pub keep: Keep,
    /// Tokens that are needed whatever their logits, ascending, each once.
    pub exact_ids: &'a [u32],
}

/// Samples one token per call for one sequence.
///
/// A token is a function of the parameters, the logits, the history and the output position.
/// Nothing is carried from call to call but room to work in: positions can be sampled in any order
/// and again.
#[derive(Debug, Clone)]
pub struct Sampler {
    chain: Chain,
    greedy: bool,
    seed: u64,
    logprobs: Option<usize>,
    candidates: Candidates,
    /// Room for [`Selection::exact_ids`].
    touched: Vec<u32>,
}

impl Sampler {
    /// A sampler with the fixed order of [`SamplingParams`].
    ///
    /// # Errors
    /// If a parameter has a value that it cannot have.
    pub fn new(params: &SamplingParams) -> Result<Self, InvalidParameter> {
        let mut filters = params.filters();
        filters.iter().try_for_each(Filter::validate)?;
        let greedy = params.is_greedy();
        if greedy {
            filters.retain(Filter::is_adjustment);
        }
        let mut sampler = Self::with_chain(Chain::new(filters)?, params.seed);
        sampler.greedy = greedy;
        sampler.logprobs = params.logprobs;
        Ok(sampler)
    }

    /// A sampler that draws from what a chain of your own leaves, without log-probabilities.
    pub fn with_chain(chain: Chain, seed: u64) -> Self {
        Self {
            chain,
            greedy: false,
            seed,
            logprobs: None,
            candidates: Candidates::default(),
            touched: Vec::new(),
        }
    }

    /// Makes room for a history of this many tokens, so that no position up to there allocates, given
    /// [candidates](Sampler::swap_candidates) with room for the vocabulary. So many `positions` may
    /// share a [selection](Sampler::selection_of).
    pub(crate) fn reserve(&mut self, history: usize, positions: usize) {
        let adjustments = self.chain.filters().iter().filter(|filter| filter.is_adjustment());
        let touched = adjustments.map(|filter| match filter {
            Filter::LogitBias(biases) => biases.len(),
            _ => history,
        });
        self.touched.reserve(positions * touched.sum::<usize>());
        self.chain.reserve(history);
    }

    /// Exchanges the candidates it works with: samplers that take turns can share their memory.
    pub(crate) fn swap_candidates(&mut self, candidates: &mut Candidates) {
        std::mem::swap(&mut self.candidates, candidates);
    }

    /// Samples from the logits of the whole vocabulary, `logits: [vocabulary]`.
    ///
    /// `history` is the prompt and the output so far, of which the last `output_position` tokens
    /// are output: the repetition penalty looks at all of it, presence and frequency penalties at
    /// the output. The draw is number 0 of (seed, `output_position`). After the first calls,
    /// nothing is allocated unless log-probabilities are asked for.
    ///
    /// # Errors
    /// If a logit is NaN or positive infinity, or no token can come.
    pub fn sample(
        &mut self,
        logits: &[f32],
        history: &[u32],
        output_position: u64,
    ) -> Result<Sampled, SampleError> {
        let token = self.choose(logits, history, output_position)?;
        self.report(token, logits)
    }

    /// As [`sample`](Sampler::sample), from some tokens of the vocabulary alone: what is not `allowed`
    /// does not exist for any filter. `allowed` has each token at most once. Log-probabilities are
    /// those of the whole vocabulary.
    ///
    /// # Errors
    /// As [`sample`](Sampler::sample), of the allowed tokens.
    pub(crate) fn sample_among(
        &mut self,
        logits: &[f32],
        allowed: impl Iterator<Item = u32>,
        history: &[u32],
        output_position: u64,
    ) -> Result<Sampled, SampleError> {
        self.candidates.set_some(logits, allowed)?;
        let token = self.pick(history, output_position)?;
        self.report(token, logits)
    }

    /// A token with its log-probabilities, if they are asked for.
    fn report(&mut self, token: u32, logits: &[f32]) -> Result<Sampled, SampleError> {
        let Some(count) = self.logprobs else {
            return Ok(Sampled { token, logprob: None, top_logprobs: Vec::new() });
        };
        let normalizer = log_sum_exp(logits);
        let logprob = |logit: f32| f64::from(logit) - normalizer;
        self.candidates.set_logits(logits)?;
        let tops = self.candidates.first(count).iter();
        let top_logprobs = tops.map(|c| (c.id, logprob(c.logit))).collect();
        Ok(Sampled { token, logprob: Some(logprob(logits[token as usize])), top_logprobs })
    }

    /// The token that [`sample`](Sampler::sample) gives, without log-probabilities.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        history: &[u32],
        output_position: u64,
    ) -> Result<u32, SampleError> {
        if self.greedy && self.chain.filters().is_empty() {
            return argmax(logits);
        }
        self.candidates.set_logits(logits)?;
        self.pick(history, output_position)
    }

    /// What [`sample_candidates`](Sampler::sample_candidates) needs to give the token that
    /// [`sample`](Sampler::sample) would, for the same history and position; `None` if that is all
    /// logits.
    pub fn selection(&mut self, history: &[u32], output_position: u64) -> Option<Selection<'_>> {
        self.selection_of(1, history, output_position)
    }

    /// A [selection](Sampler::selection) that serves each of the last `positions` up to
    /// `output_position`: those before have the same history without its last tokens. An exact id
    /// that a position has no need of is one candidate more and changes no token.
    pub(crate) fn selection_of(
        &mut self,
        positions: usize,
        history: &[u32],
        output_position: u64,
    ) -> Option<Selection<'_>> {
        if self.logprobs.is_some() {
            return None;
        }
        let output_tokens = usize::try_from(output_position).unwrap_or(usize::MAX);
        let histories = (0..positions).map(|less| {
            History::new(&history[..history.len() - less], output_tokens.saturating_sub(less))
        });
        let rest = self.chain.touched(histories, &mut self.touched);
        // Tokens that nothing touched keep their order among themselves, and what is kept of all
        // is at most what is kept of them.
        let keep = match *rest {
            [] if self.greedy => Keep::Largest(1),
            [Filter::TopK(k), ..] => Keep::Largest(k),
            [Filter::MinP(p), ..] => Keep::Within(-libm::log(p)),
            [Filter::Temperature(t), Filter::MinP(p), ..] => {
                // The last term is for quotients too small for f32 to tell apart.
                let t = f64::from(t);
                Keep::Within(t * -libm::log(p) * (1.0 + 1e-6) + t * 1e-44)
            }
            _ => return None,
        };
        // Of p = 0 everything is kept.
        let bounded = !matches!(keep, Keep::Within(margin) if !margin.is_finite());
        bounded.then_some(Selection { keep, exact_ids: &self.touched })
    }

    /// Samples from some of the vocabulary's tokens, in any order, each at most once.
    ///
    /// The token is the one that [`sample`](Sampler::sample) gives if every absent token is one
    /// that the first removing filter of the chain would remove, and that filter is top-k or min-p,
    /// which look at nothing below what they keep ([`selection`](Sampler::selection)). For greedy sampling, if the largest logit after
    /// bias and penalties is there, with all its ties.
    ///
    /// # Errors
    /// As [`sample`](Sampler::sample), and if log-probabilities are asked for.
    pub fn sample_candidates(
        &mut self,
        candidates: &[Candidate],
        history: &[u32],
        output_position: u64,
    ) -> Result<Sampled, SampleError> {
        if self.logprobs.is_some() {
            return Err(SampleError::LogprobsOfSomeLogits);
        }
        self.candidates.set_candidates(candidates)?;
        let token = self.pick(history, output_position)?;
        Ok(Sampled { token, logprob: None, top_logprobs: Vec::new() })
    }

    /// The token that the chain and the draw make of the candidates that are set.
    fn pick(&mut self, history: &[u32], output_position: u64) -> Result<u32, SampleError> {
        let output_tokens = usize::try_from(output_position).unwrap_or(usize::MAX);
        let history = History::new(history, output_tokens);
        if self.greedy {
            self.chain.run(&mut self.candidates, history)?;
            return Ok(self.candidates.best()?.id);
        }
        let kept = self.chain.apply(&mut self.candidates, history)?;
        Ok(kept.choose(random::uniform(self.seed, output_position, 0)).id)
    }
}

/// The largest logit's token, the lowest id of equal ones.
fn argmax(logits: &[f32]) -> Result<u32, SampleError> {
    // Whole passes without an early exit run in vector registers: three of them are faster than
    // one that branches.
    if !logits.iter().fold(true, |good, &logit| good & (logit < f32::INFINITY)) {
        (0..).zip(logits).try_for_each(|(id, &logit)| candidates::check_logit(id, logit))?;
    }
    let largest = numerics::max(logits);
    if logits.is_empty() {
        Err(SampleError::NoLogits)
    } else if largest == f32::NEG_INFINITY {
        Err(SampleError::NothingLeft)
    } else {
        let token = logits.iter().position(|&logit| logit == largest);
        Ok(token.expect("the maximum is one of them") as u32)
    }
}

/// `ln p` of a token in f64, by the softmax of all logits.
///
/// # Errors
/// [`SampleError::BadLogit`] if that is no finite number: the token's logit or another one is none.
pub(crate) fn logprob(logits: &[f32], token: u32) -> Result<f64, SampleError> {
    let logit = logits[token as usize];
    let logprob = f64::from(logit) - log_sum_exp(logits);
    match logprob.is_finite() {
        true => Ok(logprob),
        false => {
            let bad = (0..).zip(logits).find(|(_, logit)| !logit.is_finite());
            let (id, &logit) = bad.unwrap_or((token, &logit));
            Err(SampleError::BadLogit { id, logit })
        }
    }
}

/// `ln of the sum of exp(logit)` in f64, for logits with a finite maximum.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(numerics::max(logits));
    let sum = logits.iter().fold(0.0, |sum, &l| sum + libm::exp(f64::from(l) - largest));
    largest + libm::log(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_for_several_positions_has_the_exact_ids_of_each() {
        let params = SamplingParams {
            repetition_penalty: 1.5,
            presence_penalty: 0.5,
            repeat_last_n: Some(2),
            logit_bias: vec![(50, 1.0)],
            ..SamplingParams::default()
        };
        let mut sampler = Sampler::new(&params).unwrap();
        let history = [9, 8, 7, 6, 5, 4];
        let mut exact_ids = |positions, history: &[u32], position| {
            let selection = sampler.selection_of(positions, history, position).unwrap();
            assert_eq!(selection.keep, Keep::Largest(1));
            selection.exact_ids.to_vec()
        };
        let each: [Vec<u32>; 3] = [
            exact_ids(1, &history[..4], 2),
            exact_ids(1, &history[..5], 3),
            exact_ids(1, &history, 4),
        ];
        assert_eq!(each, [vec![6, 7, 50], vec![5, 6, 50], vec![4, 5, 50]]);
        assert_eq!(exact_ids(3, &history, 4), [4, 5, 6, 7, 50]);
    }

    #[test]
    fn a_mask_is_minus_infinity_before_every_filter() {
        let neutral = SamplingParams::default();
        let ways = [
            neutral.clone(),
            SamplingParams { temperature: 1.5, ..neutral.clone() },
            SamplingParams { temperature: 0.8, top_k: 5, top_p: 0.9, ..neutral.clone() },
            SamplingParams { temperature: 1.2, min_p: 0.05, ..neutral.clone() },
            SamplingParams { temperature: 1.0, typical_p: 0.7, ..neutral.clone() },
            SamplingParams { repetition_penalty: 1.4, presence_penalty: 0.3, ..neutral.clone() },
            SamplingParams { logit_bias: vec![(3, 9.0), (8, -9.0)], logprobs: Some(2), ..neutral },
        ];
        for (seed, params) in (0..500).flat_map(|seed| ways.iter().map(move |way| (seed, way))) {
            let mut sampler = Sampler::new(&SamplingParams { seed, ..params.clone() }).unwrap();
            let uniform = |position| random::uniform(seed, position, 1);
            let logits: Vec<f32> = (0..60).map(|id| uniform(id) as f32 * 8.0 - 4.0).collect();
            let share = uniform(1000);
            let allowed: Vec<u32> =
                (0..60).filter(|&id| id == 17 || uniform(100 + u64::from(id)) < share).collect();
            let mut masked = logits.clone();
            for id in (0..60).filter(|id| !allowed.contains(id)) {
                masked[id as usize] = f32::NEG_INFINITY;
            }
            let history = [3, 4, 17, 8, 17];
            let among =
                sampler.sample_among(&logits, allowed.iter().copied(), &history, 2).unwrap();
            let expected = sampler.sample(&masked, &history, 2).unwrap();
            assert_eq!(among.token, expected.token, "seed {seed}, {params:?}");
            let whole = sampler.sample(&logits, &history, 2).unwrap();
            assert_eq!(among.top_logprobs, whole.top_logprobs);
        }
    }
}
