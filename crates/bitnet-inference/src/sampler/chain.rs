//! Filters, and chains of them. Formulas with their sources are in `docs/sampling.md`.

use std::fmt::Debug;

use super::candidates::{Candidates, Distribution};
use super::{InvalidParameter, SampleError};

/// The tokens before the one to be sampled.
#[derive(Debug, Clone, Copy)]
pub struct History<'a> {
    tokens: &'a [u32],
    output_tokens: usize,
}

impl<'a> History<'a> {
    /// Prompt and output in one piece, of which the last `output_tokens` are output. Where the
    /// history is shorter than that, all of it is output.
    pub fn new(tokens: &'a [u32], output_tokens: usize) -> Self {
        Self { tokens, output_tokens: output_tokens.min(tokens.len()) }
    }

    /// The last `last_n` tokens of prompt and output.
    fn all(&self, last_n: Option<usize>) -> &'a [u32] {
        last(self.tokens, last_n)
    }

    /// The last `last_n` tokens of the output.
    fn output(&self, last_n: Option<usize>) -> &'a [u32] {
        last(&self.tokens[self.tokens.len() - self.output_tokens..], last_n)
    }

    /// Tokens that would complete a sequence of `n` tokens once more.
    fn repeats(&self, n: usize) -> impl Iterator<Item = u32> + use<'a> {
        let tokens = self.tokens;
        let current = &tokens[tokens.len().saturating_sub(n - 1)..];
        // Of a history that is too short for one, there are no windows.
        let repeats = tokens.windows(n).filter(move |ngram| ngram.starts_with(current));
        repeats.map(move |ngram| ngram[n - 1])
    }
}

fn last(tokens: &[u32], n: Option<usize>) -> &[u32] {
    &tokens[tokens.len() - n.unwrap_or(usize::MAX).min(tokens.len())..]
}

/// One step of a [`Chain`]: changes logits or removes candidates. Logits are computed with in
/// f32, probabilities in f64.
#[derive(Debug, Clone, PartialEq)]
pub enum Filter {
    /// Adds a number to the logits of given tokens; negative infinity bans one. Several for one
    /// token add up.
    LogitBias(Vec<(u32, f32)>),
    /// Divides the positive logits of tokens in prompt or output by `penalty` and multiplies
    /// the negative ones by it (Keskar et al. 2019, as Hugging Face does it).
    RepetitionPenalty {
        /// Above 0; 1 changes nothing.
        penalty: f32,
        /// How many of the last tokens count; `None`: all.
        last_n: Option<usize>,
    },
    /// Subtracts `frequency * count + presence` from the logits of tokens that the output has
    /// `count > 0` times (OpenAI). The prompt does not count.
    PresenceFrequency {
        /// Subtracted once.
        presence: f32,
        /// Subtracted for every occurrence.
        frequency: f32,
        /// How many of the last output tokens count; `None`: all.
        last_n: Option<usize>,
    },
    /// Bans every token that would complete a sequence of this many tokens that prompt and output
    /// have already.
    NoRepeatNgram(usize),
    /// Divides every logit by this.
    Temperature(f32),
    /// Keeps this many of the largest logits, and all that equal the last of them.
    TopK(usize),
    /// Keeps the fewest most probable tokens whose probabilities add up to this (nucleus sampling,
    /// Holtzman et al. 2019).
    TopP(f64),
    /// Keeps the tokens with at least this share of the largest probability (Nguyen et al. 2024).
    MinP(f64),
    /// Keeps the fewest tokens with this much probability whose information content is nearest to
    /// the entropy, and all as near as the last of them (locally typical sampling, Meister et al.
    /// 2022).
    Typical(f64),
    /// Keeps the tokens with at least this probability, and always the most probable (Hewitt et
    /// al. 2022).
    EpsilonCutoff(f64),
    /// The same with the probability `min(ε, √ε exp(-entropy))` (Hewitt et al. 2022).
    EtaCutoff(f64),
}

