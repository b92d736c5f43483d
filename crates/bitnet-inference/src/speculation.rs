//! Speculation: tokens that are guessed, and computed together with the last known one.
//!
//! A step of some tokens takes less time than as many steps of one, most of all where reading the
//! weights takes the time. So guesses about the next tokens of a sequence go along with it. Then each position is
//! sampled as it would be without them, from the logits after the tokens before it, with its own
//! random numbers: as long as the sampled token is the one that was guessed, the logits after it
//! are there too. The first that is not is the last that the step gives, and what was guessed after
//! it is gone. So a guess changes how many tokens a step gives, and never which.
//!
//! Guesses come from the sequence itself (`lookup.rs`) or from a smaller model (`draft.rs`). How many
//! there are follows from how good the last ones were.

pub(crate) mod draft;
mod lookup;

use crate::sampler::InvalidParameter;
use draft::DraftTable;

/// Most tokens that may be proposed in a step.
const MOST_TOKENS: usize = 16;

/// Who proposes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proposer {
    /// The sequence: what followed the last time that its last tokens came.
    PromptLookup,
    /// The draft model of the engine.
    DraftModel,
}

/// How the next tokens of a request are guessed. This changes its speed, and no token.
///
/// Repetitive texts, and answers that quote their prompt, gain by [`Speculation::prompt_lookup`]; others
/// by a [draft model](crate::InferenceEngineBuilder::draft_model) that is much smaller than the
/// model and writes alike. A request whose guesses fail is left alone for a while.
///
/// ```
/// use bitnet_inference::{GenerationParams, InferenceEngine, Speculation};
///
/// let mut engine = InferenceEngine::new();
/// engine.load_model("tiny")?;
/// let plain = GenerationParams { max_tokens: 60, ..GenerationParams::default() };
/// let params =
///     GenerationParams { speculation: Some(Speculation::prompt_lookup()), ..plain.clone() };
/// let text = engine.generate("The cat and the dog and the", params).wait()?.text;
/// assert_eq!(text, engine.generate("The cat and the dog and the", plain).wait()?.text);
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// Where the guesses come from.
    pub proposer: Proposer,
    /// Most tokens to guess per step, 1 to 16.
    pub tokens: usize,
}

impl Speculation {
    /// Guesses of up to 4 tokens by [`Proposer::PromptLookup`].
    pub fn prompt_lookup() -> Self {
        Speculation { proposer: Proposer::PromptLookup, tokens: 4 }
    }

    /// Guesses of up to 4 tokens by [`Proposer::DraftModel`].
    pub fn draft_model() -> Self {
        Speculation { proposer: Proposer::DraftModel, tokens: 4 }
    }

    /// Checks the number of tokens.
    ///
    /// # Errors
    /// If it is not one of 1 to 16.
    pub fn validate(&self) -> Result<(), InvalidParameter> {
        if (1..=MOST_TOKENS).contains(&self.tokens) {
            return Ok(());
        }
        Err(InvalidParameter {
            name: "the number of tokens guessed per step",
            value: self.tokens.to_string(),
            allowed: "1 to 16",
        })
    }
}

/// How many tokens are proposed next: twice as many once all were accepted, one more than were
/// accepted if not all were, and half as many if none was. Steps without any accepted one make
/// pauses, which get longer with each.
#[derive(Debug)]
struct Pace {
    most: usize,
    next: usize,
    /// Steps in a row of whose proposals none was accepted.
    misses: u32,
    /// Output tokens before which nothing is proposed.
    resume: usize,
}

/// Longest pause, in output tokens, and its logarithm.
const LONGEST_PAUSE: u32 = 4;

impl Pace {
    fn new(most: usize) -> Self {
        Pace { most, next: most.div_ceil(2), misses: 0, resume: 0 }
    }

    /// Tokens to propose after so many output tokens.
    fn tokens(&self, output_tokens: usize) -> usize {
        if output_tokens < self.resume { 0 } else { self.next }
    }

    /// Learns what became of the last proposals, which is known after so many output tokens.
    fn settle(&mut self, proposed: usize, accepted: usize, output_tokens: usize) {
        if accepted == 0 {
            self.misses = (self.misses + 1).min(LONGEST_PAUSE);
            self.next = (self.next / 2).max(1);
            self.resume = output_tokens + (1 << self.misses) - 1;
            return;
        }
        self.misses = 0;
        let next = if accepted == proposed { 2 * self.next } else { accepted + 1 };
        self.next = next.min(self.most);
    }
}