impl Filter {
    /// Checks the filter's numbers.
    ///
    /// # Errors
    /// Names the parameter, the value and what it may be.
    pub fn validate(&self) -> Result<(), InvalidParameter> {
        const ABOVE_0_TO_1: &str = "a number above 0 and at most 1";
        const BETWEEN_0_AND_1: &str = "a number above 0 and below 1";
        let (name, value, good, allowed): (_, &dyn Debug, _, _) = match self {
            Filter::LogitBias(biases) => {
                let bad = biases.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY);
                let Some((_, bias)) = bad else { return Ok(()) };
                ("logit_bias", bias, false, "a finite number, or -inf to ban the token")
            }
            Filter::RepetitionPenalty { penalty, .. } => {
                let good = *penalty > 0.0 && penalty.is_finite();
                ("repetition_penalty", penalty, good, "a number above 0")
            }
            Filter::PresenceFrequency { presence, .. } if !presence.is_finite() => {
                ("presence_penalty", presence, false, "a finite number")
            }
            Filter::PresenceFrequency { frequency, .. } => {
                ("frequency_penalty", frequency, frequency.is_finite(), "a finite number")
            }
            Filter::NoRepeatNgram(n) => ("no_repeat_ngram", n, *n > 0, "a number above 0"),
            Filter::Temperature(value) => {
                // Below this, quotients of ordinary logits leave the range of f32.
                let good = *value >= 1e-5 && value.is_finite();
                ("temperature", value, good, "0 (greedy) or a number of at least 0.00001")
            }
            Filter::TopK(k) => ("top_k", k, *k > 0, "a number above 0"),
            Filter::TopP(p) => ("top_p", p, *p > 0.0 && *p <= 1.0, ABOVE_0_TO_1),
            Filter::MinP(p) => ("min_p", p, (0.0..=1.0).contains(p), "a number from 0 (off) to 1"),
            Filter::Typical(p) => ("typical_p", p, *p > 0.0 && *p <= 1.0, ABOVE_0_TO_1),
            Filter::EpsilonCutoff(p) => {
                ("epsilon_cutoff", p, *p > 0.0 && *p < 1.0, BETWEEN_0_AND_1)
            }
            Filter::EtaCutoff(p) => ("eta_cutoff", p, *p > 0.0 && *p < 1.0, BETWEEN_0_AND_1),
        };
        if good {
            Ok(())
        } else {
            Err(InvalidParameter { name, value: format!("{value:?}"), allowed })
        }
    }

    /// Whether the filter moves the logits of single tokens, as opposed to the shape of the whole
    /// distribution. Greedy sampling applies these and no others.
    pub fn is_adjustment(&self) -> bool {
        match self {
            Filter::LogitBias(_)
            | Filter::RepetitionPenalty { .. }
            | Filter::PresenceFrequency { .. }
            | Filter::NoRepeatNgram(_) => true,
            Filter::Temperature(_)
            | Filter::TopK(_)
            | Filter::TopP(_)
            | Filter::MinP(_)
            | Filter::Typical(_)
            | Filter::EpsilonCutoff(_)
            | Filter::EtaCutoff(_) => false,
        }
    }

    /// Adds the tokens whose logits an [adjustment](Filter::is_adjustment) may change.
    fn touched(&self, history: History<'_>, touched: &mut Vec<u32>) {
        match *self {
            Filter::LogitBias(ref biases) => touched.extend(biases.iter().map(|(id, _)| id)),
            Filter::RepetitionPenalty { last_n, .. } => {
                touched.extend_from_slice(history.all(last_n));
            }
            Filter::PresenceFrequency { last_n, .. } => {
                touched.extend_from_slice(history.output(last_n));
            }
            Filter::NoRepeatNgram(n) => touched.extend(history.repeats(n)),
            _ => {}
        }
    }

    fn apply(
        &self,
        candidates: &mut Candidates,
        history: History<'_>,
        sorted: &mut Vec<u32>,
    ) -> Result<(), SampleError> {
        match *self {
            Filter::LogitBias(ref biases) => {
                candidates.map_tokens(biases.iter().copied(), |logit, bias| logit + bias)?;
            }
            Filter::RepetitionPenalty { penalty, last_n } => {
                candidates.map_tokens(count(history.all(last_n), sorted), |logit, _| {
                    if logit < 0.0 { logit * penalty } else { logit / penalty }
                })?;
            }
            Filter::PresenceFrequency { presence, frequency, last_n } => {
                candidates.map_tokens(count(history.output(last_n), sorted), |logit, count| {
                    logit - frequency * count as f32 - presence
                })?;
            }
            Filter::NoRepeatNgram(n) => {
                let banned = history.repeats(n).map(|id| (id, ()));
                candidates.map_tokens(banned, |_, ()| f32::NEG_INFINITY)?;
            }
            Filter::Temperature(temperature) => candidates.map(|logit| logit / temperature)?,
            Filter::TopK(k) => candidates.keep_largest(k),
            Filter::TopP(p) => {
                let Distribution { weights, total, .. } = candidates.distribution()?;
                let mut before = 0.0;
                let kept = weights.iter().take_while(|&weight| {
                    let short = before < p * total;
                    before += weight;
                    short
                });
                let count = kept.count();
                candidates.truncate(count);
            }
            Filter::MinP(p) => {
                let least = f64::from(candidates.best()?.logit) + libm::log(p);
                candidates.retain(|candidate| f64::from(candidate.logit) >= least);
            }
            Filter::Typical(p) => {
                let distribution = candidates.distribution()?;
                let range = distribution.around(distribution.entropy(), p * distribution.total);
                candidates.keep_range(range);
            }
            Filter::EpsilonCutoff(epsilon) => keep_probable(candidates, epsilon)?,
            Filter::EtaCutoff(epsilon) => {
                let entropy = candidates.distribution()?.entropy();
                keep_probable(candidates, epsilon.min(epsilon.sqrt() * libm::exp(-entropy)))?;
            }
        }
        Ok(())
    }
}