/// Where the guesses of one request come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// The sequence: the tokens from this place on are those that followed the last time.
    Lookup(usize),
    /// The draft model, which has these keys and values.
    Draft(DraftTable),
}

/// The guesses of one request.
#[derive(Debug)]
pub(crate) struct Speculating {
    pub(crate) source: Source,
    pace: Pace,
    /// Tokens of the sequence before which guesses end.
    most_tokens: usize,
    /// Proposed and accepted tokens since the last look at the pace.
    recent: (usize, usize),
    /// Proposed and accepted tokens in all.
    total: (usize, usize),
}

impl Speculating {
    /// Guesses for the first `most_tokens` of a sequence, with room for the draft model's blocks of
    /// `block_tokens` tokens.
    pub(crate) fn new(speculation: Speculation, most_tokens: usize, block_tokens: usize) -> Self {
        let table = || DraftTable::with_capacity(most_tokens.div_ceil(block_tokens));
        Speculating {
            source: match speculation.proposer {
                Proposer::PromptLookup => Source::Lookup(0),
                Proposer::DraftModel => Source::Draft(table()),
            },
            pace: Pace::new(speculation.tokens),
            most_tokens,
            recent: (0, 0),
            total: (0, 0),
        }
    }

    /// How many tokens to propose after `tokens`, of which so many are output, if there is `room`
    /// for so many.
    pub(crate) fn wish(&mut self, tokens: &[u32], output_tokens: usize, room: usize) -> usize {
        if let Source::Draft(table) = &mut self.source {
            table.roll_back(tokens.len());
        }
        let (proposed, accepted) = std::mem::take(&mut self.recent);
        if proposed > 0 {
            self.pace.settle(proposed, accepted, output_tokens);
        }
        let room = room.min(self.most_tokens.saturating_sub(tokens.len()));
        let wish = self.pace.tokens(output_tokens).min(room);
        if let Source::Lookup(place) = &mut self.source
            && wish > 0
        {
            let Some(found) = lookup::continuation(tokens) else { return 0 };
            *place = found;
        }
        wish
    }

    /// Counts tokens that go into the step.
    pub(crate) fn count_proposed(&mut self, tokens: usize) {
        self.recent.0 += tokens;
        self.total.0 += tokens;
    }

    /// Counts a token that was sampled as it was proposed.
    pub(crate) fn count_accepted(&mut self) {
        self.recent.1 += 1;
        self.total.1 += 1;
    }

    /// Proposed and accepted tokens until now.
    pub(crate) fn counts(&self) -> (usize, usize) {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_follows_what_was_accepted() {
        let mut pace = Pace::new(8);
        assert_eq!(pace.tokens(0), 4);
        pace.settle(4, 4, 5);
        assert_eq!(pace.tokens(5), 8);
        pace.settle(8, 8, 14);
        assert_eq!(pace.tokens(14), 8);
        pace.settle(8, 2, 17);
        assert_eq!(pace.tokens(17), 3);
        // Nothing is proposed for 1, 3, 7 and then 15 tokens.
        let mut position = 17;
        for (next, pause) in [(1, 1), (1, 3), (1, 7), (1, 15), (1, 15)] {
            position += 1;
            pace.settle(pace.next, 0, position);
            assert_eq!(pace.tokens(position + pause - 1), 0);
            position += pause;
            assert_eq!(pace.tokens(position), next);
        }
        pace.settle(1, 1, position + 2);
        assert_eq!(pace.tokens(position + 2), 2);
        pace.settle(2, 0, position + 3);
        assert_eq!((pace.tokens(position + 3), pace.tokens(position + 4)), (0, 1));
    }

    #[test]
    fn guesses_end_where_the_step_or_the_sequence_has_no_more_room() {
        let speculation = Speculation { tokens: 8, ..Speculation::prompt_lookup() };
        let mut speculating = Speculating::new(speculation, 100, 16);
        assert_eq!(speculating.wish(&[7, 1, 2, 3, 9, 1, 2, 3], 0, 100), 4);
        assert!(matches!(speculating.source, Source::Lookup(4)));
        assert_eq!(speculating.wish(&[5; 9], 0, 3), 3);
        assert_eq!(speculating.wish(&[5; 98], 0, 100), 2);
        assert_eq!(speculating.wish(&[5; 101], 0, 100), 0);
        assert_eq!(speculating.wish(&[1, 2, 3, 4], 0, 100), 0);
        // What became of the guesses is heard once.
        speculating.count_proposed(4);
        assert_eq!(speculating.wish(&[5; 9], 8, 100), 0);
        assert_eq!(speculating.wish(&[5; 9], 9, 100), 2);
    }
}