/// Keeps the tokens with at least this probability, and always the most probable.
fn keep_probable(candidates: &mut Candidates, least: f64) -> Result<(), SampleError> {
    let Distribution { weights, total, .. } = candidates.distribution()?;
    let count = weights.partition_point(|&weight| weight >= least * total);
    candidates.truncate(count.max(1));
    Ok(())
}

/// Every token that occurs, with its number of occurrences. `sorted` is room to work in.
fn count(tokens: &[u32], sorted: &mut Vec<u32>) -> impl Iterator<Item = (u32, usize)> {
    sorted.clear();
    sorted.extend_from_slice(tokens);
    sorted.sort_unstable();
    sorted.chunk_by(|a, b| a == b).map(|run| (run[0], run.len()))
}

/// Filters in the order in which they apply.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    filters: Vec<Filter>,
    /// Room for a sorted history, kept from one position to the next.
    sorted: Vec<u32>,
}

impl Chain {
    /// A chain of filters, any number in any order.
    ///
    /// # Errors
    /// If a filter has a number it cannot work with.
    pub fn new(filters: Vec<Filter>) -> Result<Self, InvalidParameter> {
        filters.iter().try_for_each(Filter::validate)?;
        Ok(Self { filters, sorted: Vec::new() })
    }

    /// Makes room for a history of this many tokens.
    pub(super) fn reserve(&mut self, history: usize) {
        if self.filters.iter().any(Filter::is_adjustment) {
            self.sorted.reserve(history);
        }
    }

    /// The filters in their order.
    pub fn filters(&self) -> &[Filter] {
        &self.filters
    }

    /// Applies the filters and returns what they leave: the kept set with its probabilities.
    ///
    /// # Errors
    /// If no token is left, or a logit became NaN or infinite on the way.
    pub fn apply<'a>(
        &mut self,
        candidates: &'a mut Candidates,
        history: History<'_>,
    ) -> Result<Distribution<'a>, SampleError> {
        self.run(candidates, history)?;
        candidates.distribution()
    }

    /// Collects the tokens that the adjustments at the beginning of the chain touch after any of some
    /// histories, ascending, each once, and returns the filters after them.
    pub(super) fn touched<'a>(
        &self,
        histories: impl Iterator<Item = History<'a>>,
        touched: &mut Vec<u32>,
    ) -> &[Filter] {
        let adjustments = self.filters.iter().take_while(|filter| filter.is_adjustment()).count();
        touched.clear();
        for history in histories {
            for filter in &self.filters[..adjustments] {
                filter.touched(history, touched);
            }
        }
        touched.sort_unstable();
        touched.dedup();
        &self.filters[adjustments..]
    }

    /// Applies the filters.
    pub(super) fn run(
        &mut self,
        candidates: &mut Candidates,
        history: History<'_>,
    ) -> Result<(), SampleError> {
        let Self { filters, sorted } = self;
        filters.iter().try_for_each(|filter| filter.apply(candidates, history, sorted))
    }
}
